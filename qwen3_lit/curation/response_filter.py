"""Which candidate responses are fit to be learned from (Qwen3 Technical Report, section 4.1: six reasons to drop one).

Every check is a pure function that returns the reason for dropping, or None. The report gives no thresholds; those of
``ResponseFilterConfig`` are our own.

- ``malformed``: no thinking, no answer, or chat-template tokens inside the text;
- ``repetition``: some n-gram comes again and again and covers much of the text;
- ``disagreement``: the thinking concludes with another answer than the one given;
- ``guessing``: hedging words, an answer that the thinking never reaches, or far less thinking than its siblings;
- ``language_mixing``: writing systems that the query does not use.

Wrong final answers need a verifier and are dropped by the driver (``wrong_answer``), similarity to held-out items is in
``decontaminate`` (``held_out_similarity``).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.final_answer import as_number, final_answer, last_number

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+(?:\.\d+)?|\w+|[^\w\s]")
_TEMPLATE_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>|</?think>")
_HEDGE = re.compile(
    r"\b(?:i(?:'ll| will)? (?:just )?guess|just (?:a )?guess\w*|random guess|(?:it is|it's|is) probably|"
    r"not (?:really |quite )?sure|no idea|perhaps it is|maybe)\b",
    re.IGNORECASE,
)
_JAPANESE = ("HIRAGANA", "KATAKANA")


@dataclass(frozen=True)
class ResponseFilterConfig:
    """Thresholds of the response filter; none of them is published, these are our own."""

    ngram: int = 20
    """Words and signs in the n-grams that repetition is counted in; worked steps repeat short ones by nature."""
    max_repeats: int = 4
    """An n-gram that occurs more often than this is suspicious."""
    max_repeated_share: float = 0.2
    """Share of the text that suspicious n-grams may cover."""
    max_hedges_per_100_words: float = 2.0
    """Hedging phrases in 100 words of thinking; a single one in a thinking of under 50 words is too many."""
    min_sibling_ratio: float = 0.35
    """Thinking shorter than this share of the median of its siblings (responses to the same query) is a guess."""
    min_thinking_words: int = 3
    """Least words of thinking besides the answer itself."""
    max_foreign_share: float = 0.02
    """Letters in writing systems that the query does not use."""
    max_latin_share: float = 0.3
    """Letters of Latin words (3 letters or more; variables do not count) when the query uses another script."""
    allowed_scripts: tuple[str, ...] = ("GREEK",)
    """Writing systems that are never foreign, as Unicode names them."""

    def __post_init__(self) -> None:
        for name in ("max_repeated_share", "min_sibling_ratio", "max_foreign_share", "max_latin_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"response filter: {name}={value}: expected a share between 0 and 1")
        if self.ngram < 2 or self.max_repeats < 1:
            raise UserError(
                f"response filter: ngram={self.ngram}, max_repeats={self.max_repeats}: expected 2 or more and 1 or more"
            )


def check_form(thinking: str, answer: str) -> str | None:
    """Both parts must be there, and neither may hold tokens of the chat template."""
    if not thinking.strip() or not answer.strip():
        return "malformed"
    return "malformed" if _TEMPLATE_TOKEN.search(thinking) or _TEMPLATE_TOKEN.search(answer) else None


def repeated_share(text: str, ngram: int, max_repeats: int) -> float:
    """Share of the words that lie in n-grams occurring more than ``max_repeats`` times."""
    words = _TOKEN.findall(text.lower())
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    counts = Counter(grams)
    covered = [False] * len(words)
    for start, gram in enumerate(grams):
        if counts[gram] > max_repeats:
            covered[start : start + ngram] = [True] * ngram
    return sum(covered) / len(words) if words else 0.0


def longest_line_run(text: str) -> int:
    """How often the most stubborn line is repeated without a break."""
    best, run, previous = 0, 0, None
    for line in (line.strip() for line in text.splitlines()):
        run = run + 1 if line and line == previous else 1
        previous, best = line, max(best, run if line else 0)
    return best


def check_repetition(thinking: str, answer: str, config: ResponseFilterConfig) -> str | None:
    """Substantial repetition in either part."""
    for text in (thinking, answer):
        if longest_line_run(text) > config.max_repeats:
            return "repetition"
        if repeated_share(text, config.ngram, config.max_repeats) > config.max_repeated_share:
            return "repetition"
    return None


def conclusion(thinking: str) -> str:
    """The answer that a thinking ends in: of its last line that is not empty."""
    lines = [line for line in thinking.splitlines() if line.strip()]
    return final_answer(lines[-1]) if lines else ""


def same_answer(first: str, second: str) -> bool | None:
    """Whether two answers agree; None when they cannot be compared (one is prose)."""
    left, right = final_answer(first), final_answer(second)
    if _squeezed(left) == _squeezed(right):
        return True
    if (left_number := as_number(left)) is not None and (right_number := as_number(right)) is not None:
        return left_number == right_number
    if as_number(right) is not None and (number := last_number(left)) is not None:
        return as_number(number) == as_number(right)
    short = max(len(left.split()), len(right.split())) <= 1 or (left[:1], right[:1]) == ("[", "[")
    return False if short else None


def check_agreement(thinking: str, answer: str) -> str | None:
    """The thinking's conclusion and the final answer must not contradict each other."""
    return "disagreement" if same_answer(conclusion(thinking), answer) is False else None


def check_guessing(
    thinking: str, answer: str, config: ResponseFilterConfig, sibling_median_words: float | None = None
) -> str | None:
    """Hedging, an answer out of the blue, or hardly any thinking."""
    words = _TOKEN.findall(thinking)
    hedges = len(_HEDGE.findall(thinking)) + len(_HEDGE.findall(answer))
    if hedges and hedges * 100 > config.max_hedges_per_100_words * max(len(words), 1):
        return "guessing"
    final = _squeezed(final_answer(answer))
    body = _squeezed(thinking)
    if final not in body and same_answer(conclusion(thinking), answer) is not True and len(final) <= 64:
        return "guessing"
    if len(words) - len(_TOKEN.findall(final_answer(answer))) < config.min_thinking_words:
        return "guessing"
    if sibling_median_words and len(words) < config.min_sibling_ratio * sibling_median_words:
        return "guessing"
    return None


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    name = unicodedata.name(character, "")
    script = name.split(" ")[0] if name else "UNKNOWN"
    return "CJK" if script in _JAPANESE else script


def script_shares(text: str) -> dict[str, float]:
    """Share of the letters in each writing system; Latin runs of one or two letters (variables) are left out.

    Signs that stand for letters count as those: the R of the real numbers, the n of an exponent, the mu of micro.
    """
    counts: Counter[str] = Counter()
    for run in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", text)):
        scripts = [_script(character) for character in run if character.isalpha()]
        if len(run) < 3 and set(scripts) == {"LATIN"}:
            continue
        counts.update(scripts)
    total = sum(counts.values())
    return {script: count / total for script, count in counts.items()}


def check_language(query: str, thinking: str, answer: str, config: ResponseFilterConfig) -> str | None:
    """No writing system beyond the query's own and the allowed ones."""
    of_query = script_shares(query)
    allowed = {script for script, share in of_query.items() if share >= 0.05} | set(config.allowed_scripts)
    if not of_query:
        allowed.add("LATIN")
    shares = script_shares(f"{thinking}\n{answer}")
    if "LATIN" not in allowed and shares.pop("LATIN", 0.0) > config.max_latin_share:
        return "language_mixing"
    foreign = sum(share for script, share in shares.items() if script not in allowed)
    return "language_mixing" if foreign > config.max_foreign_share else None


def check_response(
    query: str,
    thinking: str,
    answer: str,
    config: ResponseFilterConfig,
    sibling_median_words: float | None = None,
) -> str | None:
    """The first reason to drop a response that has been found right, None when it is sound."""
    return (
        check_form(thinking, answer)
        or check_repetition(thinking, answer, config)
        or check_agreement(thinking, answer)
        or check_guessing(thinking, answer, config, sibling_median_words)
        or check_language(query, thinking, answer, config)
    )


def thinking_words(thinking: str) -> int:
    """Length of a thinking in the words that the filters count."""
    return len(_TOKEN.findall(thinking))


def median(values: Sequence[float]) -> float | None:
    """The middle value (the lower one of two), None of nothing."""
    return sorted(values)[(len(values) - 1) // 2] if values else None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s$]+", "", text).lower().rstrip(".")

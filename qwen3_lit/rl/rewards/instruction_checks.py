"""Verifiable instructions: what is asked for in words, and a check of it in pure Python, kept side by side.

An instruction in a problem's `metadata["checks"]` is a dict: `name` of the check plus its parameters, e.g.
``{"name": "max_words", "count": 20}``. The kinds follow IFEval (arXiv 2311.07911); none needs a model or a corpus.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.final_answer import last_boxed

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\"')\]]*(?:\s|$))")


@dataclass(frozen=True)
class InstructionCheck:
    """One kind of instruction."""

    name: str
    """Its name in a problem's metadata."""

    wording: str
    """The instruction in English, with the parameters in braces."""

    parameters: tuple[str, ...]
    """Names of the parameters, all required."""

    holds: Callable[..., bool]
    """`holds(text, **parameters)`."""


CHECKS: dict[str, InstructionCheck] = {}


def _check(name: str, wording: str, *parameters: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def register(holds: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = InstructionCheck(name, wording, parameters, holds)
        return holds

    return register


def check_holds(text: str, spec: Mapping[str, Any]) -> bool:
    """Whether `text` obeys one instruction.

    Raises:
        UserError: If the check's name is unknown or its parameters do not fit.
    """
    check = _lookup(spec)
    return check.holds(text.strip(), **{name: spec[name] for name in check.parameters})


def describe_check(spec: Mapping[str, Any]) -> str:
    """The instruction as an English sentence, for building prompts.

    Raises:
        UserError: As :func:`check_holds`.
    """
    check = _lookup(spec)
    values = {name: spec[name] for name in check.parameters}
    return check.wording.format(
        **{name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    )


def _lookup(spec: Mapping[str, Any]) -> InstructionCheck:
    name = str(spec.get("name"))
    if name not in CHECKS:
        raise UserError(f"metadata.checks: unknown check {name!r}, expected one of {', '.join(sorted(CHECKS))}")
    check = CHECKS[name]
    given = set(spec) - {"name"}
    if given != set(check.parameters):
        wanted = list(check.parameters)
        raise UserError(f"metadata.checks: {name} takes the parameters {wanted}, got {sorted(given)}")
    return check


def count_words(text: str) -> int:
    """Number of words; hyphens and apostrophes join."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Number of sentences: runs of text closed by `.`, `!` or `?` before white space, and an unclosed rest."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


@_check("exact_words", "Use exactly {count} words.", "count")
def _exact_words(text: str, count: int) -> bool:
    return count_words(text) == count


@_check("min_words", "Use at least {count} words.", "count")
def _min_words(text: str, count: int) -> bool:
    return count_words(text) >= count


@_check("max_words", "Use at most {count} words.", "count")
def _max_words(text: str, count: int) -> bool:
    return 0 < count_words(text) <= count


@_check("exact_sentences", "Write exactly {count} sentences.", "count")
def _exact_sentences(text: str, count: int) -> bool:
    return count_sentences(text) == count


@_check("include_word", 'Include the word "{word}" at least {count} times.', "word", "count")
def _include_word(text: str, word: str, count: int) -> bool:
    return _occurrences(text, word) >= count


@_check("exact_word_count", 'Use the word "{word}" exactly {count} times.', "word", "count")
def _exact_word_count(text: str, word: str, count: int) -> bool:
    return _occurrences(text, word) == count


@_check("forbid_word", 'Do not use the word "{word}".', "word")
def _forbid_word(text: str, word: str) -> bool:
    return bool(text) and _occurrences(text, word) == 0


@_check("all_upper", "Write in capital letters only.")
def _all_upper(text: str) -> bool:
    return text.isupper()


@_check("all_lower", "Write in lower-case letters only.")
def _all_lower(text: str) -> bool:
    return text.islower()


@_check("starts_with", 'Start with "{text}".', "text")
def _starts_with(answer: str, text: str) -> bool:
    return answer.startswith(text)


@_check("ends_with", 'End with "{text}".', "text")
def _ends_with(answer: str, text: str) -> bool:
    return answer.endswith(text)


@_check("json_object", "Answer with one JSON object that has exactly the keys {keys}.", "keys")
def _json_object(text: str, keys: Sequence[str]) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


@_check("separated_list", 'Give a list of exactly {count} items separated by "{separator}".', "count", "separator")
def _separated_list(text: str, count: int, separator: str) -> bool:
    items = text.split(separator)
    return len(items) == count and all(item.strip() for item in items)


@_check("bullet_list", 'Give exactly {count} bullet points, each on a line that starts with "- ".', "count")
def _bullet_list(text: str, count: int) -> bool:
    return sum(line.startswith("- ") and bool(line[2:].strip()) for line in text.splitlines()) == count


@_check("numbered_list", 'Number the points from 1 to {count}, each on its own line such as "1. ...".', "count")
def _numbered_list(text: str, count: int) -> bool:
    numbers = [int(number) for number in re.findall(r"^(\d{1,6})\. \S", text, re.MULTILINE)]
    return numbers == list(range(1, count + 1))


@_check("boxed", "Put the final answer within \\boxed{{}}.")
def _boxed(text: str) -> bool:
    return bool(last_boxed(text))


@_check("no_commas", "Do not use any commas.")
def _no_commas(text: str) -> bool:
    return bool(text) and "," not in text


@_check("quoted", "Wrap the whole answer in double quotation marks.")
def _quoted(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and bool(text[1:-1].strip())


@_check("title", "Give a title in double angular brackets, such as <<my title>>.")
def _title(text: str) -> bool:
    return bool(re.search(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", text))


@_check("paragraphs", "Write exactly {count} paragraphs separated by one empty line.", "count")
def _paragraphs(text: str, count: int) -> bool:
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text)) == count


@_check("one_of", "Answer with one of these and nothing else: {options}.", "options")
def _one_of(text: str, options: Sequence[str]) -> bool:
    return text in options


@_check("repeat_word", 'Answer with the word "{word}" repeated {count} times and nothing else.', "word", "count")
def _repeat_word(text: str, word: str, count: int) -> bool:
    return text.split() == [word] * count


@_check("postscript", 'End with a postscript that starts with "P.S."')
def _postscript(text: str) -> bool:
    return bool(re.search(r"(?:^|\n)\s*P\.S\.[ \t]*\S", text))


@_check("no_digits", "Do not use any digits.")
def _no_digits(text: str) -> bool:
    return bool(text) and not any(character.isdigit() for character in text)

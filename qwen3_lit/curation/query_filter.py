"""Which queries are fit for long chain-of-thought training (Qwen3 Technical Report, section 4.1).

Dropped are queries that are hard to verify (several questions in one, requests to generate text, answers that are empty
or that their own verifier refuses), queries that a judge model answers correctly without thinking, queries too similar
to held-out ones, and, where wanted, the surplus of over-represented domains. Every check is a pure function that
returns the reason for dropping, or None; the engine is behind ``Judge``.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen3_lit.curation.decontaminate import HeldOutIndex, check_similarity
from qwen3_lit.curation.synthesis_problems import query_text
from qwen3_lit.curation.synthesis_split import text_key
from qwen3_lit.curation.verification import AnswerVerifier, response_input
from qwen3_lit.data.chat_template import render
from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import RolloutEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.rl.rollout import collect, reward_input

_log = logging.getLogger(__name__)

Record = dict[str, Any]

_PART_MARK = re.compile(r"(?:^|\s)\(?(?:[a-e]|i{1,3}|[1-5])\)\s", re.IGNORECASE)
_NUMBERED = re.compile(r"^\s*(?:part\s+)?\(?(?:[a-e]|[1-9])[.):]\s+(\S+)", re.IGNORECASE | re.MULTILINE)
_ASKING = (
    "what",
    "which",
    "who",
    "when",
    "where",
    "why",
    "how",
    "find",
    "compute",
    "calculate",
    "determine",
    "show",
) + (
    "prove",
    "solve",
    "evaluate",
    "derive",
    "give",
)
_OPEN_ENDED = re.compile(
    r"^\W*(?:please\s+)?(?:write|compose|draft|create|generate|tell|describe|discuss|summari[sz]e|translate|rewrite|"
    r"brainstorm|imagine|invent|suggest|explain)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class QueryFilterConfig:
    """Thresholds of the query filter; none of them is published, these are our own."""

    max_questions: int = 1
    """Questions or numbered parts that a query may have."""
    max_answer_words: int = 40
    """A longer reference answer is taken for free text."""
    max_domain_ratio: float | None = None
    """Most queries of a domain, as a multiple of the median domain; null keeps all."""

    def __post_init__(self) -> None:
        if self.max_questions < 1 or self.max_answer_words < 1:
            raise UserError(
                f"query filter: max_questions={self.max_questions}, max_answer_words={self.max_answer_words}: "
                "each must be 1 or more"
            )
        if self.max_domain_ratio is not None and self.max_domain_ratio <= 0:
            raise UserError(f"query filter: max_domain_ratio={self.max_domain_ratio}: expected above 0 or null")


def count_questions(text: str) -> int:
    """Questions in a query: sentences with a question mark, or numbered parts that ask for something."""
    marks = len(re.findall(r"\?(?=[\s\"')\]]|$)", text))
    parts = sum(word.lower().strip(",.:") in _ASKING for word in _NUMBERED.findall(text))
    inline = len(_PART_MARK.findall(text)) if len(_PART_MARK.findall(text)) >= 2 else 0
    return max(marks, parts, inline)


def check_query(record: Mapping[str, Any], config: QueryFilterConfig) -> str | None:
    """Reasons that the record alone tells: ``empty_query``, ``empty_answer``, ``multi_part``, ``open_ended``."""
    query = query_text(dict(record)).strip()
    answer = str(record.get("answer") or "").strip()
    if not query:
        return "empty_query"
    if not answer:
        return "empty_answer"
    if len(answer.split()) > config.max_answer_words:
        return "open_ended"
    if _OPEN_ENDED.search(query) and len(answer.split()) > 5:
        return "open_ended"
    return "multi_part" if count_questions(query) > config.max_questions else None


def domain_of(record: Mapping[str, Any]) -> str:
    """Domain label: the record's own, its metadata's, or its task."""
    metadata = record.get("metadata") or {}
    return str(record.get("domain") or metadata.get("domain") or record.get("task") or "unknown")


def surplus(keys: Sequence[int], domains: Sequence[str], max_ratio: float) -> set[int]:
    """Keys to drop so that no domain has more than ``max_ratio`` times the median domain; hashes decide which."""
    members: dict[str, list[int]] = defaultdict(list)
    for key, domain in zip(keys, domains, strict=True):
        members[domain].append(key)
    if not members:
        return set()
    sizes = sorted(len(group) for group in members.values())
    limit = max(1, int(max_ratio * sizes[(len(sizes) - 1) // 2]))
    return {key for group in members.values() for key in sorted(group)[limit:]}


class Judge(Protocol):
    """A model that filters queries."""

    def solves(self, records: Sequence[Record]) -> list[bool]:
        """Whether each query is answered correctly without thinking."""
        ...

    def label_domains(self, records: Sequence[Record], domains: Sequence[str]) -> list[str | None]:
        """The domain of each query among ``domains``, None where the answer names none of them."""
        ...


class EngineJudge:
    """A judge that runs on a rollout engine, greedily and without thinking.

    Args:
        engine: Answers the queries.
        tokenizer: Its tokenizer.
        verifier: Compares answers with references.
        max_new_tokens: Room for an answer; a longer one counts as wrong.
        batch_size: Queries a call of the engine.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: TextTokenizer,
        verifier: AnswerVerifier,
        max_new_tokens: int = 256,
        batch_size: int = 256,
    ) -> None:
        self._engine, self._tokenizer, self._verifier = engine, tokenizer, verifier
        self._params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self._batch_size = batch_size

    def solves(self, records: Sequence[Record]) -> list[bool]:
        solved: list[bool] = []
        for start in range(0, len(records), self._batch_size):
            batch = records[start : start + self._batch_size]
            rollouts = collect(self._engine, self._tokenizer, batch, self._params, mode="no_think")
            right = self._verifier.right([reward_input(rollout) for rollout in rollouts])
            solved += [ok and not rollout.truncated for ok, rollout in zip(right, rollouts, strict=True)]
        return solved

    def label_domains(self, records: Sequence[Record], domains: Sequence[str]) -> list[str | None]:
        labels: list[str | None] = []
        for start in range(0, len(records), self._batch_size):
            asked = [
                {"messages": [{"role": "user", "content": domain_question(query_text(record), domains)}]}
                for record in records[start : start + self._batch_size]
            ]
            rollouts = collect(self._engine, self._tokenizer, asked, self._params, mode="no_think")
            labels += [named_domain(reward_input(rollout).answer, domains) for rollout in rollouts]
        return labels


def domain_question(query: str, domains: Sequence[str]) -> str:
    """The question that the judge is asked to label a query."""
    return f"{query}\n\nWhich domain does this problem belong to: {', '.join(domains)}? Answer with the domain only."


def named_domain(answer: str, domains: Sequence[str]) -> str | None:
    """The domain that an answer names first."""
    found = [(answer.lower().find(domain.lower()), domain) for domain in domains if domain.lower() in answer.lower()]
    return min(found)[1] if found else None


@dataclass
class QueryDecision:
    """What became of the queries."""

    reasons: dict[int, str | None]
    """Query hash -> reason for dropping, None for the kept ones."""
    domains: dict[int, str]
    """Query hash -> domain."""

    @property
    def dropped(self) -> dict[str, int]:
        return dict(Counter(reason for reason in self.reasons.values() if reason))


def filter_queries(
    records: Mapping[int, Record],
    config: QueryFilterConfig,
    *,
    verifier: AnswerVerifier,
    held_out: HeldOutIndex | None = None,
    judge: Judge | None = None,
    domain_labels: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> QueryDecision:
    """Decide about problem records keyed by their ``query_key``.

    ``judge`` adds ``answered_without_thinking`` and, with ``domain_labels``, gives the domains. Cheap checks come
    first, so the judge sees only what passed them.
    """
    reasons: dict[int, str | None] = {}
    for key, record in records.items():
        reasons[key] = check_similarity(query_text(record), held_out) or check_query(record, config)
    alive = [key for key, reason in reasons.items() if reason is None]
    # A reference answer alone calls no tool, so the rules of tool problems refuse all of them.
    plain = [key for key in alive if not needs_tools(records[key])]
    gold = [response_input(records[key], "", _as_answer(records[key])) for key in plain]
    for key, ok in zip(plain, verifier.right(gold), strict=True):
        if not ok:
            reasons[key] = "unparsable_answer"
    alive = [key for key in alive if reasons[key] is None]
    if judge is not None:
        step = 256
        for start in range(0, len(alive), step):
            keys = alive[start : start + step]
            for key, solved in zip(keys, judge.solves([records[key] for key in keys]), strict=True):
                if solved:
                    reasons[key] = "answered_without_thinking"
            if progress is not None:
                progress(min(start + step, len(alive)), len(alive))
        alive = [key for key in alive if reasons[key] is None]
    domains = {key: domain_of(record) for key, record in records.items()}
    if judge is not None and domain_labels:
        for key, label in zip(alive, judge.label_domains([records[key] for key in alive], domain_labels), strict=True):
            domains[key] = label or "unknown"
    if config.max_domain_ratio is not None:
        for key in surplus(alive, [domains[key] for key in alive], config.max_domain_ratio):
            reasons[key] = "domain_balance"
    return QueryDecision(reasons, domains)


def _as_answer(record: Record) -> str:
    checks = (record.get("metadata") or {}).get("checks") or ()
    answer = str(record["answer"])
    return f"\\boxed{{{answer}}}" if any(check.get("name") == "boxed" for check in checks) else answer


def needs_tools(record: Mapping[str, Any]) -> bool:
    """Whether an answer has to call a tool."""
    return bool(record.get("tools") or (record.get("metadata") or {}).get("tool"))


def query_key(record: Record) -> int:
    """Hash that identifies a query: its user turns, with the system turn, earlier answers and tools where it has any.

    The same question under another system prompt may have another answer.
    """
    messages, tools = record.get("messages") or (), record.get("tools")
    if tools or any(message["role"] != "user" for message in messages):
        return text_key(render(messages, tools=tools))
    return text_key(query_text(record))

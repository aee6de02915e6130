"""From candidate responses to a cold-start set: query filter, response filter, choice of a subset, report.

The candidates are streamed three times (lengths and queries, verdicts, output); in memory stay the queries, and a few
numbers for each candidate. Nothing depends on chance: what is chosen among equals is chosen by hash.
"""

import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3_lit.curation.decontaminate import HeldOutIndex, SimilarityConfig, check_similarity
from qwen3_lit.curation.jsonl_output import write_json, write_jsonl
from qwen3_lit.curation.query_filter import Judge, QueryDecision, QueryFilterConfig, filter_queries, query_key
from qwen3_lit.curation.response_filter import (
    ResponseFilterConfig,
    check_form,
    check_repetition,
    check_response,
    median,
    thinking_words,
)
from qwen3_lit.curation.synthesis_problems import query_text
from qwen3_lit.curation.synthesis_split import stream_seed
from qwen3_lit.curation.verification import AnswerVerifier, response_input
from qwen3_lit.data.chat_template import answer_turns, render_segments, split_thinking
from qwen3_lit.data.schema import read_records
from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.reward import RewardInput

_log = logging.getLogger(__name__)

Record = dict[str, Any]
Progress = Callable[[str, int], None]
"""``progress(what, candidates done)``."""
_BATCH = 512


@dataclass(frozen=True)
class CurationConfig:
    """What to keep."""

    max_samples: int | None = None
    """Most samples in the output, spread evenly over the domains; null keeps all."""
    per_query: int | None = 1
    """Most samples a query; null keeps all."""
    query: QueryFilterConfig = field(default_factory=QueryFilterConfig)
    """Thresholds of the query filter."""
    response: ResponseFilterConfig = field(default_factory=ResponseFilterConfig)
    """Thresholds of the response filter."""
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """When a query is too similar to a held-out one."""
    domains: tuple[str, ...] = ()
    """Domain labels for the judge to choose from; empty uses the records' own domain or task."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read."""

    def __post_init__(self) -> None:
        for name in ("max_samples", "per_query"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"curation: {name}={value}: expected 1 or more, or null for no limit")


@dataclass(frozen=True)
class Candidate:
    """A candidate conversation: what was asked, and the answer."""

    problem: Record
    """The record with the messages up to the last query."""
    thinking: str
    answer: str
    """Both of the last turn."""
    turns: list[Record]
    """All turns after the query as the model wrote and saw them, tool calls and results included."""

    def response_to(self, problem: Record) -> RewardInput:
        """What verifiers see of it as an answer to ``problem``."""
        return response_input(problem, self.thinking, self.answer, self.turns if len(self.turns) > 1 else ())


def split_candidate(record: Record) -> Candidate:
    """The parts of a candidate conversation."""
    messages = record["messages"]
    asked, last = len(answer_turns(messages)[0]) - 1, messages[-1]
    thinking, answer = last.get("reasoning_content"), str(last.get("content") or "")
    if thinking is None:
        thinking, answer = split_thinking(answer)
    turns = [
        {"role": "assistant" if message["role"] == "assistant" else "tool", "content": segment.body}
        for message, segment in zip(messages, render_segments(messages), strict=True)
    ]
    problem = {key: value for key, value in record.items() if key not in ("messages", "provenance")}
    return Candidate(problem | {"messages": messages[:asked]}, thinking or "", answer, turns[asked:])


def curate(
    candidates: str,
    out: str,
    *,
    config: CurationConfig,
    verifier: AnswerVerifier,
    problems: str | None = None,
    held_out: Sequence[str] = (),
    judge: Judge | None = None,
    report: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Filter a file of candidate conversations into a file of conversations to train on.

    Args:
        candidates: Conversations that end in an assistant turn; ``answer``, ``task`` and ``metadata`` either in the
            record or in ``problems``.
        problems: Problem records of the queries.
        held_out: Files whose queries must not be trained on.
        judge: Drops queries that a model answers without thinking.
        report: Where the returned report is written as JSON.

    Returns:
        ``{"seen", "kept", "kept_fraction", "dropped": {reason: n}, "queries": {...}, "domains": {...}, ...}``; each
        candidate is counted once, under the first reason that applies.

    Raises:
        UserError: bad records, candidates without a reference answer, or no candidate was kept; ``report`` is written
            all the same.
    """
    index = HeldOutIndex(
        (query_text(record) for path in held_out for record in read_records(path, "problem", config.on_bad_record)),
        config.similarity,
    )
    references, lengths = _read_queries(candidates, problems, config, progress)
    decision = filter_queries(
        references,
        config.query,
        verifier=verifier,
        held_out=index if held_out else None,
        judge=judge,
        domain_labels=config.domains,
        progress=None if progress is None else lambda done, _: progress("judging queries", done),
    )
    medians = {key: median(values) for key, values in lengths.items()}
    verdicts = list(_verdicts(candidates, references, decision, medians, config, verifier, index, progress))
    _choose(verdicts, decision, config)

    def kept() -> Iterator[Record]:
        for (_, reason), record in zip(verdicts, _candidates(candidates, config), strict=True):
            if reason is None:
                yield record

    result = _report(verdicts, decision, verifier)
    if report is not None:
        write_json(report, result)
    if not result["kept"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items())
        raise UserError(
            f"{out}: not written, none of {len(verdicts)} candidates in {candidates} was kept: "
            f"{reasons or 'it is empty'}; sample more or better candidates"
        )
    write_jsonl(out, kept())
    _log.info("%s: kept %d of %d candidates", out, result["kept"], len(verdicts))
    return result


def _candidates(path: str, config: CurationConfig) -> Iterator[Record]:
    return read_records(path, "conversation", config.on_bad_record)


def _read_queries(
    candidates: str, problems: str | None, config: CurationConfig, progress: Progress | None
) -> tuple[dict[int, Record], "dict[int, array[int]]"]:
    """Problem records by query, and the thinking lengths of each query's candidates, loops left out."""
    references: dict[int, Record] = {}
    if problems is not None:
        for record in read_records(problems, "problem", config.on_bad_record):
            references.setdefault(query_key(record), record)
    lengths: dict[int, array[int]] = defaultdict(lambda: array("l"))
    for number, record in enumerate(_candidates(candidates, config), start=1):
        candidate = split_candidate(record)
        thinking, answer = candidate.thinking, candidate.answer
        key = query_key(candidate.problem)
        if key not in references:
            if not isinstance(candidate.problem.get("answer"), str):
                raise UserError(
                    f"{candidates}: record {number}: field 'answer': missing, and its query is in no problem file; "
                    "add the column or pass --problems"
                )
            references[key] = candidate.problem
        if check_form(thinking, answer) is None and check_repetition(thinking, answer, config.response) is None:
            lengths[key].append(thinking_words(thinking))
        if progress is not None and number % _BATCH == 0:
            progress("reading", number)
    return references, lengths


def _verdicts(
    candidates: str,
    references: dict[int, Record],
    decision: QueryDecision,
    medians: dict[int, float | None],
    config: CurationConfig,
    verifier: AnswerVerifier,
    index: HeldOutIndex,
    progress: Progress | None,
) -> Iterator[tuple[tuple[int, int], str | None]]:
    """((query hash, candidate hash), reason) for each candidate in order."""
    batch: list[tuple[int, Candidate]] = []
    seen: set[int] = set()
    done = 0

    def flush() -> Iterator[tuple[tuple[int, int], str | None]]:
        live = [row for row in batch if decision.reasons[row[0]] is None]
        items = [candidate.response_to(references[key]) for key, candidate in live]
        right = iter(verifier.right(items))
        for key, candidate in batch:
            thinking, answer = candidate.thinking, candidate.answer
            identity = stream_seed(key, thinking, answer)
            reason = decision.reasons[key]
            if reason is None:
                is_right = next(right)
                query = query_text(candidate.problem)
                reason = check_form(thinking, answer) or (None if is_right else "wrong_answer")
                reason = reason or check_response(query, thinking, answer, config.response, medians.get(key))
                reason = reason or check_similarity(query, index if len(index) else None)
                if reason is None and identity in seen:
                    reason = "duplicate"
                if reason is None:
                    seen.add(identity)
            yield (key, identity), reason

    for record in _candidates(candidates, config):
        candidate = split_candidate(record)
        batch.append((query_key(candidate.problem), candidate))
        if len(batch) == _BATCH:
            yield from flush()
            done += len(batch)
            batch.clear()
            if progress is not None:
                progress("filtering", done)
    yield from flush()


def _choose(
    verdicts: list[tuple[tuple[int, int], str | None]], decision: QueryDecision, config: CurationConfig
) -> None:
    """Apply ``per_query`` and ``max_samples`` in place; hashes decide, and the domains take turns."""
    order = sorted(
        (position for position, (_, reason) in enumerate(verdicts) if reason is None),
        key=lambda position: (stream_seed(*verdicts[position][0]), position),
    )
    if config.per_query is not None:
        taken: Counter[int] = Counter()
        for position in order:
            identity, _ = verdicts[position]
            if taken[identity[0]] >= config.per_query:
                verdicts[position] = (identity, "per_query")
            taken[identity[0]] += 1
        order = [position for position in order if verdicts[position][1] is None]
    if config.max_samples is not None:
        turn: Counter[str] = Counter()
        ranked = []
        for rank, position in enumerate(order):
            domain = decision.domains[verdicts[position][0][0]]
            ranked.append((turn[domain], rank, position))
            turn[domain] += 1
        for _, _, position in sorted(ranked)[config.max_samples :]:
            verdicts[position] = (verdicts[position][0], "max_samples")


def _report(
    verdicts: list[tuple[tuple[int, int], str | None]],
    decision: QueryDecision,
    verifier: AnswerVerifier,
) -> dict[str, Any]:
    dropped = Counter(reason for _, reason in verdicts if reason)
    kept = len(verdicts) - dropped.total()
    kept_keys = {key for (key, _), reason in verdicts if reason is None}
    tried = {key for (key, _), _ in verdicts}
    right = {key for (key, _), reason in verdicts if reason not in ("wrong_answer", "malformed")}
    unsolved = [key for key in tried - right if decision.reasons[key] is None]
    return {
        "seen": len(verdicts),
        "kept": kept,
        "kept_fraction": kept / len(verdicts) if verdicts else 0.0,
        "dropped": dict(sorted(dropped.items())),
        "queries": {
            "seen": len(decision.reasons),
            "kept": len(kept_keys),
            "dropped": dict(sorted(decision.dropped.items())),
            "never_answered_right": len(unsolved),
        },
        "domains": dict(sorted(Counter(decision.domains[key] for (key, _), r in verdicts if r is None).items())),
        "verifier_failures": verifier.failures,
    }

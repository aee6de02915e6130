"""Responses of a checkpoint to problems, verified: rejection sampling and teacher outputs in both modes.

The problems are answered chunk by chunk. A chunk's samples depend on the seed and the chunk's number only, and a
finished chunk is a file, so a run that was killed at any moment and is started again gives the same output as one that
was never killed.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_lit.curation.jsonl_output import write_json, write_jsonl
from qwen3_lit.curation.synthesis_problems import query_text
from qwen3_lit.curation.synthesis_split import stream_seed, text_key
from qwen3_lit.curation.verification import AnswerVerifier, is_right
from qwen3_lit.data.chat_template import requested_mode, split_thinking
from qwen3_lit.data.fusion_data import has_reasoning
from qwen3_lit.data.schema import iter_rows, validate_record
from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import RolloutEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.rl.environment import Environment
from qwen3_lit.rl.rewards.mode_follow import follows_mode
from qwen3_lit.rl.rewards.reward import Mode
from qwen3_lit.rl.rollout import Rollout, collect, reward_input
from qwen3_lit.rl.tool_calls import parse_tool_calls

_log = logging.getLogger(__name__)

Record = dict[str, Any]
Keep = Literal["correct", "all", "best"]
Modes = Literal["think", "no_think", "both"]
Progress = Callable[[int, int, int], None]
"""``progress(chunks done, chunks, samples kept)``."""


@dataclass(frozen=True)
class SampleConfig:
    """How responses are drawn and which are kept."""

    n: int = 4
    """Responses a problem and mode."""
    mode: Modes = "think"
    """Mode to answer in; problems that carry a flag in their text keep it and are answered once."""
    keep: Keep = "correct"
    """``correct``: every right response; ``best``: the best of each problem and mode; ``all``: all finished ones."""
    max_new_tokens: int = 1024
    """Longest response; one that is cut is dropped and counted."""
    temperature: float = 0.6
    """Sampling temperature (0.6 is what the Qwen3 report evaluates thinking with, section 4.6)."""
    top_p: float = 1.0
    """Nucleus; 1 keeps the whole distribution."""
    top_k: int = 0
    """Most likely tokens to draw from; 0 keeps all."""
    thinking_budget: int | None = None
    """Most thinking tokens before the stop sentence is spliced in; null means no limit."""
    chunk_problems: int = 64
    """Problems answered together, and lost together when the run is killed."""
    seed: int = 0
    """Seed of all samples."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.chunk_problems < 1:
            raise UserError(f"sampling: n={self.n}, chunk_problems={self.chunk_problems}: each must be 1 or more")
        if self.mode not in ("think", "no_think", "both"):
            raise UserError(f"sampling: mode={self.mode!r}: expected think, no_think or both")
        if self.keep not in ("correct", "all", "best"):
            raise UserError(f"sampling: keep={self.keep!r}: expected correct, all or best")

    def params(self) -> SamplingParams:
        """What the engine is asked for."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            n=self.n,
            thinking_budget=self.thinking_budget,
        )


def read_queries(
    path: str, on_bad_record: Literal["raise", "skip"] = "raise", limit: int | None = None
) -> list[Record]:
    """The problems of a file, each query once: problem records, or conversations whose answers are cut off.

    A conversation (a cold-start set, candidates) must carry ``answer`` and ``task`` like a problem.

    Raises:
        UserError: a bad record (with "raise"), or no query at all.
    """
    queries: dict[int, Record] = {}
    bad, first_bad = 0, ""
    for where, row in iter_rows(path):
        try:
            if isinstance(row, UserError):
                raise row
            record = validate_record(_without_answer(row), "problem", where)
        except UserError as error:
            if on_bad_record == "raise":
                raise
            bad, first_bad = bad + 1, first_bad or str(error)
            continue
        queries.setdefault(stream_seed(json.dumps([record["messages"], record.get("tools")])), record)
        if limit is not None and len(queries) == limit:
            break
    if bad:
        _log.warning("%s: skipped %d records; the first: %s", path, bad, first_bad)
    if not queries:
        raise UserError(f"{path}: no problem in it; expected problem records or conversations with answer and task")
    return list(queries.values())


def _without_answer(row: Any) -> Any:
    """A conversation cut behind its last user turn; anything else as it is."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        return row
    roles = [message.get("role") if isinstance(message, dict) else None for message in row["messages"]]
    if roles[-1] != "assistant" or "user" not in roles:
        return row
    last_user = len(roles) - 1 - roles[::-1].index("user")
    kept = {key: value for key, value in row.items() if key not in ("mode", "score", "provenance", "problem_id")}
    return kept | {"messages": row["messages"][: last_user + 1]}


def conversation_record(rollout: Rollout, score: float | None) -> Record:
    """A rollout as a conversation record; thinking goes to ``reasoning_content``, tool calls to ``tool_calls``."""
    problem = rollout.problem
    record: Record = {
        "messages": [*problem["messages"], *(_stored_turn(turn) for turn in rollout.turns)],
        "mode": rollout.mode,
        "task": problem.get("task"),
        "answer": problem.get("answer"),
        "score": score,
        "problem_id": f"{text_key(query_text(problem)):016x}",
    }
    for column in ("metadata", "tools", "split"):
        if problem.get(column) is not None:
            record[column] = problem[column]
    return record


def _stored_turn(turn: Record) -> Record:
    if turn["role"] != "assistant":
        return turn
    thinking, answer = split_thinking(str(turn["content"]))
    stored: Record = {"role": "assistant", "content": answer}
    calls = parse_tool_calls(str(turn["content"]))
    if calls and not any(call.error for call in calls):
        stored["content"] = answer.partition("<tool_call>")[0].rstrip("\n")
        stored["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    if thinking:
        stored["reasoning_content"] = thinking
    return stored


def drop_reason(rollout: Rollout) -> str | None:
    """Why a response cannot be learned from whatever its score: cut, without a clean answer, or in the wrong mode."""
    item = reward_input(rollout)
    if rollout.truncated:
        return "truncated"
    if not item.answer.strip():
        return "no_answer"
    if "<think>" in item.answer:
        return "think_tag_in_answer"
    # Stricter than the reward: what is kept is trained turn by turn, and an empty block is not how to think.
    answers = [turn for turn in rollout.turns if turn["role"] == "assistant"]
    if rollout.mode == "think" and not all(map(has_reasoning, answers)):
        return "wrong_mode"
    return None if follows_mode(rollout.mode, rollout.turns) else "wrong_mode"


def select(
    rollouts: Sequence[Rollout], scores: Sequence[float | None], keep: Keep
) -> tuple[list[Record], Counter[str]]:
    """The records to keep of one problem and mode, and what was dropped for which reason."""
    dropped: Counter[str] = Counter()
    alive: list[tuple[Rollout, float | None]] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        reason = drop_reason(rollout)
        if reason is None and keep == "correct" and not is_right(score):
            reason = "unverifiable" if score is None else "wrong_answer"
        if reason is None:
            alive.append((rollout, score))
        else:
            dropped[reason] += 1
    if keep == "best" and len(alive) > 1:
        # The shorter of two equally good responses.
        alive.sort(key=lambda pair: (-(pair[1] if pair[1] is not None else -1.0), len(pair[0].completion_ids)))
        dropped["not_best"] += len(alive) - 1
        alive = alive[:1]
    return [conversation_record(rollout, score) for rollout, score in alive], dropped


def sample_responses(
    engine: RolloutEngine,
    tokenizer: TextTokenizer,
    problems: Sequence[Record],
    out: str,
    *,
    config: SampleConfig,
    verifier: AnswerVerifier,
    source: str,
    environments: Sequence[Environment] = (),
    report: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer problems and write what is kept to ``out``; the finished chunks of a killed run are not done again.

    Args:
        engine: Answers; its random stream is reseeded for each chunk.
        source: Names the checkpoint; a folder of chunks that came from another source or config is started anew.
        environments: Answer tool calls.
        report: Where the returned report is written as JSON.

    Raises:
        UserError: no response was kept; ``report`` is written all the same.

    Returns:
        ``{"problems", "sampled", "kept", "dropped": {reason: n}, "tasks": {task: {mode: accuracy}}}``
    """
    folder = Path(f"{out}.parts")
    _open_folder(folder, config, problems, source)
    chunks = [
        problems[start : start + config.chunk_problems] for start in range(0, len(problems), config.chunk_problems)
    ]
    totals: Counter[str] = Counter()
    for number, chunk in enumerate(chunks):
        counts_file = folder / f"{number:06d}.json"
        if counts_file.exists():
            counts = Counter(json.loads(counts_file.read_text(encoding="utf-8")))
        else:
            engine.reseed(stream_seed("sample", config.seed, number))
            records, counts = _answer_chunk(engine, tokenizer, chunk, config, verifier, environments)
            write_jsonl(folder / f"{number:06d}.jsonl", records)
            write_json(counts_file, counts)  # last: a chunk counts as finished once this file is there
        totals.update(counts)
        if progress is not None:
            progress(number + 1, len(chunks), totals["kept"])

    def records_of_all() -> Iterator[Record]:
        for number in range(len(chunks)):
            with open(folder / f"{number:06d}.jsonl", encoding="utf-8") as file:
                yield from (json.loads(line) for line in file)

    result = _report(totals, len(problems))
    if report is not None:
        write_json(report, result)
    if not result["kept"]:
        shutil.rmtree(folder)
        reasons = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items())
        raise UserError(
            f"{out}: not written, none of {result['sampled']} responses to {len(problems)} problems was kept: "
            f"{reasons}; raise max_new_tokens for truncated ones, take easier problems or a better model for wrong ones"
        )
    write_jsonl(out, records_of_all())
    shutil.rmtree(folder)
    _log.info("%s: kept %d of %d responses to %d problems", out, result["kept"], result["sampled"], len(problems))
    return result


def _answer_chunk(
    engine: RolloutEngine,
    tokenizer: TextTokenizer,
    chunk: Sequence[Record],
    config: SampleConfig,
    verifier: AnswerVerifier,
    environments: Sequence[Environment],
) -> tuple[list[Record], Counter[str]]:
    modes: tuple[Mode, ...] = ("think", "no_think") if config.mode == "both" else (config.mode,)
    records: list[Record] = []
    counts: Counter[str] = Counter()
    asked = [(problem, mode) for problem in chunk for mode in modes]
    flagged = [problem for problem in chunk if requested_mode(problem["messages"])]
    free = [(problem, mode) for problem, mode in asked if not requested_mode(problem["messages"])]
    # A flag in the text decides; the record's mode follows it, since rewards read the mode from there.
    wanted = [
        *({**problem, "mode": mode} for problem, mode in free),
        *({**problem, "mode": requested_mode(problem["messages"])} for problem in flagged),
    ]
    rollouts = collect(engine, tokenizer, wanted, config.params(), environments)
    scores = verifier.scores([reward_input(rollout) for rollout in rollouts])
    for start in range(0, len(rollouts), config.n):
        group, group_scores = rollouts[start : start + config.n], scores[start : start + config.n]
        kept, dropped = select(group, group_scores, config.keep)
        records += kept
        counts["kept"] += len(kept)
        counts["sampled"] += len(group)
        counts.update({f"dropped/{reason}": count for reason, count in dropped.items()})
        label = f"{group[0].problem.get('task')}/{group[0].mode}"
        counts[f"of/{label}"] += len(group)
        counts[f"right/{label}"] += sum(is_right(score) for score in group_scores)
    return records, counts


def _open_folder(folder: Path, config: SampleConfig, problems: Sequence[Record], source: str) -> None:
    """Make the chunk folder, or take over the one that the same request left behind."""
    request = {
        "config": asdict(config),
        "problems": f"{stream_seed(json.dumps(list(problems), sort_keys=True)):016x}",
        "source": source,
    }
    identity = folder / "request.json"
    if identity.exists() and json.loads(identity.read_text(encoding="utf-8")) == json.loads(json.dumps(request)):
        done = len(list(folder.glob("*.json"))) - 1
        _log.info("%s: continuing after %d finished chunks", folder, done)
        return
    if folder.exists():
        _log.info("%s: left by another request, starting anew", folder)
        shutil.rmtree(folder)
    write_json(identity, request)


def _report(totals: Counter[str], num_problems: int) -> dict[str, Any]:
    tasks: dict[str, dict[str, float]] = {}
    for name, count in sorted(totals.items()):
        kind, _, label = name.partition("/")
        if kind == "of":
            task, _, mode = label.rpartition("/")
            tasks.setdefault(task, {})[mode] = totals[f"right/{label}"] / count
    return {
        "problems": num_problems,
        "sampled": totals["sampled"],
        "kept": totals["kept"],
        "dropped": {name.partition("/")[2]: n for name, n in sorted(totals.items()) if name.startswith("dropped/")},
        "tasks": tasks,
    }


def checkpoint_identity(folder: str) -> str:
    """Name, sizes and times of a checkpoint's weight files: chunks of another checkpoint must not be mixed in."""
    files = sorted(Path(folder).glob("*.safetensors"))
    listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{Path(folder).resolve()}|{stream_seed(json.dumps(listed)):016x}"


def best_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)

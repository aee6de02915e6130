"""Made-up data: the kinds, what they are asked for, and the driver that writes one file.

Every kind is a pure function of its request: the same request gives the same file, byte for byte. The kinds are

- ``problems``: problem records of reasoning-gym tasks, with what the task's own scorer needs;
- ``worked_steps``: pre-training text with written-out solutions of the same tasks;
- ``reasoning_candidates``: several responses to each problem, flawed at given rates, for the filters;
- ``general_problems``: problem records of the general tasks, with what their rewards need;
- ``dialogs``: conversations over the general tasks with right answers, without thinking unless it is asked for;
- ``preferences``: chosen and rejected answers for a reward model, with and without reference.
"""

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_lit.curation.jsonl_output import write_jsonl
from qwen3_lit.curation.synthesis_split import SPLITS, Split
from qwen3_lit.errors import UserError

_log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class SynthesisRequest:
    """What to make."""

    count: int
    """Records to make (for ``reasoning_candidates``: problems to answer)."""
    seed: int = 0
    """Seed of the random stream; the splits draw from unrelated streams of the same seed."""
    split: Split = "train"
    """Which split the records belong to: ``train`` or ``held_out``."""
    tasks: tuple[str, ...] = ()
    """Task names; a name given twice is drawn twice as often. Empty: the kind's own default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the kind and its tasks: ``name`` or ``task.name`` -> value."""
    problems: str | None = None
    """Problem file to answer, instead of fresh problems (``reasoning_candidates``)."""
    held_out: str | None = None
    """Problem file whose items the flawed teacher copies (``reasoning_candidates``)."""
    exclude: tuple[str, ...] = ()
    """Files of problems or conversations whose queries must not be made again."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count is {self.count}: at least one record is needed")
        if self.split not in SPLITS:
            raise UserError(f"split is {self.split!r}: expected one of {', '.join(SPLITS)}")

    def task_options(self, task: str, names: Sequence[str]) -> dict[str, Any]:
        """Options meant for one task: ``task.name`` must be one of ``names``, a bare ``name`` applies where it fits."""
        chosen = {name: value for name, value in self.options.items() if name in names}
        for key, value in self.options.items():
            owner, dot, name = key.partition(".")
            if dot and owner == task:
                if name not in names:
                    raise UserError(unknown_name(f"option of {task}", name, names))
                chosen[name] = value
        return chosen

    def option(self, name: str, default: Any) -> Any:
        """One option of the kind itself, checked against the type of its default."""
        value = self.options.get(name, default)
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and (type(value) is not type(default)):
            raise UserError(f"option {name}={value!r}: expected {type(default).__name__}, like the default {default!r}")
        return float(value) if number else value

    def check_options(self, kind: str, tasks: Sequence[str], bare: Sequence[str]) -> None:
        """Refuse options that nothing would read."""
        for key in self.options:
            owner, dot, _ = key.partition(".")
            if dot and owner not in tasks:
                raise UserError(unknown_name(f"task in option {key!r} of {kind}", owner, tasks))
            if not dot and key not in bare:
                raise UserError(unknown_name(f"option of {kind}", key, bare))


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """One line that names the nearest known name."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(set(known)))}"
    return f"unknown {what}: {name!r}; {hint}"


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["max_digits=2", "style=short"]`` -> ``{"max_digits": 2, "style": "short"}``; values are JSON where they parse.

    Raises:
        UserError: a pair without ``=``.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"option {pair!r}: expected name=value or task.name=value")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def _problems(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.synthesis_problems import problem_records

    return problem_records(request)


def _worked_steps(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.synthesis_documents import document_records

    return document_records(request)


def _reasoning_candidates(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.synthesis_candidates import candidate_records

    return candidate_records(request)


def _general_problems(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.general_tasks import general_problem_records

    return general_problem_records(request)


def _dialogs(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.general_tasks import dialog_records

    return dialog_records(request)


def _preferences(request: SynthesisRequest) -> Iterator[Record]:
    from qwen3_lit.curation.preferences import preference_records

    return preference_records(request)


KINDS: dict[str, Callable[[SynthesisRequest], Iterator[Record]]] = {
    "problems": _problems,
    "worked_steps": _worked_steps,
    "reasoning_candidates": _reasoning_candidates,
    "general_problems": _general_problems,
    "dialogs": _dialogs,
    "preferences": _preferences,
}


def synthesize(kind: str, request: SynthesisRequest) -> Iterator[Record]:
    """Stream the records of a kind.

    Raises:
        UserError: unknown kind, task or option, or a task with too few distinct problems for the count.
    """
    if kind not in KINDS:
        raise UserError(unknown_name("kind of data", kind, list(KINDS)))
    return KINDS[kind](request)


def synthesize_to_file(
    kind: str,
    request: SynthesisRequest,
    path: str,
    *,
    progress: Callable[[], None] | None = None,
) -> int:
    """Write the records of a kind to a JSON lines file, whole or not at all, and return their number."""

    def records() -> Iterator[Record]:
        for record in synthesize(kind, request):
            if progress is not None:
                progress()
            yield record

    count = write_jsonl(path, records())
    _log.info("%s: %d records of kind %s, split %s, seed %d", path, count, kind, request.split, request.seed)
    return count

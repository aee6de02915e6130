"""General tasks for reinforcement learning and for non-thinking dialogs: the registry and the records made from it.

A task is a generator ``(rng, options) -> GeneralItem``: a query with what its rewards need, and a right answer. The
problem record carries the instruction checks in ``metadata["checks"]``, context in ``metadata["context"]``, the tools
and the tool's name, the wanted ``mode``, and in ``answer`` the reference for a judge. See ``qwen3_lit.rl.rewards``.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_lit.curation.synthesis import Record, SynthesisRequest, unknown_name
from qwen3_lit.curation.synthesis_problems import excluded_keys, problem_records, query_text
from qwen3_lit.curation.synthesis_split import split_of, stream, text_key
from qwen3_lit.errors import UserError

_PATIENCE = 2_000


@dataclass(frozen=True)
class GeneralOptions:
    """Sizes of the general tasks; the defaults suit very small models."""

    max_words: int = 5
    """Most words that ``word_count`` asks for."""
    max_items: int = 4
    """Most items of a list, of a repetition or of a word mapping."""
    context_facts: int = 3
    """Statements in the context of ``grounded_qa``."""
    max_turns: int = 3
    """Most user turns of a ``mode_flags`` dialog."""
    digits: int = 2
    """Most digits of a number that the calculator gets."""
    not_stated_share: float = 0.3
    """Share of ``grounded_qa`` questions that the context does not answer."""
    no_think_share: float = 0.0
    """Share of the problems without a mode of their own that end in ``/no_think``; dialogs never have flags."""

    def __post_init__(self) -> None:
        for name in ("max_words", "max_items", "context_facts", "max_turns", "digits"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"option {name}={getattr(self, name)!r}: expected a whole number of 1 or more")
        if self.context_facts > 8:
            raise UserError(f"option context_facts={self.context_facts}: the colors and places allow at most 8")
        for name in ("not_stated_share", "no_think_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"option {name}={getattr(self, name)}: expected a share between 0 and 1")


@dataclass(frozen=True)
class GeneralItem:
    """One made-up query and a right answer to it."""

    messages: list[dict[str, Any]]
    """The conversation up to the answer."""
    gold: str
    """A right answer."""
    reference: str | None = None
    """The problem's ``answer``, when it is not ``gold``."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the rewards read."""
    wrong: str | None = None
    """A bad answer of the same form, for preference pairs."""
    thinking: str | None = None
    """Thinking that leads to ``gold``, where a dialog may have some."""
    mode: str | None = None
    """The mode that the conversation asks for."""
    tools: list[dict[str, Any]] | None = None
    """Tool schemas."""
    tool_turns: list[dict[str, Any]] = field(default_factory=list)
    """Tool calls and results between the query and the answer."""
    plain_messages: list[dict[str, Any]] | None = None
    """The conversation without mode flags, when ``messages`` has them."""


Generator = Callable[[random.Random, GeneralOptions], GeneralItem]

GENERAL_TASKS: dict[str, Generator] = {}
"""Task name -> generator, filled by ``general_task``."""


def general_task(name: str) -> Callable[[Generator], Generator]:
    """Register a generator under a task name."""

    def register(generator: Generator) -> Generator:
        GENERAL_TASKS[name] = generator
        return generator

    return register


def user(content: str) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": content}


def load_general_tasks() -> dict[str, Generator]:
    """The registry, with the tasks of this package in it."""
    from qwen3_lit.curation import general_tasks_content, general_tasks_instructions  # noqa: F401

    return GENERAL_TASKS


def general_options(request: SynthesisRequest, own: tuple[str, ...] = ()) -> GeneralOptions:
    """The request's options as sizes of the tasks; ``own`` are options that the kind itself reads.

    Raises:
        UserError: unknown option or bad value.
    """
    known = tuple(GeneralOptions.__dataclass_fields__)
    chosen = {name: value for name, value in request.options.items() if "." not in name and name not in own}
    for name in chosen:
        if name not in known:
            raise UserError(unknown_name("option of the general tasks", name, [*known, *own]))
    return GeneralOptions(**chosen)


def general_items(
    request: SynthesisRequest, options: GeneralOptions, unique: bool
) -> Iterator[tuple[str, GeneralItem]]:
    """Draw items whose query texts belong to the request's split.

    Raises:
        UserError: unknown task, or no further distinct queries.
    """
    registry = load_general_tasks()
    tasks = request.tasks or tuple(registry)
    for task in tasks:
        if task not in registry:
            raise UserError(unknown_name("general task", task, list(registry)))
    taken = excluded_keys(request.exclude)
    rng = stream("general", *tasks, request.split, request.seed)
    for made in range(request.count):
        task = rng.choice(tasks)
        for _ in range(_PATIENCE):
            item = registry[task](rng, options)
            text = query_text({"messages": item.plain_messages or item.messages})
            key = text_key(text)
            if split_of(text) == request.split and key not in taken:
                break
        else:
            raise UserError(
                f"task {task} has no further distinct {request.split} queries after {made} of {request.count}; "
                "ask for fewer, raise the sizes with --option, or leave out --option unique=true"
            )
        if unique:
            taken.add(key)
        yield task, item


def general_problem_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream problem records of the general tasks. Options: those of ``GeneralOptions`` and ``unique`` (false)."""
    options = general_options(request, ("unique",))
    flags = stream("general flags", request.split, request.seed)
    for task, item in general_items(request, options, request.option("unique", False)):
        mode, messages = item.mode, item.messages
        if mode is None and flags.random() < options.no_think_share:
            mode, messages = "no_think", [*messages[:-1], user(f"{messages[-1]['content']} /no_think")]
        record: Record = {
            "messages": messages,
            "answer": item.gold if item.reference is None else item.reference,
            "task": task,
            "metadata": item.metadata,
            "split": request.split,
        }
        if mode is not None:
            record["mode"] = mode
        if item.tools is not None:
            record["tools"] = item.tools
        yield record


def dialog_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream conversations with right answers and without mode flags: without thinking, or all with it.

    ``tasks`` may also name reasoning-gym tasks: these are answered directly. Options: ``thinking`` (false; only tasks
    that have thinking to show), those of ``GeneralOptions``, ``unique`` (false), and ``task.name`` settings of the
    reasoning-gym tasks.

    Raises:
        UserError: unknown task or option, no further distinct queries, or thinking asked of a task without it.
    """
    registry = load_general_tasks()
    tasks = request.tasks or tuple(registry)
    general = tuple(task for task in tasks if task in registry)
    reasoning = tuple(task for task in tasks if task not in registry)
    sources: dict[bool, Iterator[Record]] = {}
    if general:
        sources[True] = _general_dialogs(replace(request, tasks=general))
    if reasoning:
        if request.option("thinking", False):
            raise UserError(
                f"option thinking=true: {', '.join(reasoning)} would be answered directly; "
                "ask for the kind reasoning_candidates, or leave them out of --tasks"
            )
        scoped = {name: value for name, value in request.options.items() if "." in name or name == "style"}
        options = {"unique": False} | scoped
        sources[False] = _direct_answers(replace(request, tasks=reasoning, options=options))
    order = stream("dialog order", *tasks, request.split, request.seed)
    for _ in range(request.count):
        yield next(sources[order.choice(tasks) in registry])


def _general_dialogs(request: SynthesisRequest) -> Iterator[Record]:
    own = ("thinking", "unique", "style")
    thinking = request.option("thinking", False)
    for task, item in general_items(request, general_options(request, own), request.option("unique", False)):
        answer = {"role": "assistant", "content": item.gold}
        if thinking:
            if item.thinking is None:
                raise UserError(f"option thinking=true: task {task} has no thinking to show; leave it out of --tasks")
            answer["reasoning_content"] = item.thinking
        record: Record = {
            "messages": [*(item.plain_messages or item.messages), *item.tool_turns, answer],
            "mode": "think" if thinking else "no_think",
            "task": task,
            "split": request.split,
        }
        if item.tools is not None:
            record["tools"] = item.tools
        yield record


def _direct_answers(request: SynthesisRequest) -> Iterator[Record]:
    for problem in problem_records(request):
        answer = {"role": "assistant", "content": problem["answer"]}
        yield {
            "messages": [*problem["messages"], answer],
            "mode": "no_think",
            "task": problem["task"],
            "split": request.split,
        }

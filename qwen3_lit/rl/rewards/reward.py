"""The reward seam: what a reward sees, the base class every reward extends, and how several rewards become one number.

Contract of this file and of every rule reward beside it: no torch import, everything picklable, because rule rewards
are sent to killable worker processes (:mod:`qwen3_lit.rl.rewards.workers`).

Composition. Each reward scores a completion on its own scale and may answer ``None`` for "not applicable" (its `tasks`
do not contain the problem's task, or the problem lacks what it reads). :func:`combine_scores` then forms either

* ``"mean"``: ``sum(weight * score) / sum(weight)`` over the rewards that apply, so problems of different tasks stay on
  one scale however many rewards each of them meets (the default), or
* ``"sum"``: ``sum(weight * score)`` over the rewards that apply, as in DAPO, which adds a length penalty to
  accuracy.

Rewards that do not apply take no part in either, neither in the numerator nor in the denominator.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from qwen3_lit.errors import UserError

Mode = Literal["think", "no_think"]
FinishReason = Literal["stop", "length"]
Composition = Literal["mean", "sum"]


@dataclass(frozen=True)
class RewardInput:
    """One completion and everything a reward may want to know about it."""

    messages: list[dict[str, Any]]
    """The conversation up to the completion."""

    completion: str
    """Text of the whole completion: every turn and tool result, and a think block that the prompt injected."""

    thinking: str | None
    """Inside of the last turn's think block; empty for an empty block, None when there is no block."""

    answer: str
    """Text of the last turn after its think block; empty when thinking was never closed."""

    problem: dict[str, Any]
    """The problem record: answer, task, metadata, mode, free columns."""

    finish_reason: FinishReason = "stop"
    """`stop` when the model ended its turn, `length` when it was cut."""

    mode: Mode = "think"
    """The mode in which the completion was asked for."""

    num_tokens: int = 0
    """Length of the completion in tokens, forced tokens included."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    """Messages that the completion added: assistant turns (raw text) and tool results, in order."""

    @property
    def task(self) -> str:
        """The problem's task name."""
        return str(self.problem.get("task", ""))

    @property
    def metadata(self) -> dict[str, Any]:
        """The problem's metadata, empty when it has none."""
        return self.problem.get("metadata") or {}

    @property
    def reference(self) -> str:
        """The problem's reference answer as text."""
        answer = self.problem.get("answer")
        return "" if answer is None else str(answer)

    def capped(self, max_chars: int) -> "RewardInput":
        """The same input with each text no longer than `max_chars`.

        The answer keeps its end (final answers stand there); completion and thinking lose their middle.
        """
        if max(len(self.completion), len(self.answer), len(self.thinking or "")) <= max_chars:
            return self
        thinking = None if self.thinking is None else _without_middle(self.thinking, max_chars)
        turns = [{**turn, "content": _without_middle(str(turn.get("content", "")), max_chars)} for turn in self.turns]
        return RewardInput(
            messages=self.messages,
            completion=_without_middle(self.completion, max_chars),
            thinking=thinking,
            answer=self.answer[-max_chars:],
            problem=self.problem,
            finish_reason=self.finish_reason,
            mode=self.mode,
            num_tokens=self.num_tokens,
            turns=turns,
        )


def _without_middle(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = max_chars // 2
    return text[:head] + text[len(text) - (max_chars - head) :]


class Reward:
    """Base of all rewards. A subclass implements :meth:`score` and lists its settings as typed `__init__` arguments.

    Args:
        weight: Weight in the composition; 0 records the reward without using it.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics; null takes the class's own.
    """

    in_process: ClassVar[bool] = False
    """True for rewards that run a model: scored in the trainer process, a batch at a time."""

    measures_accuracy: ClassVar[bool] = False
    """True when a full score means that the answer is right; evaluation derives accuracy and pass@k from these."""

    judges_content: ClassVar[bool] = True
    """False for rewards that any answer can have in full, right or wrong: of form, mode, length."""

    default_name: ClassVar[str] = "reward"
    """Name in metrics unless the recipe gives another."""

    def __init__(self, weight: float = 1.0, tasks: list[str] | None = None, name: str | None = None) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{type(self).__name__}: weight: {weight} is not usable, expected a finite number >= 0")
        self.weight = float(weight)
        self.tasks = None if tasks is None else list(tasks)
        self.name = name or self.default_name

    def applies(self, item: RewardInput) -> bool:
        """Whether this reward has anything to say about `item`. Cheap: called in the trainer process.

        Decided by the problem, not by the completion: before a run it is asked of every problem with an empty one.
        """
        return self.tasks is None or item.task in self.tasks

    def prepare(self) -> None:
        """Load what scoring needs. Called once in each process before its first score, outside the deadline."""

    def score(self, item: RewardInput) -> float | None:
        """Score of one completion, None when not applicable."""
        raise NotImplementedError

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        """Scores of many completions; rewards with `in_process` override it."""
        return [self.score(item) for item in items]

    def __call__(self, item: RewardInput) -> float | None:
        return self.score(item) if self.applies(item) else None


def check_rewards(
    rewards: Sequence[Reward], problems: Sequence[dict[str, Any]] = (), known_tasks: Collection[str] = ()
) -> None:
    """Refuse a reward list that cannot work, before anything is sampled.

    Args:
        rewards: the list: not empty, each with a name of its own.
        problems: training problems; each needs a weighted reward that judges content, or wrong answers are full ones.
        known_tasks: tasks that a reward's `tasks` may name beside those of the problems.

    Raises:
        UserError: Naming the reward, the task, and the problem.
    """
    if not rewards:
        raise UserError("rewards: the list is empty, expected at least one reward")
    seen: set[str] = set()
    for reward in rewards:
        if reward.name in seen:
            raise UserError(f"rewards: two rewards are named {reward.name!r}; give one of them another `name`")
        seen.add(reward.name)
    if not problems:
        return
    tasks = sorted({str(problem.get("task", "")) for problem in problems} | set(known_tasks))
    for reward in rewards:
        unknown = [task for task in reward.tasks or () if task not in tasks]
        if unknown:
            raise UserError(
                f"rewards: {reward.name}: tasks: no problem has the task {', '.join(map(repr, unknown))}; "
                f"the problems' tasks are {', '.join(tasks)}"
            )
    judges = [reward for reward in rewards if reward.weight > 0 and reward.judges_content]
    for number, problem in enumerate(problems, start=1):
        item = RewardInput(problem.get("messages", []), completion="", thinking=None, answer="", problem=problem)
        if not any(reward.applies(item) for reward in judges):
            raise UserError(
                f"rewards: training problem {number}, of task {item.task!r}: no weighted reward judges the content of "
                f"its answers, so wrong ones are paid like right ones (rewards: {', '.join(sorted(seen))}); add the "
                "task to the `tasks` of a reward, and to the problem what that reward reads (`answer`, `metadata`)"
            )


def combine_scores(
    scores: Mapping[str, float | None], rewards: Sequence[Reward], composition: Composition = "mean"
) -> float | None:
    """One number from the scores of several rewards; see the module docstring. None when no weighted reward applies."""
    total, weight = 0.0, 0.0
    for reward in rewards:
        value = scores.get(reward.name)
        if value is not None and reward.weight > 0:
            total += reward.weight * value
            weight += reward.weight
    if weight == 0:
        return None
    return total / weight if composition == "mean" else total

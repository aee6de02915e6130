"""Is an answer right? The rule rewards of reinforcement learning, asked as a yes-or-no question.

The rewards run in killable processes (``RewardPool``), since a symbolic verifier may hang on hostile text. Which of
them judge a problem follows from its record: reasoning-gym's scorer, instruction checks, context or tools; a problem
that has none of these is compared with its reference, as text and as mathematics.
"""

import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from qwen3_lit.rl.rewards.final_answer import final_answer
from qwen3_lit.rl.rewards.grounded import GroundedReward
from qwen3_lit.rl.rewards.instruction import InstructionReward
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.reasoning_gym_answer import ReasoningGymAnswerReward
from qwen3_lit.rl.rewards.reward import Mode, Reward, RewardInput
from qwen3_lit.rl.rewards.tool_use import ToolUseReward
from qwen3_lit.rl.rewards.workers import RewardPool

_MATH = "math_answer"


def response_input(
    problem: Mapping[str, Any], thinking: str | None, answer: str, turns: Sequence[dict[str, Any]] = ()
) -> RewardInput:
    """What rewards see of a stored response; ``turns`` are the messages that it added, tool results included."""
    mode: Mode = "no_think" if not (thinking or "").strip() else "think"
    completion = f"<think>\n{(thinking or '').strip()}\n</think>\n\n{answer}"
    messages = list(problem.get("messages") or [{"role": "user", "content": problem.get("prompt", "")}])
    return RewardInput(
        messages=messages,
        completion=completion,
        thinking=thinking,
        answer=answer,
        problem=dict(problem),
        mode=mode,
        turns=list(turns) or [{"role": "assistant", "content": completion}],
    )


class AnswerVerifier:
    """Scores responses between 0 (wrong) and 1 (right) with rule rewards; None where no rule can tell.

    Args:
        rewards: Rules to apply instead of the built-in choice; the least of the applicable scores counts.
        num_workers: Verifier processes.
        deadline_seconds: A verifier that takes longer is killed and the response counts as wrong.
    """

    def __init__(
        self, rewards: Sequence[Reward] | None = None, num_workers: int = 1, deadline_seconds: float = 10.0
    ) -> None:
        self._custom = rewards is not None
        built_in: list[Reward] = [
            ReasoningGymAnswerReward(),
            InstructionReward(),
            GroundedReward(),
            ToolUseReward(),
            MathAnswerReward(name=_MATH),
        ]
        self._pool = RewardPool(
            list(rewards) if rewards is not None else built_in,
            num_workers=num_workers,
            deadline_seconds=deadline_seconds,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    @property
    def failures(self) -> dict[str, int]:
        """Verifier runs that timed out, failed or ran out of memory so far."""
        return {name: count for name, count in self._pool.totals.items() if name != "jobs" and "/" not in name}

    def scores(self, items: Sequence[RewardInput]) -> list[float | None]:
        """One score a response."""
        if not items:
            return []
        return [self._combine(item, scores) for item, scores in zip(items, self._pool.score(items), strict=True)]

    def right(self, items: Sequence[RewardInput]) -> list[bool]:
        """Whether each response is right; one that no rule can judge is not."""
        return [is_right(score) for score in self.scores(items)]

    def _combine(self, item: RewardInput, scores: Mapping[str, float | None]) -> float | None:
        applicable = {name: score for name, score in scores.items() if score is not None}
        if self._custom:
            return min(applicable.values(), default=None)
        math = applicable.pop(_MATH, 0.0)
        if not item.reference:
            return min(applicable.values(), default=None)
        boxed = any(check.get("name") == "boxed" for check in item.metadata.get("checks", ()))
        if applicable:
            return min([*applicable.values(), *([math] if boxed else [])])
        same_text = _squeezed(final_answer(item.answer)) == _squeezed(item.reference)
        return 1.0 if same_text else math


def is_right(score: float | None) -> bool:
    """A full score."""
    return score is not None and score >= 1.0 - 1e-9


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()

"""Evaluation on problems: sample, score, and report each task's rewards, accuracy, pass@k and mode following."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import Progress, RolloutEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.rl.environment import Environment
from qwen3_lit.rl.rewards.reward import Mode, Reward
from qwen3_lit.rl.rewards.workers import RewardPool
from qwen3_lit.rl.rollout import ModeSwitch, Rollout, collect, score_rollouts
from qwen3_lit.rl.rollout_metrics import think_follow

CORRECT = 1.0 - 1e-6
"""A reward that measures accuracy counts as right from this score on."""


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task, or of all tasks together."""

    num_problems: int
    """Problems evaluated."""
    num_samples: int
    """Completions sampled."""
    reward: float
    """Mean of the composed reward."""
    rewards: dict[str, float]
    """Mean of each reward over the completions it applies to."""
    accuracy: float | None
    """Fraction of right completions; None when no reward of the task measures accuracy."""
    pass_at_k: dict[int, float]
    """Unbiased pass@k for each k asked for; empty without accuracy."""
    think_follow: float | None
    """Fraction of completions that obey their mode; None when no problem names one."""
    truncated_frac: float
    """Fraction of completions that were cut."""
    mean_tokens: float
    """Mean completion length in tokens."""


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of an evaluation."""

    overall: TaskResult
    """All problems together, each completion counted once."""
    tasks: dict[str, TaskResult]
    """By task."""
    samples: list[dict[str, Any]]
    """A few completions a task: prompt, completion, reference, mode, rewards, correct."""
    rollouts: list[Rollout]
    """Every completion."""

    @property
    def accuracy(self) -> float:
        """Overall accuracy; nan when nothing measures it."""
        return float("nan") if self.overall.accuracy is None else self.overall.accuracy

    def as_dict(self) -> dict[str, Any]:
        """Figures without samples, ready for JSON."""
        return {"overall": asdict(self.overall), "tasks": {task: asdict(value) for task, value in self.tasks.items()}}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k completions is right, from n with c right: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))


def is_correct(rollout: Rollout, rewards: Sequence[Reward]) -> bool | None:
    """Whether every applicable reward that measures accuracy is full; None when none applies."""
    values = [
        value
        for reward in rewards
        if reward.measures_accuracy and (value := rollout.rewards.get(reward.name)) is not None
    ]
    return all(value >= CORRECT for value in values) if values else None


def summarize(rollouts: Sequence[Rollout], rewards: Sequence[Reward], ks: Sequence[int] = (1,)) -> TaskResult:
    """Figures of scored rollouts; those of one group are the samples of one problem."""
    if not rollouts:
        raise ValueError("nothing to summarize")
    correct: dict[int, list[bool]] = {}
    for rollout in rollouts:
        right = is_correct(rollout, rewards)
        if right is not None:
            correct.setdefault(rollout.group_id, []).append(right)
    flat = [right for group in correct.values() for right in group]
    means: dict[str, float] = {}
    for reward in rewards:
        values = [value for rollout in rollouts if (value := rollout.rewards.get(reward.name)) is not None]
        if values:
            means[reward.name] = float(np.mean(values))
    passes = {
        k: float(np.mean([pass_at_k(len(group), sum(group), k) for group in correct.values()]))
        for k in ks
        if correct and all(len(group) >= k for group in correct.values())
    }
    return TaskResult(
        num_problems=len({rollout.group_id for rollout in rollouts}),
        num_samples=len(rollouts),
        reward=float(np.mean([rollout.reward for rollout in rollouts])),
        rewards=means,
        accuracy=sum(flat) / len(flat) if flat else None,
        pass_at_k=passes,
        think_follow=think_follow(rollouts),
        truncated_frac=sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        mean_tokens=float(np.mean([len(rollout.completion_ids) for rollout in rollouts])),
    )


def evaluate_problems(
    engine: RolloutEngine,
    tokenizer: TextTokenizer,
    problems: Sequence[dict[str, Any]],
    rewards: RewardPool | Sequence[Reward],
    params: SamplingParams,
    *,
    environments: Sequence[Environment] = (),
    mode: Mode | None = None,
    mode_switch: ModeSwitch = "auto",
    ks: Sequence[int] = (1,),
    samples_per_task: int = 4,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Sample `params.n` completions of each problem and score them.

    Args:
        engine: samples.
        tokenizer: renders and decodes.
        problems: problem records.
        rewards: a running pool, or rewards for which one is started and closed.
        params: sampling; a `thinking_budget` in it holds for the problems that think.
        environments: answer tool calls.
        mode: overrides every problem's mode; None keeps their own.
        mode_switch: how the mode is asked for; see :func:`qwen3_lit.rl.rollout.apply_mode`.
        ks: values of k for pass@k; those above `params.n` are refused.
        samples_per_task: completions kept for reading.
        progress: passed to the engine.

    Raises:
        UserError: If there is no problem, or a k is larger than the number of samples.
    """
    if not problems:
        raise UserError("evaluation: no problems given")
    if max(ks, default=1) > params.n:
        raise UserError(f"evaluation: pass@{max(ks)} needs at least that many samples a problem, n is {params.n}")
    rollouts = collect(
        engine, tokenizer, problems, params, environments, mode=mode, mode_switch=mode_switch, progress=progress
    )
    if isinstance(rewards, RewardPool):
        score_rollouts(rollouts, rewards)
        scorers: Sequence[Reward] = rewards.rewards
    else:
        with RewardPool(rewards) as pool:
            score_rollouts(rollouts, pool)
        scorers = rewards
    by_task: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_task.setdefault(str(rollout.problem.get("task", "")), []).append(rollout)
    return EvaluationResult(
        overall=summarize(rollouts, scorers, ks),
        tasks={task: summarize(members, scorers, ks) for task, members in sorted(by_task.items())},
        samples=[_sample(rollout, scorers) for task in sorted(by_task) for rollout in by_task[task][:samples_per_task]],
        rollouts=rollouts,
    )


def _sample(rollout: Rollout, rewards: Sequence[Reward]) -> dict[str, Any]:
    return {
        "task": rollout.problem.get("task", ""),
        "prompt": rollout.problem["messages"][-1]["content"],
        "completion": rollout.text,
        "reference": rollout.problem.get("answer"),
        "mode": rollout.mode,
        "finish_reason": rollout.finish_reason,
        "rewards": rollout.rewards,
        "reward": rollout.reward,
        "correct": is_correct(rollout, rewards),
        "tokens": len(rollout.completion_ids),
    }

"""What a batch of rollouts looked like, as a flat dict of floats for the loggers, and the alarms that follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_lit.losses.reduction import gather_over_ranks
from qwen3_lit.rl.dynamic_sampling import groups_with_signal
from qwen3_lit.rl.rewards.mode_follow import follows_mode
from qwen3_lit.rl.rollout import Rollout

_REWARD_FAILURES = {
    "timeouts": ("timeout_frac", "time out", "raise deadline_seconds or check the verifier"),
    "errors": (
        "error_frac",
        "raise or are no number",
        "mend the reward or what it needs, its first error is in the log",
    ),
    "oom": ("oom_frac", "run out of memory", "raise memory_limit_mb or check the verifier"),
    "crashes": ("crash_frac", "take their process down", "check the libraries of the verifier"),
}
"""Failure -> its share in the metrics of RewardPool, what happened, what to do."""


@dataclass(frozen=True)
class RolloutFigures:
    """What the metrics read of one rollout: small enough to be sent to every rank."""

    task: str
    reward: float
    rewards: dict[str, float | None]
    truncated: bool
    tokens: int
    """Tokens of the completion."""
    sampled: int
    """Tokens of it that were sampled, not forced."""
    follows: float | None
    """1 when it obeyed its problem's mode, 0 when not, None when the problem has none."""
    policy_version: int


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the rollouts of all ranks; rewards that apply to none of them are absent.

    Every rank has to call it, with at least one rollout.

    Keys: `reward/mean`, `reward/std`, `reward/<name>/mean|std`, `reward/task/<task>`, `zero_advantage_frac` (groups
    without signal), `truncated_frac`, `forced_frac` (tokens), `completion_tokens/mean|min|max`,
    `completion_tokens/terminated_mean`, `think_follow` (where problems carry a mode), `policy_version/min`.
    """
    figures = [
        RolloutFigures(
            task=str(rollout.problem.get("task", "")),
            reward=rollout.reward,
            rewards=rollout.rewards,
            truncated=rollout.truncated,
            tokens=len(rollout.completion_ids),
            sampled=sum(rollout.trained_mask),
            follows=think_follow([rollout]),
            policy_version=rollout.policy_version,
        )
        for rollout in rollouts
    ]
    # Groups are told apart by their rank's own count: each rank judges its own.
    gathered = gather_over_ranks((figures, list(groups_with_signal(rollouts).values())))
    figures = [entry for of_rank, _ in gathered for entry in of_rank]
    signal = [differs for _, of_rank in gathered for differs in of_rank]
    metrics: dict[str, float] = {}
    totals = np.array([entry.reward for entry in figures], dtype=np.float64)
    metrics["reward/mean"], metrics["reward/std"] = float(totals.mean()), float(totals.std())
    for name in sorted({name for entry in figures for name in entry.rewards}):
        values = [value for entry in figures if (value := entry.rewards.get(name)) is not None]
        if values:
            metrics[f"reward/{name}/mean"] = float(np.mean(values))
            metrics[f"reward/{name}/std"] = float(np.std(values))
    for task in sorted({entry.task for entry in figures}):
        metrics[f"reward/task/{task}"] = float(totals[[entry.task == task for entry in figures]].mean())
    metrics["zero_advantage_frac"] = 1.0 - sum(signal) / len(signal)
    metrics["truncated_frac"] = sum(entry.truncated for entry in figures) / len(figures)
    lengths = np.array([entry.tokens for entry in figures], dtype=np.float64)
    metrics["forced_frac"] = 1.0 - sum(entry.sampled for entry in figures) / float(lengths.sum())
    metrics["completion_tokens/mean"] = float(lengths.mean())
    metrics["completion_tokens/min"] = float(lengths.min())
    metrics["completion_tokens/max"] = float(lengths.max())
    ended = lengths[[not entry.truncated for entry in figures]]
    if ended.size:
        metrics["completion_tokens/terminated_mean"] = float(ended.mean())
    followed = [entry.follows for entry in figures if entry.follows is not None]
    if followed:
        metrics["think_follow"] = sum(followed) / len(followed)
    metrics["policy_version/min"] = float(min(entry.policy_version for entry in figures))
    return metrics


def think_follow(rollouts: Sequence[Rollout]) -> float | None:
    """Fraction of rollouts that think exactly when their problem's mode says so; None when no problem has a mode."""
    judged = [
        follows_mode(rollout.mode, rollout.turns)
        for rollout in rollouts
        if rollout.problem.get("mode") is not None and rollout.turns
    ]
    return sum(judged) / len(judged) if judged else None


def alarms(metrics: dict[str, float]) -> list[str]:
    """One line for each figure that usually means a run is wasted, with what to do; empty when all is well."""
    lines = []
    if metrics.get("truncated_frac", 0.0) > 0.5:
        lines.append(f"{metrics['truncated_frac']:.0%} of completions are truncated: raise max_new_tokens")
    if metrics.get("zero_advantage_frac", 0.0) > 0.8:
        lines.append(
            f"{metrics['zero_advantage_frac']:.0%} of groups have equal rewards: take problems of another difficulty, "
            "or more samples a prompt"
        )
    for kind, (share, what, advice) in _REWARD_FAILURES.items():
        if metrics.get(share, 0.0) > 0.01:
            suffix = f"/{kind}"
            own = [name for name in metrics if name.endswith(suffix) and not name.startswith("workers/")]
            names = sorted(name.removesuffix(suffix) for name in own)
            whose = f" ({', '.join(names)})" if names else ""
            lines.append(f"{metrics[share]:.1%} of rewards {what} and got default_reward: {advice}{whose}")
    return lines

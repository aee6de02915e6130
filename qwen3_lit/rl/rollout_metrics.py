"""What a batch of rollouts looked like, as a flat dict of floats for the loggers, and the alarms that follow."""

from collections.abc import Sequence

import numpy as np

from qwen3_lit.data.chat_template import split_thinking
from qwen3_lit.rl.dynamic_sampling import groups_with_signal
from qwen3_lit.rl.rewards.mode_follow import follows_mode
from qwen3_lit.rl.rollout import Rollout


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the rollouts; rewards that apply to none of them are absent.

    Keys: `reward/mean`, `reward/std`, `reward/<name>/mean|std`, `reward/task/<task>`, `zero_advantage_frac` (groups
    without signal), `truncated_frac`, `forced_frac` (tokens), `completion_tokens/mean|min|max`,
    `completion_tokens/terminated_mean`, `think_follow` (where problems carry a mode), `policy_version/min`.
    """
    if not rollouts:
        return {}
    metrics: dict[str, float] = {}
    totals = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
    metrics["reward/mean"], metrics["reward/std"] = float(totals.mean()), float(totals.std())
    for name in sorted({name for rollout in rollouts for name in rollout.rewards}):
        values = [value for rollout in rollouts if (value := rollout.rewards.get(name)) is not None]
        if values:
            metrics[f"reward/{name}/mean"] = float(np.mean(values))
            metrics[f"reward/{name}/std"] = float(np.std(values))
    tasks = [str(rollout.problem.get("task", "")) for rollout in rollouts]
    for task in sorted(set(tasks)):
        metrics[f"reward/task/{task}"] = float(totals[[entry == task for entry in tasks]].mean())
    signal = groups_with_signal(rollouts)
    metrics["zero_advantage_frac"] = 1.0 - sum(signal.values()) / len(signal)
    metrics["truncated_frac"] = sum(rollout.truncated for rollout in rollouts) / len(rollouts)
    lengths = np.array([len(rollout.completion_ids) for rollout in rollouts], dtype=np.float64)
    metrics["forced_frac"] = 1.0 - sum(sum(rollout.trained_mask) for rollout in rollouts) / float(lengths.sum())
    metrics["completion_tokens/mean"] = float(lengths.mean())
    metrics["completion_tokens/min"] = float(lengths.min())
    metrics["completion_tokens/max"] = float(lengths.max())
    ended = lengths[[not rollout.truncated for rollout in rollouts]]
    if ended.size:
        metrics["completion_tokens/terminated_mean"] = float(ended.mean())
    followed = think_follow(rollouts)
    if followed is not None:
        metrics["think_follow"] = followed
    metrics["policy_version/min"] = float(min(rollout.policy_version for rollout in rollouts))
    return metrics


def think_follow(rollouts: Sequence[Rollout]) -> float | None:
    """Fraction of rollouts that think exactly when their problem's mode says so; None when no problem has a mode."""
    judged = [
        follows_mode(rollout.mode, split_thinking(rollout.turns[-1]["content"])[0])
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
    if metrics.get("timeout_frac", 0.0) > 0.01:
        lines.append(f"{metrics['timeout_frac']:.1%} of rewards time out: raise deadline_seconds or check the verifier")
    return lines

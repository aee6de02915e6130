"""Advantages relative to the group: pure functions on numpy arrays, and the classes a recipe names.

Rewards of one prompt's completions form a group. All arithmetic is in float64: a group whose rewards are equal must
have a standard deviation of zero, and float32 noise would turn it into a huge advantage.

Sources: GRPO, arXiv 2402.03300 section 4.1; Dr. GRPO, arXiv 2503.20783 section 3.2; leave-one-out (RLOO), arXiv
2402.14740 section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rollout import Rollout

ZERO_STD = 1e-6
"""A group whose reward has a standard deviation of at most this carries no signal."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Advantages:
    """Result for N rollouts."""

    values: Floats
    """float64 [N]; exactly 0 in zero-variance groups."""
    zero_variance: NDArray[np.bool_]
    """bool [N], True for rollouts of groups whose rewards are all equal."""


def check_groups(group_ids: Sequence[int], group_size: int | None = None) -> None:
    """Assert that each group is whole and has at least two members.

    A wrong group id does not crash a run, it quietly compares completions of different prompts.

    Raises:
        ValueError: Naming the group.
    """
    ids, counts = np.unique(np.asarray(group_ids), return_counts=True)
    if ids.size == 0:
        raise ValueError("advantages of no rollouts")
    for group, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if count < 2 or (group_size is not None and count != group_size):
            expected = "at least 2" if group_size is None else str(group_size)
            raise ValueError(f"group {group} has {count} rollouts, expected {expected}")


def check_same_prompt(rollouts: Sequence[Rollout]) -> None:
    """Assert that rollouts share a group exactly when they share a prompt's sampling.

    Raises:
        ValueError: Naming the group.
    """
    prompts: dict[int, list[int]] = {}
    for rollout in rollouts:
        if prompts.setdefault(rollout.group_id, rollout.prompt_ids) != rollout.prompt_ids:
            raise ValueError(f"group {rollout.group_id} holds rollouts of different prompts")


def _grouped(rewards: Sequence[float], group_ids: Sequence[int]) -> tuple[Floats, NDArray[np.intp], int]:
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(group_ids),):
        raise ValueError(f"{values.shape} rewards for {len(group_ids)} group ids")
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {values[~np.isfinite(values)][:3]}")
    ids, inverse = np.unique(np.asarray(group_ids), return_inverse=True)
    return values, inverse, ids.size


def _group_mean_std(values: Floats, inverse: NDArray[np.intp], size: int) -> tuple[Floats, Floats, Floats]:
    counts = np.bincount(inverse, minlength=size).astype(np.float64)
    mean = np.bincount(inverse, values, size) / counts
    variance = np.bincount(inverse, (values - mean[inverse]) ** 2, size) / counts
    return mean, np.sqrt(variance), counts


def group_relative_advantages(
    rewards: Sequence[float],
    group_ids: Sequence[int],
    scale: Literal["group", "batch", "none"] = "group",
    group_size: int | None = None,
) -> Advantages:
    """Reward minus the group's mean, over a standard deviation.

    Args:
        rewards: [N].
        group_ids: [N], in any order.
        scale: divide by the group's population std (GRPO), the batch's, or nothing (Dr. GRPO).
        group_size: assert that each group has this many members.
    """
    check_groups(group_ids, group_size)
    values, inverse, size = _grouped(rewards, group_ids)
    mean, std, _ = _group_mean_std(values, inverse, size)
    flat = std <= ZERO_STD
    centred = np.where(flat[inverse], 0.0, values - mean[inverse])
    if scale == "group":
        centred = centred / np.where(flat, 1.0, std)[inverse]
    elif scale == "batch":
        centred = centred / max(float(values.std()), ZERO_STD)
    return Advantages(centred, flat[inverse])


def leave_one_out_advantages(
    rewards: Sequence[float], group_ids: Sequence[int], group_size: int | None = None
) -> Advantages:
    """Reward minus the mean of the group's other members; unlike with a leave-one-out std, nothing is divided."""
    check_groups(group_ids, group_size)
    values, inverse, size = _grouped(rewards, group_ids)
    mean, std, counts = _group_mean_std(values, inverse, size)
    flat = std <= ZERO_STD
    factor = (counts / (counts - 1))[inverse]
    return Advantages(np.where(flat[inverse], 0.0, (values - mean[inverse]) * factor), flat[inverse])


class AdvantageEstimator:
    """Base of the estimators a recipe can name. A variant overrides :meth:`estimate`."""

    def estimate(self, rewards: Sequence[float], group_ids: Sequence[int], group_size: int | None) -> Advantages:
        """Advantages of N rollouts."""
        raise NotImplementedError

    def __call__(self, rollouts: Sequence[Rollout], group_size: int | None = None) -> Advantages:
        """Advantages of the rollouts, also written into them.

        Raises:
            ValueError: If a group is not whole or mixes prompts.
        """
        check_same_prompt(rollouts)
        rewards = [rollout.reward for rollout in rollouts]
        result = self.estimate(rewards, [rollout.group_id for rollout in rollouts], group_size)
        for rollout, value in zip(rollouts, result.values.tolist(), strict=True):
            rollout.advantage = value
        return result


class GroupRelativeAdvantage(AdvantageEstimator):
    """GRPO's advantage.

    Args:
        scale: What the centred reward is divided by: the std of its group, of the batch, or none.
    """

    def __init__(self, scale: Literal["group", "batch", "none"] = "group") -> None:
        if scale not in ("group", "batch", "none"):
            raise UserError(f"GroupRelativeAdvantage: scale: {scale!r} is unknown, expected group, batch or none")
        self.scale: Literal["group", "batch", "none"] = scale

    def estimate(self, rewards: Sequence[float], group_ids: Sequence[int], group_size: int | None) -> Advantages:
        return group_relative_advantages(rewards, group_ids, self.scale, group_size)


class DrGRPOAdvantage(GroupRelativeAdvantage):
    """Centred by the group's mean and not divided: a std weights easy and hard prompts up (Dr. GRPO)."""

    def __init__(self) -> None:
        super().__init__("none")


class LeaveOneOutAdvantage(AdvantageEstimator):
    """Centred by the mean of the other members (RLOO)."""

    def estimate(self, rewards: Sequence[float], group_ids: Sequence[int], group_size: int | None) -> Advantages:
        return leave_one_out_advantages(rewards, group_ids, group_size)

"""Dynamic sampling as a decision without side effects (DAPO, arXiv 2503.14476, section 3.2).

Groups whose rewards are all equal give no gradient. The caller samples, asks :func:`decide_refill` what to keep and how
many prompts to draw next, and stops when nothing more is asked for. The number of refills is bounded: on a set of
problems that are all solved or all hopeless an unbounded loop never returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_lit.errors import UserError
from qwen3_lit.rl.advantage import ZERO_STD
from qwen3_lit.rl.rollout import Rollout


@dataclass
class DynamicSamplingConfig:
    """How zero-variance groups are handled."""

    enabled: bool = True
    """Drop groups whose rewards are all equal and sample other prompts in their place."""
    max_refills: int = 2
    """Times that more prompts are sampled for one step before the step goes on with what there is."""

    def __post_init__(self) -> None:
        if self.max_refills < 0:
            raise UserError(f"DynamicSamplingConfig: max_refills: {self.max_refills} must be 0 or more")


@dataclass(frozen=True)
class RefillDecision:
    """What to do with the groups sampled so far."""

    kept_groups: list[int]
    """Groups to train on, in the order of `rollouts`."""
    dropped_groups: list[int]
    """Groups without signal that are left out."""
    num_prompts_wanted: int
    """Prompts to sample before asking again; 0 means go on."""
    fell_back: bool
    """True when refills ran out and groups without signal fill up the step."""

    def keep(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts of the kept groups."""
        kept = set(self.kept_groups)
        return [rollout for rollout in rollouts if rollout.group_id in kept]


def groups_with_signal(rollouts: Sequence[Rollout]) -> dict[int, bool]:
    """Whether each group's rewards differ (float64 std above 1e-6), in order of first appearance."""
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.group_id, []).append(rollout.reward)
    return {group: bool(np.std(np.asarray(values, dtype=np.float64)) > ZERO_STD) for group, values in rewards.items()}


def decide_refill(
    rollouts: Sequence[Rollout], num_groups: int, refills_done: int, config: DynamicSamplingConfig
) -> RefillDecision:
    """What to keep of all groups sampled for this step, and how many prompts to sample next.

    Keeps the first `num_groups` groups with signal. Too few of them: as many prompts as are missing are asked for
    until `max_refills` is reached; then groups without signal fill the step up (their advantage is 0, so they only
    keep the batch shape), which also holds when no group has any signal.
    """
    signal = groups_with_signal(rollouts)
    if not config.enabled:
        return RefillDecision(list(signal)[:num_groups], list(signal)[num_groups:], 0, False)
    useful = [group for group, differs in signal.items() if differs][:num_groups]
    missing = num_groups - len(useful)
    if missing and refills_done < config.max_refills:
        dropped = [group for group, differs in signal.items() if not differs]
        return RefillDecision(useful, dropped, missing, False)
    filler = [group for group, differs in signal.items() if not differs][:missing]
    kept = set(useful) | set(filler)
    return RefillDecision(
        [group for group in signal if group in kept],
        [group for group in signal if group not in kept],
        0,
        bool(filler),
    )

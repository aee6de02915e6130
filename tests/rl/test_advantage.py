"""Advantages against the formulas written out, and the ways groups go wrong."""

import numpy as np
import pytest

from qwen3_lit.rl.advantage import (
    DrGRPOAdvantage,
    GroupRelativeAdvantage,
    check_groups,
    group_relative_advantages,
    leave_one_out_advantages,
)
from qwen3_lit.rl.rollout import Rollout

REWARDS = [1.0, 0.0, 0.5, 0.25, 0.25, 0.25, 2.0, -1.0, 0.0]
GROUPS = [7, 3, 7, 5, 5, 5, 3, 3, 7]


def slow(scale: str) -> list[float]:
    out = []
    for reward, group in zip(REWARDS, GROUPS, strict=True):
        members = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        mean = sum(members) / len(members)
        std = (sum((r - mean) ** 2 for r in members) / len(members)) ** 0.5
        batch_mean = sum(REWARDS) / len(REWARDS)
        batch = (sum((r - batch_mean) ** 2 for r in REWARDS) / len(REWARDS)) ** 0.5
        divisor = {"group": std, "batch": batch, "none": 1.0}[scale]
        out.append(0.0 if std == 0 else (reward - mean) / divisor)
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative(scale: str) -> None:
    result = group_relative_advantages(REWARDS, GROUPS, scale)  # type: ignore[arg-type]
    np.testing.assert_allclose(result.values, slow(scale), rtol=1e-12)
    assert result.zero_variance.tolist() == [group == 5 for group in GROUPS]


def test_leave_one_out() -> None:
    result = leave_one_out_advantages(REWARDS, GROUPS)
    for index, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        others = [r for i, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)) if g == group and i != index]
        assert result.values[index] == pytest.approx(reward - sum(others) / len(others))


def test_float_noise_is_no_signal() -> None:
    """Rewards equal up to float32 rounding must not be blown up to advantages of +-1."""
    noisy = [0.1 + 0.2, 0.3, float(np.float32(0.3)), 0.3]
    result = group_relative_advantages(noisy, [0] * 4)
    assert result.values.tolist() == [0.0] * 4 and result.zero_variance.all()
    assert not group_relative_advantages([0.3, 0.3, 0.3, 0.30001], [0] * 4).zero_variance.any()


def test_broken_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="group 1 has 1 rollouts"):
        group_relative_advantages([1.0, 0.0, 1.0], [0, 0, 1])
    with pytest.raises(ValueError, match="group 0 has 2 rollouts, expected 4"):
        check_groups([0, 0], 4)
    with pytest.raises(ValueError, match="finite"):
        group_relative_advantages([float("nan"), 1.0], [0, 0])


def rollout(prompt: int, group: int, reward: float) -> Rollout:
    return Rollout([prompt], [1], [-1.0], [True], "stop", "think", group, {"task": "t"}, reward=reward)


def test_estimators_write_into_the_rollouts_and_check_prompts() -> None:
    rollouts = [rollout(1, 0, 1.0), rollout(1, 0, 0.0), rollout(2, 1, 3.0), rollout(2, 1, 1.0)]
    GroupRelativeAdvantage()(rollouts, group_size=2)
    assert [r.advantage for r in rollouts] == [1.0, -1.0, 1.0, -1.0]
    DrGRPOAdvantage()(rollouts)
    assert [r.advantage for r in rollouts] == [0.5, -0.5, 1.0, -1.0]
    rollouts[1].prompt_ids = [9]
    with pytest.raises(ValueError, match="different prompts"):
        GroupRelativeAdvantage()(rollouts)

"""Schedules at the points that matter, for every kind."""

import itertools
import math

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.optim.schedule import ScheduleConfig, check_length, learning_rate_multiplier


def curve(config: ScheduleConfig, total: int = 100) -> list[float]:
    return [learning_rate_multiplier(step, config, total) for step in range(total + 5)]


def test_constant_warms_up_and_stays() -> None:
    assert curve(ScheduleConfig(warmup_steps=4))[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_multiplier(10**9, ScheduleConfig()) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_from_warmup_to_the_end(kind: str) -> None:
    values = curve(ScheduleConfig(kind=kind, warmup_steps=20, min_ratio=0.1))
    assert values[19] == values[20] == 1.0
    assert values[60] == pytest.approx(0.55)
    assert values[100] == values[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[20:]))
    quarter = 0.75 if kind == "linear" else 0.5 * (1 + math.cos(math.pi / 4))
    assert values[40] == pytest.approx(0.1 + 0.9 * quarter)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_then_decays(shape: str, middle: float) -> None:
    values = curve(ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2, decay_shape=shape))
    assert values[9:81] == [1.0] * 72
    assert values[90] == pytest.approx(middle)
    assert values[99] > 0.0
    assert values[100] == pytest.approx(0.0)


def test_own_length_wins_over_the_trainers() -> None:
    config = ScheduleConfig(kind="linear", total_steps=10)
    assert learning_rate_multiplier(5, config, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScheduleConfig(kind="cosin"),
        lambda: ScheduleConfig(decay_shape="round"),
        lambda: ScheduleConfig(warmup_steps=-1),
        lambda: ScheduleConfig(min_ratio=1.5),
        lambda: ScheduleConfig(decay_fraction=0.0),
        lambda: ScheduleConfig(total_steps=0),
        lambda: check_length(ScheduleConfig(kind="linear"), None),
        *(
            lambda kind=kind, warmup=warmup: check_length(ScheduleConfig(kind=kind, warmup_steps=warmup), 10)
            for kind in ("constant", "linear", "cosine", "wsd")
            for warmup in (10, 11)
        ),
        lambda: check_length(ScheduleConfig(warmup_steps=10, total_steps=5), 100),
    ],
)
def test_bad_settings_are_user_errors(make) -> None:
    with pytest.raises(UserError, match="schedule"):
        make()


def test_lengths_that_fit() -> None:
    check_length(ScheduleConfig(warmup_steps=10), None)
    check_length(ScheduleConfig(kind="cosine", warmup_steps=9), 10)
    check_length(ScheduleConfig(kind="wsd", warmup_steps=2000, total_steps=10_000), 2)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 10, 12])
def test_a_step_behind_the_end_never_fails(kind: str, warmup_steps: int) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup_steps, min_ratio=0.2)
    assert learning_rate_multiplier(12, config, 10) == pytest.approx(0.2)

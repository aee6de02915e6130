"""Refills are bounded, and what is kept is what carries signal."""

from qwen3_lit.rl.dynamic_sampling import DynamicSamplingConfig, decide_refill
from qwen3_lit.rl.rollout import Rollout

ON = DynamicSamplingConfig(max_refills=2)


def groups(*rewards: tuple[float, float]) -> list[Rollout]:
    return [
        Rollout([1], [1], [-1.0], [True], "stop", "think", group, {}, reward=value)
        for group, pair in enumerate(rewards)
        for value in pair
    ]


FLAT, GOOD = (1.0, 1.0), (0.0, 1.0)


def test_asks_for_as_many_prompts_as_are_missing() -> None:
    decision = decide_refill(groups(GOOD, FLAT, FLAT, GOOD), 4, 0, ON)
    assert (decision.kept_groups, decision.dropped_groups) == ([0, 3], [1, 2])
    assert decision.num_prompts_wanted == 2 and not decision.fell_back


def test_stops_when_full_and_leaves_the_surplus() -> None:
    decision = decide_refill(groups(GOOD, FLAT, GOOD, GOOD), 2, 1, ON)
    assert decision.kept_groups == [0, 2] and decision.dropped_groups == [1, 3]
    assert decision.num_prompts_wanted == 0
    assert {r.group_id for r in decision.keep(groups(GOOD, FLAT, GOOD, GOOD))} == {0, 2}


def test_falls_back_to_what_there_is_after_the_last_refill() -> None:
    decision = decide_refill(groups(FLAT, FLAT, GOOD, FLAT), 3, 2, ON)
    assert decision.kept_groups == [0, 1, 2] and decision.num_prompts_wanted == 0 and decision.fell_back
    hopeless = decide_refill(groups(FLAT, FLAT), 2, 2, ON)
    assert hopeless.kept_groups == [0, 1] and hopeless.fell_back


def test_a_loop_over_hopeless_problems_ends() -> None:
    sampled, refills = groups(FLAT, FLAT), 0
    while decide_refill(sampled, 2, refills, ON).num_prompts_wanted:
        refills += 1
        assert refills <= ON.max_refills
    assert refills == ON.max_refills


def test_disabled_keeps_everything_asked_for() -> None:
    decision = decide_refill(groups(FLAT, GOOD), 2, 0, DynamicSamplingConfig(enabled=False))
    assert decision.kept_groups == [0, 1] and decision.num_prompts_wanted == 0

"""Evaluation figures against counting by hand."""

from itertools import combinations

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.rl.rewards.format import FormatReward
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.mode_follow import ModeFollowReward
from qwen3_lit.rl.rollout_metrics import alarms, rollout_metrics
from qwen3_lit.rl.scoring import evaluate_problems, pass_at_k

PROBLEMS = [
    {"prompt": "3 + 4?", "answer": "7", "task": "add"},
    {"prompt": "1 + 1?", "answer": "2", "task": "add"},
    {"prompt": "Hello /no_think", "answer": "hi", "task": "chat", "mode": "no_think"},
    {"prompt": "Hello /think", "answer": "hi", "task": "chat", "mode": "think"},
]
SCRIPT = {
    (0, 0): "<think>\na\n</think>\n\n7",
    (0, 1): "<think>\na\n</think>\n\n8",
    (1, 0): "<think>\na\n</think>\n\n3",
    (1, 1): "4",
    (2, 0): "<think>\n\n</think>\n\nhi",
    (2, 1): "<think>\noops\n</think>\n\nhi",
    (3, 0): "<think>\nwell\n</think>\n\nhi",
    (3, 1): "<think>\nwell\n</think>\n\nhi",
}
REWARDS = [MathAnswerReward(tasks=["add"]), FormatReward(), ModeFollowReward()]


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (8, 3)])
def test_pass_at_k_is_the_chance_over_all_subsets(n: int, c: int) -> None:
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="needs at least"):
        pass_at_k(n, c, n + 1)


def test_figures_by_task(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: [SCRIPT[prompt, sample]])
    result = evaluate_problems(engine, tokenizer, PROBLEMS, REWARDS, SamplingParams(n=2), ks=(1, 2), samples_per_task=3)
    add, chat = result.tasks["add"], result.tasks["chat"]
    assert (add.num_problems, add.num_samples, add.accuracy) == (2, 4, 0.25)
    assert add.pass_at_k == {1: 0.25, 2: 0.5}
    assert add.rewards == {"math_answer": 0.25, "format": 0.75} and add.think_follow is None
    assert (chat.accuracy, chat.pass_at_k, chat.think_follow) == (None, {}, 0.75)
    assert chat.reward == pytest.approx((3 * 1.0 + 0.5) / 4)
    assert result.overall.accuracy == result.accuracy == 0.25 and result.overall.think_follow == 0.75
    assert len(result.samples) == 6 and result.samples[0]["correct"] is True
    metrics = rollout_metrics(result.rollouts)
    assert metrics["reward/format/mean"] == pytest.approx(7 / 8) and metrics["think_follow"] == 0.75
    assert metrics["zero_advantage_frac"] == 0.25 and metrics["truncated_frac"] == 0.0


def test_a_mode_can_be_forced_on_all_problems(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: ["7"])
    result = evaluate_problems(
        engine, tokenizer, PROBLEMS[:2], REWARDS, SamplingParams(), mode="no_think", mode_switch="hard"
    )
    assert all(tokenizer.decode(prompt).endswith("</think>\n\n") for prompt in engine.prompts)
    assert result.overall.think_follow == 1.0 and result.accuracy == 0.5


def test_a_block_behind_an_empty_one_does_not_obey(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: ["<think>\n\n</think>\n\n<think>\nLet me really think\n</think>\n\nhi"])
    result = evaluate_problems(engine, tokenizer, PROBLEMS[2:], REWARDS, SamplingParams())
    assert [rollout.rewards["mode_follow"] for rollout in result.rollouts] == [0.0, 1.0]
    assert result.overall.think_follow == 0.5


def test_unusable_requests_are_refused(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: ["7"])
    with pytest.raises(UserError, match="no problems"):
        evaluate_problems(engine, tokenizer, [], REWARDS, SamplingParams())
    with pytest.raises(UserError, match="pass@4"):
        evaluate_problems(engine, tokenizer, PROBLEMS, REWARDS, SamplingParams(n=2), ks=(4,))


def test_alarms_say_what_to_do() -> None:
    assert alarms({"truncated_frac": 0.1, "zero_advantage_frac": 0.3, "timeout_frac": 0.0}) == []
    lines = alarms({"truncated_frac": 0.9, "zero_advantage_frac": 0.9, "timeout_frac": 0.5})
    assert len(lines) == 3 and "max_new_tokens" in lines[0]


@pytest.mark.parametrize(
    ("failure", "share"),
    [("timeouts", "timeout_frac"), ("errors", "error_frac"), ("oom", "oom_frac"), ("crashes", "crash_frac")],
)
def test_each_kind_of_failed_reward_raises_an_alarm_that_names_the_reward(failure: str, share: str) -> None:
    metrics = {f"judge/{failure}": 90.0, f"math/{failure}": 1.0, f"workers/judge/{failure}": 90.0}
    (line,) = alarms({share: 0.02, **metrics})
    assert line.startswith("2.0% of rewards") and line.endswith("(judge, math)")
    assert alarms({share: 0.01, **metrics}) == []

"""Phases on two gloo ranks against one process: the same gradients, and no rank waits for the other for ever."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import save_hf
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.rl.rewards.reward_model import load_score_head

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: str) -> Path:
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    return tmp_path


@pytest.fixture
def run(run_ranks: Callable[..., list[dict[str, Any]]]) -> Run:
    # A rank that waits for ever shows as a timeout.
    return partial(run_ranks, Path(__file__).with_name("module_rank.py"), timeout=90)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.slow
def test_balance_losses_weigh_the_same_on_any_number_of_ranks(run: Run, folder: Path) -> None:
    one, two = run("balance", 1, folder)[0], run("balance", 2, folder)[0]
    assert_same(two["gradients"], one["gradients"])


@pytest.mark.slow
def test_a_rank_may_refill_while_the_other_has_its_groups(run: Run, folder: Path) -> None:
    first, second = run("refill", 2, folder)
    assert (first["groups"], second["groups"]) == (4, 8), "one refill takes the four spare problems"
    assert_same(second["gradients"], first["gradients"])
    # What is shown is of both: rank 0 gives every second completion a point, rank 1 none.
    assert first["logged"] == second["logged"]
    shown = {name: values[0] for name, values in first["logged"].items()}
    assert (shown["reward"], shown["rollout/zero_advantage_frac"], shown["rollout/groups_trained"]) == (0.25, 0.5, 8)


@pytest.mark.slow
def test_on_policy_ranks_run_the_same_number_of_micro_batches(run: Run, folder: Path) -> None:
    teacher = ModelConfig(
        vocab_size=300,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
    )
    save_hf(Qwen3(teacher), teacher, folder / "teacher", tokenizer_dir=folder / "tokenizer")
    first, second = run("distill", 2, folder)
    assert first["forwards"] == second["forwards"] > 1
    assert first["logged"] == second["logged"]
    assert_same(second["gradients"], first["gradients"])
    # A rank with fewer rollouts than micro-batches adds rows that train nothing.
    assert first["trained"] == [(4, 1)] * 3
    assert second["trained"] == [(4, 1), (4, 1), (0, 0)]


@pytest.mark.slow
def test_a_reward_model_trains_sharded_as_in_one_plain_process(run: Run, folder: Path) -> None:
    plain = run("reward_plain", 1, folder)[0]
    assert plain["gradients"][0]["score_head.weight"].norm() > 0
    assert plain["gradients"][1]["model.layers.0.mlp.gate.weight"].norm() > 0
    for ranks in (1, 2):
        for sharded in run("reward", ranks, folder):
            for ours, theirs in zip(sharded["gradients"], plain["gradients"], strict=True):
                assert_same(ours, theirs)
            for name in ("train/loss", "train/accuracy"):
                assert sharded["logged"][name] == pytest.approx(plain["logged"][name], rel=1e-4)
        assert load_score_head(folder / f"fsdp2_{ranks}", 16).norm() > 0

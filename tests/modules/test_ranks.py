"""Phases on two gloo ranks against one process: the same gradients, and no rank waits for the other for ever."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_lit.data.tokenizer import train_tokenizer

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(["the cat sat on the mat, 1 + 2 = 3"] * 20, 290, tmp_path / "tokenizer")
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

"""fsdp2 on two gloo ranks against one process: losses, gradient norms, accumulation, save and resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_lit.distributed.checkpoint import is_complete

Run = Callable[[str, int, Path], list[dict[str, Any]]]


@pytest.fixture
def run(run_ranks: Callable[..., list[dict[str, Any]]]) -> Run:
    return partial(run_ranks, Path(__file__).with_name("fsdp2_rank.py"))


def close(ours: list[float], theirs: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_equal_one(run: Run, tmp_path: Path) -> None:
    one, (two, other) = run("equal", 1, tmp_path)[0], run("equal", 2, tmp_path)
    for kind in ("automatic", "manual", "muon"):
        assert two[kind]["norms"] == other[kind]["norms"]
        close(two[kind]["norms"], one[kind]["norms"])
        assert max(one[kind]["norms"]) > 0.5, "the clip has to bite for the comparison to mean anything"
        # Root and two blocks, reduced once an optimizer step: never on accumulation micro-steps.
        assert two[kind]["units"] == 3
        assert two[kind]["reductions"] == 3 * len(two[kind]["norms"])
        assert two[kind]["micro_steps"] == 2 * len(two[kind]["norms"])
    close(two["automatic"]["losses"], one["automatic"]["losses"])
    for name, value in one["automatic"]["weights"].items():
        torch.testing.assert_close(two["automatic"]["weights"][name], value, rtol=1e-3, atol=1e-4)
    for name, value in one["muon"]["weights"].items():
        # Newton-Schulz runs in bf16.
        torch.testing.assert_close(two["muon"]["weights"][name], value, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_save_and_resume_on_the_same_and_another_number_of_ranks(run: Run, tmp_path: Path) -> None:
    results = run("save", 2, tmp_path)
    for result in results:
        # Bit for bit what the uninterrupted run does, each rank's own random numbers included.
        assert result["second"]["losses"] == result["whole"]["losses"][8:]
        assert result["second"]["norms"] == result["whole"]["norms"][4:]
        assert result["second"]["draws"] == result["whole"]["draws"][8:]
    assert results[0]["whole"]["draws"] != results[1]["whole"]["draws"]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step=4.ckpt", "last.ckpt"}, "the checkpoint of step 2 is removed, nothing incomplete is left"
    assert all(is_complete(tmp_path / "checkpoints" / name) for name in names)
    single = run("resume", 1, tmp_path)[0]
    close(single["second"]["losses"], results[0]["whole"]["losses"][8:])
    close(single["second"]["norms"], results[0]["whole"]["norms"][4:])


@pytest.mark.slow
def test_gathered_parameters_let_ranks_run_apart(run: Run, tmp_path: Path) -> None:
    results = run("gathered", 2, tmp_path)
    assert all(result["equal"] for result in results)
    assert results[0]["norm"] == results[1]["norm"] > 0

"""Fixed seeds, few threads and poisoned memory for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU their numerics run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    # Lightning leaves the seed of a run in the environment, where every later child process finds it.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` and its relatives return NaN (floats) or a huge number (integers): unwritten memory shows.

    Kernels that allocate outputs this way must write every element.
    """

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8):
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _original=original, **kwargs: poison(_original(*args, **kwargs)))
    yield


@pytest.fixture
def run_ranks() -> Callable[..., list[dict[str, Any]]]:
    """Runs a scenario of a script in one process a rank; what each rank left, in their order.

    The script takes rank, world size, folder and scenario, and writes ``{scenario}_{world size}_{rank}.pt``.
    """

    def run(script: Path, scenario: str, world_size: int, folder: Path, timeout: float = 240) -> list[dict[str, Any]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = {**os.environ, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world_size), str(folder), scenario],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                output, _ = process.communicate(timeout=timeout)
                assert process.returncode == 0, output[-4000:]
        finally:
            for process in processes:
                process.kill()
        return [torch.load(folder / f"{scenario}_{world_size}_{rank}.pt") for rank in range(world_size)]

    return run

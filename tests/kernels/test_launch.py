"""Which table of launch parameters a GPU takes."""

import pytest
import torch
from qwen3_kernels.launch import generation


@pytest.mark.parametrize(
    "capability, expected",
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((11, 0), 100), ((12, 0), 80), ((12, 1), 80)],
)
def test_a_gpu_with_little_shared_memory_never_takes_the_table_of_a_large_one(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert generation.__wrapped__() == expected


def test_the_interpreter_takes_the_table_that_is_tuned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generation.__wrapped__() == 90

"""Choosing an implementation: by preference, by force, never silently; its device, and the type that autocast wants."""

import contextlib
import logging

import pytest
import torch
from qwen3_kernels import dispatch
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def operation(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch._say_once.cache_clear()
    dispatch.register("op", "fast", lambda: "fast", lambda t: "it needs cuda" if t.device.type == "cpu" else None)
    dispatch.register("op", "plain", lambda: "plain")


def test_the_first_that_fits_runs_and_the_log_says_why(operation, caplog):
    with caplog.at_level(logging.INFO, "qwen3_kernels.dispatch"):
        for _ in range(3):
            assert dispatch.choose("op", torch.zeros(1))() == "plain"
    assert [r.message for r in caplog.records] == ["op runs as 'plain' on cpu (not fast: it needs cuda)"]


def test_forcing_what_does_not_fit_is_an_error(operation):
    with pytest.raises(ValueError, match="'fast' was asked for, but it needs cuda"):
        dispatch.choose("op", torch.zeros(1), "fast")
    with dispatch.prefer("op", "fast"), pytest.raises(ValueError, match="it needs cuda"):
        dispatch.choose("op", torch.zeros(1))
    assert dispatch.choose("op", torch.zeros(1))() == "plain"
    with pytest.raises(ValueError, match="no implementation 'none'"), dispatch.prefer("op", "none"):
        pass


@pytest.fixture
def devices_entered(operation, monkeypatch):
    """The GPUs that were made current around a call, where number 0 was, by a machine that seems to have two."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(str(which))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


def test_a_tensor_on_another_gpu_makes_that_one_current(devices_entered):
    with FakeTensorMode():
        here, there = torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1")
    assert dispatch.choose("op", here)() == "fast" and devices_entered == []
    function = dispatch.choose("op", there)
    assert devices_entered == []
    assert function() == "fast" and devices_entered == ["cuda:1"]
    assert dispatch.choose("op", there, "plain")() == "plain" and devices_entered == ["cuda:1"] * 2
    assert dispatch.choose("op", torch.empty(1))() == "plain" and len(devices_entered) == 2


def test_fake_tensors_and_compiled_code_get_the_bare_function(operation, monkeypatch):
    fast = dispatch._registry["op"]["fast"].function
    with FakeTensorMode():
        there = torch.empty(1, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert dispatch.choose("op", there) is fast
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.choose("op", there) is fast


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprob", "grouped_experts"])
@pytest.mark.skipif(torch.cuda.is_available() or not dispatch.HAS_TRITON, reason="runs in Triton's interpreter")
def test_kernels_of_three_float_types_leave_float64_to_others(op):
    facts = {"expert_width": 8} if op == "grouped_experts" else {}
    with dispatch.interpreted():
        chosen = {d: dispatch.choose(op, torch.zeros(1, 8, dtype=d), **facts) for d in (torch.float32, torch.float64)}
    assert chosen[torch.float32] is dispatch._registry[op]["triton"].function
    assert chosen[torch.float64] is not dispatch._registry[op]["triton"].function


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_gives_its_type_to_all_but_float64(compiled):
    cast = torch.compile(dispatch.autocast, fullgraph=True, backend="eager") if compiled else dispatch.autocast
    single, double = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64)
    assert cast(single).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cast(single).dtype == torch.bfloat16 and cast(double).dtype == torch.float64
        (grad,) = torch.autograd.grad(cast(single).sum(), single)
        with torch.autocast("cpu", enabled=False):
            assert cast(single).dtype == torch.float32
    assert grad.dtype == torch.float32
    assert dispatch.autocast(torch.ones(2, device="meta")).dtype == torch.float32

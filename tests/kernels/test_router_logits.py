"""Router logits: float32 sums everywhere, and what the two bfloat16 halves of a gradient keep."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from qwen3_kernels import router_logits
from qwen3_kernels.router_logits import in_two_halves


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_summed_in_float32(x_dtype, weight_dtype):
    x_TD, weight_ED = torch.randn(5, 64).to(x_dtype), torch.randn(7, 64).to(weight_dtype)
    logits_TE = router_logits(x_TD, weight_ED)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), x_TD.double() @ weight_ED.double().t(), rtol=1e-5, atol=1e-5)


def test_two_halves_keep_sixteen_bits():
    x_TE = torch.randn(64, 32) * 10.0 ** torch.randint(-6, 3, (64, 1))
    high, low = in_two_halves(x_TE).double().view(64, 2, 32).unbind(1)
    assert ((high + low - x_TE.double()).abs() <= x_TE.double().abs() * 2.0**-16).all()
    assert ((high - x_TE.double()).abs() > x_TE.double().abs() * 2.0**-12).any()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_a_compiler_leaves_the_two_halves_as_they_are():
    x_TE = torch.randn(64, 32) * 10.0 ** torch.randint(-6, 3, (64, 1))
    assert torch.equal(torch.compile(in_two_halves, fullgraph=True)(x_TE), in_two_halves(x_TE))


@pytest.mark.parametrize(
    "device, dtype",
    [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    + [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autocast_changes_neither_logits_nor_gradients(device, dtype, backend):
    """Forward and, as manual optimization runs it, backward."""
    x_TD, weight_ED = (torch.randn(rows, 64, device=device).to(dtype).requires_grad_() for rows in (50, 16))
    upstream_TE = torch.randn(50, 16, device=device)
    function = torch.compile(router_logits, fullgraph=True, backend=backend) if backend else router_logits
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logits_TE = function(x_TD, weight_ED)
            results.append([logits_TE, *torch.autograd.grad(logits_TE, (x_TD, weight_ED), upstream_TE)])
    for plain, under_autocast in zip(*results, strict=True):
        assert under_autocast.dtype == plain.dtype and torch.equal(under_autocast, plain)
    logits, *_ = double_precision(x_TD.detach(), weight_ED.detach(), upstream_TE)
    torch.testing.assert_close(results[1][0].double(), logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_good_to_float32_and_only_those_asked_for(wanted, dtype):
    x_TD, weight_ED = (
        torch.randn(rows, 64).to(dtype).requires_grad_(w) for rows, w in zip((50, 16), wanted, strict=True)
    )
    upstream_TE = torch.randn(50, 16)
    router_logits(x_TD, weight_ED).backward(upstream_TE)
    truth = double_precision(x_TD.detach(), weight_ED.detach(), upstream_TE)[1:]
    for leaf, expected, want in zip((x_TD, weight_ED), truth, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            error = (leaf.grad.double() - expected).norm() / expected.norm()
            assert leaf.grad.dtype == dtype and error < (2.0**-8 if dtype == torch.bfloat16 else 1e-6)


def double_precision(x_TD, weight_ED, upstream_TE):
    x, weight = x_TD.double().requires_grad_(), weight_ED.double().requires_grad_()
    logits = F.linear(x, weight)
    return logits, *torch.autograd.grad(logits, (x, weight), upstream_TE.double())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 77, 32768])
def test_bfloat16_on_a_gpu_is_as_good_as_float32(tokens):
    x_TD = torch.randn(tokens, 2048, device="cuda").bfloat16().requires_grad_()
    weight_ED = (torch.randn(128, 2048, device="cuda") * 0.02 + 0.05).bfloat16().requires_grad_()
    upstream_TE = torch.randn(tokens, 128, device="cuda")
    upstream_TE -= upstream_TE.mean(-1, keepdim=True)  # as behind a softmax
    logits_TE = router_logits(x_TD, weight_ED)
    grads = torch.autograd.grad(logits_TE, (x_TD, weight_ED), upstream_TE)
    logits, *expected = double_precision(x_TD.detach(), weight_ED.detach(), upstream_TE)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), logits, rtol=1e-5, atol=1e-4)
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == torch.bfloat16
        # The result's own rounding, 2**-9 of it, and little else.
        error = (grad.double() - truth).norm()
        assert error <= 2.0**-9 * truth.norm() + 1e-12


@pytest.mark.gpu
def test_compiles_as_one_graph():
    x_TD = torch.randn(300, 256, device="cuda").bfloat16().requires_grad_()
    weight_ED = torch.randn(16, 256, device="cuda").bfloat16().requires_grad_()
    upstream_TE = torch.randn(300, 16, device="cuda")
    results = []
    for function in (router_logits, torch.compile(router_logits, fullgraph=True)):
        logits_TE = function(x_TD, weight_ED)
        results.append([logits_TE, *torch.autograd.grad(logits_TE, (x_TD, weight_ED), upstream_TE)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)

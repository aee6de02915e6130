"""QK-norm and RoPE on Triton against the reference: interpreter numerics here, real shapes on a GPU."""

import contextlib

import pytest
import torch
from qwen3_kernels import dispatch, qk_norm_rope, reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from qwen3_kernels import qk_norm_rope_backward_triton as backward  # noqa: E402
from qwen3_kernels import qk_norm_rope_triton as fast  # noqa: E402
from qwen3_kernels.rotation_triton import cos_sin  # noqa: E402

INPUTS = 4  # q, k and the two weights take gradients
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter was not chosen at import")


@contextlib.contextmanager
def on_triton():
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(dispatch.interpreted())
        stack.enter_context(dispatch.prefer("qk_norm_rope", "triton"))
        yield


def arguments(tokens, heads, groups, width, *, dtype=torch.float32, device="cpu", largest=100_000, fused=False):
    if fused:
        qkv = torch.randn(tokens, (heads + 2 * groups) * width, device=device, dtype=dtype)
        q, k, _ = qkv.split([heads * width, groups * width, groups * width], dim=-1)
        q, k = q.unflatten(-1, (heads, width)), k.unflatten(-1, (groups, width))
    else:
        q = torch.randn(tokens, heads, width, device=device, dtype=dtype)
        k = torch.randn(tokens, groups, width, device=device, dtype=dtype)
    weights = (torch.rand(width, device=device).to(dtype) + 0.5 for _ in range(2))
    position = torch.randint(0, largest, (tokens,), device=device)
    inv_freq = 1.0 / 10_000.0 ** (torch.arange(0, width, 2, device=device).float() / width)
    return q, k, *weights, position, inv_freq, 1.25, 1e-6


def both_ways(function, args, upstream):
    leaves = [x.detach().requires_grad_() for x in args[:INPUTS]]
    out = function(*leaves, *args[INPUTS:])
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def upstream_of(args):
    return [torch.randn(x.shape, device=x.device, dtype=x.dtype) for x in args[:2]]


@cpu_only
@pytest.mark.parametrize(
    "tokens, heads, groups, width", [(5, 4, 2, 16), (1, 1, 1, 2), (6, 3, 5, 12), (9, 5, 1, 80), (3, 2, 2, 96)]
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_outputs_and_gradients_equal_the_reference(tokens, heads, groups, width, fused):
    args = arguments(tokens, heads, groups, width, fused=fused)
    upstream = upstream_of(args)
    with on_triton():
        ours = both_ways(qk_norm_rope, args, upstream)
    for result, expected in zip(ours, both_ways(reference.qk_norm_rope, args, upstream), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)
        assert result.is_contiguous()


@cpu_only
@pytest.mark.parametrize("block_heads, ahead", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.usefixtures("poisoned_empty")
def test_several_tiles_a_token_and_several_tokens_a_program(monkeypatch, block_heads, ahead):
    """Heads that do not fill the last tile, fewer tiles than are loaded ahead, tokens left over in the last turn."""
    monkeypatch.setitem(backward.PROGRAMS, 90, 4)
    for table, blocks in ((fast.FORWARD, {}), (backward.BACKWARD, {"AHEAD": ahead})):
        monkeypatch.setitem(table, 90, table[90]._replace(blocks={"BLOCK_H": block_heads, **blocks}))
    args = arguments(10, 6, 3, 128)
    upstream = upstream_of(args)
    with on_triton():
        ours = both_ways(qk_norm_rope, args, upstream)
    for result, expected in zip(ours, both_ways(reference.qk_norm_rope, args, upstream), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


@cpu_only
def test_wide_heads_and_packed_copies():
    args = list(arguments(3, 18, 9, 264))  # tiles of eight heads forward, of two backward
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)  # heads of a token lie apart
    upstream = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in upstream_of(args)]
    with on_triton():
        ours = both_ways(qk_norm_rope, args, upstream)
    for result, expected in zip(ours, both_ways(reference.qk_norm_rope, args, upstream), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


@triton.jit
def _cos_sin_kernel(angle_ptr, cos_ptr, sin_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    cos, sin = cos_sin(tl.load(angle_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("largest", [1.0, 100.0, 2.0**20])
def test_cosine_and_sine_of_large_angles(device, largest):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter was not chosen at import")
    quarter_turns = torch.arange(-2_048, 2_048, device=device) * (torch.pi / 4)
    angle = torch.cat(((torch.rand(1 << 16, device=device) * 2 - 1) * largest, quarter_turns))
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    _cos_sin_kernel[angle.numel() // 4_096,](angle, cos, sin, SIZE=4_096)
    assert (cos - angle.double().cos()).abs().max() < 1.2e-7
    assert (sin - angle.double().sin()).abs().max() < 1.2e-7


@cpu_only
def test_long_positions_keep_their_angle():
    args = list(arguments(4, 1, 1, 16))
    args[4] = torch.tensor([1_048_576, 1_048_575, 131_072, 0])
    with on_triton():
        ours = qk_norm_rope(*args)
    for result, expected in zip(ours, reference.qk_norm_rope(*args), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@cpu_only
@pytest.mark.usefixtures("poisoned_empty")
def test_no_token_gives_zero_weight_gradients():
    args = arguments(0, 4, 2, 8)
    with on_triton():
        q, k, *grads = both_ways(qk_norm_rope, args, upstream_of(args))
    assert q.shape == (0, 4, 8) and k.shape == (0, 2, 8)
    assert [g.abs().sum().item() for g in grads] == [0.0] * 4


@cpu_only
def test_one_output_alone_and_float64():
    args = arguments(3, 2, 1, 8)
    leaves = [x.detach().requires_grad_() for x in args[:INPUTS]]
    with on_triton():
        grads = torch.autograd.grad(qk_norm_rope(*leaves, *args[INPUTS:])[1].sum(), leaves)
    assert grads[0].abs().sum() == 0 and grads[1].abs().sum() > 0
    with on_triton(), pytest.raises(ValueError, match="q is torch.float64"):
        qk_norm_rope(args[0].double(), *args[1:])
    with pytest.raises(ValueError, match="width 7"):
        qk_norm_rope(args[0][..., :7], *args[1:])


@cpu_only
def test_definition_is_clean_for_the_compiler():
    args = [x.requires_grad_() if i < INPUTS else x for i, x in enumerate(arguments(3, 2, 1, 8))]
    torch.library.opcheck(torch.ops.qwen3_kernels.qk_norm_rope.default, tuple(args))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 64, 792, 793, 4_097, 32_768, 131_072])
def test_gpu_error_is_no_larger_than_eager_bfloat16(tokens, fused):
    args = arguments(tokens, 32, 4, 128, dtype=torch.bfloat16, device="cuda", largest=1_000_000, fused=fused)
    upstream = upstream_of(args)
    with on_triton():
        ours = both_ways(qk_norm_rope, args, upstream)
    eager = both_ways(reference.qk_norm_rope, args, upstream)
    single = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    truth = both_ways(reference.qk_norm_rope, single, [g.float() for g in upstream])
    for result, bf16, exact in zip(ours, eager, truth, strict=True):
        error, allowed = ((x.float() - exact).norm() for x in (result, bf16))
        assert error <= 1.5 * allowed + 1e-5 * exact.norm()


@gpu
@pytest.mark.parametrize(
    "heads, groups, width", [(6, 3, 64), (5, 1, 80), (6, 3, 96), (40, 8, 128), (64, 4, 128), (6, 3, 256)]
)
def test_gpu_other_sizes_in_float32(heads, groups, width):
    args = arguments(1_500, heads, groups, width, device="cuda")
    upstream = upstream_of(args)
    with on_triton():
        ours = both_ways(qk_norm_rope, args, upstream)
    for result, expected in zip(ours, both_ways(reference.qk_norm_rope, args, upstream), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@gpu
def test_gpu_is_deterministic():
    args = arguments(16_384, 32, 4, 128, dtype=torch.bfloat16, device="cuda")
    upstream = upstream_of(args)
    with on_triton():
        first = both_ways(qk_norm_rope, args, upstream)
        for _ in range(20):
            again = both_ways(qk_norm_rope, args, upstream)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@gpu
def test_gpu_compiles_whole_and_is_captured():
    args = arguments(2_048, 32, 4, 128, dtype=torch.bfloat16, device="cuda")
    upstream = upstream_of(args)
    with on_triton():
        expected = both_ways(qk_norm_rope, args, upstream)
        compiled = both_ways(torch.compile(fast.run, fullgraph=True), args, upstream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fast.run(*args)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected[:2], strict=True))
    leaves = [x.detach().requires_grad_() if i < INPUTS else x for i, x in enumerate(args)]
    torch.library.opcheck(torch.ops.qwen3_kernels.qk_norm_rope.default, tuple(leaves))

"""The fused attention kernels against the reference: in the interpreter in float32, on a GPU in bfloat16."""

from types import SimpleNamespace

import pytest
import torch
from qwen3_kernels import dispatch, dual_chunk_attention, dual_chunk_attention_flash, reference
from torch.utils._python_dispatch import TorchDispatchMode

if not dispatch.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from qwen3_kernels import dual_chunk_attention_triton
from qwen3_kernels.dual_chunk_tiles_triton import Tiles
from qwen3_kernels.launch import Launch

ON_GPU = torch.cuda.is_available()
interpreter = pytest.mark.skipif(ON_GPU, reason="the interpreter is for machines without a GPU")


def frequencies(width, base=1e4):
    return 1.0 / base ** (torch.arange(0, width, 2).double() / width).float()


def inputs(num_rows, heads=2, groups=1, width=16, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(num_rows, h, width, dtype=dtype, device=device, generator=generator)
        for h in (heads, groups, groups)
    ]


def bounds(lengths, padding=0, tail=0, device="cpu"):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends, *[ends[-1]] * padding], dtype=torch.int32, device=device), ends[-1] + tail


def with_gradients(function, qkv, grad_out):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad_out)


def assert_equals_reference(
    lengths, chunks=(None, None), *, heads=2, groups=1, width=16, padding=0, tail=0, scale=None
):
    cu_seqlens, num_rows = bounds(lengths, padding, tail)
    qkv = inputs(num_rows, heads, groups, width)
    rest = (cu_seqlens, max(lengths), frequencies(width, 100.0), *chunks, scale)
    grad_out = torch.randn(num_rows, heads, width)
    expected = with_gradients(lambda *x: reference.dual_chunk_attention(*x, *rest), qkv, grad_out)
    with dispatch.interpreted():
        got = with_gradients(lambda *x: dual_chunk_attention_triton.run(*x, *rest), qkv, grad_out)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return got


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=str)
def tile(request, monkeypatch):
    blocks = {"BM": request.param[0], "BN": request.param[1]}
    monkeypatch.setattr(dual_chunk_attention_triton, "FLOAT32", Launch(blocks, num_warps=4, num_stages=1))


@pytest.fixture
def small_tile(monkeypatch):
    monkeypatch.setattr(dual_chunk_attention_triton, "FLOAT32", Launch({"BM": 16, "BN": 16}, 4, 1))


@interpreter
@pytest.mark.parametrize("lengths", [[1], [40, 1, 23]], ids=str)
def test_plain_attention_and_gradients(lengths, tile, poisoned_empty):
    assert_equals_reference(lengths, padding=2)


@interpreter
def test_chunks_that_are_no_multiple_of_a_tile(tile, poisoned_empty):
    s = 18
    assert_equals_reference([1, s - 1, s + 1, 2 * s + 1, 3 * s + 5], (s + 3, 3), padding=1)


@interpreter
@pytest.mark.parametrize("length", [15, 16, 17, 33, 48, 49], ids=str)
def test_lengths_around_chunk_borders(length, small_tile, poisoned_empty):
    assert_equals_reference([length], (20, 4))


@interpreter
@pytest.mark.parametrize("chunk_size, local_size", [(12, 1), (20, 14), (9, 8)])
def test_short_chunks_and_wide_windows(chunk_size, local_size, small_tile):
    assert_equals_reference([12 * (chunk_size - local_size) // 4 + 1], (chunk_size, local_size))


@interpreter
@pytest.mark.parametrize("heads, groups, width", [(1, 1, 16), (4, 2, 24), (3, 3, 40)])
def test_head_counts_and_widths(heads, groups, width, small_tile, poisoned_empty):
    assert_equals_reference([21, 13], (14, 3), heads=heads, groups=groups, width=width, scale=0.3)


@interpreter
@pytest.mark.parametrize("chunks", [(None, None), (14, 3)])
def test_rows_past_the_last_document_are_zero(chunks, small_tile, poisoned_empty):
    for x in assert_equals_reference([9, 25], chunks, tail=21, padding=1):
        assert torch.equal(x[34:], torch.zeros_like(x[34:]))


@interpreter
def test_strided_inputs_and_an_empty_row(small_tile, poisoned_empty):
    both = torch.randn(20, 3, 16)
    q, k, v = both[:, :2], both[:, 2:], torch.randn(20, 16, 2)[:, :, 1:].transpose(1, 2)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
    with dispatch.interpreted(), dispatch.prefer("dual_chunk_attention", "triton"):
        out = dual_chunk_attention(q, k, v, cu_seqlens, 20)
        empty = dual_chunk_attention(q[:0], k[:0], v[:0], torch.zeros(3, dtype=torch.int32), 0)
    torch.testing.assert_close(out, dual_chunk_attention(q, k, v, cu_seqlens, 20), rtol=1e-4, atol=1e-5)
    assert empty.shape == (0, 2, 16)


@interpreter
def test_another_document_changes_no_bit(small_tile):
    cu_seqlens, num_rows = bounds([19, 21])
    q, k, v = inputs(num_rows)
    with dispatch.interpreted():
        run = dual_chunk_attention_triton.run
        before = run(q, k, v, cu_seqlens, 21, frequencies(16), 12, 2, None)
        for x in (q, k, v):
            x[:19] += 1.0
        after = run(q, k, v, cu_seqlens, 21, frequencies(16), 12, 2, None)
    assert torch.equal(before[19:], after[19:])


@interpreter
@pytest.mark.parametrize("chunk_len", [None, 10])
@pytest.mark.parametrize("keys", [False, True])
def test_tiles_cover_every_row_once_by_falling_work(chunk_len, keys):
    lengths, tile = [5, 0, 33, 16, 1, 0, 70], 16
    cu_seqlens, num_rows = bounds(lengths, padding=70, tail=9)
    tiles = Tiles(cu_seqlens, num_rows, chunk_len, tile, keys=keys)
    total = int(tiles.table_N3[tiles.most, 0])
    covered, work = [], []
    for row, begin, end in tiles.table_N3[:total].tolist():
        document = [b for b in cu_seqlens.tolist() if b <= row][-1]
        assert begin == (document if row < sum(lengths) else -1)
        stop = min(end, row + tile)
        if chunk_len is not None:
            stop = min(stop, document + ((row - document) // chunk_len + 1) * chunk_len)
        covered += range(row, stop)
        work.append(end - row if keys else row - document)
    assert sorted(covered) == list(range(num_rows))
    assert total <= tiles.most
    slack = tile if chunk_len is None else tile + chunk_len  # works are ordered by tiles, not by rows
    assert all(later <= sooner + slack for sooner, later in zip(work, work[1:], strict=False))


def test_what_does_not_fit_says_why():
    q, k, v = inputs(4, width=12)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="head width of 12"):
        dual_chunk_attention(q, k, v, cu_seqlens, 4, backend="triton")
    with pytest.raises(ValueError, match="positive"):
        dual_chunk_attention_triton.run(q, k, v, cu_seqlens, 4, None, None, None, -1.0)
    with pytest.raises(ValueError, match="'flash' was asked for, but"):
        dual_chunk_attention(q, k, v, cu_seqlens, 4, backend="flash")


@pytest.mark.parametrize(
    "version, capability, width, chunked, deterministic, reason",
    [
        (None, (9, 0), 128, False, False, "none of the flash-attn packages"),
        (4, (9, 0), 128, False, False, None),
        (4, (9, 0), 128, True, False, "no dual chunks"),
        (4, (8, 0), 128, False, False, "compute capability 8.0"),
        (3, (10, 0), 128, False, False, "compute capability 10.0"),
        (4, (9, 0), 256, False, False, None),
        (4, (10, 0), 256, False, False, "a head width of 256"),
        (4, (9, 0), 16, False, False, "a head width of 16"),
        (2, (8, 0), 100, False, False, "a head width of 100"),
        (4, (9, 0), 128, False, True, "use_deterministic_algorithms"),
        (4, (12, 0), 128, False, True, "use_deterministic_algorithms"),
        (4, (10, 0), 128, False, True, None),
        (3, (9, 0), 128, False, True, None),
    ],
)
def test_flash_says_why_it_does_not_fit(monkeypatch, version, capability, width, chunked, deterministic, reason):
    monkeypatch.setattr(dual_chunk_attention_flash, "VERSION", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    on_gpu = SimpleNamespace(shape=(4, 2, width), dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda"))
    said = dual_chunk_attention_flash.unfit(on_gpu, chunked=chunked)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize("operator", ["triton", "flash"])
def test_the_logsumexp_has_no_gradient_and_costs_none(operator, small_tile):
    """Of no rows: such a call needs neither a GPU nor flash-attn."""
    q, k, v = (x.requires_grad_() for x in inputs(0))
    cu_seqlens = torch.zeros(2, dtype=torch.int32)
    if operator == "triton":
        out, lse = dual_chunk_attention_triton.attention_forward(q, k, v, cu_seqlens, None, None, None, 0.25)
    else:
        out, lse = dual_chunk_attention_flash.flash4_forward(q, k, v, cu_seqlens, 0, 0.25)
    assert out.requires_grad and not lse.requires_grad
    with Calls() as calls:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    assert not [name for name in calls.names if "zeros" in name]
    assert torch.autograd.grad(Cut.apply(out).sum(), (q, k, v), allow_unused=True) == (None, None, None)


class Cut(torch.autograd.Function):
    """The identity, with no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Calls(TorchDispatchMode):
    """The names of all operators that are called inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.name())
        return function(*arguments, **(options or {}))


# On a GPU.

CASES = {
    "plain": ([1000, 24, 1, 1023], None),
    "short chunks": ([2048], (300, 70)),
    "chunk borders": ([229, 230, 231, 461, 897], (300, 70)),
    "aligned chunks": ([2048], (640, 128)),
}


def gpu_case(lengths, heads=8, groups=2, width=128, dtype=torch.bfloat16, padding=5):
    cu_seqlens, num_rows = bounds(lengths, padding, device="cuda")
    return (
        cu_seqlens,
        inputs(num_rows, heads, groups, width, dtype, "cuda"),
        torch.randn(num_rows, heads, width, device="cuda", dtype=dtype),
    )


def options(chunks, width=128):
    if chunks is None:
        return {}
    return {"inv_freq_R": frequencies(width).cuda(), "chunk_size": chunks[0], "local_size": chunks[1]}


def attend(backend, cu_seqlens, longest, chunks, width=128):
    given = options(chunks, width)  # made once: a graph cannot capture their copy to the device
    return lambda q, k, v: dual_chunk_attention(q, k, v, cu_seqlens, longest, **given, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 80, 256])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_near_to_float32_as_the_eager_path(name, width):
    lengths, chunks = CASES[name]
    cu_seqlens, qkv, grad_out = gpu_case(lengths, width=width)
    truth = with_gradients(
        attend("sdpa", cu_seqlens, max(lengths), chunks, width), [x.float() for x in qkv], grad_out.float()
    )
    eager = with_gradients(attend("sdpa", cu_seqlens, max(lengths), chunks, width), qkv, grad_out)
    ours = with_gradients(attend("triton", cu_seqlens, max(lengths), chunks, width), qkv, grad_out)
    for exact, theirs, mine in zip(truth, eager, ours, strict=True):
        error, allowed = (mine - exact).norm(), (theirs - exact).norm()
        assert error <= 1.5 * allowed + 1e-3 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(dual_chunk_attention_flash.VERSION is None, reason="flash-attn is not installed")
def test_flash_backend_equals_ours():
    lengths, _ = CASES["plain"]
    cu_seqlens, qkv, grad_out = gpu_case(lengths)
    ours = with_gradients(attend("triton", cu_seqlens, max(lengths), None), qkv, grad_out)
    theirs = with_gradients(attend("flash", cu_seqlens, max(lengths), None), qkv, grad_out)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def turned(q_IHC, by_I1, inv_freq_R):
    angle = (by_I1 * inv_freq_R)[:, None]
    low, high = q_IHC.chunk(2, -1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


def by_definition(qkv, grad_out, chunks):
    """out and the gradients of q, k and v in float64, with one kv head; 256 queries at a time, for want of memory."""
    q_THC, k_TGC, v_TGC = leaves = [x.detach().double().requires_grad_() for x in qkv]
    num_rows, heads, width = q_THC.shape
    inv_freq = frequencies(width).to(q_THC)
    outs = []
    for first in range(0, num_rows, 256):
        last = min(first + 256, num_rows)
        q, k, v = q_THC[first:last], k_TGC[:last, 0], v_TGC[:last, 0]
        j = torch.arange(last, device=q.device)
        i = j[first:, None]
        if chunks is None:
            scores = torch.einsum("ihc,jc->hij", q, k)
        else:
            chunk_size, local_size = chunks
            chunk_len = chunk_size - local_size
            local = i % chunk_len
            own, before, older = (
                torch.einsum("ihc,jc->hij", turned(q, place - local, inv_freq), k)
                for place in (local, (local + chunk_len).clamp(max=chunk_size), torch.full_like(i, chunk_size))
            )
            distance = i // chunk_len - j // chunk_len
            scores = torch.where(distance == 0, own, torch.where(distance == 1, before, older))
        p = (scores * width**-0.5).masked_fill(j > i, -torch.inf).softmax(-1)
        out = torch.einsum("hij,jc->ihc", p, v)
        out.backward(grad_out[first:last].double())
        outs.append(out.detach())
    return torch.cat(outs), *(x.grad for x in leaves)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_rows, chunks",
    [
        *((num_rows, None) for num_rows in (1, 2, 63, 129, 4_097, 131_072)),
        *((num_rows, (50, 13)) for num_rows in (38, 129, 4_097)),
        (131_072, (8_192, 1_024)),
    ],
)
def test_any_number_of_tokens(num_rows, chunks):
    """Rows are compared in blocks: late ones, means over many keys, are so small that early ones would hide them."""
    cu_seqlens, qkv, grad_out = gpu_case([num_rows], heads=2, groups=1)
    ours = with_gradients(attend("triton", cu_seqlens, num_rows, chunks), qkv, grad_out)
    for name, mine, exact in zip(("out", "dq", "dk", "dv"), ours, by_definition(qkv, grad_out, chunks), strict=True):
        errors, norms = (torch.stack([block.norm() for block in x.split(64)]) for x in (mine - exact, exact))
        # Emulated in bfloat16: below 0.004, of two rows up to 0.024. One wrong row is 0.18.
        assert (errors <= 0.05 * norms + 1e-4).all(), f"{name}: an error of {(errors / norms).max():.3f} of the norm"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_twenty_times(name):
    lengths, chunks = CASES[name]
    cu_seqlens, qkv, grad_out = gpu_case(lengths)
    first = with_gradients(attend("triton", cu_seqlens, max(lengths), chunks), qkv, grad_out)
    for _ in range(20):
        again = with_gradients(attend("triton", cu_seqlens, max(lengths), chunks), qkv, grad_out)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_the_fastest_that_fits_is_deterministic_where_that_is_asked_for():
    cu_seqlens, qkv, grad_out = gpu_case([2048, 4096, 2048])
    torch.use_deterministic_algorithms(True)
    try:
        first = with_gradients(attend("auto", cu_seqlens, 4096, None), qkv, grad_out)
        for _ in range(20):
            again = with_gradients(attend("auto", cu_seqlens, 4096, None), qkv, grad_out)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "short chunks"])
def test_compiles_as_one_graph(name):
    lengths, chunks = CASES[name]
    cu_seqlens, qkv, grad_out = gpu_case(lengths)
    function = attend("triton", cu_seqlens, max(lengths), chunks)
    eager = with_gradients(function, qkv, grad_out)
    compiled = with_gradients(torch.compile(function, fullgraph=True), qkv, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [None, (300, 70)])
def test_cuda_graph_follows_new_documents(chunks):
    cu_seqlens, qkv, grad_out = gpu_case([1024, 1024])
    function = attend("triton", cu_seqlens, 2048, chunks)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with_gradients(function, qkv, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = with_gradients(function, qkv, grad_out)
    cu_seqlens[1] = 700
    graph.replay()
    expected = with_gradients(function, qkv, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [None, (300, 70)])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_gradients_of_the_output_in_any_layout(layout, chunks):
    cu_seqlens, qkv, grad_out = gpu_case([1000, 24])
    grad_out = {
        "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "expanded": lambda x: x[:, :1, :1].expand_as(x),
        "strided": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    }[layout](grad_out)
    assert not grad_out.is_contiguous()
    function = attend("triton", cu_seqlens, 1000, chunks)
    expected = with_gradients(function, qkv, grad_out.contiguous())
    got = with_gradients(function, qkv, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [None, (300, 70)])
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)], ids=str)
def test_gradients_of_some_inputs_alone(wanted, chunks):
    cu_seqlens, qkv, grad_out = gpu_case([1000, 24])
    function = attend("triton", cu_seqlens, 1000, chunks)
    _, *every = with_gradients(function, qkv, grad_out)
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(qkv)]
    some = torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], grad_out)
    assert all(torch.equal(grad, every[i]) for grad, i in zip(some, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [None, (100, 30)])
def test_operators_are_declared_right(chunks):
    cu_seqlens, qkv, _ = gpu_case([150, 50], heads=4, groups=2)
    leaves = [x.requires_grad_() for x in qkv]
    rest = (None, None, None) if chunks is None else (frequencies(128).cuda(), chunks[0], chunks[0] - chunks[1])
    torch.library.opcheck(dual_chunk_attention_triton.attention_forward, (*leaves, cu_seqlens, *rest, 128**-0.5))

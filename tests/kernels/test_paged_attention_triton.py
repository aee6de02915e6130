"""Paged decode attention on Triton against the reference: interpreter numerics here, real shapes on a GPU."""

import contextlib

import pytest
import torch
from qwen3_kernels import dispatch, paged_attention, reference

pytest.importorskip("triton")
from qwen3_kernels import paged_attention_triton as fast  # noqa: E402

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter was not chosen at import")
gpu = pytest.mark.gpu


@contextlib.contextmanager
def on_triton():
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(dispatch.interpreted())
        stack.enter_context(dispatch.prefer("paged_attention", "triton"))
        yield


def decode(lengths, heads, groups, width, page, *, spare=0, dtype=torch.float32, device="cpu"):
    """Arguments whose pages lie in random order; slots past a context hold NaN, table entries past it garbage."""
    needed = [-(-n // page) for n in lengths]
    columns = max([1, *needed]) + spare
    pages = sum(needed) + 2
    order = torch.randperm(pages)
    k = torch.randn(pages, page, groups, width, device=device, dtype=dtype)
    v = torch.randn(pages, page, groups, width, device=device, dtype=dtype)
    table = torch.full((len(lengths), columns), 2**31 - 1, dtype=torch.int32)
    written = torch.zeros(pages, page, dtype=torch.bool)
    for b, (n, count) in enumerate(zip(lengths, needed, strict=True)):
        table[b, :count], order = order[:count].int(), order[count:]
        slots = torch.arange(n)
        written[table[b, slots // page].long(), slots % page] = True
    for cache in (k, v):
        cache[~written.to(device)] = float("nan")
    q = torch.randn(len(lengths), heads, width, device=device, dtype=dtype)
    return [q, k, v, table.to(device), torch.tensor(lengths, device=device)]


def frequencies(width, device="cpu"):
    return 1.0 / 100.0 ** (torch.arange(0, width, 2, device=device).float() / width)


def expected_of(args, inv_freq=None, chunk=None, local=None, scale=None):
    """The reference multiplies what it masks: it gets zeros for the NaN."""
    q, k, v, *rest = args
    return reference.paged_attention(q, k.nan_to_num(0.0), v.nan_to_num(0.0), *rest, inv_freq, chunk, local, scale)


@cpu_only
@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize(
    "heads, groups, width, page", [(4, 2, 16, 4), (3, 3, 20, 16), (6, 1, 8, 5), (34, 2, 24, 16), (1, 1, 2, 1)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_plain_equals_the_reference(monkeypatch, splits, heads, groups, width, page):
    monkeypatch.setattr(fast, "num_splits", lambda *shapes: splits)
    monkeypatch.setitem(fast.ATTEND, (90, 256), fast.ATTEND[90, 256]._replace(blocks={"BLOCK_N": 16}))
    args = decode([1, 0, 7, 16, 53], heads, groups, width, page, spare=3)
    with on_triton():
        out = paged_attention(*args, softmax_scale=0.3)
    torch.testing.assert_close(out, expected_of(args, scale=0.3), rtol=1e-5, atol=1e-5)
    assert (out[1] == 0).all()


@cpu_only
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("chunk, local", [(8, 3), (7, 1), (6, 5), (64, 32)])
@pytest.mark.usefixtures("poisoned_empty")
def test_dual_chunks_equal_the_reference(monkeypatch, splits, chunk, local):
    monkeypatch.setattr(fast, "num_splits", lambda *shapes: splits)
    monkeypatch.setitem(fast.ATTEND, (90, 256), fast.ATTEND[90, 256]._replace(blocks={"BLOCK_N": 16}))
    s = chunk - local
    args = decode([0, 1, s, s + 1, 2 * s, 2 * s + 1, 3 * s + 2, 75], 6, 2, 12, 4)
    inv_freq = frequencies(12)
    with on_triton():
        out = paged_attention(*args, inv_freq_R=inv_freq, chunk_size=chunk, local_size=local)
    torch.testing.assert_close(out, expected_of(args, inv_freq, chunk, local), rtol=1e-5, atol=1e-5)


@cpu_only
def test_shipped_launches_and_views():
    """Tiles as they ship, caches that are one layer of many, a table and a query that are slices."""
    args = decode([130, 64, 1], 8, 2, 16, 16)
    expected = expected_of(args)
    q, k, v, table, lens = args
    k, v = (torch.stack((torch.full_like(x, float("nan")), x))[1] for x in (k, v))
    q, table = q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((table, table), 1)[:, : table.shape[1]]
    with on_triton():
        out = paged_attention(q, k, v, table, lens)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert paged_attention(q[:0], k, v, table[:0], lens[:0]).shape == (0, 8, 16)


@cpu_only
def test_scores_far_from_zero():
    args = decode([40], 4, 2, 16, 4)
    args[0] = args[0] * 1000
    with on_triton():
        torch.testing.assert_close(paged_attention(*args), expected_of(args), rtol=1e-4, atol=1e-5)


def test_splits_follow_shapes():
    assert fast.num_splits(256, 4, 16_384) == 1
    assert fast.num_splits(64, 4, 4_096) == 4
    assert fast.num_splits(1, 4, 4_096) == 32
    assert fast.num_splits(1, 4, 16) == 1
    assert fast.num_splits(1, 4, 1 << 20) == fast.MAX_SPLITS


@cpu_only
def test_what_does_not_fit_is_said():
    q, k, v, table, lens = decode([5], 4, 2, 16, 4)
    with on_triton():
        with pytest.raises(ValueError, match="strides"):
            paged_attention(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), table, lens)
        with pytest.raises(ValueError, match="float64"):
            paged_attention(q.double(), k, v, table, lens)


@cpu_only
def test_definition_is_clean_for_the_compiler():
    args = decode([5, 9], 4, 2, 16, 4)
    torch.library.opcheck(fast.run, (*args, frequencies(16), 8, 3, None))


@gpu
@pytest.mark.parametrize("page", [16, 64, 24, 256])
@pytest.mark.parametrize("chunks", [None, (2048, 512), (512, 64)])
@pytest.mark.parametrize("batch, longest", [(1, 16_384), (16, 4_096), (64, 4_096), (256, 1_024)])
def test_gpu_error_is_no_larger_than_eager_bfloat16(batch, longest, chunks, page):
    lengths = torch.randint(1, longest + 1, (batch,)).tolist()
    lengths[0] = longest
    if batch > 1:
        lengths[1] = 0
    args = decode(lengths, 32, 4, 128, page, dtype=torch.bfloat16, device="cuda")
    inv_freq, (chunk, local) = frequencies(128, "cuda"), chunks or (None, None)
    options = {} if chunks is None else {"inv_freq_R": inv_freq, "chunk_size": chunk, "local_size": local}
    with on_triton():
        out = paged_attention(*args, **options)
    single = [x.float() if x.is_floating_point() else x for x in args]
    for start in range(0, batch, 16):  # the reference gathers keys in float32
        rows = slice(start, start + 16)
        exact = expected_of([single[0][rows], *single[1:3], *(x[rows] for x in args[3:])], inv_freq, chunk, local)
        eager = expected_of([args[0][rows], *args[1:3], *(x[rows] for x in args[3:])], inv_freq, chunk, local)
        error, allowed = ((x.float() - exact).norm() for x in (out[rows], eager))
        # Probabilities are bfloat16 here and float32 there; both outputs end in bfloat16.
        assert error <= 1.5 * allowed + 2e-3 * exact.norm()


@gpu
def test_gpu_is_deterministic_and_graphs_replay_for_other_lengths():
    args = decode([4_096] * 32, 32, 4, 128, 16, dtype=torch.bfloat16, device="cuda")
    lens = args[4]
    with on_triton():
        first = paged_attention(*args)
        assert all(torch.equal(paged_attention(*args), first) for _ in range(20))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = paged_attention(*args)
        for lengths in (4_096, 1, 1_000):
            lens.fill_(lengths)
            lens[3] = 0
            graph.replay()
            assert torch.equal(out, paged_attention(*args))
            assert (out[3] == 0).all() and out.isfinite().all()


@gpu
def test_gpu_compiles_whole():
    args = decode([300, 5, 77], 32, 4, 128, 16, dtype=torch.bfloat16, device="cuda")
    with on_triton():
        assert torch.equal(torch.compile(paged_attention, fullgraph=True)(*args), paged_attention(*args))
    torch.library.opcheck(fast.run, (*args, None, None, None, None))


@gpu
@pytest.mark.parametrize("width", [80, 128, 256])
def test_gpu_float32(width):
    args = decode([300, 5, 77], 8, 2, width, 16, device="cuda")
    with on_triton():
        torch.testing.assert_close(paged_attention(*args), expected_of(args), rtol=1e-4, atol=1e-4)

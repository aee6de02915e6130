"""Packed, dual-chunk and paged attention against one dense score matrix with explicit positions, in float64."""

import pytest
import torch
from qwen3_kernels import dispatch, dual_chunk_attention, paged_attention, qk_norm_rope
from qwen3_kernels.reference import rotate

HEADS, GROUPS, WIDTH = 4, 2, 8
INV_FREQ = 1.0 / 100.0 ** (torch.arange(0, WIDTH, 2).double() / WIDTH)


def dense(q, k, v, chunk_size=None, local_size=None):
    """q, k not rotated. Scores of every pair with the position pair that the regime prescribes."""
    length = q.shape[0]
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    if chunk_size is None:
        position_q, position_k = i.expand(length, length), j.expand(length, length)
    else:
        s = chunk_size - local_size
        d = i // s - j // s
        successive = (i % s + s).clamp(max=chunk_size)
        position_q = torch.where(d == 0, i % s, torch.where(d == 1, successive, chunk_size)).expand(length, length)
        position_k = (j % s).expand(length, length)
    scores = torch.empty(HEADS, length, length, dtype=q.dtype)
    for a in range(length):
        for b in range(a + 1):
            qa = rotate64(q[a : a + 1], position_q[a, b])
            kb = rotate64(k[b : b + 1], position_k[a, b])
            scores[:, a, b] = (qa * kb).sum(-1)[0] * WIDTH**-0.5
    scores = scores.masked_fill(j > i, float("-inf"))
    return torch.einsum("hij,jhc->ihc", scores.softmax(-1), v)


def rotate64(x, position):
    angle = position.double() * INV_FREQ
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


def inputs(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, heads, WIDTH, dtype=torch.float64, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    ]


def rotated(q, k, position):
    return tuple(torch.cat([rotate64(x[t : t + 1], position[t]) for t in range(len(x))]) for x in (q, k))


@pytest.mark.parametrize("lengths", [[7], [1, 1, 5], [3, 20, 2, 9]])
def test_plain_causal_equals_dense_and_documents_are_isolated(lengths):
    parts = [inputs(n, seed) for seed, n in enumerate(lengths)]
    expected = torch.cat([dense(*part) for part in parts])
    position = torch.cat([torch.arange(n) for n in lengths])
    q, k, v = (torch.cat(column) for column in zip(*parts, strict=True))
    q, k = rotated(q, k, position)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), sum(lengths)], dtype=torch.int32)
    out = dual_chunk_attention(q, k, v, cu_seqlens, max(lengths))
    torch.testing.assert_close(out, expected)
    disturbed = k.clone()
    disturbed[: lengths[0]] += 1.0
    again = dual_chunk_attention(q, disturbed, v, cu_seqlens, max(lengths))
    assert torch.equal(again[lengths[0] :], out[lengths[0] :])


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 11, 17])
@pytest.mark.parametrize("chunk_size, local_size", [(8, 3), (7, 1), (6, 5)])
def test_dual_chunks_equal_dense_with_exact_gradients(length, chunk_size, local_size):
    s = chunk_size - local_size
    raw = inputs(length)
    leaves = [x.clone().requires_grad_() for x in raw]
    expected = dense(*leaves, chunk_size, local_size)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)

    leaves = [x.clone().requires_grad_() for x in raw]
    q, k = rotated(leaves[0], leaves[1], torch.arange(length) % s)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    out = dual_chunk_attention(
        q, k, leaves[2], cu_seqlens, length, inv_freq_R=INV_FREQ, chunk_size=chunk_size, local_size=local_size
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # scores of long documents are float32
    for ours, theirs in zip(torch.autograd.grad(out, leaves, upstream), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if length <= s:
        plain = dual_chunk_attention(q, k, leaves[2], cu_seqlens, length)
        assert torch.equal(out, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
@pytest.mark.parametrize("chunks", [None, (8, 3)])
def test_paged_decode_equals_the_last_row_of_packed_attention(chunks, implementation):
    page, lengths = 4, [1, 9, 13, 0]
    options = {} if chunks is None else {"chunk_size": chunks[0], "local_size": chunks[1]}
    s = 10**9 if chunks is None else chunks[0] - chunks[1]
    pages = torch.full((20, page, GROUPS, WIDTH), float("nan")), torch.full((20, page, GROUPS, WIDTH), float("nan"))
    table = torch.full((len(lengths), 4), -1)
    queries, expected, free = [], [], list(torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist())
    for b, n in enumerate(lengths):
        if n == 0:
            queries.append(torch.randn(1, HEADS, WIDTH))
            expected.append(torch.zeros(1, HEADS, WIDTH))
            continue
        q, k, v = inputs(n, b)
        q, k = rotated(q, k, torch.arange(n) % s)
        q, k, v = q.float(), k.float(), v.float()
        out = dual_chunk_attention(q, k, v, torch.tensor([0, n], dtype=torch.int32), n, inv_freq_R=INV_FREQ, **options)
        expected.append(out[-1:])
        queries.append(q[-1:])
        for start in range(0, n, page):
            table[b, start // page] = free[0]
            for cache, x in zip(pages, (k, v), strict=True):
                cache[free[0], : min(page, n - start)] = x[start : start + page]
            free.pop(0)
    with dispatch.prefer("paged_attention", implementation):
        out = paged_attention(torch.cat(queries), *pages, table, torch.tensor(lengths), inv_freq_R=INV_FREQ, **options)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


def packed(q, k, v, **options):
    return dual_chunk_attention(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), **options)


def paged(q, k, v, **options):
    return paged_attention(q[-1:], k[None], v[None], torch.zeros(1, 1).int(), torch.tensor([len(q)]), **options)


@pytest.mark.parametrize(
    "chunk_size, local_size, reason",
    [
        (8, None, "both or neither"),
        (None, 2, "both or neither"),
        (4, 5, "0 <= local_size < chunk_size"),
        (4, 4, "0 <= local_size < chunk_size"),
        (4, -1, "0 <= local_size < chunk_size"),
        (0, 0, "0 <= local_size < chunk_size"),
        (-2, -3, "0 <= local_size < chunk_size"),
    ],
)
@pytest.mark.parametrize("attend, name", [(packed, "dual_chunk_attention"), (paged, "paged_attention")])
def test_sizes_that_make_no_chunks_are_rejected(attend, name, chunk_size, local_size, reason):
    with pytest.raises(ValueError, match=f"^{name}: chunk_size {chunk_size}, local_size {local_size}.*{reason}"):
        attend(*inputs(9), inv_freq_R=INV_FREQ, chunk_size=chunk_size, local_size=local_size)


@pytest.mark.parametrize("attend, name", [(packed, "dual_chunk_attention"), (paged, "paged_attention")])
def test_chunks_need_the_frequencies(attend, name):
    with pytest.raises(ValueError, match=f"^{name}: .*without inv_freq_R"):
        attend(*inputs(3), chunk_size=8, local_size=2)


@pytest.mark.parametrize("attend", [packed, paged])
def test_chunks_without_a_window_are_chunks(attend):
    q, k, v = inputs(9)
    expected = dense(q, k, v, 4, 0)
    q, k = rotated(q, k, torch.arange(9) % 4)
    out = attend(q, k, v, inv_freq_R=INV_FREQ, chunk_size=4, local_size=0)
    torch.testing.assert_close(out[-1], expected[-1], rtol=1e-5, atol=1e-5)


def test_qk_norm_rope_equals_the_formula():
    q, k, _ = (x.float() for x in inputs(6))
    weight_q, weight_k = torch.rand(WIDTH) + 0.5, torch.rand(WIDTH) + 0.5
    position = torch.tensor([0, 1, 2, 0, 1, 700])
    leaves = [x.requires_grad_() for x in (q, k, weight_q, weight_k)]
    out = qk_norm_rope(*leaves, position, INV_FREQ.float(), 1.25, 1e-6)
    for x, weight, result in ((q, weight_q, out[0]), (k, weight_k, out[1])):
        normed = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() * weight.double()
        expected = 1.25 * torch.cat([rotate64(normed[t : t + 1], position[t]) for t in range(6)])
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(out[0].square().sum() + out[1].sum(), leaves)
    assert all(g.abs().sum() > 0 for g in grads)


def test_rotations_add_up():
    x = torch.randn(3, 2, WIDTH)
    freq = INV_FREQ.float()
    one, two = torch.tensor([3, 4, 5]), torch.tensor([10, 0, -2])
    torch.testing.assert_close(rotate(rotate(x, one, freq), two, freq), rotate(x, one + two, freq))

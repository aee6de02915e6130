"""Fused varlen grouped-query attention on the GPU, plain causal and in dual chunks: the backward kernels.

Legend: T tokens, H query heads, G kv heads, C head width; S query heads of one kv head.

Probabilities are recomputed from the logsumexp over all ranges. The gradients of k and v are sums over query heads and
ranges in one program, that of q is a sum over keys in another: seven products instead of five, but no atomics, so that
a step gives the same bits every time. Keys have one rotation, so one accumulator takes the gradients from all three
ranges. Those of q arrive at three positions; a rotation is linear, so the kernel leaves three sums, in place of the
rotated copies of q, and ``move_queries`` brings them together.
"""

import triton
import triton.language as tl

from qwen3_kernels.dual_chunk_tiles_triton import (
    count_ranges,
    heads_of_grid,
    key_range,
    load_kept_rows,
    load_rows,
    load_tile,
    segment,
    store_rows,
    tile_rank,
)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def delta_kernel(
    out,
    grad_out,
    delta,
    num_rows,
    num_tokens,
    H: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta_HT <- sum over C of out * grad_out; rows are (token, head) pairs."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    offsets = rows[:, None] * C + columns[None, :]
    ok = (rows < num_rows)[:, None] & (columns < C)[None, :]
    o = tl.load(out + offsets, mask=ok, other=0.0).to(tl.float32)
    do = tl.load(grad_out + offsets, mask=ok, other=0.0).to(tl.float32)
    tl.store(delta + (rows % H) * num_tokens + rows // H, tl.sum(o * do, 1), mask=rows < num_rows)


@triton.jit(do_not_specialize=["most", "num_rows", "chunk_len"])
def key_gradients_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    table,
    most,
    num_rows,
    chunk_len,
    scale_log2,
    scale,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    S: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_k_TGC and grad_v_TGC. Grid: tiles, G.

    One loop over all heads and ranges, with the causal mask in every turn: two accumulators of 128 x 128 leave no
    registers for the loop-invariant values of nested loops (356 bytes of spills against 24), and two loops over one
    pair of accumulators make the assembler serialise every product.
    """
    rank = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    if rank < tl.load(table + most * 3):
        first_key, begin, end = load_tile(table, rank)
        _, chunk_end = segment(first_key, begin, end, chunk_len, CHUNKED)
        # Steps of one head: own, near and then far queries, as far as there are any.
        own = tl.cdiv(chunk_end - first_key, BM)
        near_end = chunk_end
        near = own
        steps = own
        if CHUNKED:
            near_end = tl.minimum(end, chunk_end + chunk_len)
            near = own + tl.cdiv(near_end - chunk_end, BM)
            steps = near + tl.cdiv(end - near_end, BM)
        if begin < 0:
            steps = 0
        k_tile = load_kept_rows(k + group * k_stride_g, first_key, k_stride_t, chunk_end, BN, C, WIDTH)
        v_tile = load_kept_rows(v + group * v_stride_g, first_key, v_stride_t, chunk_end, BN, C, WIDTH)
        keys = first_key + tl.arange(0, BN)
        dk = tl.zeros((BN, WIDTH), tl.float32)
        dv = tl.zeros((BN, WIDTH), tl.float32)
        head = group * S
        step = 0
        for _ in range(0, steps * S):
            start, stop, row = first_key + step * BM, chunk_end, first_key + step * BM
            if CHUNKED:
                is_near, is_far = step >= own, step >= near
                start = tl.where(is_near, chunk_end + (step - own) * BM, start)
                start = tl.where(is_far, near_end + (step - near) * BM, start)
                stop = tl.where(is_far, end, tl.where(is_near, near_end, stop))
                row = start + (is_near.to(tl.int32) + is_far.to(tl.int32)) * num_rows
            q_tile = load_rows(q, row, head, BM, WIDTH)
            grad_tile = load_rows(grad_out, start, head, BM, WIDTH)
            queries = start + tl.arange(0, BM)
            lse_tile = tl.load(lse + head * num_rows + queries, mask=queries < stop, other=float("inf"))  # p = 0 there
            delta_tile = tl.load(delta + head * num_rows + queries, mask=queries < stop, other=0.0)
            scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - lse_tile[None, :])
            p = tl.where(keys[:, None] <= queries[None, :], p, 0.0)
            dv = tl.dot(p.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
            dp = tl.dot(v_tile, grad_tile.T, input_precision=PRECISION)
            ds = p * (dp - delta_tile[None, :])
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
            is_last = step + 1 == steps
            head += is_last.to(tl.int32)
            step = tl.where(is_last, 0, step + 1)
        store_rows(grad_k + group * C, dk * scale, first_key, groups * C, chunk_end, BN, C, WIDTH)
        store_rows(grad_v + group * C, dv, first_key, groups * C, chunk_end, BN, C, WIDTH)


@triton.jit
def add_keys(
    dq,
    q_tile,
    grad_tile,
    lse_tile,
    delta_tile,
    k,
    v,
    group,
    rows,
    low,
    full,
    high,
    scale_log2,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile from the keys [low, high), those from ``full`` on with masks."""
    for masked in tl.static_range(2):
        for start in tl.range(full if masked else low, high if masked else full, BN, num_stages=1 if masked else None):
            k_tile = load_rows(k, start, group, BN, WIDTH)
            v_tile = load_rows(v, start, group, BN, WIDTH)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
            p = tl.exp2(scores * scale_log2 - lse_tile[:, None])
            if masked:
                keys = start + tl.arange(0, BN)
                p = tl.where((keys[None, :] <= rows[:, None]) & (keys < high)[None, :], p, 0.0)
            dp = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
            ds = p * (dp - delta_tile[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["most", "slots", "num_rows", "chunk_len"])
def query_gradients_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    moved,
    table,
    most,
    slots,
    num_rows,
    chunk_len,
    scale_log2,
    scale,
    S: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q_THC from the keys of the own chunk; those from other chunks replace q in its planes of ``moved_3THC``.

    Grid as in the forward kernel.
    """
    group, head, heads, slot = heads_of_grid(S)
    total = tl.load(table + most * 3)
    for turn in range(0, tl.cdiv(total, slots)):
        rank = tile_rank(turn, slot, slots)
        if rank < total:
            first_row, begin, end = load_tile(table, rank)
            chunk, end = segment(first_row, begin, end, chunk_len, CHUNKED)
            rows = first_row + tl.arange(0, BM)
            ok = rows < end
            grad_tile = load_rows(grad_out, first_row, head, BM, WIDTH)
            lse_tile = tl.load(lse + head.to(tl.int64) * num_rows + rows, mask=ok, other=float("inf"))
            delta_tile = tl.load(delta + head.to(tl.int64) * num_rows + rows, mask=ok, other=0.0)
            for regime in range(0, count_ranges(chunk, begin, chunk_len, CHUNKED)):
                low, high = key_range(regime, first_row, chunk, begin, end, chunk_len, CHUNKED, BM)
                full = low + (tl.minimum(high, first_row) - low) // BN * BN
                dq = tl.zeros((BM, WIDTH), tl.float32)
                if begin >= 0:
                    q_tile = load_rows(q, regime * num_rows + first_row, head, BM, WIDTH)
                    dq = add_keys(
                        dq,
                        q_tile,
                        grad_tile,
                        lse_tile,
                        delta_tile,
                        k,
                        v,
                        group,
                        rows,
                        low,
                        full,
                        high,
                        scale_log2,
                        WIDTH,
                        BN,
                        PRECISION,
                    )
                target = grad_q + head * C
                if regime > 0:
                    target = moved + regime * tl.cast(num_rows, tl.int64) * heads * C + head * C
                store_rows(target, dq * scale, first_row, heads * C, end, BM, C, WIDTH)

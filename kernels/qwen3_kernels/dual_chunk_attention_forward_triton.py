"""Fused varlen grouped-query attention on the GPU, plain causal and in dual chunks: the forward kernel.

Legend: T tokens, H query heads, G kv heads, C head width; S query heads of one kv head.

A query tile lies in one chunk, so its keys are three contiguous ranges: its own chunk (causal), the chunk before, all
older ones. One loop runs over each with q rotated for it, on the same running maximum, sum and accumulator: no more
products than plain causal attention, which is the case of one range. The rotated copies of q are written beforehand
(``move_queries``): 1 GB of traffic at T = 32,768, one percent of the time.

The loop over full tiles carries the probabilities of a tile to the next turn: their product with v is then started
before the exponentials of the next tile and runs beside them. Stock Triton waits for a product in the turn that uses
it, so that without the carry tensor cores idle through every softmax (of 128 x 64 scores: 512 cycles of exponentials
against 1,024 of products).
"""

import triton
import triton.language as tl

from qwen3_kernels.dual_chunk_tiles_triton import (
    count_ranges,
    heads_of_grid,
    key_range,
    load_rows,
    load_tile,
    segment,
    store_rows,
    tile_rank,
)


@triton.jit
def attend_range(
    acc,
    top,
    mass,
    q_tile,
    k,
    v,
    group,
    rows,
    first_row,
    low,
    high,
    scale_log2,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys [low, high) that are no later than their query to the accumulator; the part with masks first.

    ``top`` is the running maximum and ``mass`` the running sum, both of base-2 scores.
    """
    full = tl.minimum(high, first_row)
    full = low + (full - low) // BN * BN  # keys before it are seen by every row, in whole tiles
    for start in tl.range(full, high, BN, num_stages=1):
        keys = start + tl.arange(0, BN)
        scores = tl.dot(q_tile, load_rows(k, start, group, BN, WIDTH).T, input_precision=PRECISION)
        seen = (keys[None, :] <= rows[:, None]) & (keys < high)[None, :]
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        mass = mass * fade + tl.sum(p, 1)
        v_tile = load_rows(v, start, group, BN, WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    if full > low:
        scores = tl.dot(q_tile, load_rows(k, low, group, BN, WIDTH).T, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])
        fade = tl.exp2(top - new_top)
        mass = mass * fade + tl.sum(p, 1)
        top = new_top
        for start in range(low + BN, full, BN):
            scores = tl.dot(q_tile, load_rows(k, start, group, BN, WIDTH).T, input_precision=PRECISION)
            v_tile = load_rows(v, start - BN, group, BN, WIDTH)
            # p is carried in float32: cast here, its registers change only after the product before has ended.
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
            new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - new_top[:, None])
            fade = tl.exp2(top - new_top)
            mass = mass * fade + tl.sum(p, 1)
            top = new_top
        v_tile = load_rows(v, full - BN, group, BN, WIDTH)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, mass


@triton.jit(do_not_specialize=["most", "slots", "num_rows", "chunk_len"])
def attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    table,
    most,
    slots,
    num_rows,
    chunk_len,
    scale_log2,
    S: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_THC and the base-2 logsumexp lse_HT of every query. Grid: slots x S, G.

    The heads of one kv head start together and kv heads one after the other: k and v of one are 16 MB at T = 32,768,
    those of four would not stay in a cache of 50 MB.
    """
    group, head, heads, slot = heads_of_grid(S)
    total = tl.load(table + most * 3)
    for turn in range(0, tl.cdiv(total, slots)):
        rank = tile_rank(turn, slot, slots)
        if rank < total:
            first_row, begin, end = load_tile(table, rank)
            rows = first_row + tl.arange(0, BM)
            acc = tl.zeros((BM, WIDTH), tl.float32)
            top = tl.full((BM,), float("-inf"), tl.float32)
            mass = tl.zeros((BM,), tl.float32)
            if begin >= 0:
                chunk, end = segment(first_row, begin, end, chunk_len, CHUNKED)
                # The own chunk comes first: its masked tiles give every row a finite maximum, which the loops without
                # masks rely on.
                for regime in range(0, count_ranges(chunk, begin, chunk_len, CHUNKED)):
                    low, high = key_range(regime, first_row, chunk, begin, end, chunk_len, CHUNKED, BM)
                    q_tile = load_rows(q, regime * num_rows + first_row, head, BM, WIDTH)
                    acc, top, mass = attend_range(
                        acc,
                        top,
                        mass,
                        q_tile,
                        k,
                        v,
                        group,
                        rows,
                        first_row,
                        low,
                        high,
                        scale_log2,
                        BN,
                        WIDTH,
                        PRECISION,
                    )
                acc = acc / mass[:, None]
            store_rows(out + head * C, acc, first_row, heads * C, end, BM, C, WIDTH)
            lse_rows = lse + head.to(tl.int64) * num_rows + rows
            tl.store(lse_rows, top + tl.log2(tl.maximum(mass, 1e-30)), mask=rows < end)

"""Third launch of the routing: where every row stands among the rows sorted by expert.

A program is one warp and places the rows of ``PLACED`` tiles. It counts what precedes them in their group while the
second launch still scans the groups: what the first launch wrote is complete before that one lets this one start. The
first programs add up the sums of all groups for four experts each.

What takes time are the 4-byte writes to ``order_N``, each to another sector of memory: 3.1 us for 262,144 on an H200.

Legend: T tokens, E experts, K experts per token, N = T * K routed rows; a tile is ``TOKENS`` consecutive tokens, a
group ``TILES`` consecutive tiles, a quad four consecutive experts, whose counts in a tile are the bytes of one word.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_rows_triton import padded_experts
from qwen3_kernels.router_topk_scan_triton import SEGMENTS, TILES, bytes_apart, counts_apart
from qwen3_kernels.router_topk_select_triton import TILE_TOKENS

# Tiles one after the other in a thread's registers.
LAUNCHES = {
    (gpu, experts): Launch({"PLACED": 512 // experts}, 1, 1) for gpu in (80, 90, 100) for experts in (128, 256, 512)
}


@triton.jit
def _finish(
    quad,
    segment_counts,
    group_prob_sums,
    group_z_sums,
    counts_E,
    prob_sum_E,
    z_sum,
    offsets_E,
    num_groups,
    num_experts: tl.constexpr,
    EXPERTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    group_G = tl.arange(0, 256)
    expert_4 = quad * 4 + tl.arange(0, 4)
    prob_G4 = tl.zeros((256, 4), tl.float32)
    for first in range(0, num_groups, 256):
        at_G4 = tl.cast(first, tl.int64) * EXPERTS + group_G[:, None] * EXPERTS + expert_4[None, :]
        prob_G4 += tl.load(group_prob_sums + at_G4, mask=(group_G < num_groups - first)[:, None], other=0.0)
    tl.store(prob_sum_E + expert_4, tl.sum(prob_G4, axis=0), mask=expert_4 < num_experts)
    if quad == 0:
        z_G = tl.zeros((256,), tl.float32)
        for first in range(0, num_groups, 256):
            z_G += tl.load(group_z_sums + first + group_G, mask=group_G < num_groups - first, other=0.0)
        tl.store(z_sum, tl.sum(z_G, axis=0))
        expert_E = tl.arange(0, EXPERTS)
        count_E = tl.zeros((EXPERTS,), tl.int32)
        for segment in tl.static_range(SEGMENTS):
            count_E += tl.load(segment_counts + segment * EXPERTS + expert_E)
        tl.store(counts_E + expert_E, count_E.to(tl.int64), mask=expert_E < num_experts)
        tl.store(offsets_E + expert_E, tl.cumsum(count_E, axis=0), mask=expert_E < num_experts)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "segment_groups"])
def place_kernel(
    expert_ids_TK,
    token_mask_T,
    tile_masks,
    tile_counts,
    group_rows_before,
    segment_counts,
    group_prob_sums,
    group_z_sums,
    counts_E,
    prob_sum_E,
    z_sum,
    order_N,
    position_TK,
    offsets_E,
    num_tokens,
    num_tiles,
    segment_groups,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PDL: tl.constexpr,
    PLACED: tl.constexpr,
):
    QUADS: tl.constexpr = EXPERTS // 4
    program = tl.program_id(0)
    if program < QUADS:
        if PDL:
            gdc_wait()
        _finish(
            program,
            segment_counts,
            group_prob_sums,
            group_z_sums,
            counts_E,
            prob_sum_E,
            z_sum,
            offsets_E,
            tl.cdiv(num_tiles, TILES),
            num_experts,
            EXPERTS,
            SEGMENTS,
        )
    else:
        ROWS: tl.constexpr = TOKENS * SLOTS
        first_tile = (program - QUADS) * PLACED
        expert_E = tl.arange(0, EXPERTS)
        quad_Q = tl.arange(0, QUADS)
        placed_S = tl.arange(0, PLACED)
        row_R = tl.arange(0, ROWS)
        in_tile_R = row_R // SLOTS
        token = placed_S[:, None] * TOKENS + in_tile_R[None, :]
        slot = (row_R % SLOTS)[None, :]
        first_token = first_tile * TOKENS
        exists = (token < num_tokens - first_token) & (slot < top_k)
        first_row = tl.cast(first_token, tl.int64) * top_k
        origin = token * top_k + slot
        expert = tl.load(expert_ids_TK + first_row + origin, mask=exists, other=0)
        counted = exists
        if token_mask_T is not None:
            counted = tl.load(token_mask_T + first_token + token, mask=exists, other=0) != 0

        # Rows of each expert before a tile in its group: 16 bits hold the 2,048 rows of a group.
        first_in_group = first_tile % TILES
        in_group_G = tl.arange(0, TILES)
        first_word = tl.cast(first_tile, tl.int64) * QUADS
        group_ptr = tile_counts + first_word + ((in_group_G - first_in_group)[:, None] * QUADS + quad_Q[None, :])
        word_GQ = tl.load(group_ptr, mask=(in_group_G < first_in_group)[:, None], other=0)
        even_Q, odd_Q = tl.sum(word_GQ & 0xFF00FF, axis=0), tl.sum((word_GQ >> 8) & 0xFF00FF, axis=0)
        inside_S = placed_S < num_tiles - first_tile
        own_SQ = placed_S[:, None] * QUADS + quad_Q[None, :]
        count_SE = bytes_apart(tl.load(tile_counts + first_word + own_SQ, mask=inside_S[:, None], other=0))
        before_SE = counts_apart(even_Q[None, :], odd_Q[None, :]) + tl.cumsum(count_SE, axis=0) - count_SE
        # Rank among the tile's rows of the same expert.
        if tile_masks is not None:
            mask_SQ = tl.load(tile_masks + first_word + own_SQ, mask=inside_S[:, None], other=0)
            mask = tl.gather(mask_SQ, expert // 4, axis=1) >> (expert % 4 * 8)
            earlier = mask & ((1 << in_tile_R) - 1)[None, :]
            earlier -= (earlier >> 1) & 0x55
            earlier = (earlier & 0x33) + ((earlier >> 2) & 0x33)
            rank = (earlier + (earlier >> 4)) & 0xF
        else:
            # Replayed experts may repeat in a token, so bits of tokens don't do: rows are compared one by one.
            rank = tl.zeros((PLACED, ROWS), tl.int32)
            for other in range(TOKENS * top_k):
                other_token_S = placed_S * TOKENS + other // top_k
                other_inside_S = other_token_S < num_tokens - first_token
                other_ptr = expert_ids_TK + first_row + placed_S * (TOKENS * top_k) + other
                other_S = tl.load(other_ptr, mask=other_inside_S, other=-1)
                if token_mask_T is not None:
                    mask_ptr = token_mask_T + first_token + other_token_S
                    other_S = tl.where(tl.load(mask_ptr, mask=other_inside_S, other=0) != 0, other_S, -1)
                later = (in_tile_R * top_k + row_R % SLOTS > other)[None, :]
                rank += ((expert == other_S[:, None]) & later).to(tl.int32)

        if PDL:
            gdc_wait()
        group = first_tile // TILES
        own_segment = group // segment_groups
        total_E = tl.zeros((EXPERTS,), tl.int32)
        group_E = tl.load(group_rows_before + tl.cast(group, tl.int64) * EXPERTS + expert_E)
        for segment in tl.static_range(SEGMENTS):
            count_E = tl.load(segment_counts + segment * EXPERTS + expert_E)
            total_E += count_E
            group_E += tl.where(segment < own_segment, count_E, 0)
        before_SE += group_E[None, :]
        start_SE = (tl.cumsum(total_E, axis=0) - total_E)[None, :] + before_SE
        position = tl.gather(start_SE, expert, axis=1) + rank
        if token_mask_T is not None:
            # Rows of masked tokens come last, in their order.
            masked = exists & ~counted
            masked_before_S = (first_tile + placed_S) * (TOKENS * top_k) - tl.sum(before_SE, axis=1)
            masked_rank = tl.cumsum(masked.to(tl.int32), axis=1) - 1
            last = tl.sum(total_E, axis=0) + masked_before_S[:, None] + masked_rank
            position = tl.where(masked, last, position)
        tl.store(order_N + position, (first_row + origin).to(tl.int32), mask=exists)
        tl.store(position_TK + first_row + origin, position, mask=exists)


def _aot_cases() -> list[AotCase]:
    types = {
        **dict.fromkeys(("expert_ids_TK", "tile_masks", "tile_counts", "group_rows_before", "segment_counts"), "*i32"),
        **dict.fromkeys(("order_N", "position_TK", "offsets_E"), "*i32"),
        **dict.fromkeys(("group_prob_sums", "group_z_sums", "prob_sum_E", "z_sum"), "*fp32"),
        **{"token_mask_T": "*i1", "counts_E": "*i64"},
        **dict.fromkeys(("num_tokens", "num_tiles", "segment_groups"), "i32"),
    }
    cases = []
    for name, E, K, slots, absent in (
        ("e128_k8", 128, 8, 8, {"token_mask_T": None}),
        ("e60_k4_masked", 60, 4, 8, {}),
        ("e128_k8_replay", 128, 8, 8, {"token_mask_T": None, "tile_masks": None}),
        ("e512_k16", 512, 16, 16, {"token_mask_T": None}),
    ):
        experts = padded_experts(E)
        shape = {"num_experts": E, "top_k": K, "EXPERTS": experts, "SLOTS": slots}
        tiles = {"TOKENS": TILE_TOKENS, "TILES": TILES, "SEGMENTS": SEGMENTS}
        for gpu in (80, 90, 100):
            label = f"router_topk_place_{name}_sm{gpu}"
            constexprs = {**shape, **tiles, **absent, "PDL": gpu >= 90}
            cases.append(AotCase(label, place_kernel, types, constexprs, LAUNCHES[gpu, experts], (gpu,)))
    return cases


AOT_CASES = _aot_cases()

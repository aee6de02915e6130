"""Second launch of the routing: where every row stands among the rows sorted by expert, and the sums over spans.

A program places the rows of one span. It adds up the counts of all spans and of those before its own (64 KB of int16,
from the cache), sorts the rows of each of its tiles, few enough for shuffles, and so knows every row's place. Programs
beyond the spans add up the partial sums of a few experts each.

Legend: T tokens, E experts, K experts per token, N = T * K routed rows; a tile is ``TOKENS`` consecutive tokens, a span
the consecutive tiles of one program of the first launch.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_rows_triton import padded_experts

# Counts of 256 spans at once for E = 128: 64 words a thread, all on their way together. 128 registers a thread: two
# blocks on a multiprocessor.
LAUNCHES = {
    (gpu, experts): Launch({"SPANS": 32768 // experts, "TILES": tiles}, 8, 1, max_registers=128)
    for gpu in (80, 90, 100)
    for experts, tiles in ((128, 2), (256, 2), (512, 2))
}
SUM_EXPERTS = 8
"""Experts whose partial sums one program adds up: a sector of memory for each span."""


@triton.jit
def _counts(span_pair_counts, num_spans, span, SPANS: tl.constexpr, EXPERTS: tl.constexpr):
    """[EXPERTS] int32 of all spans, and of those before ``span``."""
    # Counts are read in pairs and eight pairs are added as they are; no span has so many rows that 16 bits overflow.
    ROWS: tl.constexpr = SPANS // 8
    PAIRS: tl.constexpr = EXPERTS // 2
    row_S = tl.arange(0, SPANS)
    both_P22 = tl.zeros((PAIRS, 2, 2), tl.int32)
    for start in range(0, num_spans, SPANS):
        at_SP = (start + row_S)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
        pair_SP = tl.load(span_pair_counts + at_SP, mask=(row_S < num_spans - start)[:, None], other=0)
        before_SP = tl.where((row_S < span - start)[:, None], pair_SP, 0)
        all_RP = tl.sum(tl.reshape(pair_SP, (8, ROWS, PAIRS)), axis=0)
        before_RP = tl.sum(tl.reshape(before_SP, (8, ROWS, PAIRS)), axis=0)
        both_RP2 = tl.join(all_RP, before_RP)
        both_RP22 = tl.join(both_RP2 & 0xFFFF, (both_RP2 >> 16) & 0xFFFF)
        both_P22 += tl.sum(both_RP22, axis=0)
    all_P2, before_P2 = tl.split(tl.trans(both_P22, 0, 2, 1))
    return tl.reshape(all_P2, (EXPERTS,)), tl.reshape(before_P2, (EXPERTS,))


@triton.jit
def _sum_partials(
    span_prob_sums,
    span_z_sums,
    prob_sum_E,
    z_sum,
    num_spans,
    program,
    num_experts,
    EXPERTS: tl.constexpr,
    SUM: tl.constexpr,
):
    expert = program * SUM + tl.arange(0, SUM)
    prob = tl.zeros((256, SUM), tl.float32)
    z = tl.zeros((256,), tl.float32)
    for start in range(0, num_spans, 256):
        span = start + tl.arange(0, 256)
        inside = span < num_spans
        prob += tl.load(span_prob_sums + (span[:, None] * EXPERTS + expert[None, :]), mask=inside[:, None], other=0.0)
        z += tl.load(span_z_sums + span, mask=inside, other=0.0)
    tl.store(prob_sum_E + expert, tl.sum(prob, axis=0), mask=expert < num_experts)
    if program == 0:
        tl.store(z_sum, tl.sum(z, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_spans", "span_tiles"])
def place_kernel(
    expert_ids_TK,
    token_mask_T,
    tile_counts,
    span_pair_counts,
    span_prob_sums,
    span_z_sums,
    counts_E,
    prob_sum_E,
    z_sum,
    order_N,
    position_TK,
    offsets_E,
    num_tokens,
    num_spans,
    span_tiles,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SUM: tl.constexpr,
    PDL: tl.constexpr,
    SPANS: tl.constexpr,
    TILES: tl.constexpr,
):
    if PDL:
        gdc_wait()
    span = tl.program_id(0)
    if span >= num_spans:
        program = span - num_spans
        _sum_partials(span_prob_sums, span_z_sums, prob_sum_E, z_sum, num_spans, program, num_experts, EXPERTS, SUM)
        if program == 0:
            expert_E = tl.arange(0, EXPERTS)
            count_E, _ = _counts(span_pair_counts, num_spans, 0, SPANS, EXPERTS)
            tl.store(counts_E + expert_E, count_E.to(tl.int64), mask=expert_E < num_experts)
            tl.store(offsets_E + expert_E, tl.cumsum(count_E, axis=0), mask=expert_E < num_experts)
    else:
        ROWS: tl.constexpr = TOKENS * SLOTS
        expert_E = tl.arange(0, EXPERTS)
        tile_S = tl.arange(0, TILES)
        row_R = tl.arange(0, ROWS)
        count_E, before_E = _counts(span_pair_counts, num_spans, span, SPANS, EXPERTS)
        end_E = tl.cumsum(count_E, axis=0)
        counted = tl.sum(count_E, axis=0)
        counted_before = tl.sum(before_E, axis=0)
        # Row i of a sorted tile goes to i + shift: where the expert starts, past its rows of earlier tiles, and less
        # the rows of other experts that precede it in the tile.
        start_E = end_E - count_E + before_E
        num_tiles = tl.cdiv(num_tokens, TOKENS)
        end_tile = tl.minimum(span * span_tiles + span_tiles, num_tiles)
        for first_tile in range(span * span_tiles, end_tile, TILES):
            tile = first_tile + tile_S
            own_SE = tl.load(
                tile_counts + (tile[:, None].to(tl.int64) * EXPERTS + expert_E[None, :]),
                mask=(tile < end_tile)[:, None],
                other=0,
            ).to(tl.int32)
            token = tile[:, None] * TOKENS + row_R[None, :] // SLOTS
            slot = row_R[None, :] % SLOTS
            exists = (token < tl.minimum(num_tokens, end_tile * TOKENS)) & (slot < top_k)
            expert = tl.load(expert_ids_TK + token * top_k + slot, mask=exists, other=0)
            if token_mask_T is not None:
                expert = tl.where(tl.load(token_mask_T + token, mask=exists, other=0) != 0, expert, EXPERTS)
            expert = tl.where(exists, expert, EXPERTS + 1)
            # The row in the low bits makes the sort stable; masked rows come after all experts, missing ones last.
            key = tl.sort(expert * ROWS + row_R[None, :], dim=1)
            expert, row = key // ROWS, key % ROWS
            earlier_SE = tl.cumsum(own_SE, axis=0) - own_SE
            shift_SE = start_E[None, :] + earlier_SE - (tl.cumsum(own_SE, axis=1) - own_SE)
            at = tile_S[:, None] * EXPERTS + tl.minimum(expert, EXPERTS - 1)
            shift = tl.gather(tl.reshape(shift_SE, (TILES * EXPERTS,)), tl.reshape(at, (TILES * ROWS,)), axis=0)
            shift = tl.reshape(shift, (TILES, ROWS))
            if token_mask_T is not None:
                own_S = tl.sum(own_SE, axis=1)
                masked_S = counted + tile * (TOKENS * top_k) - counted_before - tl.sum(earlier_SE, axis=1) - own_S
                shift = tl.where(expert == EXPERTS, masked_S[:, None], shift)
            position = shift + row_R[None, :]
            origin = (tile[:, None] * TOKENS + row // SLOTS) * top_k + row % SLOTS
            tl.store(order_N + position, origin, mask=expert <= EXPERTS)
            tl.store(position_TK + origin, position, mask=expert <= EXPERTS)
            start_E += tl.sum(own_SE, axis=0)
            counted_before += tl.sum(own_SE)


def _aot_cases() -> list[AotCase]:
    types = {
        **dict.fromkeys(("expert_ids_TK", "span_pair_counts", "order_N", "position_TK", "offsets_E"), "*i32"),
        **dict.fromkeys(("span_prob_sums", "span_z_sums", "prob_sum_E", "z_sum"), "*fp32"),
        **{"token_mask_T": "*i1", "tile_counts": "*i16", "counts_E": "*i64"},
        **dict.fromkeys(("num_tokens", "num_spans", "span_tiles"), "i32"),
    }
    cases = []
    for name, E, K, tokens, slots, absent in (
        ("e128_k8", 128, 8, 64, 8, {"token_mask_T": None}),
        ("e60_k4_masked", 60, 4, 64, 8, {}),
        ("e512_k16", 512, 16, 16, 16, {"token_mask_T": None}),
    ):
        experts = padded_experts(E)
        shape = {"num_experts": E, "top_k": K, "EXPERTS": experts, "SLOTS": slots, "TOKENS": tokens, "SUM": SUM_EXPERTS}
        for gpu in (80, 90, 100):
            label = f"router_topk_place_{name}_sm{gpu}"
            constexprs = {**shape, **absent, "PDL": gpu >= 90}
            cases.append(AotCase(label, place_kernel, types, constexprs, LAUNCHES[gpu, experts], (gpu,)))
    return cases


AOT_CASES = _aot_cases()

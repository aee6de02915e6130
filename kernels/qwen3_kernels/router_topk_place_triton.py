"""Second and third launch of the routing: where every row stands among the rows sorted by expert.

``scan_kernel`` turns the tiles' counts into running counts over tiles, and their partial sums into sums.
``place_kernel`` sorts the few rows of a tile for each row's rank there; the running counts do the rest.

Legend: T tokens, E experts, K experts per token, N = T * K routed rows; a tile is ``TOKENS`` consecutive tokens.
"""

import triton
import triton.language as tl

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_rows_triton import padded_experts

# 1,024 tiles at once: up to T = 32,768 the scan is one round trip to memory.
SCAN_LAUNCHES = {gpu: Launch({"TILES": 1024, "EXPERTS": 2}, num_warps=8, num_stages=1) for gpu in (80, 90, 100)}
# One warp sorts the 256 rows of a tile with shuffles alone.
PLACE_LAUNCHES = {gpu: Launch({}, num_warps=2, num_stages=1) for gpu in (80, 90, 100)}


@triton.jit(do_not_specialize=["num_tiles"])
def scan_kernel(
    tile_counts,
    tile_prob_sums,
    tile_z_sums,
    counts_E,
    prob_sum_E,
    z_sum,
    num_tiles,
    num_experts: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert_E = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    exists_E = expert_E < num_experts
    count_E = tl.zeros((EXPERTS,), tl.int32)
    prob_E = tl.zeros((EXPERTS,), tl.float32)
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < num_tiles)[:, None] & exists_E[None, :]
        at = tile.to(tl.int64)[:, None] * num_experts + expert_E[None, :]
        own = tl.load(tile_counts + at, mask=inside, other=0)
        prob_E += tl.sum(tl.load(tile_prob_sums + at, mask=inside, other=0.0), axis=0)
        tl.store(tile_counts + at, tl.cumsum(own, axis=0) + count_E[None, :], mask=inside)
        count_E += tl.sum(own, axis=0)
    tl.store(counts_E + expert_E, count_E.to(tl.int64), mask=exists_E)
    tl.store(prob_sum_E + expert_E, prob_E, mask=exists_E)
    if tl.program_id(0) == 0:
        z_TILES = tl.zeros((TILES,), tl.float32)
        for start in range(0, num_tiles, TILES):
            tile = start + tl.arange(0, TILES)
            z_TILES += tl.load(tile_z_sums + tile, mask=tile < num_tiles, other=0.0)
        tl.store(z_sum, tl.sum(z_TILES, axis=0))


@triton.jit(do_not_specialize=["num_tokens"])
def place_kernel(
    expert_ids_TK,
    token_mask_T,
    running_counts,
    counts_E,
    order_N,
    position_TK,
    offsets_E,
    num_tokens,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * SLOTS
    tile = tl.program_id(0)
    expert_E = tl.arange(0, EXPERTS)
    exists_E = expert_E < num_experts
    count_E = tl.load(counts_E + expert_E, mask=exists_E, other=0).to(tl.int32)
    end_E = tl.cumsum(count_E, axis=0)
    if tile == 0:
        tl.store(offsets_E + expert_E, end_E, mask=exists_E)
    running = running_counts + tile.to(tl.int64) * num_experts + expert_E
    upto_E = tl.load(running, mask=exists_E, other=0)
    before_E = tl.load(running - num_experts, mask=exists_E & (tile > 0), other=0)
    own_E = upto_E - before_E

    row = tl.arange(0, ROWS)
    token, slot = tile * TOKENS + row // SLOTS, row % SLOTS
    exists = (token < num_tokens) & (slot < top_k)
    expert = tl.load(expert_ids_TK + token * top_k + slot, mask=exists, other=0)
    if token_mask_T is not None:
        expert = tl.where(tl.load(token_mask_T + token, mask=exists, other=0) != 0, expert, EXPERTS)
    expert = tl.where(exists, expert, EXPERTS + 1)
    # The row in the low bits makes the sort stable; masked rows come after all experts, missing ones after those.
    key = tl.sort(expert * ROWS + row)
    expert, row = key // ROWS, key % ROWS
    # Row i of the sorted tile goes to i + shift: where the expert starts, past its rows of earlier tiles, and less the
    # rows of other experts that precede it here.
    shift_E = (end_E - count_E) + before_E - (tl.cumsum(own_E, axis=0) - own_E)
    masked_before = tile * (TOKENS * top_k) - tl.sum(before_E, axis=0)
    masked_shift = tl.sum(count_E, axis=0) + masked_before - tl.sum(own_E, axis=0)
    shift = tl.gather(shift_E, tl.minimum(expert, EXPERTS - 1), axis=0)
    position = tl.where(expert == EXPERTS, masked_shift, shift) + tl.arange(0, ROWS)
    origin = (tile * TOKENS + row // SLOTS) * top_k + row % SLOTS
    tl.store(order_N + position, origin, mask=expert <= EXPERTS)
    tl.store(position_TK + origin, position, mask=expert <= EXPERTS)


def _aot_cases() -> list[AotCase]:
    scan_types = {
        **dict.fromkeys(("tile_prob_sums", "tile_z_sums", "prob_sum_E", "z_sum"), "*fp32"),
        **{"tile_counts": "*i32", "counts_E": "*i64", "num_tiles": "i32"},
    }
    place_types = {
        **dict.fromkeys(("expert_ids_TK", "running_counts", "order_N", "position_TK", "offsets_E"), "*i32"),
        **{"token_mask_T": "*i1", "counts_E": "*i64", "num_tokens": "i32"},
    }
    cases = []
    for gpu in (80, 90, 100):
        scan = SCAN_LAUNCHES[gpu]
        cases.append(AotCase(f"router_topk_scan_sm{gpu}", scan_kernel, scan_types, {"num_experts": 128}, scan, (gpu,)))
        for name, E, K, tokens, slots, absent in (
            ("e128_k8", 128, 8, 32, 8, {"token_mask_T": None}),
            ("e60_k4_masked", 60, 4, 32, 8, {}),
            ("e512_k16", 512, 16, 8, 32, {"token_mask_T": None}),
        ):
            shape = {"num_experts": E, "top_k": K, "EXPERTS": padded_experts(E), "SLOTS": slots, "TOKENS": tokens}
            label = f"router_topk_place_{name}_sm{gpu}"
            place = PLACE_LAUNCHES[gpu]
            cases.append(AotCase(label, place_kernel, place_types, {**shape, **absent}, place, (gpu,)))
    return cases


AOT_CASES = _aot_cases()

"""Second launch of the routing: how many rows of each expert precede a group of tiles, and first sums over tiles.

A program is one warp, in which nothing waits for other warps. The first programs scan: each takes eight experts in one
of ``SEGMENTS`` parts of the tiles and leaves, for every group, the rows before it in its segment. The others add up the
partial sums of a group each.

Legend: T tokens, E experts; a tile is the tokens of one program of the first launch, a group ``TILES`` consecutive
tiles; the counts of four experts in a tile are the bytes of one word.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwen3_kernels.launch import AotCase, Launch

TILES, SEGMENTS = 16, 8
"""Tiles of a group, and segments: at T = 32,768 every thread of a segment's warp scans one group."""
LAUNCHES = {(gpu, experts): Launch({"GROUPS": 32}, 1, 1) for gpu in (80, 90, 100) for experts in (128, 256, 512)}


@triton.jit
def bytes_apart(word):
    """Four times as long in the last dimension: the bytes of words, lowest first."""
    low, high = tl.join(word & 0xFF, (word >> 8) & 0xFF), tl.join((word >> 16) & 0xFF, (word >> 24) & 0xFF)
    return _in_order(low, high)


@triton.jit
def counts_apart(even, odd):
    """The same of sums of words' even and odd bytes, in 16 bits each."""
    low, high = tl.join(even & 0xFFFF, odd & 0xFFFF), tl.join((even >> 16) & 0xFFFF, (odd >> 16) & 0xFFFF)
    return _in_order(low, high)


@triton.jit
def _in_order(low, high):
    x = tl.join(low, high)
    return tl.reshape(tl.trans(x, 0, 1, 3, 2), (x.shape[0], x.shape[1] * 4))


@triton.jit
def _scan(
    part,
    segment,
    tile_counts,
    group_rows_before,
    segment_counts,
    num_tiles,
    segment_groups,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group_G = tl.arange(0, GROUPS)
    expert_C = part * 8 + tl.arange(0, 8)
    before_C = tl.zeros((8,), tl.int32)
    start = segment * segment_groups
    for first in range(start, tl.minimum(start + segment_groups, tl.cdiv(num_tiles, TILES)), GROUPS):
        first_counts = tile_counts + tl.cast(first, tl.int64) * (TILES * EXPERTS // 4) + part * 2
        even_G2, odd_G2 = tl.zeros((GROUPS, 2), tl.int32), tl.zeros((GROUPS, 2), tl.int32)
        for in_group in tl.static_range(TILES):
            tile_G = group_G * TILES + in_group
            word_ptr = first_counts + tile_G[:, None] * (EXPERTS // 4) + tl.arange(0, 2)[None, :]
            word_G2 = tl.load(word_ptr, mask=(tile_G < num_tiles - first * TILES)[:, None], other=0)
            # A tile has at most 128 rows, a group 2,048: bytes are added two at a time in 16 bits each.
            even_G2 += word_G2 & 0xFF00FF
            odd_G2 += (word_G2 >> 8) & 0xFF00FF
        count_GC = counts_apart(even_G2, odd_G2)
        rows_before_GC = tl.cumsum(count_GC, axis=0) - count_GC + before_C[None, :]
        at_GC = tl.cast(first, tl.int64) * EXPERTS + group_G[:, None] * EXPERTS + expert_C[None, :]
        inside_G = group_G * TILES < num_tiles - first * TILES
        tl.store(group_rows_before + at_GC, rows_before_GC, mask=inside_G[:, None])
        before_C += tl.sum(count_GC, axis=0)
    tl.store(segment_counts + segment * EXPERTS + expert_C, before_C)


@triton.jit
def _sum(
    group,
    tile_prob_sums,
    tile_z_sums,
    group_prob_sums,
    group_z_sums,
    num_tiles,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
):
    expert_E = tl.arange(0, EXPERTS)
    in_group_S = tl.arange(0, TILES)
    inside_S = in_group_S < num_tiles - group * TILES
    first_tile = group.to(tl.int64) * TILES
    at_SE = first_tile * EXPERTS + in_group_S[:, None] * EXPERTS + expert_E[None, :]
    prob_SE = tl.load(tile_prob_sums + at_SE, mask=inside_S[:, None], other=0.0)
    tl.store(group_prob_sums + group.to(tl.int64) * EXPERTS + expert_E, tl.sum(prob_SE, axis=0))
    z_S = tl.load(tile_z_sums + first_tile + in_group_S, mask=inside_S, other=0.0)
    tl.store(group_z_sums + group, tl.sum(z_S, axis=0))


@triton.jit(do_not_specialize=["num_tiles", "segment_groups"])
def scan_kernel(
    tile_counts,
    tile_prob_sums,
    tile_z_sums,
    group_rows_before,
    segment_counts,
    group_prob_sums,
    group_z_sums,
    num_tiles,
    segment_groups,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PDL: tl.constexpr,
    GROUPS: tl.constexpr,
):
    if PDL:
        # In this order: the third launch reads what the first one wrote before it waits for this one.
        gdc_wait()
        gdc_launch_dependents()
    PARTS: tl.constexpr = EXPERTS // 8
    program = tl.program_id(0)
    if program < PARTS * SEGMENTS:
        _scan(
            program % PARTS,
            program // PARTS,
            tile_counts,
            group_rows_before,
            segment_counts,
            num_tiles,
            segment_groups,
            EXPERTS,
            TILES,
            GROUPS,
        )
    else:
        group = program - PARTS * SEGMENTS
        _sum(group, tile_prob_sums, tile_z_sums, group_prob_sums, group_z_sums, num_tiles, EXPERTS, TILES)


def _aot_cases() -> list[AotCase]:
    types = {
        **dict.fromkeys(("tile_counts", "group_rows_before", "segment_counts"), "*i32"),
        **dict.fromkeys(("tile_prob_sums", "tile_z_sums", "group_prob_sums", "group_z_sums"), "*fp32"),
        **dict.fromkeys(("num_tiles", "segment_groups"), "i32"),
    }
    return [
        AotCase(
            f"router_topk_scan_e{experts}_sm{gpu}",
            scan_kernel,
            types,
            {"EXPERTS": experts, "TILES": TILES, "SEGMENTS": SEGMENTS, "PDL": gpu >= 90},
            LAUNCHES[gpu, experts],
            (gpu,),
        )
        for experts in (128, 512)
        for gpu in (80, 90, 100)
    ]


AOT_CASES = _aot_cases()

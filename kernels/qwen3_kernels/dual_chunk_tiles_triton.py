"""Which rows a program of the attention kernels works on, and the rotation of q between the three positions.

Legend: T tokens, H query heads, C head width, R = C / 2 rotated pairs, N tiles, S segments.

A tile is at most ``tile`` neighbouring rows of one segment; a segment is a chunk of a document, or a whole document
where attention is plain. How many tiles there are depends on ``cu_seqlens``, which the host never reads: it allots rows
for the most tiles there can be and kernels stop at the count that the table holds. Rows after the last document form
tiles of their own, marked by a negative document start, for which kernels write zeros.

Tiles come in falling order of work over all documents, so that the last ones to start are the shortest. The place of a
tile in that order is counted, not sorted: a document with n tiles holds one tile for each amount of work 1 .. n.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.rotation_triton import cos_sin


@triton.jit
def count_tiles(length, chunk_len, CHUNKED: tl.constexpr, TILE: tl.constexpr):
    """Tiles of a document of ``length`` rows."""
    if CHUNKED:
        return (length // chunk_len) * tl.cdiv(chunk_len, TILE) + tl.cdiv(length % chunk_len, TILE)
    else:
        return tl.cdiv(length, TILE)


@triton.jit(do_not_specialize=["num_documents", "num_rows", "num_tiles", "chunk_len"])
def tile_table_kernel(
    cu_seqlens,
    table,
    num_documents,
    num_rows,
    num_tiles,
    chunk_len,
    CHUNKED: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table_N3 <- (first row, document start, document end) by falling work; row N <- the number of tiles."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    document = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((BLOCK,), tl.int32)
    total = tl.load(cu_seqlens) * 0
    for start in range(0, num_documents + 1, BLOCK):
        index = start + lane
        begin = tl.load(cu_seqlens + index, mask=index <= num_documents, other=num_rows)
        end = tl.load(cu_seqlens + index + 1, mask=index < num_documents, other=num_rows)
        count = count_tiles(end - begin, chunk_len, CHUNKED, TILE)
        closed = total + tl.cumsum(count, 0)
        passed = closed[None, :] <= tile[:, None]
        document += tl.sum(passed.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(passed, closed[None, :], 0), 1))
        total += tl.sum(count, 0)
    real = tile < total
    begin = tl.load(cu_seqlens + document, mask=real, other=0)
    end = tl.load(cu_seqlens + document + 1, mask=real & (document < num_documents), other=num_rows)
    inside = tile - first
    if CHUNKED:
        a_chunk = tl.cdiv(chunk_len, TILE)
        row = begin + (inside // a_chunk) * chunk_len + (inside % a_chunk) * TILE
    else:
        row = begin + inside * TILE
    work = inside
    if KEYS:  # the first keys are seen by the most queries
        work = count_tiles(end - begin, chunk_len, CHUNKED, TILE) - 1 - inside
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_documents + 1, BLOCK):
        index = start + lane
        other_begin = tl.load(cu_seqlens + index, mask=index <= num_documents, other=num_rows)
        other_end = tl.load(cu_seqlens + index + 1, mask=index < num_documents, other=num_rows)
        count = count_tiles(other_end - other_begin, chunk_len, CHUNKED, TILE)
        longer = tl.maximum(count[None, :] - 1 - work[:, None], 0)
        level = (index[None, :] < document[:, None]) & (count[None, :] > work[:, None])
        rank += tl.sum(longer + level.to(tl.int32), 1)
    tl.store(table + rank * 3, row, mask=real)
    tl.store(table + rank * 3 + 1, tl.where(document == num_documents, -1, begin), mask=real)
    tl.store(table + rank * 3 + 2, end, mask=real)
    if tl.program_id(0) == 0:
        tl.store(table + num_tiles * 3, total)


class Tiles:
    """The table of one tile size, and the numbers a launch needs with it."""

    def __init__(self, cu_seqlens: Tensor, num_rows: int, chunk_len: int | None, tile: int, *, keys: bool) -> None:
        documents = cu_seqlens.shape[0] - 1
        chunks = 0 if chunk_len is None else num_rows // chunk_len
        segments = documents + 1 + chunks
        self.tile = tile
        self.chunked = chunk_len is not None
        self.chunk_len = 0 if chunk_len is None else chunk_len
        self.most = max(1, min(num_rows, (num_rows + segments * (tile - 1)) // tile))
        # cu_seqlens is padded to many more documents than a row usually holds, and 1,000 idle programs a head cost as
        # much as a tenth of the work at T = 32,768. So there are as many slots as full tiles; what is left over goes to
        # the slots with the least work (``tile_rank``).
        self.slots = min(self.most, triton.cdiv(num_rows, tile) + chunks)
        self.table_N3 = torch.empty((self.most + 1, 3), dtype=torch.int32, device=cu_seqlens.device)
        block = 64
        tile_table_kernel[(triton.cdiv(self.most, block),)](
            cu_seqlens,
            self.table_N3,
            documents,
            num_rows,
            self.most,
            self.chunk_len,
            CHUNKED=self.chunked,
            TILE=tile,
            KEYS=keys,
            BLOCK=block,
            num_warps=4,
        )


@triton.jit
def tile_rank(turn, slot, slots):
    """Rank of the tile that ``slot`` works on in its ``turn``: 0, 1 .. slots - 1, then back, then on again."""
    return turn * slots + tl.where(turn % 2 == 0, slot, slots - 1 - slot)


@triton.jit
def heads_of_grid(S: tl.constexpr):
    """kv head, query head, number of query heads and slot of a program in a grid of slots x S, G."""
    group = tl.program_id(1)
    return group, group * S + tl.program_id(0) % S, tl.num_programs(1) * S, tl.program_id(0) // S


@triton.jit
def load_tile(table, rank):
    """First row of a tile, start and end of its document; a negative start after the last document."""
    return tl.load(table + rank * 3), tl.load(table + rank * 3 + 1), tl.load(table + rank * 3 + 2)


@triton.jit
def segment(row, begin, end, chunk_len, CHUNKED: tl.constexpr):
    """Start and end of the chunk, or document, that ``row`` lies in."""
    if CHUNKED:
        chunk = row - (row - begin) % chunk_len
        return chunk, tl.where(begin < 0, end, tl.minimum(end, chunk + chunk_len))
    else:
        return begin, end


@triton.jit
def count_ranges(chunk, begin, chunk_len, CHUNKED: tl.constexpr):
    """Ranges of keys that a query tile sees: its own chunk, the chunk before, older chunks."""
    if CHUNKED:
        return tl.where(begin < 0, 1, tl.minimum((chunk - begin) // chunk_len, 2) + 1)
    else:
        return 1


@triton.jit
def key_range(regime, first_row, chunk, begin, end, chunk_len, CHUNKED: tl.constexpr, BM: tl.constexpr):
    """Keys that a query tile sees in its own chunk (0), the chunk before (1) and older chunks (2)."""
    low, high = chunk, tl.minimum(end, first_row + BM)
    if CHUNKED:
        low = tl.where(regime == 0, low, tl.where(regime == 1, chunk - chunk_len, begin))
        high = tl.where(regime == 0, high, chunk - (regime - 1) * chunk_len)
    return low, high


@triton.jit
def load_rows(descriptor, row, head, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``ROWS`` rows of one head; zeros past the head width. Rows of a neighbour may follow: mask the scores."""
    return descriptor.load([row, head, 0]).reshape(ROWS, WIDTH)


@triton.jit
def load_kept_rows(pointer, first, stride, stop, ROWS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """``load_rows`` by pointer: a tile that a product then takes from shared memory instead of registers."""
    lane, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tile = pointer + tl.cast(first, tl.int64) * stride + (lane[:, None] * stride + columns[None, :])
    return tl.load(tile, mask=(lane < stop - first)[:, None] & (columns < C)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, value, first, stride, stop, ROWS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Store the rows before ``stop`` of a tile that starts at row ``first``."""
    lane, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tile = pointer + tl.cast(first, tl.int64) * stride + (lane[:, None] * stride + columns[None, :])
    mask = (lane < stop - first)[:, None] & (columns < C)[None, :]
    tl.store(tile, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["most", "slots", "chunk_len", "chunk_size", "num_rows"])
def move_queries_kernel(
    q,
    moved,
    inv_freq_R,
    table,
    most,
    slots,
    chunk_len,
    chunk_size,
    num_rows,
    stride_t,
    stride_h,
    H: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    """moved_3THC <- q at its three positions; ``BACK`` adds the gradients of the last two, moved back, to the first.

    Every row is written, also those that no key of another chunk is seen from: a tile may read past its chunk, and what
    it multiplies by zero must not be NaN. Grid: slots, parts of a tile.
    """
    pair = tl.arange(0, PAIRS)
    pair_ok = pair < C // 2
    plane = tl.cast(num_rows, tl.int64) * H * C
    inv_freq = tl.load(inv_freq_R + pair, mask=pair_ok, other=0.0).to(tl.float32)
    total = tl.load(table + most * 3)
    for turn in range(0, tl.cdiv(total, slots)):
        rank = tile_rank(turn, tl.program_id(0), slots)
        if rank < total:
            row, begin, end = load_tile(table, rank)
            chunk, end = segment(row, begin, end, chunk_len, True)
            rows = row + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
            local = rows - chunk
            ok = (rows < tl.minimum(end, row + TILE))[:, None] & pair_ok[None, :]
            angle = (tl.minimum(local + chunk_len, chunk_size) - local).to(tl.float32)[:, None] * inv_freq[None, :]
            cos_1, sin_1 = cos_sin(angle)
            angle = (chunk_size - local).to(tl.float32)[:, None] * inv_freq[None, :]
            cos_2, sin_2 = cos_sin(angle)
            for head in range(H):
                low_at = q + rows.to(tl.int64)[:, None] * stride_t + head * stride_h + pair[None, :]
                moved_at = moved + (rows.to(tl.int64)[:, None] * H + head) * C + pair[None, :]
                low = tl.load(low_at, mask=ok, other=0.0).to(tl.float32)
                high = tl.load(low_at + C // 2, mask=ok, other=0.0).to(tl.float32)
                if BACK:
                    if chunk > begin:
                        low_1 = tl.load(moved_at + plane, mask=ok, other=0.0).to(tl.float32)
                        high_1 = tl.load(moved_at + plane + C // 2, mask=ok, other=0.0).to(tl.float32)
                        low += low_1 * cos_1 + high_1 * sin_1
                        high += high_1 * cos_1 - low_1 * sin_1
                    if chunk - begin > chunk_len:
                        low_2 = tl.load(moved_at + 2 * plane, mask=ok, other=0.0).to(tl.float32)
                        high_2 = tl.load(moved_at + 2 * plane + C // 2, mask=ok, other=0.0).to(tl.float32)
                        low += low_2 * cos_2 + high_2 * sin_2
                        high += high_2 * cos_2 - low_2 * sin_2
                    tl.store(low_at, low.to(q.dtype.element_ty), mask=ok & (begin >= 0))
                    tl.store(low_at + C // 2, high.to(q.dtype.element_ty), mask=ok & (begin >= 0))
                else:
                    dtype = moved.dtype.element_ty
                    tl.store(moved_at, low.to(dtype), mask=ok)
                    tl.store(moved_at + C // 2, high.to(dtype), mask=ok)
                    tl.store(moved_at + plane, (low * cos_1 - high * sin_1).to(dtype), mask=ok)
                    tl.store(moved_at + plane + C // 2, (high * cos_1 + low * sin_1).to(dtype), mask=ok)
                    tl.store(moved_at + 2 * plane, (low * cos_2 - high * sin_2).to(dtype), mask=ok)
                    tl.store(moved_at + 2 * plane + C // 2, (high * cos_2 + low * sin_2).to(dtype), mask=ok)


def move_queries(
    q_THC: Tensor, moved_3THC: Tensor, inv_freq_R: Tensor, tiles: Tiles, chunk_size: int, *, back: bool
) -> None:
    """Fill ``moved_3THC`` from ``q_THC``, or with ``back`` add ``moved_3THC`` moved back to ``q_THC``."""
    num_rows, heads, width = q_THC.shape
    rows = min(16, tiles.tile)
    move_queries_kernel[(tiles.slots, triton.cdiv(tiles.tile, rows))](
        q_THC,
        moved_3THC,
        inv_freq_R,
        tiles.table_N3,
        tiles.most,
        tiles.slots,
        tiles.chunk_len,
        chunk_size,
        num_rows,
        q_THC.stride(0),
        q_THC.stride(1),
        H=heads,
        C=width,
        PAIRS=triton.next_power_of_2(width // 2),
        TILE=tiles.tile,
        ROWS=rows,
        BACK=back,
        num_warps=4,
    )


AOT_CASES = [
    *(
        AotCase(
            f"attention tiles {'keys' if keys else 'queries'} {'chunked' if chunked else 'plain'}",
            tile_table_kernel,
            {
                "cu_seqlens": "*i32",
                "table": "*i32",
                "num_documents": "i32",
                "num_rows": "i32",
                "num_tiles": "i32",
                "chunk_len": "i32",
            },
            {"CHUNKED": chunked, "TILE": 128, "KEYS": keys, "BLOCK": 64},
            Launch({}, 4, 1),
        )
        for chunked in (False, True)
        for keys in (False, True)
    ),
    *(
        AotCase(
            f"attention move queries {'back' if back else 'on'}",
            move_queries_kernel,
            {
                **dict.fromkeys(("q", "moved"), "*bf16"),
                "inv_freq_R": "*fp32",
                "table": "*i32",
                **dict.fromkeys(("most", "slots", "chunk_len", "chunk_size", "num_rows"), "i32"),
                **dict.fromkeys(("stride_t", "stride_h"), "i32:16"),
            },
            {"H": 32, "C": 128, "PAIRS": 64, "TILE": 128, "ROWS": 16, "BACK": back},
            Launch({}, 4, 1),
        )
        for back in (False, True)
    ),
]

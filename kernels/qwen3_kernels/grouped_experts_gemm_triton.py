"""The matrix products of the experts as Triton kernels, forward and backward.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K rows sorted by expert,
J column tiles of a row's partial sum.

Rows of one expert are cut into blocks. Which expert and rows a program gets is found on the device from the running
row counts, inside a number of programs that the host can bound without looking at them, so nothing waits for the GPU
and a CUDA graph replays with any routing. Rows of x and of the output's gradient are gathered while a tile is loaded:
no gathered copy exists. One expert's operands are 14 MB, a quarter of the second-level cache, so programs in the
order (expert, row block, column block) read every weight once from memory and need no other order. An expert's last
row block runs at half height where that holds its rows (HALF): with 256 rows an expert, whole blocks of 128 would
compute a quarter more than is asked for.
"""

import triton
import triton.language as tl

from qwen3_kernels.grouped_experts_rows_triton import swiglu_gradient


@triton.jit
def find_tile(offsets_ptr, tile, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, first row and end of the rows of row block ``tile``; an expert of E or more means there is none."""
    expert_E = tl.arange(0, E_POW2)
    end_E = tl.load(offsets_ptr + expert_E, mask=expert_E < E, other=0)
    start_E = tl.load(offsets_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < E), other=0)
    blocks_E = tl.where(expert_E < E, tl.cdiv(end_E - start_E, BLOCK_M), 0)
    before_E = tl.cumsum(blocks_E, 0)
    expert = tl.sum((before_E <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(before_E <= tile, before_E, 0), 0)
    start = tl.load(offsets_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    end = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    return expert, start + (tile - before) * BLOCK_M, end


@triton.jit
def load_rows(ptr, row_M, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [M, BLOCK] of rows ``row_M`` (int64) from ``column`` on; columns past WIDTH are 0."""
    columns = column + tl.arange(0, BLOCK)
    ptrs = ptr + row_M[:, None] * WIDTH + columns[None, :]
    return tl.load(ptrs) if WIDTH % BLOCK == 0 else tl.load(ptrs, mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
def load_weight(
    weight, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile of one expert's matrix [ROWS, COLUMNS]. ``weight`` is a descriptor of [E * ROWS, COLUMNS] where TMA is set:
    it then reads on into the next expert, so the contracted width must be a multiple of its block."""
    if TMA:
        tile = weight.load([expert * ROWS + row, column])
    else:
        rows, columns = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        ptrs = weight + expert.to(tl.int64) * (ROWS * COLUMNS) + rows[:, None] * COLUMNS + columns[None, :]
        if ROWS % BLOCK_R == 0 and COLUMNS % BLOCK_C == 0:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)
    return tile


@triton.jit
def gate_up_tile(
    x_ptr, weight, order_ptr, gate_up_ptr, h_ptr, expert, first, end, column,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    row_M = first + tl.arange(0, BLOCK_M)
    # Rows past the end repeat token 0: a row of a product depends on its own row alone, and these are not stored.
    token_M = (tl.load(order_ptr + row_M, mask=row_M < end, other=0) // TOP_K).to(tl.int64)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        x = load_rows(x_ptr, token_M, k, D, BLOCK_K)
        w_gate = load_weight(weight, expert, column, k, 2 * F, D, BLOCK_N, BLOCK_K, TMA)
        w_up = load_weight(weight, expert, F + column, k, 2 * F, D, BLOCK_N, BLOCK_K, TMA)
        gate = tl.dot(x, w_gate.T, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up.T, up, input_precision=PRECISION)
    column_N = column + tl.arange(0, BLOCK_N)
    mask = (row_M[:, None] < end) & (column_N[None, :] < F)
    row = row_M.to(tl.int64)[:, None]
    if SAVE:
        gate_up_ptrs = gate_up_ptr + row * (2 * F) + column_N[None, :]
        tl.store(gate_up_ptrs, gate, mask=mask)
        tl.store(gate_up_ptrs + F, up, mask=mask)
    tl.store(h_ptr + row * F + column_N[None, :], gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def gate_up_kernel(
    x_ptr, weight, offsets_ptr, order_ptr, gate_up_ptr, h_ptr,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """h = silu(x W_gate) * (x W_up) for gathered rows of x; the two products are kept where SAVE is set."""
    tile = tl.program_id(0) // tl.cdiv(F, BLOCK_N)
    column = tl.program_id(0) % tl.cdiv(F, BLOCK_N) * BLOCK_N
    expert, first, end = find_tile(offsets_ptr, tile, E, E_POW2, BLOCK_M)
    if expert >= E:
        return
    if HALF and end - first <= BLOCK_M // 2:
        gate_up_tile(
            x_ptr, weight, order_ptr, gate_up_ptr, h_ptr, expert, first, end, column,
            TOP_K, D, F, SAVE, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
    else:
        gate_up_tile(
            x_ptr, weight, order_ptr, gate_up_ptr, h_ptr, expert, first, end, column,
            TOP_K, D, F, SAVE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip


@triton.jit
def rows_tile(
    a, weight, out_ptr, expert, first, end, column,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    row_M = first + tl.arange(0, BLOCK_M)
    read_M = tl.minimum(row_M, end - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, WIDTH_IN, BLOCK_K):
        rows = a.load([first, k]) if TMA else load_rows(a, read_M, k, WIDTH_IN, BLOCK_K)
        if TRANSPOSED:
            w = load_weight(weight, expert, column, k, WIDTH_OUT, WIDTH_IN, BLOCK_N, BLOCK_K, TMA).T
        else:
            w = load_weight(weight, expert, k, column, WIDTH_IN, WIDTH_OUT, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(rows, w, acc, input_precision=PRECISION)
    column_N = column + tl.arange(0, BLOCK_N)
    mask = (row_M[:, None] < end) & (column_N[None, :] < WIDTH_OUT)
    tl.store(out_ptr + row_M.to(tl.int64)[:, None] * WIDTH_OUT + column_N[None, :], acc, mask=mask)


@triton.jit
def rows_kernel(
    a, a_half, weight, offsets_ptr, out_ptr,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """out = a W_e for rows that lie sorted by expert; W_e is stored [in, out], or [out, in] where TRANSPOSED."""
    tile = tl.program_id(0) // tl.cdiv(WIDTH_OUT, BLOCK_N)
    column = tl.program_id(0) % tl.cdiv(WIDTH_OUT, BLOCK_N) * BLOCK_N
    expert, first, end = find_tile(offsets_ptr, tile, E, E_POW2, BLOCK_M)
    if expert >= E:
        return
    if HALF and end - first <= BLOCK_M // 2:
        rows_tile(
            a_half, weight, out_ptr, expert, first, end, column,
            WIDTH_IN, WIDTH_OUT, TRANSPOSED, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
    else:
        rows_tile(
            a, weight, out_ptr, expert, first, end, column,
            WIDTH_IN, WIDTH_OUT, TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip


@triton.jit
def column_parts(x, PART_N: tl.constexpr):
    """The columns of x in parts of PART_N, as a tuple; a tensor core's accumulator is cut without moving data."""
    if x.shape[1] > PART_N:
        low, high = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        parts = column_parts(low, PART_N) + column_parts(high, PART_N)
    else:
        parts = (x,)
    return parts


@triton.jit
def load_gate_up(gate_up_ptr, row_M, end, column, F: tl.constexpr, PART_N: tl.constexpr):
    column_N = column + tl.arange(0, PART_N)
    mask = (row_M[:, None] < end) & (column_N[None, :] < F)
    ptrs = gate_up_ptr + row_M.to(tl.int64)[:, None] * (2 * F) + column_N[None, :]
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + F, mask=mask, other=0.0)


@triton.jit
def grad_h_tile(
    grad_out_ptr, weight, order_ptr, weights_ptr, gate_up_ptr, grad_gate_up_ptr, h_weighted_ptr, dot_ptr,
    expert, first, end, column_tile,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_N // PART_N
    column = column_tile * BLOCK_N
    row_M = first + tl.arange(0, BLOCK_M)
    slot_M = tl.load(order_ptr + row_M, mask=row_M < end, other=0)
    token_M = (slot_M // TOP_K).to(tl.int64)
    weight_M = tl.load(weights_ptr + slot_M, mask=row_M < end, other=0.0).to(tl.float32)
    # SwiGLU's gradient goes by parts of columns, since five tensors of the accumulator's size do not fit the
    # registers, and gate and up are loaded two parts ahead (the first two before the product): a part computes for
    # less time than memory takes to answer.
    gate_up = load_gate_up(gate_up_ptr, row_M, end, column, F, PART_N)
    next_gate_up = gate_up
    if PARTS > 1:
        next_gate_up = load_gate_up(gate_up_ptr, row_M, end, column + PART_N, F, PART_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        grad_out = load_rows(grad_out_ptr, token_M, k, D, BLOCK_K)
        w = load_weight(weight, expert, k, column, D, F, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(grad_out, w, acc, input_precision=PRECISION)
    parts = column_parts(acc, PART_N)
    row = row_M.to(tl.int64)[:, None]
    dot_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.static_range(PARTS):
        gate, up = gate_up[0].to(tl.float32), gate_up[1].to(tl.float32)
        gate_up = next_gate_up
        if i + 2 < PARTS:
            next_gate_up = load_gate_up(gate_up_ptr, row_M, end, column + (i + 2) * PART_N, F, PART_N)
        h, d_gate, d_up = swiglu_gradient(parts[i], gate, up, weight_M[:, None])
        dot_M += tl.sum(parts[i] * h, 1)
        column_N = column + i * PART_N + tl.arange(0, PART_N)
        mask = (row_M[:, None] < end) & (column_N[None, :] < F)
        grad_ptrs = grad_gate_up_ptr + row * (2 * F) + column_N[None, :]
        tl.store(grad_ptrs, d_gate, mask=mask)
        tl.store(grad_ptrs + F, d_up, mask=mask)
        tl.store(h_weighted_ptr + row * F + column_N[None, :], h * weight_M[:, None], mask=mask)
    tl.store(dot_ptr + row_M * tl.cdiv(F, BLOCK_N) + column_tile, dot_M, mask=row_M < end)


@triton.jit
def grad_h_kernel(
    grad_out_ptr, weight, offsets_ptr, order_ptr, weights_ptr, gate_up_ptr, grad_gate_up_ptr, h_weighted_ptr, dot_ptr,
    TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    HALF: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    """grad_h = dO W_down for gathered rows of dO, and through SwiGLU: the gradient of gate and up, h times the routing
    weight, and the column tile's share of <grad_h, h>, which is the gradient of the routing weight."""
    tile = tl.program_id(0) // tl.cdiv(F, BLOCK_N)
    column_tile = tl.program_id(0) % tl.cdiv(F, BLOCK_N)
    expert, first, end = find_tile(offsets_ptr, tile, E, E_POW2, BLOCK_M)
    if expert >= E:
        return
    if HALF and end - first <= BLOCK_M // 2:
        grad_h_tile(
            grad_out_ptr, weight, order_ptr, weights_ptr, gate_up_ptr, grad_gate_up_ptr, h_weighted_ptr, dot_ptr,
            expert, first, end, column_tile, TOP_K, D, F, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, TMA, PART_N,
        )  # fmt: skip
    else:
        grad_h_tile(
            grad_out_ptr, weight, order_ptr, weights_ptr, gate_up_ptr, grad_gate_up_ptr, h_weighted_ptr, dot_ptr,
            expert, first, end, column_tile, TOP_K, D, F, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PART_N,
        )  # fmt: skip


@triton.jit
def grad_weight_kernel(
    left_ptr, right_ptr, offsets_ptr, order_ptr, out_ptr,
    TOP_K: tl.constexpr, WIDTH_L: tl.constexpr, WIDTH_R: tl.constexpr, GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = left^T right over the rows of expert e; the rows of one side (left if GATHER_LEFT) are gathered."""
    tiles_n = tl.cdiv(WIDTH_R, BLOCK_N)
    tiles: tl.constexpr = tl.cdiv(WIDTH_L, BLOCK_M) * tl.cdiv(WIDTH_R, BLOCK_N)
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m, n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    m_M, n_N = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row_K = start + tl.arange(0, BLOCK_K)
    # A block's indices are loaded while the block before runs: an index load inside the pipeline would halve its depth.
    token_K = tl.load(order_ptr + row_K, mask=row_K < end, other=0) // TOP_K
    for k in range(start, end, BLOCK_K):
        row_K = k + tl.arange(0, BLOCK_K)
        # Rows past the end belong to the next expert or hold whatever memory held: both sides are masked, as 0 * NaN
        # is NaN.
        inside_K = row_K < end
        next_K = tl.load(order_ptr + row_K + BLOCK_K, mask=row_K + BLOCK_K < end, other=0)
        left_K = (token_K if GATHER_LEFT else row_K).to(tl.int64)
        right_K = (row_K if GATHER_LEFT else token_K).to(tl.int64)
        left_mask, right_mask = inside_K[:, None], inside_K[:, None]
        if WIDTH_L % BLOCK_M != 0:
            left_mask = left_mask & (m_M[None, :] < WIDTH_L)
        if WIDTH_R % BLOCK_N != 0:
            right_mask = right_mask & (n_N[None, :] < WIDTH_R)
        left = tl.load(left_ptr + left_K[:, None] * WIDTH_L + m_M[None, :], mask=left_mask, other=0.0)
        right = tl.load(right_ptr + right_K[:, None] * WIDTH_R + n_N[None, :], mask=right_mask, other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        token_K = next_K // TOP_K
    out_ptrs = out_ptr + expert.to(tl.int64) * (WIDTH_L * WIDTH_R) + m_M[:, None] * WIDTH_R + n_N[None, :]
    tl.store(out_ptrs, acc, mask=(m_M[:, None] < WIDTH_L) & (n_N[None, :] < WIDTH_R))

"""What surrounds the experts' matrix products, row by row: spread, SwiGLU both ways, weighted sum.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K rows sorted by expert,
J column tiles of a row's partial sum.

All of it is memory bound. Rows from ``offsets_E[-1]`` on belong to masked tokens: nothing reads them, because nothing
has written them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch

SPREAD = Launch({}, num_warps=4, num_stages=1)
SWIGLU = Launch({"ROWS": 4}, num_warps=4, num_stages=1)
COMBINE = {
    "few": Launch({"BLOCK_D": 256}, num_warps=1, num_stages=1),
    "many": Launch({"BLOCK_D": 2048}, num_warps=4, num_stages=1),
}
FEW_TOKENS = 512
"""Up to here one program a token does not fill a GPU, so a token's columns are split over programs."""
CLEAR = Launch({"BLOCK": 4096}, num_warps=4, num_stages=1)


@triton.jit
def spread_kernel(
    x_ptr, position_ptr, offsets_ptr, out_ptr,
    TOP_K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes a token's row to its K places: x is read once, where a gather would read every row K times."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.load(offsets_ptr + E - 1)
    column_D = tl.arange(0, BLOCK_D)
    x_D = tl.load(x_ptr + token * D + column_D, mask=column_D < D)
    for k in tl.static_range(TOP_K):
        position = tl.load(position_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + position * D + column_D, x_D, mask=(column_D < D) & (position < total))


@triton.jit
def swiglu_kernel(
    gate_up_ptr, offsets_ptr, h_ptr, F: tl.constexpr, E: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr
):
    """h = silu(gate) * up."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_F)[None, :]
    mask = (row < tl.load(offsets_ptr + E - 1)) & (column < F)
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def swiglu_gradient(grad_h, gate, up, weight):
    """(h, d_gate, d_up) of h = silu(gate) * up, for a gradient ``grad_h * weight``."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    scaled = grad_h * weight
    # d silu(g)/dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    return silu * up, scaled * up * (sigmoid + silu * (1.0 - sigmoid)), scaled * silu


@triton.jit
def swiglu_backward_kernel(
    grad_h_ptr, gate_up_ptr, weights_ptr, order_ptr, offsets_ptr, grad_gate_up_ptr, h_weighted_ptr, dot_ptr,
    F: tl.constexpr, E: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the unweighted gradient of h: that of gate and up, h times the routing weight, and <grad_h, h> of each
    row, which is the gradient of the routing weight."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < tl.load(offsets_ptr + E - 1)
    slot_R = tl.load(order_ptr + row_R, mask=inside_R, other=0)
    weight = tl.load(weights_ptr + slot_R, mask=inside_R, other=0.0).to(tl.float32)[:, None]
    row, column = row_R.to(tl.int64)[:, None], tl.arange(0, BLOCK_F)[None, :]
    mask = inside_R[:, None] & (column < F)
    offset = row * (2 * F) + column
    grad_h = tl.load(grad_h_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + F, mask=mask, other=0.0).to(tl.float32)
    h, d_gate, d_up = swiglu_gradient(grad_h, gate, up, weight)
    tl.store(grad_gate_up_ptr + offset, d_gate, mask=mask)
    tl.store(grad_gate_up_ptr + offset + F, d_up, mask=mask)
    tl.store(h_weighted_ptr + row * F + column, h * weight, mask=mask)
    tl.store(dot_ptr + row_R, tl.sum(grad_h * h, 1), mask=inside_R)


@triton.jit
def combine_kernel(
    y_ptr, position_ptr, offsets_ptr, weights_ptr, dot_ptr, out_ptr, grad_weights_ptr,
    TOP_K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, J: tl.constexpr, J_POW2: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of a token's K rows of y in slot order, weighted or plain: the same on every run. Where J is set, also sums
    the J partial dots of every row into the gradient of its routing weight."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.load(offsets_ptr + E - 1)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = column_D < D
    acc_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        position = tl.load(position_ptr + token * TOP_K + k).to(tl.int64)
        valid = position < total
        y_D = tl.load(y_ptr + position * D + column_D, mask=inside_D & valid, other=0.0).to(tl.float32)
        if WEIGHTED:
            y_D *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        acc_D += y_D
        if J > 0:
            part_J = tl.arange(0, J_POW2)
            dot_J = tl.load(dot_ptr + position * J + part_J, mask=(part_J < J) & valid, other=0.0)
            if tl.program_id(1) == 0:
                tl.store(grad_weights_ptr + token * TOP_K + k, tl.sum(dot_J, 0))
    tl.store(out_ptr + token * D + column_D, acc_D, mask=inside_D)


@triton.jit
def clear_empty_kernel(out_ptr, offsets_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Zeroes the matrices of experts without rows."""
    expert = tl.program_id(0)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    if tl.load(offsets_ptr + expert) > start:
        return
    zeros = tl.zeros((BLOCK,), dtype=tl.float32).to(out_ptr.dtype.element_ty)
    for first in range(tl.program_id(1) * BLOCK, SIZE, tl.num_programs(1) * BLOCK):
        offset = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + expert.to(tl.int64) * SIZE + offset, zeros, mask=offset < SIZE)


def spread(x_TD: Tensor, position_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """x_ND: the tokens' rows, sorted by expert."""
    (tokens, top_k), width = position_TK.shape, x_TD.shape[1]
    out_ND = x_TD.new_empty(tokens * top_k, width)
    spread_kernel[(tokens,)](
        x_TD, position_TK, offsets_E, out_ND,
        TOP_K=top_k, D=width, E=len(offsets_E), BLOCK_D=triton.next_power_of_2(width), **SPREAD.options(),
    )  # fmt: skip
    return out_ND


def swiglu(gate_up_N2F: Tensor, offsets_E: Tensor) -> Tensor:
    """h_NF."""
    rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    h_NF = gate_up_N2F.new_empty(rows, width)
    swiglu_kernel[(triton.cdiv(rows, SWIGLU.blocks["ROWS"]),)](
        gate_up_N2F, offsets_E, h_NF,
        F=width, E=len(offsets_E), BLOCK_F=triton.next_power_of_2(width), **SWIGLU.options(),
    )  # fmt: skip
    return h_NF


def swiglu_backward(
    grad_h_NF: Tensor, gate_up_N2F: Tensor, weights_TK: Tensor, order_N: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_gate_up_N2F, h_weighted_NF, dot_NJ with J = 1)."""
    rows, width = grad_h_NF.shape
    grad_gate_up_N2F, h_weighted_NF = torch.empty_like(gate_up_N2F), torch.empty_like(grad_h_NF)
    dot_NJ = torch.empty((rows, 1), dtype=torch.float32, device=grad_h_NF.device)
    swiglu_backward_kernel[(triton.cdiv(rows, SWIGLU.blocks["ROWS"]),)](
        grad_h_NF, gate_up_N2F, weights_TK, order_N, offsets_E, grad_gate_up_N2F, h_weighted_NF, dot_NJ,
        F=width, E=len(offsets_E), BLOCK_F=triton.next_power_of_2(width), **SWIGLU.options(),
    )  # fmt: skip
    return grad_gate_up_N2F, h_weighted_NF, dot_NJ


def combine(y_ND: Tensor, weights_TK: Tensor, position_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """out_TD: the weighted sum of every token's rows."""
    return _combine(y_ND, position_TK, offsets_E, weights_TK, None, None)


def combine_gradients(
    grad_x_ND: Tensor, dot_NJ: Tensor, position_TK: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """(grad_x_TD, grad_weights_TK): plain sums of every token's rows and of every row's partial dots."""
    grad_weights_TK = torch.empty(position_TK.shape, dtype=torch.float32, device=grad_x_ND.device)
    return _combine(grad_x_ND, position_TK, offsets_E, None, dot_NJ, grad_weights_TK), grad_weights_TK


def grad_weights(dot_NJ: Tensor, position_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """grad_weights_TK alone, where nobody wants the gradient of x; the dots of masked tokens' rows were not written."""
    return torch.where(position_TK < offsets_E[-1], dot_NJ.sum(1)[position_TK], 0.0)


def _combine(
    y_ND: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    dot_NJ: Tensor | None,
    grad_weights_TK: Tensor | None,
) -> Tensor:
    (tokens, top_k), width = position_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(tokens, width)
    parts = 0 if dot_NJ is None else dot_NJ.shape[1]
    launch = COMBINE["few" if tokens <= FEW_TOKENS else "many"]
    combine_kernel[(tokens, triton.cdiv(width, launch.blocks["BLOCK_D"]))](
        y_ND, position_TK, offsets_E, weights_TK, dot_NJ, out_TD, grad_weights_TK,
        TOP_K=top_k, D=width, E=len(offsets_E), J=parts, J_POW2=triton.next_power_of_2(max(parts, 1)),
        WEIGHTED=weights_TK is not None, **launch.options(),
    )  # fmt: skip
    return out_TD


def clear_empty(out: Tensor, offsets_E: Tensor) -> None:
    """Zero, in place, the matrices ``out[e]`` of experts without rows."""
    clear_empty_kernel[(out.shape[0], 16)](out, offsets_E, SIZE=out[0].numel(), **CLEAR.options())


_KINDS = {
    **dict.fromkeys(("position_ptr", "offsets_ptr", "order_ptr"), "*i32"),
    **dict.fromkeys(("x_ptr", "y_ptr", "out_ptr", "h_ptr", "grad_h_ptr", "gate_up_ptr", "grad_gate_up_ptr"), "*bf16"),
    **dict.fromkeys(("h_weighted_ptr",), "*bf16"),
    **dict.fromkeys(("weights_ptr", "dot_ptr", "grad_weights_ptr"), "*fp32"),
}


def _case(name: str, kernel, launch: Launch, **constexprs: int) -> AotCase:
    signature = {argument: _KINDS[argument] for argument in kernel.arg_names if argument in _KINDS}
    return AotCase(f"grouped_experts/{name}", kernel, signature, {"E": 128, **constexprs}, launch)


AOT_CASES = [
    _case("spread", spread_kernel, SPREAD, TOP_K=8, D=2048, BLOCK_D=2048),
    _case("swiglu", swiglu_kernel, SWIGLU, F=768, BLOCK_F=1024),
    _case("swiglu_backward", swiglu_backward_kernel, SWIGLU, F=768, BLOCK_F=1024),
    AotCase(
        "grouped_experts/clear_empty",
        clear_empty_kernel,
        {"out_ptr": "*bf16", "offsets_ptr": "*i32"},
        {"SIZE": 768 * 2048},
        CLEAR,
    ),
    *(
        _case(
            f"combine/{tokens}/{'gradients' if parts else 'weighted'}", combine_kernel, launch,
            TOP_K=8, D=2048, J=parts, J_POW2=8, WEIGHTED=not parts,
        )
        for tokens, launch in COMBINE.items()
        for parts in (0, 6)
    ),
]  # fmt: skip

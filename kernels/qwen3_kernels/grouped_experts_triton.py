"""The experts on a GPU: operators, gradients, and which product runs where.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K rows sorted by expert,
J column tiles of a row's partial sum.

Every product of the layer runs either as torch's grouped matrix product (``F.grouped_mm``, CUTLASS on Hopper) between
row kernels, or as one of our Triton products, which gather their rows while they load and do SwiGLU before they store.
``GROUPED_MM`` says which, by GPU generation and number of rows.

With h = SwiGLU(x W_gate_up) and y = h W_down, the routing weight's gradient <dO, y> equals <dO W_down, h> (SonicMoE,
arXiv 2512.14080), so neither gathered inputs nor down products are kept: the backward pass saves x, gate_up [N, 2F]
and indices. Nothing is added atomically: tokens collect their rows in slot order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import grouped_experts_products_triton as triton_products
from qwen3_kernels import grouped_experts_rows_triton as row_kernels
from qwen3_kernels.launch import generation

PRODUCTS = ("gate_up", "down", "grad_h", "grad_x", "grad_w_down", "grad_w_gate_up")
ALL = ",".join(PRODUCTS)
"""Every product by grouped_mm."""
MIXED = "mixed"

GROUPED_MM: dict[tuple[int, str], str] = {
    (90, "many"): "grad_w_down,grad_w_gate_up",
    (90, "plenty"): "down,grad_x,grad_w_down,grad_w_gate_up",
    (100, "many"): ALL,
    (100, "plenty"): ALL,
}
"""Products that run by grouped_mm, by GPU generation and bucket of rows per expert; elsewhere none does."""


def _by_grouped_mm(products: str, x_TD: Tensor, rows: int, experts: int) -> list[str]:
    if rows == 0:  # grouped_mm rejects operands without elements
        return []
    if products == MIXED:
        products = GROUPED_MM.get((generation(x_TD.device), triton_products.bucket(rows, experts)), "")
    return products.split(",")


def _weight_gradient(left_NL: Tensor, right_NR: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, L, R] by grouped_mm; Blackwell's leaves garbage for experts without rows (pytorch/pytorch#172439)."""
    out = F.grouped_mm(left_NL.t(), right_NR, offs=offsets_E)
    row_kernels.clear_empty(out, offsets_E)
    return out


@torch.library.custom_op("qwen3_kernels::grouped_experts", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
    products: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(out_TD, gate_up_N2F); the second is empty unless ``save`` is set."""
    x_TD, weights_TK = x_TD.contiguous(), weights_TK.contiguous()
    w_gate_up_E2FD, w_down_EDF = w_gate_up_E2FD.contiguous(), w_down_EDF.contiguous()
    grouped = _by_grouped_mm(products, x_TD, len(order_N), len(offsets_E))
    if "gate_up" in grouped:
        x_ND = row_kernels.spread(x_TD, position_TK, offsets_E)
        gate_up_N2F = F.grouped_mm(x_ND, w_gate_up_E2FD.transpose(1, 2), offs=offsets_E)
        h_NF = row_kernels.swiglu(gate_up_N2F, offsets_E)
        gate_up_N2F = gate_up_N2F if save else x_TD.new_empty(0)
    else:
        gate_up_N2F, h_NF = triton_products.gate_up(
            x_TD, w_gate_up_E2FD, order_N, offsets_E, position_TK.shape[1], save
        )
    if "down" in grouped:
        y_ND = F.grouped_mm(h_NF, w_down_EDF.transpose(1, 2), offs=offsets_E)
    else:
        y_ND = triton_products.down(h_NF, w_down_EDF, offsets_E)
    out_TD = row_kernels.combine(y_ND, weights_TK, position_TK, offsets_E)
    return out_TD, gate_up_N2F


@_forward.register_fake
def _(x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, position_TK, offsets_E, products, save):
    shape = (order_N.shape[0], w_gate_up_E2FD.shape[1]) if save else (0,)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(shape)


@torch.library.custom_op("qwen3_kernels::grouped_experts_backward", mutates_args=())
def _backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
    gate_up_N2F: Tensor,
    products: str,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, both weights and the routing weights (float32); of the first three, one not asked for has no
    element."""
    grad_out_TD, x_TD, weights_TK = grad_out_TD.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
    w_gate_up_E2FD, w_down_EDF = w_gate_up_E2FD.contiguous(), w_down_EDF.contiguous()
    top_k = weights_TK.shape[1]
    grouped = _by_grouped_mm(products, x_TD, len(order_N), len(offsets_E))

    grad_y_ND = grad_out_TD
    # Without the routing weight, which enters with SwiGLU's gradient.
    if "grad_h" in grouped or ("grad_w_down" in grouped and needs_down):
        grad_y_ND = row_kernels.spread(grad_out_TD, position_TK, offsets_E)
    if "grad_h" in grouped:
        grad_h_NF = F.grouped_mm(grad_y_ND, w_down_EDF, offs=offsets_E)
        grad_gate_up_N2F, h_weighted_NF, dot_NJ = row_kernels.swiglu_backward(
            grad_h_NF, gate_up_N2F, weights_TK, order_N, offsets_E
        )
        del grad_h_NF
    else:
        grad_gate_up_N2F, h_weighted_NF, dot_NJ = triton_products.grad_h(
            grad_out_TD, w_down_EDF, weights_TK, gate_up_N2F, order_N, offsets_E
        )

    grad_w_down_EDF = w_down_EDF.new_empty(0)
    if needs_down and "grad_w_down" in grouped:
        grad_w_down_EDF = _weight_gradient(grad_y_ND, h_weighted_NF, offsets_E)
    elif needs_down:
        grad_w_down_EDF = triton_products.grad_weight(
            grad_out_TD, h_weighted_NF, order_N, offsets_E, top_k, gather_left=True
        )
    del grad_y_ND, h_weighted_NF

    grad_w_gate_up_E2FD = w_gate_up_E2FD.new_empty(0)
    if needs_gate_up and "grad_w_gate_up" in grouped:
        x_ND = row_kernels.spread(x_TD, position_TK, offsets_E)
        grad_w_gate_up_E2FD = _weight_gradient(grad_gate_up_N2F, x_ND, offsets_E)
        del x_ND
    elif needs_gate_up:
        grad_w_gate_up_E2FD = triton_products.grad_weight(
            grad_gate_up_N2F, x_TD, order_N, offsets_E, top_k, gather_left=False
        )

    if not needs_x:
        grad_weights_TK = row_kernels.grad_weights(dot_NJ, position_TK, offsets_E)
        return x_TD.new_empty(0), grad_w_gate_up_E2FD, grad_w_down_EDF, grad_weights_TK
    if "grad_x" in grouped:
        grad_x_ND = F.grouped_mm(grad_gate_up_N2F, w_gate_up_E2FD, offs=offsets_E)
    else:
        grad_x_ND = triton_products.grad_x(grad_gate_up_N2F, w_gate_up_E2FD, offsets_E)
    grad_x_TD, grad_weights_TK = row_kernels.combine_gradients(grad_x_ND, dot_NJ, position_TK, offsets_E)
    return grad_x_TD, grad_w_gate_up_E2FD, grad_w_down_EDF, grad_weights_TK


@_backward.register_fake
def _(grad_out_TD, x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, *unused):
    needs_x, needs_gate_up, needs_down = unused[-3:]
    return (
        x_TD.new_empty(x_TD.shape if needs_x else 0),
        w_gate_up_E2FD.new_empty(w_gate_up_E2FD.shape if needs_gate_up else 0),
        w_down_EDF.new_empty(w_down_EDF.shape if needs_down else 0),
        weights_TK.new_empty(weights_TK.shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.products, save = inputs
    gate_up_N2F = output[1]
    ctx.mark_non_differentiable(gate_up_N2F)
    ctx.set_materialize_grads(False)  # else a zero gradient of gate_up's size is written for every layer
    ctx.save_for_backward(*tensors, *((gate_up_N2F,) if save else ()))


def _autograd(ctx, grad_out_TD, _):
    if grad_out_TD is None:
        return (None,) * 9
    needs = ctx.needs_input_grad[:3]
    *grads, grad_weights_TK = _backward(grad_out_TD, *ctx.saved_tensors, ctx.products, *needs)
    weights_TK = ctx.saved_tensors[3]
    return (
        *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)),
        grad_weights_TK.to(weights_TK.dtype),
        *(None,) * 5,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _run(products: str, tensors: tuple[Tensor, ...]) -> Tensor:
    dtypes = {tensor.dtype for tensor in tensors[:3]}
    if len(dtypes) > 1:
        raise ValueError(f"grouped_experts: x and the weights are of {sorted(map(str, dtypes))}; cast them to one type")
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors[:4])
    return _forward(*tensors, products, save)[0]


def run_mixed(x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, counts_E, position_TK, offsets_E) -> Tensor:
    """Every product by what ``GROUPED_MM`` says."""
    return _run(MIXED, (x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, position_TK, offsets_E))


def run(x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, counts_E, position_TK, offsets_E) -> Tensor:
    """Every product by Triton."""
    return _run("", (x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, position_TK, offsets_E))


def run_grouped_mm(x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, counts_E, position_TK, offsets_E) -> Tensor:
    """Every product by torch's grouped_mm."""
    return _run(ALL, (x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, position_TK, offsets_E))

"""The experts of a MoE layer: gather, gate-up product, SwiGLU, down product, weighted sum back to the tokens.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K routed rows.

``ExpertLoop`` is the way without a grouped matrix product: two products an expert forward and four backward, written
into preallocated buffers. It keeps neither the gathered inputs nor the down products for the backward pass: with
h = SwiGLU(x W_gu) and y = h W_d, the weight's gradient <dO, y> equals <dO W_d, h> (SonicMoE, arXiv 2512.14080).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import dispatch, reference
from qwen3_kernels.router_topk import Routing


def grouped_experts(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, routing: Routing) -> Tensor:
    """``out_t = sum_k weight_tk * W_down[e] (silu(W_gate[e] x_t) * W_up[e] x_t)`` with ``e = expert_ids_tk``.

    Args:
        x_TD: tokens.
        w_gate_up_E2FD: the first F rows are the gate, the last F the up projection; x's dtype.
        w_down_EDF: down projections; x's dtype.
        routing: from ``router_topk``. Masked tokens get 0 and give no gradient.

    Under autocast x and both weights are cast to its dtype, whatever theirs are; gradients come back in theirs.

    Returns:
        out_TD in x's dtype (autocast's); differentiable in x, both weights and ``routing.weights_TK``; deterministic.

    Compute bound from about 3,000 tokens on: Qwen3-30B-A3B's layer (D = 2,048, E = 128, K = 8, F = 768) takes
    T * K * 6 * D * F FLOPs forward and twice that backward, at T = 32,768 and 790 TFLOP/s 3.1 and 6.3 ms. Below, the
    weights of the experts in use have to be read: 1.2 GB for all of them, 0.28 ms at 4.28 TB/s; 9.4 MB an expert.
    """
    x_TD, w_gate_up_E2FD, w_down_EDF = map(dispatch.autocast, (x_TD, w_gate_up_E2FD, w_down_EDF))
    function = dispatch.choose("grouped_experts", x_TD, expert_width=w_down_EDF.shape[2])
    return function(
        x_TD,
        w_gate_up_E2FD,
        w_down_EDF,
        routing.weights_TK,
        routing.order_N,
        routing.counts_E,
        routing.position_TK,
        routing.offsets_E,
    )


def _products(left: Iterable[Tensor], right: Iterable[Tensor], out: Iterable[Tensor], counts: list[int]) -> None:
    """One matrix product for every expert that has rows, each into its own place."""
    for left_e, right_e, out_e, count in zip(left, right, out, counts, strict=True):
        if count:
            torch.mm(left_e, right_e, out=out_e)


class ExpertLoop(torch.autograd.Function):
    """One matrix product an expert, for devices without a grouped one.

    Views are cut by ``split`` and ``unbind``, once for all experts: slicing one by one cost as much as the products.
    """

    @staticmethod
    def forward(ctx, x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, counts_E, position_TK, offsets_E):
        num_tokens, top_k = weights_TK.shape
        counts = counts_E.tolist()
        rows = sum(counts)
        order_N = order_N[:rows].long()  # masked rows come last and are left out; index_copy_ takes int64 alone
        x_ND = x_TD.index_select(0, order_N // top_k)
        gate_up_N2F = x_TD.new_empty(rows, w_gate_up_E2FD.shape[1])
        w_up_by_expert = w_gate_up_E2FD.transpose(1, 2).unbind(0)
        _products(x_ND.split(counts), w_up_by_expert, gate_up_N2F.split(counts), counts)
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        h_NF = F.silu(gate_NF).mul_(up_NF)
        y_ND = x_ND  # the gathered inputs are not needed any more
        _products(h_NF.split(counts), w_down_EDF.transpose(1, 2).unbind(0), y_ND.split(counts), counts)
        weight_N = weights_TK.reshape(-1).index_select(0, order_N).to(y_ND.dtype)
        # Back in (token, slot) order the sum over slots is a plain reduction: the same on every run.
        y_TKD = x_TD.new_zeros(num_tokens * top_k, x_TD.shape[1])
        y_TKD.index_copy_(0, order_N, y_ND.mul_(weight_N[:, None]))
        ctx.save_for_backward(x_TD, w_gate_up_E2FD, w_down_EDF, gate_up_N2F, weight_N, order_N)
        ctx.counts, ctx.top_k, ctx.weights_dtype = counts, top_k, weights_TK.dtype
        return y_TKD.view(num_tokens, top_k, -1).sum(1)

    @staticmethod
    def backward(ctx, grad_out_TD):
        x_TD, w_gate_up_E2FD, w_down_EDF, gate_up_N2F, weight_N, order_N = ctx.saved_tensors
        counts, width = ctx.counts, w_down_EDF.shape[2]
        token_N = order_N // ctx.top_k
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        h_NF = silu_NF * up_NF
        grad_y_ND = grad_out_TD.index_select(0, token_N)
        grad_h_NF = torch.empty_like(h_NF)  # without the routing weight, which enters below
        _products(grad_y_ND.split(counts), w_down_EDF.unbind(0), grad_h_NF.split(counts), counts)
        grad_weight_N = (grad_h_NF * h_NF).sum(-1)
        h_NF.mul_(weight_N[:, None])
        grad_h_NF.mul_(weight_N[:, None])
        grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
        # d silu(g)/dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
        grad_gate_up_N2F[:, :width] = grad_h_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
        grad_gate_up_N2F[:, width:] = grad_h_NF * silu_NF
        grad_w_gate_up_E2FD = torch.zeros_like(w_gate_up_E2FD)
        grad_w_down_EDF = torch.zeros_like(w_down_EDF)
        x_ND = x_TD.index_select(0, token_N)
        _products(grad_y_ND.t().split(counts, 1), h_NF.split(counts), grad_w_down_EDF.unbind(0), counts)
        _products(grad_gate_up_N2F.t().split(counts, 1), x_ND.split(counts), grad_w_gate_up_E2FD.unbind(0), counts)
        grad_x_ND = x_ND  # read for the last time above
        _products(grad_gate_up_N2F.split(counts), w_gate_up_E2FD.unbind(0), grad_x_ND.split(counts), counts)
        grad_x_TKD = x_TD.new_zeros(x_TD.shape[0] * ctx.top_k, x_TD.shape[1])
        grad_x_TKD.index_copy_(0, order_N, grad_x_ND)
        grad_weights = torch.zeros(x_TD.shape[0] * ctx.top_k, dtype=ctx.weights_dtype, device=x_TD.device)
        grad_weights.index_copy_(0, order_N, grad_weight_N.to(ctx.weights_dtype))
        return (
            grad_x_TKD.view(x_TD.shape[0], ctx.top_k, -1).sum(1),
            grad_w_gate_up_E2FD,
            grad_w_down_EDF,
            grad_weights.view(x_TD.shape[0], ctx.top_k),
            None,
            None,
            None,
            None,
        )


def _grouped_mm_unfit(x_TD: Tensor, expert_width: int) -> str | None:
    if not x_TD.is_cuda or torch.cuda.get_device_capability(x_TD.device) < (9, 0):
        return "torch's grouped_mm is fast from compute capability 9.0 on"
    if x_TD.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16 and x is {x_TD.dtype}"
    if x_TD.shape[1] % 8 or expert_width % 8:
        return (
            f"torch's grouped_mm wants rows of a multiple of 16 bytes, x has {x_TD.shape[1]} columns and an expert "
            f"{expert_width}"
        )
    return dispatch.needs_triton(x_TD)


if dispatch.HAS_TRITON:
    from qwen3_kernels import grouped_experts_triton

    dispatch.register("grouped_experts", "mixed", grouped_experts_triton.run_mixed, _grouped_mm_unfit)
    dispatch.register("grouped_experts", "triton", grouped_experts_triton.run, dispatch.needs_float_triton)
    dispatch.register("grouped_experts", "grouped_mm", grouped_experts_triton.run_grouped_mm, _grouped_mm_unfit)
dispatch.register("grouped_experts", "expert_loop", ExpertLoop.apply)
dispatch.register("grouped_experts", "reference", reference.grouped_experts)

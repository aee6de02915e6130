"""The experts of a MoE layer: gather, gate-up product, SwiGLU, down product, weighted sum back to the tokens.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, N = T * K routed rows.

``ExpertLoop`` is the way without a grouped matrix product: two products an expert forward and four backward, written
into preallocated buffers. It keeps neither the gathered inputs nor the down products for the backward pass: with
h = SwiGLU(x W_gu) and y = h W_d, the weight's gradient <dO, y> equals <dO W_d, h> (SonicMoE, arXiv 2512.14080).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import dispatch, reference
from qwen3_kernels.router_topk import Routing


def grouped_experts(x_TD: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor, routing: Routing) -> Tensor:
    """``out_t = sum_k weight_tk * W_down[e] (silu(W_gate[e] x_t) * W_up[e] x_t)`` with ``e = expert_ids_tk``.

    Args:
        x_TD: tokens.
        w_gate_up_E2FD: the first F rows are the gate, the last F the up projection.
        w_down_EDF: down projections.
        routing: from ``router_topk``.

    Returns:
        out_TD in x's dtype; differentiable in x, both weights and ``routing.weights_TK``; deterministic.
    """
    function = dispatch.choose("grouped_experts", x_TD)
    return function(x_TD, w_gate_up_E2FD, w_down_EDF, routing.weights_TK, routing.order_N, routing.counts_E)


def _rows_of_experts(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    spans, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            spans.append((expert, start, start + count))
        start += count
    return spans


class ExpertLoop(torch.autograd.Function):
    """One matrix product an expert, for devices without a grouped one."""

    @staticmethod
    def forward(ctx, x_TD, w_gate_up_E2FD, w_down_EDF, weights_TK, order_N, counts_E):
        num_tokens, top_k = weights_TK.shape
        spans = _rows_of_experts(counts_E)
        rows = spans[-1][2] if spans else 0
        order_N = order_N[:rows]  # masked rows come last and are left out
        x_ND = x_TD[order_N // top_k]
        gate_up_N2F = x_TD.new_empty(rows, w_gate_up_E2FD.shape[1])
        for expert, start, end in spans:
            torch.mm(x_ND[start:end], w_gate_up_E2FD[expert].t(), out=gate_up_N2F[start:end])
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        h_NF = F.silu(gate_NF).mul_(up_NF)
        del x_ND
        y_ND = x_TD.new_empty(rows, x_TD.shape[1])
        for expert, start, end in spans:
            torch.mm(h_NF[start:end], w_down_EDF[expert].t(), out=y_ND[start:end])
        weight_N = weights_TK.reshape(-1)[order_N].to(y_ND.dtype)
        # Back in (token, slot) order the sum over slots is a plain reduction: the same on every run.
        y_TKD = x_TD.new_zeros(num_tokens * top_k, x_TD.shape[1])
        y_TKD[order_N] = y_ND.mul_(weight_N[:, None])
        ctx.save_for_backward(x_TD, w_gate_up_E2FD, w_down_EDF, gate_up_N2F, weight_N, order_N)
        ctx.spans, ctx.top_k, ctx.weights_dtype = spans, top_k, weights_TK.dtype
        return y_TKD.view(num_tokens, top_k, -1).sum(1)

    @staticmethod
    def backward(ctx, grad_out_TD):
        x_TD, w_gate_up_E2FD, w_down_EDF, gate_up_N2F, weight_N, order_N = ctx.saved_tensors
        token_N = order_N // ctx.top_k
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        h_NF = silu_NF * up_NF
        grad_y_ND = grad_out_TD[token_N]
        grad_h_NF = torch.empty_like(h_NF)  # without the routing weight, which enters below
        for expert, start, end in ctx.spans:
            torch.mm(grad_y_ND[start:end], w_down_EDF[expert], out=grad_h_NF[start:end])
        grad_weight_N = (grad_h_NF * h_NF).sum(-1)
        h_NF.mul_(weight_N[:, None])
        grad_h_NF.mul_(weight_N[:, None])
        grad_gate_up_N2F = torch.empty_like(gate_up_N2F)
        grad_gate_up_N2F[:, : gate_NF.shape[1]] = (
            grad_h_NF * up_NF * sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF))
        )  # d silu(g)/dg = s (1 + g (1 - s))
        grad_gate_up_N2F[:, gate_NF.shape[1] :] = grad_h_NF * silu_NF
        grad_w_gate_up_E2FD = torch.zeros_like(w_gate_up_E2FD)
        grad_w_down_EDF = torch.zeros_like(w_down_EDF)
        x_ND = x_TD[token_N]
        grad_x_ND = torch.empty_like(x_ND)
        for expert, start, end in ctx.spans:
            torch.mm(grad_y_ND[start:end].t(), h_NF[start:end], out=grad_w_down_EDF[expert])
            torch.mm(grad_gate_up_N2F[start:end].t(), x_ND[start:end], out=grad_w_gate_up_E2FD[expert])
            torch.mm(grad_gate_up_N2F[start:end], w_gate_up_E2FD[expert], out=grad_x_ND[start:end])
        grad_x_TKD = x_TD.new_zeros(x_TD.shape[0] * ctx.top_k, x_TD.shape[1])
        grad_x_TKD[order_N] = grad_x_ND
        grad_weights = torch.zeros(x_TD.shape[0] * ctx.top_k, dtype=ctx.weights_dtype, device=x_TD.device)
        grad_weights[order_N] = grad_weight_N.to(ctx.weights_dtype)
        return (
            grad_x_TKD.view(x_TD.shape[0], ctx.top_k, -1).sum(1),
            grad_w_gate_up_E2FD,
            grad_w_down_EDF,
            grad_weights.view(x_TD.shape[0], ctx.top_k),
            None,
            None,
        )


dispatch.register("grouped_experts", "expert_loop", ExpertLoop.apply)
dispatch.register("grouped_experts", "reference", reference.grouped_experts)

"""Top-k routing in three launches forward and one backward, without a host sync or a float atomic.

1. ``select_kernel``, one program a tile of eight tokens: softmax, the k largest, weights; as bits which tokens chose
   each expert; partial sums.
2. ``scan_kernel``: rows of each expert before every group of tiles.
3. ``place_kernel``, one program a few tiles: a row's place is where its expert starts, and the expert's rows in earlier
   groups, tiles and tokens. The last two are counted while the second launch runs.

Legend: T tokens, E experts, K experts per token, N = T * K routed rows.
"""

import torch
import triton
from torch import Tensor

from qwen3_kernels import router_topk_backward_triton as backward_triton
from qwen3_kernels.launch import generation
from qwen3_kernels.router_topk_place_triton import LAUNCHES as PLACE_LAUNCHES
from qwen3_kernels.router_topk_place_triton import place_kernel
from qwen3_kernels.router_topk_rows_triton import padded_experts
from qwen3_kernels.router_topk_scan_triton import LAUNCHES as SCAN_LAUNCHES
from qwen3_kernels.router_topk_scan_triton import SEGMENTS, TILES, scan_kernel
from qwen3_kernels.router_topk_select_triton import LAUNCHES as SELECT_LAUNCHES
from qwen3_kernels.router_topk_select_triton import TILE_TOKENS, padded_slots, select_kernel

MAX_EXPERTS, MAX_TOP_K = 512, 16
OVERLAP = {90, 100}
"""Generations that start a dependent launch before the first has ended (programmatic dependent launch)."""
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The logsumexp of every token, for the backward pass, and the fields of ``Routing``."""


@torch.library.custom_op("qwen3_kernels::router_topk", mutates_args=())
def _route(
    logits_TE: Tensor,
    top_k: int,
    renormalize: bool,
    token_mask_T: Tensor | None,
    given_ids_TK: Tensor | None,
    bias_E: Tensor | None,
) -> Outputs:
    outputs = _outputs(logits_TE, top_k)
    lse_T, expert_ids_TK, weights_TK, counts_E, prob_sum_E, z_sum, order_N, position_TK, offsets_E = outputs
    num_tokens, num_experts = logits_TE.shape
    if num_tokens == 0:
        for output in outputs:
            output.zero_()
        return outputs
    gpu, experts = generation(logits_TE.device), padded_experts(num_experts)
    select, scan, place = (table[gpu, experts] for table in (SELECT_LAUNCHES, SCAN_LAUNCHES, PLACE_LAUNCHES))
    overlap = logits_TE.is_cuda and gpu in OVERLAP
    slots = padded_slots(top_k, select)
    num_tiles = triton.cdiv(num_tokens, TILE_TOKENS)
    num_groups = triton.cdiv(num_tiles, TILES)
    at_once = scan.blocks["GROUPS"]
    segment_groups = triton.cdiv(num_groups, SEGMENTS * at_once) * at_once
    tile_counts = logits_TE.new_empty((num_tiles, experts // 4), dtype=torch.int32)
    tile_masks = torch.empty_like(tile_counts) if given_ids_TK is None else None
    tile_prob_sums, tile_z_sums = logits_TE.new_empty((num_tiles, experts)), logits_TE.new_empty(num_tiles)
    group_rows_before = logits_TE.new_empty((num_groups, experts), dtype=torch.int32)
    segment_counts = logits_TE.new_empty((SEGMENTS, experts), dtype=torch.int32)
    group_prob_sums, group_z_sums = logits_TE.new_empty((num_groups, experts)), logits_TE.new_empty(num_groups)
    select_kernel[(num_tiles,)](
        logits_TE,
        bias_E,
        given_ids_TK,
        token_mask_T,
        expert_ids_TK,
        weights_TK,
        lse_T,
        tile_masks,
        tile_counts,
        tile_prob_sums,
        tile_z_sums,
        num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        RENORMALIZE=renormalize,
        EXPERTS=experts,
        SLOTS=slots,
        TOKENS=TILE_TOKENS,
        PDL=overlap,
        **select.options(),
    )
    scan_kernel[(experts // 8 * SEGMENTS + num_groups,)](
        tile_counts,
        tile_prob_sums,
        tile_z_sums,
        group_rows_before,
        segment_counts,
        group_prob_sums,
        group_z_sums,
        num_tiles,
        segment_groups,
        EXPERTS=experts,
        TILES=TILES,
        SEGMENTS=SEGMENTS,
        PDL=overlap,
        launch_pdl=overlap,
        **scan.options(),
    )
    place_kernel[(experts // 4 + triton.cdiv(num_tiles, place.blocks["PLACED"]),)](
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
        num_experts=num_experts,
        top_k=top_k,
        EXPERTS=experts,
        SLOTS=slots,
        TOKENS=TILE_TOKENS,
        TILES=TILES,
        SEGMENTS=SEGMENTS,
        PDL=overlap,
        launch_pdl=overlap,
        **place.options(),
    )
    return outputs


def _outputs(logits_TE: Tensor, top_k: int) -> Outputs:
    T, E = logits_TE.shape
    return (
        logits_TE.new_empty(T),
        logits_TE.new_empty((T, top_k), dtype=torch.int32),
        logits_TE.new_empty((T, top_k)),
        logits_TE.new_empty(E, dtype=torch.int64),
        logits_TE.new_empty(E),
        logits_TE.new_empty(()),
        logits_TE.new_empty(T * top_k, dtype=torch.int32),
        logits_TE.new_empty((T, top_k), dtype=torch.int32),
        logits_TE.new_empty(E, dtype=torch.int32),
    )


@_route.register_fake
def _(logits_TE, top_k, renormalize, token_mask_T, given_ids_TK, bias_E):
    return _outputs(logits_TE, top_k)


def _save(ctx, inputs, output) -> None:
    logits_TE, _, ctx.renormalize, token_mask_T, _, _ = inputs
    lse_T, expert_ids_TK, weights_TK, *_ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse_T)
    ctx.save_for_backward(logits_TE, lse_T, expert_ids_TK, weights_TK, token_mask_T)


def _backward(ctx, grad_lse, grad_ids, grad_weights_TK, grad_counts, grad_prob_sum_E, grad_z_sum, *_):
    if grad_weights_TK is not None:
        grad_weights_TK = grad_weights_TK.contiguous()
    if grad_prob_sum_E is not None:
        grad_prob_sum_E = grad_prob_sum_E.contiguous()
    grad_logits_TE = backward_triton.grad_logits(
        *ctx.saved_tensors, grad_weights_TK, grad_prob_sum_E, grad_z_sum, ctx.renormalize
    )
    return grad_logits_TE, None, None, None, None, None


_route.register_autograd(_backward, setup_context=_save)


def run(
    logits_TE: Tensor,
    top_k: int,
    renormalize: bool,
    token_mask_T: Tensor | None,
    expert_ids_TK: Tensor | None,
    selection_bias_E: Tensor | None,
) -> tuple[Tensor, ...]:
    """The implementation ``triton`` of ``router_topk``."""
    return _route(
        logits_TE.float().contiguous(),
        top_k,
        renormalize,
        None if token_mask_T is None else token_mask_T.contiguous(),
        None if expert_ids_TK is None else expert_ids_TK.contiguous(),
        None if selection_bias_E is None else selection_bias_E.float().contiguous(),
    )[1:]

"""Top-k routing: softmax over all experts, the k largest, renormalised, with what the experts and the losses need.

Legend: T tokens, E experts, K experts per token, N = T * K routed rows.
"""

from typing import NamedTuple

from torch import Tensor

from qwen3_kernels import dispatch, reference


class Routing(NamedTuple):
    """Where every token goes.

    Masked tokens go nowhere: weight 0, not counted, last in ``order_N``.
    """

    expert_ids_TK: Tensor
    """int32, by falling logit, or probability and bias where there is one; equal ones by rising id."""
    weights_TK: Tensor
    """float32, differentiable."""
    counts_E: Tensor
    """int64, routed rows of each expert; sums to K times the unmasked tokens."""
    prob_sum_E: Tensor
    """float32, differentiable: sum over unmasked tokens of the softmax (balance loss)."""
    z_sum: Tensor
    """float32 scalar, differentiable: sum over unmasked tokens of logsumexp squared (router z-loss)."""
    order_N: Tensor
    """int32: positions in the flattened [T * K] sorted by expert, stable; the rows of masked tokens come last."""
    position_TK: Tensor
    """int32: where (t, k) stands in ``order_N``, its inverse permutation."""
    offsets_E: Tensor
    """int32: inclusive cumulative sum of ``counts_E``, the ``offs`` of a grouped product."""


def router_topk(
    logits_TE: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    token_mask_T: Tensor | None = None,
    expert_ids_TK: Tensor | None = None,
    selection_bias_E: Tensor | None = None,
) -> Routing:
    """Route every token to ``top_k`` of E experts (Qwen3 Technical Report, section 2).

    Args:
        logits_TE: router logits, float32 for a stable softmax.
        top_k: experts K per token, at most E.
        renormalize: divide the chosen probabilities by their sum.
        token_mask_T: bool, False for padding.
        expert_ids_TK: any integer type, each in [0, E): replay these experts; weights are gathered from the full
            softmax, so gradients flow.
        selection_bias_E: added to the probabilities for the choice alone (aux-loss-free balancing, arXiv 2408.15664).

    Raises:
        ValueError: ``top_k`` is not between 1 and E.

    Deterministic, and without a host sync on the fast path, which takes E up to 512 and K up to 16; beyond, the
    reference runs. Bandwidth bound: T = 32,768, E = 128 and K = 8 read 16.8 MB and write 4.2 MB forward (5 us at
    4.28 TB/s on an H200), and move 36.7 MB backward (9 us).
    """
    if not 1 <= top_k <= logits_TE.shape[-1]:
        raise ValueError(f"router_topk: top_k is {top_k}, expected between 1 and the {logits_TE.shape[-1]} experts")
    function = dispatch.choose("router_topk", logits_TE, top_k=top_k)
    return Routing(*function(logits_TE, top_k, renormalize, token_mask_T, expert_ids_TK, selection_bias_E))


if dispatch.HAS_TRITON:
    from qwen3_kernels import router_topk_triton

    def _unfit(logits_TE: Tensor, top_k: int) -> str | None:
        most_experts, most_chosen = router_topk_triton.MAX_EXPERTS, router_topk_triton.MAX_TOP_K
        if logits_TE.shape[-1] > most_experts:
            return f"the kernels take at most {most_experts} experts, not {logits_TE.shape[-1]}"
        if top_k > most_chosen:
            return f"the kernels choose at most {most_chosen} experts a token, not {top_k}"
        return dispatch.needs_triton(logits_TE)

    dispatch.register("router_topk", "triton", router_topk_triton.run, _unfit)
dispatch.register("router_topk", "reference", reference.router_topk)

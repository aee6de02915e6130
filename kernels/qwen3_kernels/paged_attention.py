"""Decode attention: one query a sequence over keys and values in pages.

Legend: B sequences, H query heads, G kv heads, C head width, R = C / 2, P pages, S tokens a page, M pages a sequence.
"""

from torch import Tensor

from qwen3_kernels import dispatch, reference


def paged_attention(
    q_BHC: Tensor,
    k_cache_PSGC: Tensor,
    v_cache_PSGC: Tensor,
    block_table_BM: Tensor,
    context_lens_B: Tensor,
    *,
    inv_freq_R: Tensor | None = None,
    chunk_size: int | None = None,
    local_size: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attend from the newest token of every sequence to its whole context, itself included.

    Args:
        q_BHC: query at position ``context_lens - 1``, rotated as ``dual_chunk_attention`` asks.
        k_cache_PSGC, v_cache_PSGC: the pages; keys rotated at their (chunk-local) positions.
        block_table_BM: int, the pages of every sequence in order; entries past the context are ignored.
        context_lens_B: int, tokens of every sequence, the newest included; 0 marks an empty slot, whose output is 0.

    Returns:
        out_BHC in q's dtype. Not differentiable.
    """
    function = dispatch.choose("paged_attention", q_BHC)
    return function(
        q_BHC,
        k_cache_PSGC,
        v_cache_PSGC,
        block_table_BM,
        context_lens_B,
        inv_freq_R,
        chunk_size,
        local_size,
        softmax_scale,
    )


dispatch.register("paged_attention", "reference", reference.paged_attention)

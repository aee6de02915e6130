"""Causal attention over packed documents, plain or in dual chunks (DCA, arXiv 2402.17463).

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.

With chunk size c, local size w and chunk length s = c - w, token i lies in chunk i // s at l(i) = i % s. Keys are
rotated at l(j). Against keys of its own chunk a query sits at l(i), of the chunk before at min(l(i) + s, c), of older
ones at c. One softmax over the union. A document of at most s tokens sees plain RoPE attention. The clamp is to c, as
in the released code; the paper's text clamps to c - 1.
"""

from torch import Tensor

from qwen3_kernels import dispatch, reference


def dual_chunk_attention(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    inv_freq_R: Tensor | None = None,
    chunk_size: int | None = None,
    local_size: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Grouped-query causal attention in which no document sees another.

    Args:
        q_THC, k_TGC, v_TGC: q and k normed and rotated; with chunks, at ``position % (chunk_size - local_size)``.
        cu_seqlens: int32, document starts, closed by T; further entries repeat T.
        max_seqlen: longest document in tokens.
        inv_freq_R: rotary frequencies; needed with chunks, to move q between the three positions.
        chunk_size, local_size: both or neither; neither is plain causal attention.
        softmax_scale: default 1 / sqrt(C).
        backend: implementation by name, or auto.

    Returns:
        out_THC in q's dtype; exact gradients for q, k and v.
    """
    if (chunk_size is None) != (local_size is None):
        raise ValueError(f"dual_chunk_attention: chunk_size {chunk_size}, local_size {local_size}: both or neither")
    if chunk_size is not None and inv_freq_R is None:
        raise ValueError("dual_chunk_attention: chunk_size without inv_freq_R, expected the model's rotary frequencies")
    function = dispatch.choose("dual_chunk_attention", q_THC, backend)
    return function(q_THC, k_TGC, v_TGC, cu_seqlens, max_seqlen, inv_freq_R, chunk_size, local_size, softmax_scale)


dispatch.register("dual_chunk_attention", "sdpa", reference.dual_chunk_attention)

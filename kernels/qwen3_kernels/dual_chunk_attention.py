"""Causal attention over packed documents, plain or in dual chunks (DCA, arXiv 2402.17463).

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.

With chunk size c, local size w and chunk length s = c - w, token i lies in chunk i // s at l(i) = i % s. Keys are
rotated at l(j). Against keys of its own chunk a query sits at l(i), of the chunk before at min(l(i) + s, c), of older
ones at c. One softmax over the union. A document of at most s tokens sees plain RoPE attention. The clamp is to c, as
in the released code; the paper's text clamps to c - 1.

Roofline on an H200 (790 TFLOP/s), 32 / 4 heads of 128, causal: 4 T^2 / 2 * H * C forward and 2.5 times that backward,
dual chunks the same; 1 x 32,768: 11.1 and 27.8 ms; 8 x 4,096: 1.4 and 3.5 ms. Memory is no limit from T = 1,024 on.
"""

from torch import Tensor

from qwen3_kernels import dispatch, dual_chunk_attention_flash, reference

if dispatch.HAS_TRITON:
    from qwen3_kernels import dual_chunk_attention_triton

OP = "dual_chunk_attention"


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
        backend: ``flash`` (the flash-attn package, plain causal only), ``triton`` (the fused kernel), ``sdpa`` (the
            definition), or ``auto``: the fastest that fits.

    Returns:
        out_THC in q's dtype; exact gradients for q, k and v. ``triton`` gives the same bits every time. The backward
        pass of ``flash`` adds up gradients in the order in which its blocks happen to finish, except under
        ``torch.use_deterministic_algorithms(True)``; on Hopper its version 4 can't, and does not fit then.

    Raises:
        ValueError: chunks that ``check_chunks`` rejects, or a named backend that does not fit.
    """
    check_chunks(OP, inv_freq_R, chunk_size, local_size)
    if chunk_size is not None and local_size is not None and max_seqlen <= chunk_size - local_size:
        inv_freq_R = chunk_size = local_size = None  # no document is longer than a chunk: plain attention
    function = dispatch.choose(OP, q_THC, backend, chunked=chunk_size is not None)
    return function(q_THC, k_TGC, v_TGC, cu_seqlens, max_seqlen, inv_freq_R, chunk_size, local_size, softmax_scale)


def check_chunks(op: str, inv_freq_R: Tensor | None, chunk_size: int | None, local_size: int | None) -> None:
    """Raise ValueError, in the name of ``op``, unless the three describe dual chunks or plain attention."""
    seen = f"{op}: chunk_size {chunk_size}, local_size {local_size}"
    if chunk_size is None or local_size is None:
        if chunk_size is not local_size:
            raise ValueError(f"{seen}, expected both or neither")
        return
    if not 0 <= local_size < chunk_size:
        raise ValueError(f"{seen}, expected 0 <= local_size < chunk_size")
    if inv_freq_R is None:
        raise ValueError(f"{seen} without inv_freq_R, expected the model's rotary frequencies")


# Plain attention, 1 x 32,768, both directions, on an H200: flash-attn 4 607 TFLOP/s, the fused kernel 416, torch's
# flash-attn 2 325. The fused kernel alone takes dual chunks.
if dual_chunk_attention_flash.VERSION == 4:
    dispatch.register(OP, "flash", dual_chunk_attention_flash.run, dual_chunk_attention_flash.unfit)
if dispatch.HAS_TRITON:
    dispatch.register(OP, "triton", dual_chunk_attention_triton.run, dual_chunk_attention_triton.unfit)
if dual_chunk_attention_flash.VERSION != 4:
    dispatch.register(OP, "flash", dual_chunk_attention_flash.run, dual_chunk_attention_flash.unfit)
# Reads cu_seqlens on the host, which on a GPU waits for all work before it: the last resort there.
dispatch.register(OP, "sdpa", reference.dual_chunk_attention)

"""RMSNorm over each head of q and k, then RoPE.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.
"""

import torch
from torch import Tensor

from qwen3_kernels import dispatch, reference


def qk_norm_rope(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_norm_weight_C: Tensor,
    k_norm_weight_C: Tensor,
    position_ids_T: Tensor,
    inv_freq_R: Tensor,
    attention_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise every head to unit mean square, scale by the weight, rotate by position * inv_freq.

    ``y = w x / sqrt(mean(x^2) + eps)`` (Qwen3 Technical Report, section 2: QK-Norm), then RoPE (arXiv 2104.09864) on
    the pairs (i, i + C/2), as in the published weights. Differentiable in q, k and both weights.

    Args:
        q_THC, k_TGC: projections. Slices of one fused projection are read where they lie; the fast path copies first
            where the heads of a token are not packed.
        position_ids_T: int, position of each token in its document (or its chunk); float32 angles, as everywhere.
        inv_freq_R: radians a token.
        attention_factor: YaRN's factor on cos and sin, both ways.

    Returns:
        q and k in their own dtypes, contiguous on the fast path.

    Raises:
        ValueError: the width of a head is odd.

    Bandwidth bound. T = 32,768 tokens of 32 + 4 heads x 128 in bfloat16 read and write 604 MB forward (141 us at
    4.28 TB/s; measured on an H200: 147 to 149, 95 %); backward reads gradients and inputs again, 906 MB (212 us;
    measured: 220 to 223, 96 %), and saves nothing but its inputs.
    """
    if q_THC.shape[-1] % 2:
        raise ValueError(f"qk_norm_rope: heads of width {q_THC.shape[-1]}, expected an even width: RoPE rotates pairs")
    function = dispatch.choose("qk_norm_rope", q_THC)
    return function(q_THC, k_TGC, q_norm_weight_C, k_norm_weight_C, position_ids_T, inv_freq_R, attention_factor, eps)


def _triton_unfit(q_THC: Tensor) -> str | None:
    if q_THC.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q is {q_THC.dtype}, not bfloat16, float16 or float32"
    return dispatch.needs_triton(q_THC)


if dispatch.HAS_TRITON:
    from qwen3_kernels import qk_norm_rope_triton

    dispatch.register("qk_norm_rope", "triton", qk_norm_rope_triton.run, _triton_unfit)
dispatch.register("qk_norm_rope", "reference", reference.qk_norm_rope)

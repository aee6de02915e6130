"""RMSNorm over each head of q and k, then RoPE.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.
"""

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

    Pairs are (i, i + C/2), as in the published weights. ``attention_factor`` (YaRN) multiplies cos and sin.
    Differentiable in q, k and both weights. Returns q and k in their own dtypes.
    """
    function = dispatch.choose("qk_norm_rope", q_THC)
    return function(q_THC, k_TGC, q_norm_weight_C, k_norm_weight_C, position_ids_T, inv_freq_R, attention_factor, eps)


dispatch.register("qk_norm_rope", "reference", reference.qk_norm_rope)

"""Rotary frequencies: plain RoPE, a raised base (ABF) and YaRN.

Legend: R = C / 2 rotated pairs of one head of width C.

YaRN (arXiv 2309.00071, section 3; constants as in transformers): with base b, width C, original length L, factor s,
``dim(n) = C ln(L / (2 pi n)) / (2 ln b)``, ``low = floor(dim(beta_fast))``, ``high = ceil(dim(beta_slow))``; a linear
ramp from low to high blends ``b^(-2i/C)`` into the same divided by s; cos and sin are multiplied by
``0.1 ln s + 1``, so logits scale by its square.
"""

import math

import torch
from torch import Tensor

from qwen3_lit.model.config import ModelConfig, YarnConfig


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies ``inv_freq_R`` in float32 (radians a token) and the factor on cos and sin."""
    exponent_R = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq_R = 1.0 / config.rope_theta**exponent_R
    if config.rope_scaling is None:
        return inv_freq_R, 1.0
    return _yarn(inv_freq_R, config.rope_scaling, config.rope_theta, config.head_dim)


def _yarn(inv_freq_R: Tensor, yarn: YarnConfig, base: float, head_dim: int) -> tuple[Tensor, float]:
    def pair_that_turns(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step, without dividing by zero
    ramp_R = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq_R = inv_freq_R / yarn.factor * ramp_R + inv_freq_R * (1 - ramp_R)
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return inv_freq_R, factor

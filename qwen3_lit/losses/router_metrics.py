"""How evenly the experts are used: pure functions of counts, per layer, fit for one batch or for summed counts.

Legend: L MoE layers, E experts, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen3_lit.losses.load_balance import balance_loss, load_fraction, router_z_loss


def max_violation(counts_LE: Tensor) -> Tensor:
    """MaxVio: (largest load - mean load) / mean load, 0 when balanced [L]. Source: 2408.15664, eq. 4."""
    return load_fraction(counts_LE).amax(-1) * counts_LE.shape[-1] - 1.0


def load_cv(counts_LE: Tensor) -> Tensor:
    """Coefficient of variation of the loads: population standard deviation / mean [L]."""
    return load_fraction(counts_LE).std(-1, correction=0) * counts_LE.shape[-1]


def load_entropy(counts_LE: Tensor) -> Tensor:
    """Entropy of the loads divided by ln E: 1 when balanced, 0 when one expert takes all [L]."""
    fraction_LE = load_fraction(counts_LE)
    return torch.special.entr(fraction_LE).sum(-1) / math.log(max(counts_LE.shape[-1], 2))


def dead_expert_fraction(counts_LE: Tensor) -> Tensor:
    """Share of experts that got no token at all [L]."""
    return (counts_LE == 0).float().mean(-1)


def router_metrics(counts_LE: Tensor, prob_sum_LE: Tensor, z_sum_L: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
    """Detached means over layers (and the worst layer's MaxVio), for the logs; give sums over ranks for global
    figures."""
    violation_L = max_violation(counts_LE)
    tokens = num_tokens.clamp(min=1)
    return {
        "max_violation": violation_L.mean(),
        "max_violation_worst_layer": violation_L.max(),
        "load_cv": load_cv(counts_LE).mean(),
        "load_entropy": load_entropy(counts_LE).mean(),
        "dead_expert_fraction": dead_expert_fraction(counts_LE).mean(),
        "router_z": router_z_loss(z_sum_L.detach(), tokens),
        "balance": balance_loss(prob_sum_LE.detach(), counts_LE, tokens),
    }

"""Drawing tokens: counter-based random numbers, filters, and inverse-CDF sampling with log-probs.

Legend: B rows of a batch, V valid vocabulary.

The random number of a token depends only on its sequence's key and its place in the completion, so what else is in the
batch, the order in which slots are refilled, and a sequence that is computed again do not change a sample.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64
_BELOW_ONE = 1.0 - 2.0**-40


def draw_uniforms(keys_B: np.ndarray, counters_B: np.ndarray) -> np.ndarray:
    """Uniform float64 in (0, 1), a pure function of (key, counter), both integer [B].

    SplitMix64 (Steele, Lea and Flood, 2014) read at place ``counter`` of the stream that ``key`` seeds; the top 53 bits
    become the fraction.
    """
    mixed = keys_B.astype(np.uint64) + (counters_B.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@dataclass(frozen=True)
class FilterTensors:
    """Filters of the rows of a batch, each [B] on the logits' device."""

    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    presence_penalty_B: Tensor


def filter_logits(scaled_BV: Tensor, filters: FilterTensors) -> Tensor:
    """Logits at the sampling temperature with the tokens that top-k, then top-p, then min-p drop at -inf."""
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_BV.shape[-1], device=scaled_BV.device)
    keep_BV = (filters.top_k_B[:, None] == 0) | (rank_V < filters.top_k_B[:, None])
    prob_BV = torch.where(keep_BV, sorted_BV, -torch.inf).softmax(-1)
    # A token stays while the mass before it is below top_p. At top_p 1 nothing may be lost to rounding.
    before_BV = prob_BV.cumsum(-1, dtype=torch.float64) - prob_BV
    keep_BV &= (before_BV < filters.top_p_B[:, None]) | (filters.top_p_B[:, None] >= 1)
    keep_BV &= prob_BV >= filters.min_p_B[:, None] * prob_BV[:, :1]
    keep_BV[:, 0] = True
    dropped_BV = torch.empty_like(keep_BV).scatter_(1, order_BV, ~keep_BV)
    return scaled_BV.masked_fill(dropped_BV, -torch.inf)


def sample_inverse_cdf(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id a row from softmax(logits) and return ``(token_ids_B int64, log_normalizer_B fp32)``.

    Needs one uniform (float64) a row. Mass is summed in blocks of 64 and the blocks are added up in float64, so a
    vocabulary of 152k costs one pass and does not lose its tail to rounding. Ids of zero mass are never drawn.
    """
    maximum_B1 = logits_BV.amax(-1, keepdim=True)
    mass_BV = (logits_BV - maximum_B1).exp_()
    num_rows, width = mass_BV.shape
    if width % _BLOCK:
        mass_BV = torch.nn.functional.pad(mass_BV, (0, -width % _BLOCK))
    mass_BNJ = mass_BV.view(num_rows, -1, _BLOCK)
    ends_BN = mass_BNJ.sum(-1).double().cumsum(-1)
    total_B1 = ends_BN[:, -1:]
    target_B1 = uniforms_B[:, None].clamp(max=_BELOW_ONE) * total_B1
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True)
    end_B1 = ends_BN.gather(1, block_B1)
    start_B1 = torch.where(block_B1 > 0, ends_BN.gather(1, (block_B1 - 1).clamp_min(0)), 0.0)
    inside_BJ = mass_BNJ.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    # The place inside the block is taken as a fraction: the fp32 block sum and the float64 one differ in the last bits.
    fraction_B1 = ((target_B1 - start_B1) / (end_B1 - start_B1)).clamp(max=_BELOW_ONE)
    place_B1 = torch.searchsorted(inside_BJ, fraction_B1 * inside_BJ[:, -1:], right=True)
    token_ids_B = (block_B1 * _BLOCK + place_B1).squeeze(1)
    return token_ids_B, (maximum_B1.double() + total_B1.log()).squeeze(1).float()


@dataclass(frozen=True)
class SamplingTensors:
    """What the rows of a batch ask for; constant until a row changes hands. All [B] on the logits' device."""

    temperature_B: Tensor
    """fp32; 0 means greedy."""
    any_greedy: bool
    any_sampled: bool
    filters: FilterTensors | None
    """None when no row filters."""


def sample_tokens(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    params: SamplingTensors,
    *,
    seen_BV: Tensor | None = None,
    forced_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token a row: forced, greedy or drawn, and its log-prob.

    Args:
        logits_BV: fp32 logits over the valid vocabulary.
        uniforms_B: float64 in (0, 1).
        params: temperatures and filters.
        seen_BV: bool, tokens already in each completion; needed for a presence penalty.
        forced_B: int64, the token to take instead, or -1.

    Returns:
        ``(token_ids_B int64, logprob_B fp32)``; the log-prob is that of the chosen token at the row's temperature (1
        for greedy rows) before penalty and filters. A forced id outside the valid vocabulary has log-prob -inf.
    """
    temperature_B1 = params.temperature_B[:, None]
    scaled_BV = logits_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)
    choice_BV = scaled_BV
    if params.filters is not None:
        choice_BV = _filtered(logits_BV, scaled_BV, temperature_B1, params.filters, seen_BV)
    if params.any_sampled:
        token_ids_B, normalizer_B = sample_inverse_cdf(choice_BV, uniforms_B)
        if params.any_greedy:
            token_ids_B = torch.where(params.temperature_B > 0, token_ids_B, choice_BV.argmax(-1))
    else:
        token_ids_B, normalizer_B = choice_BV.argmax(-1), scaled_BV.logsumexp(-1)
    if params.any_sampled and params.filters is not None:
        normalizer_B = scaled_BV.logsumexp(-1)
    if forced_B is None:
        return token_ids_B, scaled_BV.gather(1, token_ids_B[:, None]).squeeze(1) - normalizer_B
    token_ids_B = torch.where(forced_B >= 0, forced_B, token_ids_B)
    inside_B = token_ids_B < scaled_BV.shape[1]
    chosen_B = scaled_BV.gather(1, torch.where(inside_B, token_ids_B, 0)[:, None]).squeeze(1)
    return token_ids_B, torch.where(inside_B, chosen_B - normalizer_B, -torch.inf)


def _filtered(
    logits_BV: Tensor, scaled_BV: Tensor, temperature_B1: Tensor, filters: FilterTensors, seen_BV: Tensor | None
) -> Tensor:
    if seen_BV is not None:
        penalised_BV = logits_BV - filters.presence_penalty_B[:, None] * seen_BV
        scaled_BV = penalised_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)
    return filter_logits(scaled_BV, filters)

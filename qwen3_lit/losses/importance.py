"""Correction for the mismatch between the sampler that drew the tokens and the trainer that scores them.

The engine and the trainer compute slightly different probabilities for the same weights (other kernels, other expert
choices, stale weights). Each trained token's policy term is weighted by w = pi_trainer_old / pi_sampler, cut in one of
two ways. Token level only: a product over a sequence has a variance that grows with its length.

Sources: truncated importance sampling (TIS), F. Yao et al., "Your efficient RL framework secretly brings you off-policy
RL training" (2025); IcePop, Ring-1T report (2510.18855).

Legend: T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_lit.errors import UserError
from qwen3_lit.losses.kl import bounded_log_ratio


@dataclass(frozen=True)
class ImportanceWeights:
    """Detached weights and the tokens that the cut changed."""

    weight_T: Tensor
    """Factor on the policy term of each token, fp32."""
    cut_T: Tensor
    """True where the raw ratio was outside the allowed range."""


class ImportanceCorrection:
    """Base: maps trainer and sampler log-probs of the sampled tokens to detached weights."""

    def __call__(self, old_logprob_T: Tensor, sampler_logprob_T: Tensor) -> ImportanceWeights:
        raise NotImplementedError

    @staticmethod
    def ratio(old_logprob_T: Tensor, sampler_logprob_T: Tensor) -> Tensor:
        """pi_trainer_old / pi_sampler [T], detached."""
        return bounded_log_ratio(old_logprob_T.detach(), sampler_logprob_T.detach()).exp()


class NoCorrection(ImportanceCorrection):
    """Weight one everywhere: switches the correction off by name."""

    def __call__(self, old_logprob_T: Tensor, sampler_logprob_T: Tensor) -> ImportanceWeights:
        weight_T = torch.ones_like(old_logprob_T, dtype=torch.float32)
        return ImportanceWeights(weight_T, torch.zeros_like(weight_T, dtype=torch.bool))


class TruncatedImportance(ImportanceCorrection):
    """w = min(pi_trainer_old / pi_sampler, cap)."""

    def __init__(self, cap: float = 2.0) -> None:
        """
        Args:
            cap: largest weight of a token; 2.0 is the common default (verl, open-instruct, slime).
        """
        if not cap >= 1.0:
            raise UserError(f"TruncatedImportance.cap: got {cap}, expected a number >= 1 (1.0 only ever shrinks)")
        self.cap = cap

    def __call__(self, old_logprob_T: Tensor, sampler_logprob_T: Tensor) -> ImportanceWeights:
        ratio_T = self.ratio(old_logprob_T, sampler_logprob_T)
        return ImportanceWeights(ratio_T.clamp(max=self.cap), ratio_T > self.cap)


class MaskedImportance(ImportanceCorrection):
    """w = pi_trainer_old / pi_sampler inside [low, high], zero outside (IcePop)."""

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        """
        Args:
            low: ratios below it are dropped from the loss.
            high: ratios above it are dropped from the loss.
        """
        if not 0.0 <= low < 1.0 < high:
            raise UserError(f"MaskedImportance: got low {low}, high {high}, expected 0 <= low < 1 < high")
        self.low, self.high = low, high

    def __call__(self, old_logprob_T: Tensor, sampler_logprob_T: Tensor) -> ImportanceWeights:
        ratio_T = self.ratio(old_logprob_T, sampler_logprob_T)
        outside_T = (ratio_T < self.low) | (ratio_T > self.high)
        return ImportanceWeights(ratio_T.masked_fill(outside_T, 0.0), outside_T)

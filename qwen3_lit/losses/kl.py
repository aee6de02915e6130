"""Per-token estimators of KL(policy || reference) from sampled tokens.

Source: J. Schulman, "Approximating KL divergence" (2020), names k1, k2, k3.

Legend: T tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from qwen3_lit.errors import UserError

KLEstimator = Literal["k1", "k2", "k3"]

# Beyond e^20 a single token would decide the whole batch; the bound keeps fp32 finite and is never met in a sane run.
LOG_RATIO_BOUND = 20.0


def bounded_log_ratio(numerator_logprob_T: Tensor, denominator_logprob_T: Tensor) -> Tensor:
    """ln(numerator / denominator), clamped to +-20 [T], in fp32 or wider."""
    dtype = torch.promote_types(
        torch.promote_types(numerator_logprob_T.dtype, denominator_logprob_T.dtype), torch.float32
    )
    log_ratio_T = numerator_logprob_T.to(dtype) - denominator_logprob_T.to(dtype)
    return log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def kl_estimate(logprob_T: Tensor, reference_logprob_T: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(policy || reference) at each token [T], differentiable in ``logprob_T``.

    - ``k1``: ln p - ln q. Unbiased, can be negative. Its own gradient is the score function, whose mean is zero, so as
      a loss it would do nothing but add noise: the value is k1 and the gradient is that of k2 (straight through).
    - ``k2``: (ln p - ln q)^2 / 2. Biased value, on-policy unbiased gradient.
    - ``k3``: q/p - ln(q/p) - 1. Unbiased and never negative (DeepSeekMath 2402.03300, eq. 4).

    Raises:
        UserError: unknown estimator.
    """
    log_ratio_T = bounded_log_ratio(logprob_T, reference_logprob_T)
    if estimator == "k1":
        k2_T = 0.5 * log_ratio_T.square()
        return log_ratio_T.detach() + (k2_T - k2_T.detach())
    if estimator == "k2":
        return 0.5 * log_ratio_T.square()
    if estimator == "k3":
        return torch.exp(-log_ratio_T) + log_ratio_T - 1.0
    raise UserError(f"kl_estimator: got {estimator!r}, expected one of {', '.join(get_args(KLEstimator))}")

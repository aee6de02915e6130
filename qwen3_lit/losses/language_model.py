"""Next-token cross-entropy, applied to hidden states chunk by chunk and normalised by a global token count.

Legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_kernels import linear_cross_entropy
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LanguageModelLoss:
    """Scalar to call backward on, and detached values for the logs."""

    loss: Tensor
    """Weighted cross-entropy plus z-loss, divided by ``num_tokens_total``."""
    nll_sum: Tensor
    """Unweighted sum of -ln p over the local target tokens in nats."""
    num_tokens: Tensor
    """Local tokens with a target, int64."""


def language_model_loss(
    hidden_TD: Tensor,
    lm_head_weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    num_tokens_total: Tensor | float | None = None,
    loss_weights_T: Tensor | None = None,
    z_loss_weight: float = 0.0,
    valid_vocab: int | None = None,
) -> LanguageModelLoss:
    """Sum of w_t * -ln p(target_t) (+ z_loss_weight * logsumexp^2) over the local tokens / ``num_tokens_total``.

    Args:
        hidden_TD: final hidden states, after the last norm.
        lm_head_weight_VD: output head; [T, V] logits never exist.
        target_ids_T: the token after each token, -100 where there is no loss.
        num_tokens_total: target tokens (or summed weights) of the whole optimizer step, over ranks and micro-steps, so
            that unequal batches weigh by their tokens; None takes the local count.
        loss_weights_T: per-token weights.
        z_loss_weight: weight of logsumexp^2 (PaLM, 2204.02311, section 5), 0 switches it off.
        valid_vocab: rows of the head that are real tokens; padding rows get no probability.
    """
    result = linear_cross_entropy(
        hidden_TD,
        lm_head_weight_VD,
        target_ids_T,
        loss_weights_T=loss_weights_T,
        ignore_index=IGNORE_INDEX,
        z_loss_weight=z_loss_weight,
        valid_vocab=valid_vocab,
    )
    num_tokens = (target_ids_T != IGNORE_INDEX).sum()
    total = num_tokens.clamp(min=1) if num_tokens_total is None else num_tokens_total
    return LanguageModelLoss(result.loss / total, result.nll_T.sum(), num_tokens)

"""Policy-gradient losses on flat, packed tokens: GRPO (DAPO form), Dr. GRPO, GSPO, SAPO, CISPO.

A loss is a class named in the recipe. It maps `PolicyInputs` to a scalar and detached metrics. Contributions of
micro-batches and ranks add up: everything is divided by the global counts given in the inputs, never by local ones (see
`qwen3_lit.losses.reduction`). Metrics add up the same way, except the names ending in ``_max``, which combine by
maximum.

Legend: T tokens. r_t = pi / pi_old at the sampled token, A_t its advantage.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3_lit.errors import UserError
from qwen3_lit.losses.entropy_bonus import EntropyBonus
from qwen3_lit.losses.importance import ImportanceCorrection, TruncatedImportance
from qwen3_lit.losses.kl import KLEstimator, bounded_log_ratio, kl_estimate
from qwen3_lit.losses.reduction import masked_sum, sequence_mean, sequence_sum


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy loss sees: flat tensors of one packed micro-batch and the counts of the whole optimizer step."""

    logprob_T: Tensor
    """ln pi of the token under the weights being trained, at the sampling temperature; carries the gradient."""
    old_logprob_T: Tensor
    """The same under the trainer's weights at rollout time."""
    advantage_T: Tensor
    """Advantage at each token."""
    mask_T: Tensor
    """True (or 1) on tokens the policy sampled and that are trained; forced, prompt and padding tokens are False."""
    sequence_ids_T: Tensor
    """int64 in [0, T): the completion a token belongs to. Not read where the mask is off."""
    num_tokens_total: Tensor | float
    """Trained tokens of the optimizer step over all ranks and micro-steps."""
    num_sequences_total: Tensor | float
    """Completions of the optimizer step over all ranks and micro-steps."""
    sampler_logprob_T: Tensor | None = None
    """ln pi as the generation engine reported it; None takes the old log-probs as the sampler's."""
    ref_logprob_T: Tensor | None = None
    """ln of the reference policy; needed when beta > 0."""
    entropy_T: Tensor | None = None
    """Entropy of the policy at each token in nats; needed by an entropy bonus, else only logged."""


@dataclass(frozen=True)
class PolicyLossOutput:
    """Scalar to call backward on, and detached 0-d metrics."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class TokenTerms:
    """Per-token policy term (a loss, so minus the objective) and the tokens whose gradient the clip removed."""

    loss_T: Tensor
    ratio_T: Tensor
    clipped_low_T: Tensor
    clipped_high_T: Tensor


def clipped_terms(ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> TokenTerms:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, 1707.06347, eq. 7, with DAPO's two bounds)."""
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    return TokenTerms(
        loss_T,
        ratio_T,
        (ratio_T < 1.0 - clip_low) & (advantage_T < 0),
        (ratio_T > 1.0 + clip_high) & (advantage_T > 0),
    )


def mean_over_sequences(value_T: Tensor, inputs: PolicyInputs) -> Tensor:
    """Sum over sequences of the mean over each one's trained tokens, divided by the global number of sequences."""
    length_T = sequence_sum(torch.ones_like(value_T), inputs.mask_T, inputs.sequence_ids_T)
    return masked_sum(value_T / length_T.clamp(min=1.0), inputs.mask_T) / inputs.num_sequences_total


def without_masked_values(inputs: PolicyInputs) -> PolicyInputs:
    """Zeros where the mask is off, so that a NaN or an infinity there (a forced token has no sampler log-prob, say)
    reaches neither the loss nor, as 0 * NaN, the gradient."""
    mask_T = inputs.mask_T.bool()

    def clean(value_T: Tensor) -> Tensor:
        return torch.where(mask_T, value_T, torch.zeros_like(value_T))

    def clean_optional(value_T: Tensor | None) -> Tensor | None:
        return None if value_T is None else clean(value_T)

    return replace(
        inputs,
        mask_T=mask_T,
        logprob_T=clean(inputs.logprob_T),
        old_logprob_T=clean(inputs.old_logprob_T),
        advantage_T=clean(inputs.advantage_T),
        sampler_logprob_T=clean_optional(inputs.sampler_logprob_T),
        ref_logprob_T=clean_optional(inputs.ref_logprob_T),
        entropy_T=clean_optional(inputs.entropy_T),
    )


class PolicyLoss:
    """Base of all policy losses: KL to a reference, importance correction, entropy bonus, normalisation, metrics.

    A variant overrides `terms` (the per-token policy term) and, when it is not normalised by the token count, `reduce`.
    """

    def __init__(
        self,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        correction: ImportanceCorrection | None = None,
        entropy_bonus: EntropyBonus | None = None,
    ) -> None:
        """
        Args:
            beta: weight of KL(policy || reference); 0 needs no reference model.
            kl_estimator: k1, k2 or k3.
            correction: sampler-trainer correction; null takes TruncatedImportance with cap 2, NoCorrection switches it
                off.
            entropy_bonus: EntropyBonus or AdaptiveEntropyBonus; null adds none.
        """
        if beta < 0.0:
            raise UserError(f"{type(self).__name__}.beta: got {beta}, expected a number >= 0")
        self.beta, self.kl_estimator = beta, kl_estimator
        self.correction = TruncatedImportance() if correction is None else correction
        self.entropy_bonus = EntropyBonus() if entropy_bonus is None else entropy_bonus

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model has to be kept and scored."""
        return self.beta > 0.0

    def terms(self, inputs: PolicyInputs) -> TokenTerms:
        """Per-token policy term; overridden by each loss."""
        raise NotImplementedError

    def reduce(self, value_T: Tensor, inputs: PolicyInputs) -> Tensor:
        """Scalar contribution of this micro-batch; the mean over the global trained tokens unless overridden."""
        return masked_sum(value_T, inputs.mask_T) / inputs.num_tokens_total

    def __call__(self, inputs: PolicyInputs) -> PolicyLossOutput:
        """Loss and metrics of one packed micro-batch.

        Raises:
            UserError: beta > 0 without reference log-probs, or an entropy bonus without entropies.
        """
        inputs = without_masked_values(inputs)
        mask_T = inputs.mask_T
        terms = self.terms(inputs)
        value_T = terms.loss_T
        metrics: dict[str, Tensor] = {}

        def mean(per_token_T: Tensor) -> Tensor:
            return masked_sum(per_token_T.detach().float(), mask_T) / inputs.num_tokens_total

        if inputs.sampler_logprob_T is not None:
            weights = self.correction(inputs.old_logprob_T, inputs.sampler_logprob_T)
            value_T = value_T * weights.weight_T
            metrics["importance_weight_mean"] = mean(weights.weight_T)
            metrics["importance_cut_fraction"] = mean(weights.cut_T)
        sampler_T = inputs.old_logprob_T if inputs.sampler_logprob_T is None else inputs.sampler_logprob_T
        # KL(sampler || trainer) on the sampler's tokens: the trainer takes the place of the reference in k3.
        metrics["approx_kl"] = mean(kl_estimate(sampler_T.detach(), inputs.logprob_T.detach(), "k3"))

        if self.beta > 0.0:
            if inputs.ref_logprob_T is None:
                raise UserError(
                    f"{type(self).__name__}: beta is {self.beta}, which needs reference log-probs; got none"
                )
            kl_T = kl_estimate(inputs.logprob_T, inputs.ref_logprob_T.detach(), self.kl_estimator)
            value_T = value_T + self.beta * kl_T
            metrics["kl_reference"] = mean(kl_T)
        loss = self.reduce(value_T, inputs)

        coefficient = self.entropy_bonus.coefficient
        if inputs.entropy_T is not None:
            metrics["entropy"] = mean(inputs.entropy_T)
            if coefficient:
                loss = loss - coefficient * masked_sum(inputs.entropy_T, mask_T) / inputs.num_tokens_total
        elif coefficient:
            raise UserError(f"{type(self).__name__}: the entropy bonus ({coefficient}) needs entropies; got none")

        ratio_T = terms.ratio_T.detach().float()
        metrics["policy_loss"] = loss.detach()
        metrics["clip_low_fraction"] = mean(terms.clipped_low_T)
        metrics["clip_high_fraction"] = mean(terms.clipped_high_T)
        metrics["ratio_mean"] = mean(ratio_T)
        metrics["ratio_max"] = torch.where(mask_T, ratio_T, torch.zeros_like(ratio_T)).max()
        return PolicyLossOutput(loss, metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the adaptive coefficient."""
        return {"entropy_bonus": self.entropy_bonus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])


class ClippedLoss(PolicyLoss):
    """Base of the losses with a lower and an upper clip bound on the ratio."""

    default_clip = (0.2, 0.28)

    def __init__(
        self,
        clip_low: float | None = None,
        clip_high: float | None = None,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        correction: ImportanceCorrection | None = None,
        entropy_bonus: EntropyBonus | None = None,
    ) -> None:
        """
        Args:
            clip_low: the ratio is clipped below 1 - clip_low; null takes the loss's published value.
            clip_high: the ratio is clipped above 1 + clip_high; null takes the loss's published value.
            beta: weight of KL(policy || reference); 0 needs no reference model.
            kl_estimator: k1, k2 or k3.
            correction: sampler-trainer correction; null takes TruncatedImportance with cap 2, NoCorrection switches it
                off.
            entropy_bonus: EntropyBonus or AdaptiveEntropyBonus; null adds none.
        """
        super().__init__(beta, kl_estimator, correction, entropy_bonus)
        self.clip_low = self.default_clip[0] if clip_low is None else clip_low
        self.clip_high = self.default_clip[1] if clip_high is None else clip_high
        if not 0.0 < self.clip_low <= 1.0 or not self.clip_high > 0.0:
            raise UserError(
                f"{type(self).__name__}: got clip_low {self.clip_low}, clip_high {self.clip_high}, "
                "expected 0 < clip_low <= 1 and clip_high > 0"
            )

    def terms(self, inputs: PolicyInputs) -> TokenTerms:
        ratio_T = bounded_log_ratio(inputs.logprob_T, inputs.old_logprob_T.detach()).exp()
        return clipped_terms(ratio_T, inputs.advantage_T, self.clip_low, self.clip_high)


class GRPOLoss(ClippedLoss):
    """GRPO's clipped token objective with DAPO's two bounds and mean over all trained tokens of the step.

    Sources: DeepSeekMath (2402.03300), section 4.1; DAPO (2503.14476), eq. 8 (token-level mean, clip 0.2 / 0.28, no
    KL).
    """


class DrGRPOLoss(ClippedLoss):
    """GRPO with a constant normaliser, which removes the length bias: sum over tokens / (sequences * constant).

    Its other half, advantages without division by the group's standard deviation, is set where advantages are computed.
    Source: Dr. GRPO (2503.20783), section 3.2. The paper clips at 0.2 on both sides.
    """

    default_clip = (0.2, 0.2)

    def __init__(
        self,
        max_completion_tokens: int,
        clip_low: float | None = None,
        clip_high: float | None = None,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        correction: ImportanceCorrection | None = None,
        entropy_bonus: EntropyBonus | None = None,
    ) -> None:
        """
        Args:
            max_completion_tokens: the constant a sequence's token sum is divided by; the generation limit.
            clip_low: the ratio is clipped below 1 - clip_low; null takes 0.2.
            clip_high: the ratio is clipped above 1 + clip_high; null takes 0.2.
            beta: weight of KL(policy || reference); 0 needs no reference model.
            kl_estimator: k1, k2 or k3.
            correction: sampler-trainer correction; null takes TruncatedImportance with cap 2, NoCorrection switches it
                off.
            entropy_bonus: EntropyBonus or AdaptiveEntropyBonus; null adds none.
        """
        super().__init__(clip_low, clip_high, beta, kl_estimator, correction, entropy_bonus)
        if max_completion_tokens < 1:
            raise UserError(f"DrGRPOLoss.max_completion_tokens: got {max_completion_tokens}, expected an integer >= 1")
        self.max_completion_tokens = max_completion_tokens

    def reduce(self, value_T: Tensor, inputs: PolicyInputs) -> Tensor:
        return masked_sum(value_T, inputs.mask_T) / (inputs.num_sequences_total * self.max_completion_tokens)


class GSPOLoss(ClippedLoss):
    """Sequence-level ratio s = exp(mean_t ln r_t), clipped per sequence; mean over sequences.

    The token form s_t = sg[s] * pi / sg[pi] is used: the same value and gradient when advantage and importance weight
    are constant in a sequence, and defined when they are not. Source: GSPO (2507.18071), eq. 5-7 and 13-14, clip 3e-4 /
    4e-4.
    """

    default_clip = (3e-4, 4e-4)

    def terms(self, inputs: PolicyInputs) -> TokenTerms:
        log_ratio_T = bounded_log_ratio(inputs.logprob_T, inputs.old_logprob_T.detach())
        sequence_T = sequence_mean(log_ratio_T.detach(), inputs.mask_T, inputs.sequence_ids_T)
        ratio_T = (sequence_T + log_ratio_T - log_ratio_T.detach()).exp()
        return clipped_terms(ratio_T, inputs.advantage_T, self.clip_low, self.clip_high)

    def reduce(self, value_T: Tensor, inputs: PolicyInputs) -> Tensor:
        return mean_over_sequences(value_T, inputs)


class SAPOLoss(PolicyLoss):
    """A smooth gate in place of the clip: f(r) = 4 / tau * sigmoid(tau (r - 1)), tau by the advantage's sign.

    The gradient of f at r = 1 equals the ratio's own, and fades on both sides. Nothing is clipped, so the clip
    fractions are zero. Source: SAPO (2511.20347), tau 1.0 / 1.05, mean over sequences of token means.
    """

    def __init__(
        self,
        tau_positive: float = 1.0,
        tau_negative: float = 1.05,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        correction: ImportanceCorrection | None = None,
        entropy_bonus: EntropyBonus | None = None,
    ) -> None:
        """
        Args:
            tau_positive: sharpness of the gate where the advantage is positive.
            tau_negative: sharpness of the gate where it is not.
            beta: weight of KL(policy || reference); 0 needs no reference model.
            kl_estimator: k1, k2 or k3.
            correction: sampler-trainer correction; null takes TruncatedImportance with cap 2, NoCorrection switches it
                off.
            entropy_bonus: EntropyBonus or AdaptiveEntropyBonus; null adds none.
        """
        super().__init__(beta, kl_estimator, correction, entropy_bonus)
        if tau_positive <= 0.0 or tau_negative <= 0.0:
            raise UserError(
                f"SAPOLoss: got tau_positive {tau_positive}, tau_negative {tau_negative}, expected both > 0"
            )
        self.tau_positive, self.tau_negative = tau_positive, tau_negative

    def terms(self, inputs: PolicyInputs) -> TokenTerms:
        ratio_T = bounded_log_ratio(inputs.logprob_T, inputs.old_logprob_T.detach()).exp()
        positive_T = inputs.advantage_T > 0
        tau_T = torch.full_like(ratio_T, self.tau_negative).masked_fill(positive_T, self.tau_positive)
        gate_T = 4.0 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1.0))
        none_T = torch.zeros_like(positive_T)
        return TokenTerms(-gate_T * inputs.advantage_T, ratio_T, none_T, none_T)

    def reduce(self, value_T: Tensor, inputs: PolicyInputs) -> Tensor:
        return mean_over_sequences(value_T, inputs)


class CISPOLoss(PolicyLoss):
    """-sg[clip(r, ratio_min, ratio_max)] * A * ln pi: the weight is clipped, every token keeps a gradient.

    Source: MiniMax-M1 (2506.13585), eq. 4-5; the lower bound is off by default as there, the upper is to be tuned (5.0
    is ScaleRL's, 2510.13786).
    """

    def __init__(
        self,
        ratio_min: float = 0.0,
        ratio_max: float = 5.0,
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        correction: ImportanceCorrection | None = None,
        entropy_bonus: EntropyBonus | None = None,
    ) -> None:
        """
        Args:
            ratio_min: smallest weight of a token; 0 switches the lower bound off.
            ratio_max: largest weight of a token.
            beta: weight of KL(policy || reference); 0 needs no reference model.
            kl_estimator: k1, k2 or k3.
            correction: sampler-trainer correction; null takes TruncatedImportance with cap 2, NoCorrection switches it
                off.
            entropy_bonus: EntropyBonus or AdaptiveEntropyBonus; null adds none.
        """
        super().__init__(beta, kl_estimator, correction, entropy_bonus)
        if not 0.0 <= ratio_min <= 1.0 <= ratio_max:
            raise UserError(
                f"CISPOLoss: got ratio_min {ratio_min}, ratio_max {ratio_max}, "
                "expected 0 <= ratio_min <= 1 <= ratio_max"
            )
        self.ratio_min, self.ratio_max = ratio_min, ratio_max

    def terms(self, inputs: PolicyInputs) -> TokenTerms:
        ratio_T = bounded_log_ratio(inputs.logprob_T, inputs.old_logprob_T).detach().exp()
        weight_T = ratio_T.clamp(self.ratio_min, self.ratio_max)
        loss_T = -weight_T * inputs.advantage_T * inputs.logprob_T
        return TokenTerms(loss_T, ratio_T, ratio_T < self.ratio_min, ratio_T > self.ratio_max)

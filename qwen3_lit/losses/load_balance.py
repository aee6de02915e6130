"""Balance of the experts' load: losses, the aux-free selection bias, and the state they need between micro-steps.

A strategy sees the `RoutingStats` that the model *returns* (never a module's hidden state), once a training micro-step
and outside of the model's forward: recomputation by activation checkpointing counts nothing twice. Its loss is a sum
over the local tokens divided by a global count, so contributions of ranks and micro-steps add up
(`qwen3_lit.losses.reduction`).

Legend: L MoE layers, E experts, K experts per token, T tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwen3_lit.errors import UserError
from qwen3_lit.losses.reduction import sum_over_ranks

BIAS_NAME = "expert_bias_E"


class RoutingStatistics(Protocol):
    """What the strategies read; the model's `RoutingStats` fits."""

    @property
    def counts_LE(self) -> Tensor:
        """Routed rows of each expert, padding excluded; rows sum to K * num_tokens."""

    @property
    def prob_sum_LE(self) -> Tensor:
        """Sum over tokens of the softmax probability of each expert, differentiable."""

    @property
    def z_sum_L(self) -> Tensor:
        """Sum over tokens of logsumexp(router logits)^2, differentiable."""

    @property
    def num_tokens(self) -> Tensor:
        """Real tokens behind the sums, 0-d."""


def load_fraction(counts_LE: Tensor) -> Tensor:
    """f: share of the routed rows that each expert got, rows sum to one [L, E]. This is the paper's f divided by K."""
    counts_LE = counts_LE.detach().float()
    return counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1.0)


def balance_loss(prob_sum_LE: Tensor, total_counts_LE: Tensor, total_tokens: Tensor | float) -> Tensor:
    """mean over layers of E * sum_e f_e * P_e, with P_e = prob_sum_e / total_tokens.

    f comes from ``total_counts_LE``, which may span more tokens than the probabilities; it is a constant, so the
    gradient goes through P only. Divided by K (through f), so perfect balance gives 1.0 for any K, and E at worst for K
    = 1. Weights of others convert: transformers' loss is K times this one, Megatron's L times (it sums over layers).
    Probability sums of parts of a batch with the same ``total_counts_LE`` and ``total_tokens`` give losses that
    add up to the loss of the whole batch. Source: Demons in the Detail (2501.11873), eq. 2 and 5.
    """
    num_experts = prob_sum_LE.shape[-1]
    per_layer_L = num_experts * (load_fraction(total_counts_LE) * prob_sum_LE).sum(-1) / total_tokens
    return per_layer_L.mean()


def router_z_loss(z_sum_L: Tensor, total_tokens: Tensor | float) -> Tensor:
    """mean over layers and tokens of logsumexp(router logits)^2. Source: ST-MoE (2202.08906), eq. 5."""
    return (z_sum_L / total_tokens).mean()


def updated_expert_bias(bias_LE: Tensor, counts_LE: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean load - load): up for experts that got too little, down for those that got too much.

    Source: Auxiliary-loss-free load balancing (2408.15664), algorithm 1.
    """
    counts_LE = counts_LE.to(bias_LE.dtype)
    return bias_LE + rate * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE)


class BalanceStrategy:
    """Base: a weighted loss of each training micro-step, and an update after each optimizer step."""

    def __init__(self, weight: float) -> None:
        if weight < 0.0:
            raise UserError(f"{type(self).__name__}.weight: got {weight}, expected a number >= 0")
        self.weight = weight

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        """Weighted contribution of one training micro-step, 0-d.

        Every rank has to call it for every micro-step (counts are summed over ranks), and not in evaluation.

        Args:
            stats: what the model's forward returned.
            num_tokens_total: routed tokens of the whole optimizer step over ranks and micro-steps, which makes unequal
                parts weigh by their tokens. None takes this micro-step's tokens over all ranks: the loss of the
                micro-step by itself, for trainers that average over micro-steps.
        """
        raise NotImplementedError

    def after_optimizer_step(self, model: nn.Module | None = None) -> None:
        """Forgets the finished step; `AuxFreeBias` writes the model's biases here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""


def _total_tokens(stats: RoutingStatistics, num_tokens_total: Tensor | float | None) -> Tensor | float:
    if num_tokens_total is not None:
        return num_tokens_total
    return sum_over_ranks(stats.num_tokens).clamp(min=1)


class MicroBatchBalance(BalanceStrategy):
    """f from the local micro-batch alone: every rank and micro-step is pushed to balance by itself (the common
    form)."""

    def __init__(self, weight: float = 0.001) -> None:
        """
        Args:
            weight: coefficient; 0.001 is what Hugging Face's Qwen3-MoE configs carry, Qwen3's own is not published.
        """
        super().__init__(weight)

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        total_tokens = _total_tokens(stats, num_tokens_total)
        return self.weight * balance_loss(stats.prob_sum_LE, stats.counts_LE, total_tokens)


class _CountingStrategy(BalanceStrategy):
    """Keeps the counts over ranks and micro-steps since the last optimizer step."""

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self._counts_LE: Tensor | None = None

    def _add_counts(self, stats: RoutingStatistics) -> Tensor:
        counts_LE = sum_over_ranks(stats.counts_LE)
        # Out of place: the previous value is held by the graphs of earlier micro-steps.
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE.to(counts_LE.device) + counts_LE
        return self._counts_LE

    def after_optimizer_step(self, model: nn.Module | None = None) -> None:
        self._counts_LE = None

    def state_dict(self) -> dict[str, Any]:
        return {"counts_LE": None if self._counts_LE is None else self._counts_LE.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts_LE = state["counts_LE"]


class GlobalBatchBalance(_CountingStrategy):
    """f from the counts of all ranks and all micro-steps since the last optimizer step (Qwen3's balance loss).

    In micro-step m the buffer holds the counts of micro-steps 1..m, as in the paper's algorithm 1: exact with one
    micro-step, and in the last one of several. Source: Demons in the Detail (2501.11873), eq. 5 and algorithm 1.
    """

    def __init__(self, weight: float = 0.001) -> None:
        """
        Args:
            weight: coefficient. The paper's standard is 0.008, Hugging Face's Qwen3-MoE configs carry 0.001; Qwen3's
                own is not published.
        """
        super().__init__(weight)

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        total_counts_LE = self._add_counts(stats)
        return self.weight * balance_loss(stats.prob_sum_LE, total_counts_LE, _total_tokens(stats, num_tokens_total))


class RouterZLoss(BalanceStrategy):
    """Keeps the router's logits small: weight * mean logsumexp^2."""

    def __init__(self, weight: float = 0.001) -> None:
        """
        Args:
            weight: coefficient; 0.001 is ST-MoE's.
        """
        super().__init__(weight)

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        return self.weight * router_z_loss(stats.z_sum_L, _total_tokens(stats, num_tokens_total))


class AuxFreeBias(_CountingStrategy):
    """No loss: a bias per expert, added to the router's scores for the selection only, moves against the load.

    The model's routers hold it as a buffer named ``expert_bias_E``, one a MoE layer, in layer order. After each
    optimizer step the global counts of that step move it by ``rate``. Source: 2408.15664; DeepSeek-V3 (2412.19437),
    section 2.1.2.
    """

    def __init__(self, rate: float = 0.001) -> None:
        """
        Args:
            rate: change of a bias per optimizer step; 0.001 is DeepSeek-V3's.
        """
        super().__init__(0.0)
        if rate <= 0.0:
            raise UserError(f"AuxFreeBias.rate: got {rate}, expected a number > 0")
        self.rate = rate

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        self._add_counts(stats)
        return stats.prob_sum_LE.new_zeros(())

    @torch.no_grad()
    def after_optimizer_step(self, model: nn.Module | None = None) -> None:
        """Moves the biases of ``model``.

        Raises:
            UserError: the model has no selection bias, or not one per MoE layer.
        """
        if self._counts_LE is None:
            return
        biases = [] if model is None else expert_biases(model)
        if len(biases) != self._counts_LE.shape[0]:
            raise UserError(
                f"AuxFreeBias: the model has {len(biases)} buffers named {BIAS_NAME} for "
                f"{self._counts_LE.shape[0]} MoE layers; "
                "build it with the selection bias on, or take GlobalBatchBalance"
            )
        moved_LE = updated_expert_bias(torch.stack(biases), self._counts_LE.to(biases[0].device), self.rate)
        for bias_E, moved_E in zip(biases, moved_LE, strict=True):
            bias_E.copy_(moved_E)
        super().after_optimizer_step()


def expert_biases(model: nn.Module) -> list[Tensor]:
    """The routers' selection biases, in layer order; empty when the model has none."""
    return [buffer for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] == BIAS_NAME]


class CombinedBalance(BalanceStrategy):
    """Several strategies at once: losses add up, each keeps its own state (global balance with a z-loss, for
    example)."""

    def __init__(self, parts: Sequence[BalanceStrategy]) -> None:
        """
        Args:
            parts: the strategies, each with its own weight.
        """
        super().__init__(1.0)
        if not parts:
            raise UserError("CombinedBalance.parts: got an empty list, expected at least one strategy")
        self.parts = list(parts)

    def loss(self, stats: RoutingStatistics, num_tokens_total: Tensor | float | None = None) -> Tensor:
        return torch.stack([part.loss(stats, num_tokens_total) for part in self.parts]).sum()

    def after_optimizer_step(self, model: nn.Module | None = None) -> None:
        for part in self.parts:
            part.after_optimizer_step(model)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, part_state in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(part_state)

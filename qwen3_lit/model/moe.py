"""The mixture-of-experts feed-forward: a router and 128 small SwiGLU experts, no shared expert.

Legend: T tokens, D model width, E experts, K experts per token, F expert width, L MoE layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from qwen3_kernels import Routing, grouped_experts, router_logits, router_topk
from torch import Tensor, nn

from qwen3_lit.model.config import ModelConfig


@dataclass
class RoutingStats:
    """What the balance losses and the metrics need of one forward pass; a value, never hidden module state."""

    counts_LE: Tensor
    """int64: routed rows of each expert, padding excluded."""
    prob_sum_LE: Tensor
    """float32, differentiable: router probabilities summed over tokens."""
    z_sum_L: Tensor
    """float32, differentiable: squared logsumexp of the router logits summed over tokens."""
    num_tokens: Tensor
    """int64 scalar: tokens counted."""
    expert_ids_LTK: Tensor | None = None
    """uint8 or int16: the experts of every token, on request."""


class Router(nn.Module):
    """Linear logits in float32 over all experts."""

    expert_bias_E: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # Enters the choice alone, never the weights; see enable_expert_bias.
        self.register_buffer("expert_bias_E", None)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None, expert_ids_TK: Tensor | None) -> Routing:
        """Route every token."""
        return router_topk(
            router_logits(x_TD, self.weight),
            self.top_k,
            renormalize=self.renormalize,
            token_mask_T=token_mask_T,
            expert_ids_TK=expert_ids_TK,
            selection_bias_E=self.expert_bias_E,
        )

    def enable_expert_bias(self) -> None:
        """Start aux-loss-free balancing (arXiv 2408.15664) from a bias of zero."""
        self.register_buffer("expert_bias_E", torch.zeros(self.weight.shape[0], device=self.weight.device))


class Experts(nn.Module):
    """All experts of a layer as two stacked tensors, in the layout of transformers 5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts: [T, D] -> [T, D]."""
        return grouped_experts(x_TD, self.gate_up_proj, self.down_proj, routing)


class MoE(nn.Module):
    """Router and experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(
        self, x_TD: Tensor, token_mask_T: Tensor | None = None, expert_ids_TK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """[T, D] -> [T, D] and where the tokens went."""
        routing = self.gate(x_TD, token_mask_T, expert_ids_TK)
        return self.experts(x_TD, routing), routing


class MLP(nn.Module):
    """The dense SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))

"""The Qwen3 decoder, dense and mixture-of-experts in one class.

Legend: T tokens, D model width, E experts, K experts per token, V vocabulary, L MoE layers.

One flat row of T tokens holds whole documents end to end; there is no batch dimension and no padding. The model ends at
the normed hidden states: the head is applied inside the losses, chunk by chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from qwen3_kernels import Routing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen3_lit.model.attention import Attention, AttentionContext, PackedAttention, Rotary
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.moe import MLP, MoE, RoutingStats


@dataclass
class ModelOutput:
    """Hidden states after the last norm, and where the tokens went (None for a dense model)."""

    hidden_TD: Tensor
    routing: RoutingStats | None


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | MLP = MoE(config) if config.is_moe_layer(layer) else MLP(config)
        self.compiled_compute: Callable[..., tuple[Tensor, Routing | None]] | None = None

    def forward(
        self,
        x_TD: Tensor,
        rotary_position_T: Tensor,
        rope: Rotary,
        attention: AttentionContext,
        token_mask_T: Tensor | None,
        expert_ids_TK: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        """[T, D] -> [T, D] and the routing of a MoE block; compiled where ``Qwen3.compile_blocks`` says so."""
        arguments = (x_TD, rotary_position_T, rope, attention, token_mask_T, expert_ids_TK)
        if self.compiled_compute is not None and isinstance(attention, PackedAttention):
            return self.compiled_compute(self, *arguments)
        return self.compute(*arguments)

    def compute(
        self,
        x_TD: Tensor,
        rotary_position_T: Tensor,
        rope: Rotary,
        attention: AttentionContext,
        token_mask_T: Tensor | None,
        expert_ids_TK: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        """What ``forward`` computes."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotary_position_T, rope, attention)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            y_TD, routing = self.mlp(normed_TD, token_mask_T, expert_ids_TK)
            return x_TD + y_TD, routing
        return x_TD + self.mlp(normed_TD), None


class Qwen3(nn.Module):
    """A Qwen3 decoder; parameter names are those of transformers without the leading ``model.``.

    ``activation_checkpointing`` recomputes every block in the backward pass: activations of one block at a time.
    """

    def __init__(self, config: ModelConfig, *, empty: bool = False) -> None:
        """
        Args:
            config: the model.
            empty: leave the parameters on the meta device, for a model too large for one process. The constructors'
                random numbers are drawn all the same, block by block, so that ``init_weights``, once the parameters
                have memory, gives the weights of a model built whole.
        """
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        place = "meta" if empty else None  # None: where it is
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size).to(place)
        self.layers = nn.ModuleList(Block(config, i).to(place) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps).to(place)
        self.rope = Rotary(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).to(place)
        init_weights(self)

    @property
    def lm_head_weight(self) -> Tensor:
        """The head [V, D]; the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def compile_blocks(self, *, fullgraph: bool = True, backend: str = "inductor") -> None:
        """``torch.compile`` what every block computes; modules, names and state_dict stay what they are.

        Nothing that a block computes depends on its place, so blocks of one kind share one graph: 48 layers compile as
        long as one does. A second number of tokens compiles once more, for every number from then on. Hooks of a block
        (FSDP2's gather its weights) stay outside of the graph, which they would break. Only packed documents run
        compiled; generation brings contexts that write a cache, and runs as it did.

        Args:
            fullgraph: a break in a block's graph is an error. The reference operations break it (attention and experts
                read sizes on the host); the Triton ones do not.
            backend: what ``torch.compile`` takes.
        """
        compute = torch.compile(Block.compute, fullgraph=fullgraph, backend=backend)
        for block in self.layers:
            block.compiled_compute = compute  # type: ignore[assignment]

    def forward(
        self,
        token_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        attention: AttentionContext | None = None,
        token_mask_T: Tensor | None = None,
        replay_expert_ids_LTK: Tensor | None = None,
        record_routing: bool = False,
    ) -> ModelOutput:
        """Hidden states of a packed row, or of whatever ``attention`` describes.

        Args:
            token_ids_T: int64.
            position_ids_T: int64, restarting in each document.
            cu_seqlens, max_seqlen: document borders (see ``PackedAttention``); not needed with ``attention``.
            attention: what the queries see, where it is not packed documents.
            token_mask_T: bool, False for padding, which is routed to no expert.
            replay_expert_ids_LTK: route as recorded instead of by the router's own choice.
            record_routing: return the experts of every token.
        """
        if attention is None:
            if cu_seqlens is None or max_seqlen is None:
                raise ValueError("Qwen3.forward: neither cu_seqlens with max_seqlen nor an attention context was given")
            attention = PackedAttention(cu_seqlens, max_seqlen, self.rope, self.config.attention_backend)
        rotary_position_T = self.rope.rotary_position(position_ids_T)
        x_TD = self.embed_tokens(token_ids_T)
        routings: list[Routing] = []
        for block in self.layers:
            replay_TK = None
            if replay_expert_ids_LTK is not None and isinstance(block.mlp, MoE):
                replay_TK = replay_expert_ids_LTK[len(routings)]
            arguments = (x_TD, rotary_position_T, self.rope, attention, token_mask_T, replay_TK)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD, routing = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TD, routing = block(*arguments)
            if routing is not None:
                routings.append(routing)
        stats = self._routing_stats(routings, token_ids_T, token_mask_T, record_routing) if routings else None
        return ModelOutput(self.norm(x_TD), stats)

    def _routing_stats(
        self, routings: list[Routing], token_ids_T: Tensor, token_mask_T: Tensor | None, record: bool
    ) -> RoutingStats:
        if token_mask_T is None:
            # torch.tensor would copy from pageable memory, which waits for everything queued on the GPU.
            num_tokens = torch.full((), token_ids_T.shape[0], dtype=torch.int64, device=token_ids_T.device)
        else:
            num_tokens = token_mask_T.sum()
        id_type = torch.uint8 if self.config.num_experts <= 256 else torch.int16
        return RoutingStats(
            counts_LE=torch.stack([r.counts_E for r in routings]),
            prob_sum_LE=torch.stack([r.prob_sum_E for r in routings]),
            z_sum_L=torch.stack([r.z_sum for r in routings]),
            num_tokens=num_tokens,
            expert_ids_LTK=torch.stack([r.expert_ids_TK.to(id_type) for r in routings]) if record else None,
        )

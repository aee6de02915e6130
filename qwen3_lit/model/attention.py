"""Grouped-query attention with QK-norm and rotary positions.

Legend: T tokens, D model width, H query heads, G kv heads, C head width.

What a query may see is not this module's business: it hands q, k and v to an ``AttentionContext``. Training packs
documents (``PackedAttention``); generation brings contexts that read and write a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from qwen3_kernels import dual_chunk_attention, qk_norm_rope
from torch import Tensor, nn

from qwen3_lit.model.config import DualChunkConfig, ModelConfig
from qwen3_lit.model.rope import rope_frequencies


class AttentionContext(Protocol):
    """What the queries of one forward pass attend to."""

    def attend(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Attention output [T, H, C]; q and k come normed and rotated."""
        ...


class Rotary(nn.Module):
    """The rotary frequencies of a model, shared by its layers."""

    inv_freq_R: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq_R, self.attention_factor = rope_frequencies(config)
        self.register_buffer("inv_freq_R", inv_freq_R, persistent=False)
        self.dual_chunk: DualChunkConfig | None = config.dual_chunk

    def reset_parameters(self) -> None:
        """Fill the buffer again after the module was made on the meta device."""
        self.inv_freq_R.copy_(rope_frequencies(self.config)[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)
        # A cast of the whole model must not reach the frequencies: in bf16 the angle at position 32,768 is off by tens
        # of radians.
        if self.inv_freq_R.dtype != torch.float32 and not self.inv_freq_R.is_meta:
            self.inv_freq_R = rope_frequencies(self.config)[0].to(self.inv_freq_R.device)
        return self

    def rotary_position(self, position_ids_T: Tensor) -> Tensor:
        """The positions that q and k are rotated by: with dual chunks, the position inside the chunk."""
        return position_ids_T if self.dual_chunk is None else position_ids_T % self.dual_chunk.chunk_len


@dataclass
class PackedAttention:
    """Causal attention inside each document of a packed row."""

    cu_seqlens: Tensor
    """int32 document starts, closed by T."""
    max_seqlen: int
    """Longest document in tokens."""
    rope: Rotary
    backend: str = "auto"

    def attend(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """See ``AttentionContext``."""
        chunks = self.rope.dual_chunk
        return dual_chunk_attention(
            q_THC,
            k_TGC,
            v_TGC,
            self.cu_seqlens,
            self.max_seqlen,
            inv_freq_R=None if chunks is None else self.rope.inv_freq_R,
            chunk_size=None if chunks is None else chunks.chunk_size,
            local_size=None if chunks is None else chunks.local_size,
            backend=self.backend,
        )


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over head_dim, shared by all heads; the fused operation applies it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class Attention(nn.Module):
    """Qwen3 attention: no biases, RMSNorm over head_dim on q and k before RoPE (Technical Report, section 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        width_q = config.num_attention_heads * config.head_dim
        width_kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width_q, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width_kv, bias=False)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)

    def forward(self, x_TD: Tensor, rotary_position_T: Tensor, rope: Rotary, attention: AttentionContext) -> Tensor:
        """Mix tokens: [T, D] -> [T, D]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_THC, k_TGC, v_TGC = (project(x_TD).unflatten(-1, (-1, self.head_dim)) for project in projections)
        q_THC, k_TGC = qk_norm_rope(
            q_THC,
            k_TGC,
            self.q_norm.weight,
            self.k_norm.weight,
            rotary_position_T,
            rope.inv_freq_R,
            rope.attention_factor,
            self.eps,
        )
        return self.o_proj(attention.attend(self.layer, q_THC, k_TGC, v_TGC).flatten(-2))

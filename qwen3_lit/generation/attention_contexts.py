"""How queries see the cache: prefill writes whole prompts and attends among them, decode writes one token a sequence.

Legend: T tokens of a prefill, B sequences of a decode step, M pages a sequence, G kv heads, H query heads, C head
width.
"""

from dataclasses import dataclass

from qwen3_kernels import paged_attention
from torch import Tensor

from qwen3_lit.generation.kv_cache import PagedKVCache
from qwen3_lit.model.attention import PackedAttention, Rotary


@dataclass
class PrefillAttention:
    """Several whole prompts in one row: attention as in training, keys and values kept."""

    cache: PagedKVCache
    slots_T: Tensor
    """int64, where each token's keys and values go."""
    packed: PackedAttention

    def attend(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """See ``AttentionContext``."""
        self.cache.write(layer, self.slots_T, k_TGC, v_TGC)
        return self.packed.attend(layer, q_THC, k_TGC, v_TGC)


@dataclass
class DecodeAttention:
    """The newest token of every sequence against its pages; shapes depend on the batch alone, never on values."""

    cache: PagedKVCache
    slots_B: Tensor
    """int64, where each token's keys and values go."""
    block_table_BM: Tensor
    """int32, pages of each sequence in order."""
    context_lens_B: Tensor
    """int64, tokens of each sequence, the newest included."""
    rope: Rotary

    def attend(self, layer: int, q_BHC: Tensor, k_BGC: Tensor, v_BGC: Tensor) -> Tensor:
        """See ``AttentionContext``."""
        self.cache.write(layer, self.slots_B, k_BGC, v_BGC)
        chunks = self.rope.dual_chunk
        return paged_attention(
            q_BHC,
            self.cache.k_LPSGC[layer],
            self.cache.v_LPSGC[layer],
            self.block_table_BM,
            self.context_lens_B,
            inv_freq_R=None if chunks is None else self.rope.inv_freq_R,
            chunk_size=None if chunks is None else chunks.chunk_size,
            local_size=None if chunks is None else chunks.local_size,
        )

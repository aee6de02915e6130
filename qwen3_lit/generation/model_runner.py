"""Forward passes of the engine: packed prefill and one-token decode over the same parameters the trainer holds.

Legend: T tokens of a prefill, B sequences of a decode step, M pages a sequence, D model width, V valid vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from qwen3_kernels import dispatch
from torch import Tensor

from qwen3_lit.generation.attention_contexts import DecodeAttention, PrefillAttention
from qwen3_lit.generation.kv_cache import PagedKVCache
from qwen3_lit.model.attention import PackedAttention
from qwen3_lit.model.transformer import Qwen3


class ModelRunner:
    """Runs ``model`` against ``cache``; keeps no copy of a weight."""

    def __init__(self, model: Qwen3, cache: PagedKVCache, valid_vocab: int, *, record_routing: bool) -> None:
        self.model = model
        self.cache = cache
        self.valid_vocab = valid_vocab
        self.record_routing = record_routing and model.config.num_moe_layers > 0
        if self.record_routing:
            cache.keep_routes(model.config.num_moe_layers, model.config.num_experts_per_tok)

    def prefill(self, sequences: Sequence[Sequence[int]], pages: Sequence[np.ndarray]) -> Tensor:
        """Feed whole sequences, packed in one row, into their pages; hidden state of each one's last token [B, D]."""
        lengths = [len(tokens) for tokens in sequences]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        slots = [self.cache.slots(p, n) for p, n in zip(pages, lengths, strict=True)]
        slots_T = self._to_device(np.concatenate(slots))
        packed = PackedAttention(
            self._to_device(bounds.astype(np.int32)),
            max(lengths),
            self.model.rope,
            self.model.config.attention_backend,
        )
        hidden_TD = self._forward(
            self._to_device(np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in sequences])),
            self._to_device(np.concatenate([np.arange(n) for n in lengths])),
            slots_T,
            PrefillAttention(self.cache, slots_T, packed),
        )
        return hidden_TD[self._to_device(bounds[1:] - 1)]

    def decode(self, step_4B: np.ndarray, block_table_BM: np.ndarray) -> Tensor:
        """Feed one token a sequence; ``step_4B`` as ``SlotTable.step_inputs`` gives it. Hidden states [B, D]."""
        token_ids_B, position_ids_B, slots_B, context_lens_B = self._to_device(step_4B)
        table_BM = self._to_device(block_table_BM)
        attention = DecodeAttention(self.cache, slots_B, table_BM, context_lens_B, self.model.rope)
        return self._forward(token_ids_B, position_ids_B, slots_B, attention)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Float32 logits over the valid vocabulary [B, V]; rows past it belong to no token and are left out."""
        hidden_BD = dispatch.autocast(hidden_BD)
        weight_VD = dispatch.autocast(self.model.lm_head_weight[: self.valid_vocab])
        if hidden_BD.is_cuda and hidden_BD.dtype == torch.bfloat16:
            # As the trainer's linear_logprob: logits rounded to bfloat16 would part sampled from trained log-probs.
            return torch.mm(hidden_BD, weight_VD.t(), out_dtype=torch.float32)
        return F.linear(hidden_BD, weight_VD).float()

    def _forward(
        self,
        token_ids_T: Tensor,
        position_ids_T: Tensor,
        slots_T: Tensor,
        attention: PrefillAttention | DecodeAttention,
    ) -> Tensor:
        output = self.model(token_ids_T, position_ids_T, attention=attention, record_routing=self.record_routing)
        if self.record_routing:
            self.cache.write_routes(slots_T, output.routing.expert_ids_LTK)
        return output.hidden_TD

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.cache.device, non_blocking=True)

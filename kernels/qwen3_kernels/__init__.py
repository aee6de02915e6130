"""The operations of a Qwen3 model, each behind one signature: plain PyTorch today's truth, fast kernels beside it.

The package needs torch alone (and triton for the GPU kernels). ``dispatch`` decides which implementation runs.
"""

from qwen3_kernels.dual_chunk_attention import dual_chunk_attention
from qwen3_kernels.grouped_experts import grouped_experts
from qwen3_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from qwen3_kernels.linear_logprob import LinearLogprob, linear_logprob
from qwen3_kernels.paged_attention import paged_attention
from qwen3_kernels.qk_norm_rope import qk_norm_rope
from qwen3_kernels.router_logits import router_logits
from qwen3_kernels.router_topk import Routing, router_topk

__all__ = [
    "LinearCrossEntropy",
    "LinearLogprob",
    "Routing",
    "dual_chunk_attention",
    "grouped_experts",
    "linear_cross_entropy",
    "linear_logprob",
    "paged_attention",
    "qk_norm_rope",
    "router_logits",
    "router_topk",
]

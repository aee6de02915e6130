"""What a model costs, from its configuration alone: parameters and FLOPs. Pure functions, no torch.

Legend: D model width, H heads, G kv heads, C head width, E experts, K experts per token, F expert width, V vocabulary,
T tokens, L layers.

FLOPs are model FLOPs: a multiply-add counts two, backward costs twice forward, recomputation and padding are not
counted, and attention is counted causally, as (l + 1) / 2 keys for an average query of a document of l tokens
(arXiv 2204.02311, appendix B, with the causal half taken out). Norms, rotations and activations are left out: below
1 % at every published width.
"""

import math
from collections.abc import Iterable

from qwen3_lit.model.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of ``Qwen3(config)``, in the order of its state_dict."""
    D, C = config.hidden_size, config.head_dim
    width_q, width_kv = config.num_attention_heads * C, config.num_key_value_heads * C
    E, F, dense = config.num_experts, config.moe_intermediate_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, D)}
    for layer in range(config.num_hidden_layers):
        block = {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (width_q, D),
            "self_attn.k_proj.weight": (width_kv, D),
            "self_attn.v_proj.weight": (width_kv, D),
            "self_attn.o_proj.weight": (D, width_q),
            "self_attn.q_norm.weight": (C,),
            "self_attn.k_norm.weight": (C,),
            "post_attention_layernorm.weight": (D,),
        }
        if config.is_moe_layer(layer):
            block |= {
                "mlp.gate.weight": (E, D),
                "mlp.experts.gate_up_proj": (E, 2 * F, D),
                "mlp.experts.down_proj": (E, D, F),
            }
        else:
            block |= {
                "mlp.gate_proj.weight": (dense, D),
                "mlp.up_proj.weight": (dense, D),
                "mlp.down_proj.weight": (D, dense),
            }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Parameters stored, tied embeddings once.

    Args:
        config: the model.
        embeddings: False leaves out embedding and head, as the "non-embedding" figures of model cards do.
    """
    outside = () if embeddings else ("embed_tokens.weight", "lm_head.weight")
    return sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if name not in outside)


def active_parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Parameters that one token uses: K of E experts, everything else whole (3.3 B of Qwen3-30B-A3B)."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_moe_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return parameter_count(config, embeddings=embeddings) - idle


def _matmul_weights(config: ModelConfig, *, head: bool) -> int:
    """Active weights that a token is multiplied by: no embedding lookup, no norms."""
    D, C = config.hidden_size, config.head_dim
    norms = (2 * D + 2 * C) * config.num_hidden_layers + D
    return active_parameter_count(config, embeddings=False) - norms + (config.vocab_size * D if head else 0)


def _attention_flops(config: ModelConfig, document_length: float) -> float:
    """Forward FLOPs of q @ k and p @ v over one causal document, all layers."""
    keys_seen = document_length * (document_length + 1) / 2
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys_seen


def forward_flops(config: ModelConfig, document_lengths: Iterable[float], *, head_tokens: float | None = None) -> float:
    """FLOPs of one forward pass over packed documents that do not see each other.

    Args:
        config: the model. Dual chunk attention costs what plain causal attention does.
        document_lengths: tokens of each document.
        head_tokens: tokens that the head is applied to; null means all.
    """
    lengths = list(document_lengths)
    tokens = sum(lengths)
    head = 2.0 * config.vocab_size * config.hidden_size * (tokens if head_tokens is None else head_tokens)
    attention = sum(_attention_flops(config, length) for length in lengths)
    return 2.0 * _matmul_weights(config, head=False) * tokens + head + attention


def training_flops(
    config: ModelConfig, document_lengths: Iterable[float], *, head_tokens: float | None = None
) -> float:
    """FLOPs of forward and backward over packed documents; see ``forward_flops``."""
    return 3.0 * forward_flops(config, document_lengths, head_tokens=head_tokens)


def generation_flops(config: ModelConfig, prompt_length: float, completion_length: float) -> float:
    """FLOPs to read a prompt once and to sample a completion with a cache; the head runs on sampled tokens alone."""
    return forward_flops(config, [prompt_length + completion_length], head_tokens=completion_length)


def flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Training FLOPs (forward and backward) of an average token of a document of ``seq_len`` tokens.

    6 x active matrix weights (head included) + 6 L H C (seq_len + 1). With documents of unlike lengths use
    ``training_flops``: the longest ones dominate the attention term and an average length underestimates it.
    """
    return training_flops(config, [seq_len]) / seq_len if seq_len else 0.0

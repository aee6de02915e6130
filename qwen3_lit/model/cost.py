"""What a model costs, from its configuration alone: parameters, FLOPs and training memory. Pure functions, no torch.

Legend: D model width, H heads, G kv heads, C head width, E experts, K experts per token, F expert width, V vocabulary,
T tokens, L layers.

FLOPs are model FLOPs: a multiply-add counts two, backward costs twice forward, recomputation and padding are not
counted, and attention is counted causally, as (l + 1) / 2 keys for an average query of a document of l tokens
(arXiv 2204.02311, appendix B, with the causal half taken out). Norms, rotations and activations are left out: below
1 % at every published width.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Training memory of one rank in bytes, by part."""

    parameters: float
    """Master weights."""
    gradients: float
    """Gradients of the master weights."""
    optimizer_state: float
    """Moments."""
    working_weights: float
    """Weights gathered and cast for compute: what is alive at once."""
    activations: float
    """What autograd keeps of the blocks."""
    head: float
    """Logits of one chunk and the hidden states' gradient."""

    @property
    def total(self) -> float:
        """Sum of the parts; allocator overhead and communication buffers come on top (5 to 10 %)."""
        return sum(asdict(self).values())

    def describe(self) -> str:
        """One line a part, in GB."""
        rows = [*asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name.replace('_', ' '):<16} {value / 1e9:9.3f} GB" for name, value in rows)


def activation_bytes_per_token(config: ModelConfig, layer: int, *, compute_bytes: int = 2) -> float:
    """What autograd keeps of one token in block ``layer`` without recomputation, in bytes.

    Counts the inputs that each operation saves: both norms, the projections (sharing one input), q and k before and
    after norm and rotation, attention's output and its float32 logsumexp, router logits and probabilities in float32,
    the expert rows gathered, their gate, up and product, and the weighted output rows.
    """
    D, C, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * D + 2 * (H + G) * C + G * C + H * C
    if config.is_moe_layer(layer):
        K, F, E = config.num_experts_per_tok, config.moe_intermediate_size, config.num_experts
        feed_forward = 2 * D + K * (2 * D + 4 * F)
        routing = 4 * (2 * E + 2 * K) + 8 * 2 * K
    else:
        feed_forward = 2 * D + 4 * config.intermediate_size
        routing = 0
    return compute_bytes * (attention + feed_forward) + 4 * H + routing


def memory_estimate(
    config: ModelConfig,
    tokens: int,
    *,
    num_shards: int = 1,
    activation_checkpointing: bool = False,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    optimizer_bytes: int = 8,
    compute_bytes: int = 2,
    logits_per_chunk: int = 1 << 24,
) -> MemoryEstimate:
    """Training memory of one rank, for planning: expect it within a quarter of the measured peak.

    Args:
        config: the model.
        tokens: tokens of one micro batch on this rank.
        num_shards: ranks that weights, gradients and optimizer states are spread over (FSDP).
        activation_checkpointing: keep each block's input alone and one block's activations.
        weight_bytes, gradient_bytes: of one master weight and its gradient.
        optimizer_bytes: per weight; 8 for AdamW in float32.
        compute_bytes: of one element in the forward pass; 2 for bfloat16.
        logits_per_chunk: elements of logits alive at once in the losses.
    """
    parameters = parameter_count(config)
    layers = range(config.num_hidden_layers)
    kept = [tokens * activation_bytes_per_token(config, i, compute_bytes=compute_bytes) for i in layers]
    if activation_checkpointing:
        activations = tokens * config.hidden_size * compute_bytes * config.num_hidden_layers + max(kept)
    else:
        activations = sum(kept)
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"layers.{i}.")) for i in layers]
    working = 0.0 if compute_bytes == weight_bytes else float(compute_bytes * parameters)
    if num_shards > 1:
        # FSDP gathers the block at work and prefetches the next one; embedding and head stay gathered.
        outside = sum(n for name, n in sizes.items() if not name.startswith("layers."))
        working = float(compute_bytes * (2 * max(blocks) + outside))
    return MemoryEstimate(
        parameters=weight_bytes * parameters / num_shards,
        gradients=gradient_bytes * parameters / num_shards,
        optimizer_state=optimizer_bytes * parameters / num_shards,
        working_weights=working,
        activations=activations,
        head=2.0 * 4 * min(logits_per_chunk, tokens * config.vocab_size)
        + 2 * compute_bytes * tokens * config.hidden_size,
    )

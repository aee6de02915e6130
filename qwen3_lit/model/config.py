"""The shape of a Qwen3 model: one dataclass for the dense and the mixture-of-experts family.

The defaults are those of Qwen3-30B-A3B (Qwen3 Technical Report, arXiv 2505.09388, Tables 1 and 2, and the published
configuration). ``head_dim`` is a field of its own: it is 128 in every published size and is not hidden / heads.
"""

from dataclasses import dataclass, field, fields


def _require(condition: bool, name: str, seen: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: seen {seen!r}, expected {expected}")


@dataclass
class YarnConfig:
    """YaRN, yet another RoPE extension (arXiv 2309.00071), as transformers spells it."""

    factor: float
    """How many times the original context is stretched, at least 1."""
    original_max_position_embeddings: int
    """Context length in tokens that the model was trained at."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept as it is."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is divided by the factor."""
    attention_factor: float | None = None
    """Multiplies cos and sin; null means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the ramp's borders to whole frequencies, as the published models do."""

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "rope_scaling.factor", self.factor, "at least 1")
        _require(
            self.original_max_position_embeddings > 0,
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            "a positive number of tokens",
        )
        slow, fast = self.beta_slow, self.beta_fast
        _require(0 < slow <= fast, "rope_scaling.beta_slow", slow, f"between 0 and beta_fast = {fast}")
        factor = self.attention_factor
        _require(factor is None or factor > 0, "rope_scaling.attention_factor", factor, "a positive number or null")


@dataclass
class DualChunkConfig:
    """Dual chunk attention, DCA (arXiv 2402.17463); positions clamp to ``chunk_size`` as in the released code."""

    chunk_size: int
    """Largest relative position in tokens, at most the trained context."""
    local_size: int
    """Tokens before the current one whose distances stay exact across a chunk border; below chunk_size."""

    def __post_init__(self) -> None:
        _require(self.chunk_size > 1, "dual_chunk.chunk_size", self.chunk_size, "more than 1")
        _require(
            0 < self.local_size < self.chunk_size,
            "dual_chunk.local_size",
            self.local_size,
            f"between 1 and chunk_size - 1 = {self.chunk_size - 1}",
        )

    @property
    def chunk_len(self) -> int:
        """Tokens a chunk: chunk_size - local_size."""
        return self.chunk_size - self.local_size


@dataclass
class ModelConfig:
    """Dimensions and position encoding of a Qwen3 model."""

    vocab_size: int = 151936
    """Rows of the embedding, at least the tokenizer's length."""
    hidden_size: int = 2048
    """Model width D."""
    num_hidden_layers: int = 48
    """Transformer blocks."""
    num_attention_heads: int = 32
    """Query heads H."""
    num_key_value_heads: int = 4
    """Key and value heads G; divides num_attention_heads."""
    head_dim: int = 128
    """Width C of one head."""
    intermediate_size: int = 6144
    """Width of the dense feed-forward; used by dense models and by the dense layers of a MoE."""
    num_experts: int = 128
    """Experts E a MoE layer; 0 makes the model dense."""
    num_experts_per_tok: int = 8
    """Experts K a token is routed to."""
    moe_intermediate_size: int = 768
    """Width F of one expert."""
    norm_topk_prob: bool = True
    """Renormalise the K chosen probabilities to sum to one."""
    decoder_sparse_step: int = 1
    """Layer i is sparse when (i + 1) is a multiple of this."""
    mlp_only_layers: list[int] = field(default_factory=list)
    """Layers that stay dense."""
    rms_norm_eps: float = 1.0e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 1.0e6
    """RoPE base. Adjusted base frequency (ABF) raises it from 1e4 to 1e6 in the long-context stage."""
    rope_scaling: YarnConfig | None = None
    """YaRN, or null for plain RoPE."""
    dual_chunk: DualChunkConfig | None = None
    """Dual chunk attention, or null for plain causal attention."""
    max_position_embeddings: int = 32768
    """Longest context in tokens that the model claims to handle; written into exported configurations."""
    tie_word_embeddings: bool = False
    """Share the embedding with the head (0.6B, 1.7B and 4B do)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    attention_backend: str = "auto"
    """flash, triton, sdpa or auto (the fastest that fits)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "moe_intermediate_size",
            "decoder_sparse_step",
            "max_position_embeddings",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, as RoPE rotates pairs")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        _require(self.num_experts >= 0, "num_experts", self.num_experts, "0 (dense) or more")
        if self.num_experts:
            _require(
                1 <= self.num_experts_per_tok <= self.num_experts,
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"between 1 and num_experts = {self.num_experts}",
            )
        last = self.num_hidden_layers - 1
        for layer in self.mlp_only_layers:
            _require(0 <= layer <= last, "mlp_only_layers", self.mlp_only_layers, f"layers between 0 and {last}")
        _require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "a positive number")
        _require(self.initializer_range >= 0, "initializer_range", self.initializer_range, "0 or more")
        _require(self.rope_theta > 1, "rope_theta", self.rope_theta, "more than 1")
        _require(
            self.attention_backend in ("auto", "flash", "triton", "sdpa"),
            "attention_backend",
            self.attention_backend,
            "auto, flash, triton or sdpa",
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` routes to experts (transformers' rule)."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """How many blocks route to experts."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))


POSITION_FIELDS = ("rope_theta", "rope_scaling", "dual_chunk", "max_position_embeddings", "attention_backend")
"""Fields that a later phase may change without touching a weight."""


def dimension_mismatches(seen: ModelConfig, expected: ModelConfig) -> list[str]:
    """The fields that fix weight shapes or routing and differ, as ``name: seen a, expected b``."""
    ignored = {*POSITION_FIELDS, "initializer_range"}
    if not (seen.num_experts or expected.num_experts):
        ignored |= {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}
        ignored |= {"mlp_only_layers"}
    elif seen.num_moe_layers == seen.num_hidden_layers:
        ignored |= {"intermediate_size"}
    return [
        f"{f.name}: seen {getattr(seen, f.name)}, expected {getattr(expected, f.name)}"
        for f in fields(ModelConfig)
        if f.name not in ignored and getattr(seen, f.name) != getattr(expected, f.name)
    ]

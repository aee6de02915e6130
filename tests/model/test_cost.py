"""Costs against torch's own counts and the published totals."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.cost import (
    active_parameter_count,
    flops_per_token,
    forward_flops,
    generation_flops,
    parameter_count,
    parameter_shapes,
    training_flops,
)
from qwen3_lit.model.transformer import Qwen3

TINY = ModelConfig(
    vocab_size=160,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)
VARIANTS = {
    "moe": TINY,
    "dense_tied": dataclasses.replace(TINY, num_experts=0, tie_word_embeddings=True),
    "mixed": dataclasses.replace(TINY, mlp_only_layers=[1], decoder_sparse_step=1, tie_word_embeddings=True),
    "sparse_step": dataclasses.replace(TINY, decoder_sparse_step=2),
}


def dense(layers: int, heads: int, groups: int, hidden: int, width: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        num_experts=0,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        hidden_size=hidden,
        intermediate_size=width,
        tie_word_embeddings=tied,
    )


LARGE_MOE = ModelConfig(
    num_hidden_layers=94, num_attention_heads=64, hidden_size=4096, moe_intermediate_size=1536, intermediate_size=12288
)
PUBLISHED = [
    # name, config, total, without embeddings, active; billions as on the model cards
    ("0.6B", dense(28, 16, 8, 1024, 3072, True), 0.596, 0.44, 0.596),
    ("1.7B", dense(28, 16, 8, 2048, 6144, True), 1.72, 1.41, 1.72),
    ("4B", dense(36, 32, 8, 2560, 9728, True), 4.02, 3.63, 4.02),
    ("8B", dense(36, 32, 8, 4096, 12288, False), 8.19, 6.95, 8.19),
    ("14B", dense(40, 40, 8, 5120, 17408, False), 14.77, 13.21, 14.77),
    ("32B", dense(64, 64, 8, 5120, 25600, False), 32.76, 31.21, 32.76),
    ("30B-A3B", ModelConfig(), 30.53, 29.91, 3.35),
    ("235B-A22B", LARGE_MOE, 235.09, 233.85, 22.19),
]


@pytest.mark.parametrize(("name", "config", "total", "inner", "active"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_counts_are_those_of_the_published_models(
    name: str, config: ModelConfig, total: float, inner: float, active: float
) -> None:
    def agrees(count: int, billions: float) -> bool:
        digits = len(str(billions).partition(".")[2])
        return abs(count / 1e9 - billions) <= 0.5 * 10**-digits + 1e-9

    assert agrees(parameter_count(config), total)
    assert agrees(parameter_count(config, embeddings=False), inner)
    assert agrees(active_parameter_count(config), active)


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = Qwen3(VARIANTS[name])
    shapes = parameter_shapes(VARIANTS[name])
    assert shapes == {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert set(shapes) == set(model.state_dict())
    assert parameter_count(VARIANTS[name]) == sum(p.numel() for p in model.parameters())


def test_only_the_idle_experts_are_inactive() -> None:
    expert = 3 * TINY.hidden_size * TINY.moe_intermediate_size
    assert parameter_count(TINY) - active_parameter_count(TINY) == 3 * (8 - 2) * expert
    step = VARIANTS["sparse_step"]
    assert parameter_count(step) - active_parameter_count(step) == 1 * (8 - 2) * expert


def test_flops_equal_the_figure_that_frameworks_quote_for_30b_a3b() -> None:
    """277 TFLOP/s at 12,040 tokens/s, 206 at 8,960 and 666 at 28,934 per GPU all mean 23.0 GFLOP a token at 4,096."""
    assert flops_per_token(ModelConfig(), 4096) == pytest.approx(23.0e9, rel=0.005)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_backward_flops_equal_torch_count(name: str) -> None:
    """Everything but attention is counted by torch; causal attention is half of what torch counts, and a diagonal."""
    config, length = VARIANTS[name], 64
    model = Qwen3(config)
    ids_T, positions_T = torch.arange(length) % config.vocab_size, torch.arange(length)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        hidden_TD = model(ids_T, positions_T, bounds, length).hidden_TD
        (hidden_TD @ model.lm_head_weight.t()).sum().backward()
    ops = counter.get_flop_counts()["Global"]
    matmuls = sum(count for op, count in ops.items() if "attention" not in str(op))
    attention = (
        3 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length * (length + 1) / 2
    )
    assert training_flops(config, [length]) == pytest.approx(matmuls + attention, rel=1e-9)


def test_packed_documents_cost_their_own_attention_only() -> None:
    lengths = [5, 100, 395]
    apart = sum(training_flops(TINY, [length]) for length in lengths)
    assert training_flops(TINY, lengths) == pytest.approx(apart)
    assert training_flops(TINY, lengths) < training_flops(TINY, [500])
    keys = sum(length * (length + 1) / 2 for length in lengths)
    # The slope in keys seen: 12 FLOPs a key, head and channel, forward and backward.
    slope = 12 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim
    difference = training_flops(TINY, [500]) - training_flops(TINY, lengths)
    assert difference == pytest.approx(slope * (500 * 501 / 2 - keys))
    assert flops_per_token(TINY, 500) * 500 == pytest.approx(training_flops(TINY, [500]))
    assert training_flops(TINY, []) == 0


def test_generation_reads_the_prompt_once_and_heads_only_what_it_samples() -> None:
    assert generation_flops(TINY, 30, 10) == pytest.approx(forward_flops(TINY, [40], head_tokens=10))
    assert forward_flops(TINY, [40]) - forward_flops(TINY, [40], head_tokens=10) == pytest.approx(
        2 * 30 * TINY.vocab_size * TINY.hidden_size
    )

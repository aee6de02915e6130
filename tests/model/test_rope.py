"""Rotary frequencies against transformers, and their precision under a cast of the model."""

import pytest
import torch

from qwen3_lit.model.config import ModelConfig, YarnConfig
from qwen3_lit.model.rope import rope_frequencies
from qwen3_lit.model.transformer import Qwen3


def test_yarn_equals_the_published_figures_of_qwen3():
    config = ModelConfig(rope_theta=1e6, rope_scaling=YarnConfig(4.0, 32768))
    inv_freq_R, factor = rope_frequencies(config)
    plain_R, one = rope_frequencies(ModelConfig(rope_theta=1e6))
    assert one == 1.0 and factor == pytest.approx(1.1386, abs=1e-4)
    assert torch.equal(inv_freq_R[:24], plain_R[:24])  # the ramp starts at 23 and ends at 40 for Qwen3
    torch.testing.assert_close(inv_freq_R[40:], plain_R[40:] / 4)
    assert (inv_freq_R[24:40] < plain_R[24:40]).all() and (inv_freq_R[24:40] > plain_R[24:40] / 4).all()


def test_a_cast_of_the_model_leaves_the_frequencies_in_float32():
    config = ModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config.num_experts = 0
    model = Qwen3(config).bfloat16()
    assert model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.rope.inv_freq_R, rope_frequencies(config)[0])

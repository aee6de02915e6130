"""Logits and every gradient against transformers' Qwen3 classes, in float32 on random weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from qwen3_lit.model.config import ModelConfig, YarnConfig
from qwen3_lit.model.hf_checkpoint import load_hf, save_hf
from qwen3_lit.model.hf_config import hf_config_dict
from qwen3_lit.model.transformer import Qwen3

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    rope_theta=10000.0,
    max_position_embeddings=256,
)
DENSE = dataclasses.replace(BASE, num_experts=0, num_experts_per_tok=8, moe_intermediate_size=768)
YARN = {"rope_scaling": YarnConfig(4.0, 64), "max_position_embeddings": 256}

CASES: dict[str, ModelConfig] = {
    "moe": BASE,
    "dense": DENSE,
    "head_dim_unlike_hidden_over_heads": dataclasses.replace(BASE, head_dim=20),
    "dense_head_dim_unlike_hidden_over_heads": dataclasses.replace(DENSE, head_dim=6),
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "dense_tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "mlp_only_layers": dataclasses.replace(BASE, mlp_only_layers=[0, 2]),
    "decoder_sparse_step_2": dataclasses.replace(BASE, decoder_sparse_step=2),
    "norm_topk_prob_off": dataclasses.replace(BASE, norm_topk_prob=False),
    "yarn": dataclasses.replace(BASE, **YARN),
    "dense_yarn": dataclasses.replace(DENSE, **YARN),
    "yarn_all_fields": dataclasses.replace(
        BASE, rope_scaling=YarnConfig(8.0, 32, 16.0, 2.0, 1.3, truncate=False), max_position_embeddings=256
    ),
    "one_expert": dataclasses.replace(BASE, num_experts=1, num_experts_per_tok=1),
    "top_1": dataclasses.replace(BASE, num_experts_per_tok=1),
    "top_1_norm_off": dataclasses.replace(BASE, num_experts_per_tok=1, norm_topk_prob=False),
    "all_experts": dataclasses.replace(BASE, num_experts_per_tok=8),
    "gqa_ratio_1": dataclasses.replace(BASE, num_key_value_heads=4),
    "gqa_ratio_8": dataclasses.replace(BASE, num_attention_heads=8, num_key_value_heads=1),
    "dense_gqa_ratio_8": dataclasses.replace(DENSE, num_attention_heads=8, num_key_value_heads=1),
    "base_1e6_and_eps": dataclasses.replace(BASE, rope_theta=1e6, rms_norm_eps=1e-3),
}
DOCUMENTS = [13, 1, 30, 7]


def peer(config: ModelConfig) -> transformers.PreTrainedModel:
    """transformers' model of the same configuration with weights large enough that every part of it shows."""
    torch.manual_seed(7)
    settings = hf_config_dict(config, "float32")
    kind = transformers.Qwen3MoeConfig if config.num_experts else transformers.Qwen3Config
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings), attn_implementation="eager")
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model.float().eval()


def tokens(config: ModelConfig, length: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(3))


def ours_from(model: transformers.PreTrainedModel, config: ModelConfig) -> Qwen3:
    """The same weights, renamed: parameter names and shapes must be transformers' own, without conversion."""
    ours = Qwen3(config)
    state = {name.removeprefix("model."): value.clone() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    ours.load_state_dict(state)
    return ours


def packed_logits(model: Qwen3, token_ids_T: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    hidden_TD = model(token_ids_T, positions_T, bounds.int(), max(lengths)).hidden_TD
    return hidden_TD @ model.lm_head_weight.t()


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_and_gradients_equal_transformers_document_by_document(name: str) -> None:
    config = CASES[name]
    theirs = peer(config)
    ours = ours_from(theirs, config)
    ids_T = tokens(config, sum(DOCUMENTS))

    logits_TV = packed_logits(ours, ids_T, DOCUMENTS)
    expected_TV = torch.cat([theirs(document[None]).logits[0] for document in ids_T.split(DOCUMENTS)])
    assert expected_TV.std() > 0.1, "the comparison would be empty on vanishing logits"
    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)

    targets_T = tokens(config, sum(DOCUMENTS)).flip(0)
    F.cross_entropy(logits_TV, targets_T).backward()
    F.cross_entropy(expected_TV, targets_T).backward()
    gradients = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    # A renormalised top-1 weight is exactly 1, so its router's gradient is rounding noise around 0.
    floor = 1e-4 * max(gradient.norm() for gradient in gradients.values())
    for parameter_name, parameter in ours.named_parameters():
        expected = gradients.pop(parameter_name)
        assert parameter.grad is not None, parameter_name
        error = (parameter.grad - expected).norm() / expected.norm().clamp(min=floor)
        assert error < 1e-4, f"{parameter_name}: relative error {error:.2e}"
    assert not gradients


@pytest.mark.parametrize("length", [1, 2, 63, 129])
def test_odd_lengths(length: int) -> None:
    theirs = peer(BASE)
    ids_T = tokens(BASE, length)
    with torch.no_grad():
        logits_TV = packed_logits(ours_from(theirs, BASE), ids_T, [length])
        torch.testing.assert_close(logits_TV, theirs(ids_T[None]).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["moe", "dense_tied", "mlp_only_layers", "yarn_all_fields"])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_transformers_loads_our_folder(name: str, layout: str, tmp_path) -> None:
    config = CASES[name]
    ours = ours_from(peer(config), config)
    save_hf(ours, config, tmp_path / "hf", layout=layout, max_shard_bytes=20_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids_T = tokens(config, 40)
    with torch.no_grad():
        expected_TV = theirs(ids_T[None]).logits[0]
        torch.testing.assert_close(packed_logits(ours, ids_T, [40]), expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["moe", "dense_tied", "decoder_sparse_step_2", "yarn"])
@pytest.mark.parametrize("original_format", [True, False])
def test_we_load_the_folder_that_transformers_saves(name: str, original_format: bool, tmp_path) -> None:
    config = CASES[name]
    theirs = peer(config)
    theirs.save_pretrained(tmp_path, save_original_format=original_format, max_shard_size="30KB")
    ours = load_hf(tmp_path)
    assert ours.config == config
    ids_T = tokens(config, 40)
    with torch.no_grad():
        expected_TV = theirs(ids_T[None]).logits[0]
        torch.testing.assert_close(packed_logits(ours, ids_T, [40]), expected_TV, rtol=0, atol=1e-4)


def test_router_stays_in_float32_and_close_to_transformers_in_bfloat16() -> None:
    config = dataclasses.replace(BASE, moe_intermediate_size=16)  # their grouped product asks for multiples of 8
    theirs = peer(config)
    ours = ours_from(theirs, config).bfloat16()
    ids_T = tokens(config, 60)
    with torch.no_grad():
        exact_TV = theirs(ids_T[None]).logits[0]
        ours_TV = packed_logits(ours, ids_T, [60]).float()
        theirs_TV = theirs.bfloat16()(ids_T[None]).logits[0].float()
    ours_error, their_error = ((x - exact_TV).norm() / exact_TV.norm() for x in (ours_TV, theirs_TV))
    assert ours_error < max(0.03, 1.5 * their_error)

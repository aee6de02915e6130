"""Which parameter lands where, hyper-parameters that cannot be, and the default optimizer."""

import pytest
import torch
from torch import nn

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.optim.optimizer import build_optimizer
from qwen3_lit.optim.param_groups import OptimizerConfig, build_param_groups, describe_groups, group_of


def small_model(tied: bool = False) -> Qwen3:
    return Qwen3(
        ModelConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            mlp_only_layers=[1],
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("embed_tokens.weight", (8, 4), "embedding"),
        ("lm_head.weight", (8, 4), "embedding"),
        ("layers.0.self_attn.q_proj.weight", (8, 4), "matrix"),
        ("layers.0.self_attn.q_norm.weight", (4,), "no_decay"),
        ("layers.0.mlp.gate.weight", (8, 4), "router"),
        ("layers.0.mlp.gate_proj.weight", (8, 4), "matrix"),
        ("layers.0.mlp.experts.gate_up_proj", (2, 8, 4), "matrix"),
        ("score.bias", (4,), "no_decay"),
    ],
)
def test_rules(name: str, shape: tuple[int, ...], group: str) -> None:
    assert group_of(name, torch.empty(shape)) == group


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_once_with_its_own_settings(tied: bool) -> None:
    model = small_model(tied)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.3, router_lr_scale=0.5, embedding_lr_scale=2.0)
    groups = {group.name: group for group in build_param_groups(model, config)}
    ids = [id(parameter) for group in groups.values() for parameter in group.parameters]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert groups["matrix"].weight_decay == groups["router"].weight_decay == 0.3
    assert groups["embedding"].weight_decay == groups["no_decay"].weight_decay == 0.0
    assert groups["router"].names == ("layers.0.mlp.gate.weight",)
    assert ("lm_head.weight" in groups["embedding"].names) is not tied
    by_name = {group["name"]: group["lr"] for group in build_optimizer(model, config).param_groups}
    assert by_name["router"] == pytest.approx(0.005) and by_name["embedding"] == pytest.approx(0.02)
    table = describe_groups(groups.values(), config.learning_rate)
    assert len(table.splitlines()) == 1 + len(groups) and "0.005" in table


def test_frozen_parameters_are_left_out_and_an_all_frozen_model_is_refused() -> None:
    model = small_model()
    model.embed_tokens.requires_grad_(False)
    groups = {group.name: group for group in build_param_groups(model, OptimizerConfig(decay_embeddings=True))}
    assert groups["embedding"].names == ("lm_head.weight",) and groups["embedding"].weight_decay == 0.1
    with pytest.raises(UserError, match="no trainable parameter"):
        build_param_groups(model.requires_grad_(False), OptimizerConfig())


def test_default_is_fused_adamw_equal_to_the_plain_one() -> None:
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(model.state_dict())
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    plain = torch.optim.AdamW(
        [{"params": [reference.weight], "weight_decay": 0.2}, {"params": [reference.bias], "weight_decay": 0.0}],
        lr=0.05,
        betas=config.betas,
    )
    for _ in range(3):
        x = torch.randn(5, 4)
        for module, steps in ((model, optimizer), (reference, plain)):
            steps.zero_grad()
            module(x).square().sum().backward()
            steps.step()
    torch.testing.assert_close(model.weight, reference.weight)
    torch.testing.assert_close(model.bias, reference.bias)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("grad_clip_norm", 0.0),
        ("router_lr_scale", -1.0),
    ],
)
def test_bad_hyper_parameters_name_the_field(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"optimizer.{field}: got"):
        OptimizerConfig(**{field: value})


def test_recipe_form_parses_with_a_factory_by_class_path() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerConfig, default=OptimizerConfig())
    assert parser.instantiate(parser.parse_args([])).optimizer.factory is None
    arguments = ["--optimizer.learning_rate=0.1", "--optimizer.factory=qwen3_lit.optim.muon.MuonFactory"]
    config = parser.instantiate(parser.parse_args(arguments)).optimizer
    assert config.learning_rate == 0.1 and type(config.factory).__name__ == "MuonFactory"

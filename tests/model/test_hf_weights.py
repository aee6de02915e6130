"""Every folder that ``load_hf`` refuses: one line that names the file, the key and the fix."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig, YarnConfig
from qwen3_lit.model.hf_checkpoint import load_hf, save_hf
from qwen3_lit.model.hf_config import hf_config_dict, read_hf_config
from qwen3_lit.model.transformer import Qwen3

MOE = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=20,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    mlp_only_layers=[0],
    rope_theta=12345.0,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
)


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; ``...`` removes one."""
    content = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(Qwen3(MOE), MOE, tmp_path / "hf", layout="v4")
    return tmp_path / "hf"


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_hf(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.001, 0.0])
def test_truncated_weights(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * kept))
    assert_refused(folder, "model.safetensors", "truncated")


def test_truncation_names_the_first_key_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert_refused(folder, "lm_head.weight is cut off", f"expected {file.stat().st_size + 1}")


def test_missing_key(folder: Path) -> None:
    rewrite(folder, **{"model.layers.1.mlp.experts.2.up_proj.weight": None})
    assert_refused(folder, str(folder), "model.layers.1.mlp.experts.2.up_proj.weight is missing")


def test_missing_head_points_at_tying(folder: Path) -> None:
    rewrite(folder, **{"lm_head.weight": None})
    assert_refused(folder, "lm_head.weight is missing", "tie_word_embeddings")


def test_unexpected_key(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)})
    assert_refused(folder, "model.safetensors", "model.layers.0.self_attn.q_proj.bias is unexpected")


def test_old_rotary_buffers_are_no_weights(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)})
    assert load_hf(folder).config == MOE


def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.zeros(17)})
    assert_refused(folder, "model.safetensors", "model.norm.weight", "[17]", "[16]")


def test_quantized_tensor(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.zeros(16, dtype=torch.int8)})
    assert_refused(folder, "model.norm.weight", "I8", "quantized")


def test_experts_of_several_types_keep_every_bit(folder: Path) -> None:
    key = "model.layers.1.mlp.experts.{}.down_proj.weight"
    torch.manual_seed(0)
    experts = [torch.randn(16, 8).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    rewrite(folder, **{key.format(expert): value for expert, value in enumerate(experts)})
    loaded = load_hf(folder).layers[1].mlp.experts.down_proj
    assert loaded.dtype == torch.float32
    for expert, value in enumerate(experts):
        assert torch.equal(loaded[expert], value.float()), expert
    rewrite(folder, **{key.format(expert): experts[0].clone() for expert in range(4)})
    assert load_hf(folder).layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def test_fewer_layers_in_the_config_than_in_the_weights(folder: Path) -> None:
    edit(folder, num_hidden_layers=1)
    assert_refused(folder, "model.layers.1.", "is unexpected", "more)")


def test_tied_config_with_another_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    assert_refused(folder, "lm_head.weight differs", "tie_word_embeddings")
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert load_hf(folder).config.tie_word_embeddings


def test_shard_that_the_index_names_is_missing_or_lacks_its_key(tmp_path: Path) -> None:
    save_hf(Qwen3(MOE), MOE, tmp_path, max_shard_bytes=4000)
    index_file = tmp_path / "model.safetensors.index.json"
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    index = json.loads(index_file.read_text())
    moved = dict(index["weight_map"], **{"model.embed_tokens.weight": last.name})
    index_file.write_text(json.dumps({**index, "weight_map": moved}))
    assert_refused(tmp_path, last.name, "model.embed_tokens.weight is missing")
    index_file.write_text(json.dumps(index))
    last.unlink()
    assert_refused(tmp_path, last.name, "missing")
    index_file.write_text('{"weight_map": ')
    assert_refused(tmp_path, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("seen", ["qwen2", "qwen2_moe", "llama", "qwen3_next"])
def test_other_architectures(folder: Path, seen: str) -> None:
    edit(folder, model_type=seen)
    assert_refused(folder, "config.json", f"'{seen}'", "qwen3 or qwen3_moe")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": ...}, ("no model_type",)),
        ({"hidden_size": ...}, ("hidden_size", "null")),
        ({"num_attention_heads": "4"}, ("num_attention_heads", '"4"')),
        ({"num_experts": ..., "num_local_experts": ...}, ("num_experts", "missing")),
        ({"num_local_experts": 8}, ("num_experts = 4", "num_local_experts = 8", "disagree")),
        ({"rope_theta": 1e6}, ("rope_theta", "rope_parameters.rope_theta", "disagree")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_scaling", "rope_parameters", "disagree")),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling", "'linear'")),
        ({"attention_bias": True}, ("attention_bias", "True")),
        ({"use_sliding_window": True}, ("use_sliding_window",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types[1]", "sliding_attention")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok", "9")),
        ({"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}, ("dual_chunk", "local_size")),
    ],
)
def test_configs_that_do_not_fit(folder: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    edit(folder, **changes)
    assert_refused(folder, "config.json", *parts)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", ["qwen3"]),
        ("num_attention_heads", 0),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", float("nan")),
        ("initializer_range", [0.02]),
        pytest.param("initializer_range", 10**400, id="initializer_range-10**400"),
        ("tie_word_embeddings", "false"),
        ("norm_topk_prob", "false"),
        ("norm_topk_prob", 1),
        ("max_position_embeddings", 4096.5),
        ("decoder_sparse_step", "1"),
        ("mlp_only_layers", 5),
        ("mlp_only_layers", [99]),
        ("mlp_only_layers", ["0"]),
        ("layer_types", 5),
        ("num_experts", [1]),
        ("num_experts", "4"),
        ("attention_dropout", 0.1),
        ("rope_theta", "a"),
        ("rope_scaling", "yarn"),
        ("rope_parameters", "x"),
        ("rope_scaling.rope_type", ["yarn"]),
        ("rope_scaling.factor", "x"),
        ("rope_scaling.factor", 0),
        ("rope_scaling.original_max_position_embeddings", 0),
        ("rope_scaling.attention_factor", "1.2"),
        ("rope_scaling.attention_factor", -1),
        ("rope_scaling.beta_slow", 0),
        ("rope_scaling.mscale", "x"),
        ("rope_scaling.partial_rotary_factor", "x"),
        ("rope_scaling.truncate", "false"),
        ("dual_chunk_attention_config", [8192]),
        ("dual_chunk_attention_config.chunk_size", "8192"),
        ("dual_chunk_attention_config.chunk_size", 8192.5),
    ],
)
def test_config_fields_of_another_type_or_out_of_range(folder: Path, field: str, value: Any) -> None:
    block, _, key = field.rpartition(".")
    if block == "rope_scaling":
        edit(folder, rope_parameters=..., rope_scaling={**YARN, key: value})
    elif block:
        edit(folder, **{block: {key: value}})
    else:
        edit(folder, num_local_experts=..., head_dim=..., **{field: value})
    assert_refused(folder, "config.json: ", key)


def test_a_null_in_the_config_means_the_default(folder: Path) -> None:
    optional = ("initializer_range", "tie_word_embeddings", "max_position_embeddings", "decoder_sparse_step")
    optional += ("mlp_only_layers", "norm_topk_prob", "rms_norm_eps", "attention_dropout", "intermediate_size")
    edit(folder, **dict.fromkeys(optional))
    filled = read_hf_config(folder)
    edit(folder, **dict.fromkeys(optional, ...))
    assert read_hf_config(folder) == filled
    assert (filled.rms_norm_eps, filled.max_position_embeddings, filled.norm_topk_prob) == (1e-6, 32768, False)
    yarn = {"rope_type": "yarn", **dict.fromkeys(("factor", "beta_fast", "truncate", "attention_factor"))}
    edit(folder, rope_parameters=..., rope_scaling={**yarn, "original_max_position_embeddings": 16384})
    assert read_hf_config(folder).rope_scaling == YarnConfig(2.0, 16384)


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere", "no such folder")
    assert_refused(tmp_path, "config.json", "missing")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert_refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    assert_refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    assert_refused(tmp_path, "config.json", "list")
    (tmp_path / "config.json").write_text(json.dumps(hf_config_dict(MOE)))
    assert_refused(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_refused(tmp_path, "save_pretrained")

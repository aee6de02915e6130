"""``config.json`` of a Hugging Face folder <-> ``ModelConfig``.

transformers 4 and 5 spell the same things differently (num_experts and num_local_experts, rope_theta with rope_scaling
and rope_parameters, torch_dtype and dtype), and each silently falls back to a default where it meets the other's
spelling. Reading accepts both and refuses a file whose two spellings disagree; writing states both.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import DualChunkConfig, ModelConfig, YarnConfig
from qwen3_lit.model.folder_swap import recover

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

_DIMENSIONS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_MOE_DIMENSIONS = ("num_experts_per_tok", "moe_intermediate_size")
_UNSUPPORTED = {
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
"""Fields of a Qwen3 configuration that this model knows one value of."""


def config_path(path: str | Path) -> Path:
    """The config.json that ``path``, a folder or the file itself, means.

    Raises UserError when there is none.
    """
    path = Path(path)
    recover(path)
    file = path if path.suffix == ".json" else path / CONFIG_FILE
    if not file.is_file():
        hint = "expected a Hugging Face checkpoint folder" if path.is_dir() else "no such folder"
        raise UserError(
            f"{file}: missing; {hint}. `hf download Qwen/Qwen3-0.6B --local-dir DIR` makes one of a published model"
        )
    return file


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The raw content of a config.json. Raises UserError when it is missing or no JSON object."""
    file = config_path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}; copy or download the file again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: seen a JSON {type(raw).__name__}, expected an object with model_type")
    return raw


def read_hf_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a Hugging Face folder (or of one config.json).

    Args:
        path: the folder.
        overrides: fields of ``ModelConfig`` that win over the file; nested blocks may be dicts.

    Raises:
        UserError: no config.json, another architecture, a missing or contradictory field.
    """
    file = config_path(path)
    fields = _config_fields(read_config_json(file), file)
    return model_config_from({**fields, **(overrides or {})}, str(file))


def model_config_from(values: Mapping[str, Any] | ModelConfig, where: str) -> ModelConfig:
    """A ``ModelConfig`` from plain values such as a recipe's or a checkpoint's. UserError names ``where``."""
    if isinstance(values, ModelConfig):
        return dataclasses.replace(values)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{where}: seen {unknown[0]!r}, expected a field of the model: {', '.join(sorted(known))}")
    values = dict(values)
    for name, block in (("rope_scaling", YarnConfig), ("dual_chunk", DualChunkConfig)):
        if isinstance(values.get(name), Mapping):
            values[name] = _checked(block, values[name], where)
    return _checked(ModelConfig, values, where)


def _checked(kind: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _config_fields(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        seen = "no model_type" if model_type is None else f"model_type {model_type!r}"
        raise UserError(
            f"{file}: seen {seen}, expected qwen3 or qwen3_moe; only Qwen3 dense and mixture-of-experts "
            "checkpoints can be loaded"
        )
    for key, supported in _UNSUPPORTED.items():
        if raw.get(key, supported) not in (supported, None):
            raise UserError(f"{file}: {key}: seen {raw[key]!r}, expected {supported!r}; this variant is not supported")
    for index, kind in enumerate(raw.get("layer_types") or ()):
        if kind != "full_attention":
            raise UserError(f"{file}: layer_types[{index}]: seen {kind!r}, expected 'full_attention'")

    def needed(key: str) -> int:
        value = raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{file}: {key}: seen {json.dumps(value)}, expected a whole number")
        return value

    fields: dict[str, Any] = {key: needed(key) for key in _DIMENSIONS}
    fields["head_dim"] = needed("head_dim") if raw.get("head_dim") is not None else _default_head_dim(raw, file)
    fields["rms_norm_eps"] = float(raw.get("rms_norm_eps", 1e-6))
    fields["initializer_range"] = float(raw.get("initializer_range", 0.02))
    fields["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    fields["max_position_embeddings"] = int(raw.get("max_position_embeddings", 32768))
    if model_type == "qwen3":
        fields |= {"num_experts": 0, "intermediate_size": needed("intermediate_size")}
    else:
        fields |= {key: needed(key) for key in _MOE_DIMENSIONS}
        fields["num_experts"] = _same_number(raw, ("num_experts", "num_local_experts"), file)
        if raw.get("intermediate_size") is not None:
            fields["intermediate_size"] = needed("intermediate_size")
        fields["decoder_sparse_step"] = int(raw.get("decoder_sparse_step", 1))
        fields["mlp_only_layers"] = [int(layer) for layer in raw.get("mlp_only_layers") or ()]
        if "norm_topk_prob" not in raw:
            logger.warning("%s: norm_topk_prob is missing and taken as false, transformers' default", file)
        fields["norm_topk_prob"] = bool(raw.get("norm_topk_prob", False))
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(raw, file, fields["max_position_embeddings"])
    fields["dual_chunk"] = _read_dual_chunk(raw.get("dual_chunk_attention_config"), file)
    return fields


def _default_head_dim(raw: dict[str, Any], file: Path) -> int:
    """transformers' rule: 128 for the dense class, hidden / heads for the mixture of experts."""
    head_dim = 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // raw["num_attention_heads"]
    logger.warning("%s: head_dim is missing and taken as %d, transformers' default", file, head_dim)
    return head_dim


def _same_number(raw: dict[str, Any], keys: tuple[str, ...], file: Path) -> int:
    found = {key: raw[key] for key in keys if raw.get(key) is not None}
    if not found:
        raise UserError(f"{file}: {keys[0]}: missing, expected a whole number")
    if len(set(found.values())) > 1:
        raise UserError(f"{file}: {_spelled(found)} disagree; old and new transformers would load different models")
    value = next(iter(found.values()))
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{file}: {next(iter(found))}: seen {value!r}, expected a whole number of at least 1")
    return value


def _spelled(found: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} = {json.dumps(value)}" for key, value in found.items())


def _read_rope(raw: dict[str, Any], file: Path, max_positions: int) -> tuple[float, YarnConfig | None]:
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    bases = {
        key: float(value)
        for key, value in (
            ("rope_theta", raw.get("rope_theta")),
            ("rope_parameters.rope_theta", new.get("rope_theta")),
            ("rope_scaling.rope_theta", old.get("rope_theta")),
        )
        if value is not None
    }
    if len(set(bases.values())) > 1:
        raise UserError(f"{file}: {_spelled(bases)} disagree; keep one value")
    if not bases:
        logger.warning("%s: rope_theta is missing and taken as 10000, transformers' default", file)
    base = next(iter(bases.values()), 10000.0)
    blocks = {
        name: _read_yarn(block, f"{file}: {name}", max_positions)
        for name, block in (("rope_scaling", old), ("rope_parameters", new))
        if block
    }
    # A file in the new spelling alone has no rope_scaling; a null there says nothing.
    if len(blocks) == 2 and blocks["rope_scaling"] != blocks["rope_parameters"]:
        raise UserError(
            f"{file}: rope_scaling and rope_parameters disagree; old and new transformers would load different models: "
            "make them equal or delete one"
        )
    return base, next(iter(blocks.values()), None)


def _read_yarn(block: Any, where: str, max_positions: int) -> YarnConfig | None:
    if not isinstance(block, dict):
        raise UserError(f"{where}: seen {block!r}, expected an object with rope_type")
    kind = block.get("rope_type", block.get("type", "default"))
    if float(block.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}.partial_rotary_factor: seen {block['partial_rotary_factor']}, expected 1.0")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"{where}.rope_type: seen {kind!r}, expected 'default' or 'yarn'; remove the block or use YaRN")
    original = int(block.get("original_max_position_embeddings") or max_positions)
    factor = float(block.get("factor") or max_positions / original)
    attention_factor = block.get("attention_factor")
    mscale, mscale_all = block.get("mscale"), block.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all and factor > 1:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    values = {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": float(block.get("beta_fast") or 32),
        "beta_slow": float(block.get("beta_slow") or 1),
        "attention_factor": attention_factor,
        "truncate": bool(block.get("truncate", True)),
    }
    return _checked(YarnConfig, values, where)


def _read_dual_chunk(block: Any, file: Path) -> DualChunkConfig | None:
    if not block:
        return None
    where = f"{file}: dual_chunk_attention_config"
    if not isinstance(block, dict):
        raise UserError(f"{where}: seen {block!r}, expected an object with chunk_size and local_size")
    # Length temperature and sparse attention are inference options of vLLM's former backend.
    ignored = [key for key in ("original_max_position_embeddings", "sparse_attention_enabled") if block.get(key)]
    if ignored:
        logger.warning("%s: %s not applied: dual chunk attention is computed exactly", where, " and ".join(ignored))
    values = {"chunk_size": block.get("chunk_size", 8192), "local_size": block.get("local_size", 1024)}
    return _checked(DualChunkConfig, values, where)


def hf_config_dict(
    config: ModelConfig, dtype: str = "bfloat16", special_token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What goes into config.json, in both spellings.

    Args:
        config: the model. With YaRN ``max_position_embeddings`` is written as factor * original length, because
            transformers warns about, and servers cut at, any other value.
        dtype: the weights' type as torch names it.
        special_token_ids: bos_token_id, eos_token_id and pad_token_id, where a tokenizer is known.
    """
    moe = config.num_experts > 0
    model_type = "qwen3_moe" if moe else "qwen3"
    rope: dict[str, Any] = {"rope_type": "default"}
    max_positions = config.max_position_embeddings
    if config.rope_scaling is not None:
        yarn = dataclasses.asdict(config.rope_scaling)
        if yarn["attention_factor"] is None:
            del yarn["attention_factor"]
        if yarn["truncate"]:
            del yarn["truncate"]  # transformers 4 warns about the key; true is the default everywhere
        rope = {"rope_type": "yarn", **yarn}
        max_positions = round(yarn["factor"] * yarn["original_max_position_embeddings"])
        if max_positions != config.max_position_embeddings:
            logger.info(
                "max_position_embeddings is exported as YaRN's factor * original length = %d instead of %d",
                max_positions,
                config.max_position_embeddings,
            )
    written: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": max_positions,
        "model_type": model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if moe:
        written |= {
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_local_experts": config.num_experts,
            "output_router_logits": False,
        }
    if config.dual_chunk is not None:
        written["dual_chunk_attention_config"] = dataclasses.asdict(config.dual_chunk)
    return written | dict(special_token_ids or {})

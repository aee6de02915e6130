"""``config.json`` of a Hugging Face folder <-> ``ModelConfig``.

transformers 4 and 5 spell the same things differently (num_experts and num_local_experts, rope_theta with rope_scaling
and rope_parameters, torch_dtype and dtype), and each silently falls back to a default where it meets the other's
spelling. Reading accepts both and refuses a file whose two spellings disagree; writing states both.
"""

import dataclasses
import json
import logging
import math
import sys
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
    "attention_dropout": 0.0,
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
    except (ValueError, RecursionError) as error:
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


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Typed fields of a JSON object. A null means the default, as in transformers; another type is a UserError."""

    raw: Mapping[str, Any]
    where: str
    """What a message puts before a field's name."""

    def refusal(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}{key}: seen {json.dumps(self.raw.get(key))}, expected {expected}")

    def whole(self, key: str, default: int | None = None) -> int:
        """Without a default the field is required."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(key, "a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if not finite or isinstance(value, bool):
            raise self.refusal(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def items(self, key: str, kind: type, expected: str) -> list[Any]:
        value = self.raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.refusal(key, expected)
        return value

    def block(self, key: str, expected: str) -> "_Fields":
        """A nested object, empty where there is none."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, expected)
        return _Fields(value or {}, f"{self.where}{key}.")


def _config_fields(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        seen = "no model_type" if model_type is None else f"model_type {model_type!r}"
        raise UserError(
            f"{file}: seen {seen}, expected qwen3 or qwen3_moe; only Qwen3 dense and mixture-of-experts "
            "checkpoints can be loaded"
        )
    for key, supported in _UNSUPPORTED.items():
        if raw.get(key, supported) not in (supported, None):
            raise UserError(f"{file}: {key}: seen {raw[key]!r}, expected {supported!r}; this variant is not supported")
    config = _Fields(raw, f"{file}: ")
    for index, kind in enumerate(config.items("layer_types", str, "a list of names")):
        if kind != "full_attention":
            raise UserError(f"{file}: layer_types[{index}]: seen {kind!r}, expected 'full_attention'")

    fields: dict[str, Any] = {key: config.whole(key) for key in _DIMENSIONS}
    fields["head_dim"] = config.whole("head_dim") if raw.get("head_dim") is not None else _default_head_dim(raw, file)
    fields["rms_norm_eps"] = config.number("rms_norm_eps", 1e-6)
    fields["initializer_range"] = config.number("initializer_range", 0.02)
    fields["tie_word_embeddings"] = config.flag("tie_word_embeddings", False)
    fields["max_position_embeddings"] = config.whole("max_position_embeddings", 32768)
    if model_type == "qwen3":
        fields |= {"num_experts": 0, "intermediate_size": config.whole("intermediate_size")}
    else:
        fields |= {key: config.whole(key) for key in _MOE_DIMENSIONS}
        fields["num_experts"] = _num_experts(config)
        if raw.get("intermediate_size") is not None:
            fields["intermediate_size"] = config.whole("intermediate_size")
        fields["decoder_sparse_step"] = config.whole("decoder_sparse_step", 1)
        fields["mlp_only_layers"] = list(config.items("mlp_only_layers", int, "a list of layer numbers"))
        if raw.get("norm_topk_prob") is None:
            logger.warning("%s: norm_topk_prob is missing and taken as false, transformers' default", file)
        fields["norm_topk_prob"] = config.flag("norm_topk_prob", False)
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(config, fields["max_position_embeddings"])
    fields["dual_chunk"] = _read_dual_chunk(config)
    return fields


def _default_head_dim(raw: dict[str, Any], file: Path) -> int:
    """transformers' rule: 128 for the dense class, hidden / heads for the mixture of experts."""
    heads = max(raw["num_attention_heads"], 1)  # a model without heads is refused by ModelConfig, by name
    head_dim = 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // heads
    logger.warning("%s: head_dim is missing and taken as %d, transformers' default", file, head_dim)
    return head_dim


def _num_experts(config: _Fields) -> int:
    keys = [key for key in ("num_experts", "num_local_experts") if config.raw.get(key) is not None]
    if not keys:
        raise UserError(f"{config.where}num_experts: missing, expected a whole number")
    found = {key: config.whole(key) for key in keys}
    if len(set(found.values())) > 1:
        raise UserError(
            f"{config.where}{_spelled(found)} disagree; old and new transformers would load different models"
        )
    if found[keys[0]] < 1:
        raise config.refusal(keys[0], "a whole number of at least 1")
    return found[keys[0]]


def _spelled(found: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} = {json.dumps(value)}" for key, value in found.items())


def _read_rope(config: _Fields, max_positions: int) -> tuple[float, YarnConfig | None]:
    old, new = (config.block(key, "an object with rope_type") for key in ("rope_scaling", "rope_parameters"))
    bases = {
        f"{prefix}rope_theta": fields.number("rope_theta", 10000.0)
        for prefix, fields in (("", config), ("rope_parameters.", new), ("rope_scaling.", old))
        if fields.raw.get("rope_theta") is not None
    }
    if len(set(bases.values())) > 1:
        raise UserError(f"{config.where}{_spelled(bases)} disagree; keep one value")
    if not bases:
        logger.warning("%srope_theta is missing and taken as 10000, transformers' default", config.where)
    base = next(iter(bases.values()), 10000.0)
    # A file in the new spelling alone has no rope_scaling; a null there says nothing.
    blocks = [_read_yarn(block, max_positions) for block in (old, new) if block.raw]
    if len(blocks) == 2 and blocks[0] != blocks[1]:
        raise UserError(
            f"{config.where}rope_scaling and rope_parameters disagree; old and new transformers would load different "
            "models: make them equal or delete one"
        )
    return base, next(iter(blocks), None)


def _read_yarn(block: _Fields, max_positions: int) -> YarnConfig | None:
    kind = block.raw.get("rope_type", block.raw.get("type", "default"))
    if block.number("partial_rotary_factor", 1.0) != 1.0:
        raise block.refusal("partial_rotary_factor", "1.0")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(
            f"{block.where}rope_type: seen {kind!r}, expected 'default' or 'yarn'; remove the block or use YaRN"
        )
    original = block.whole("original_max_position_embeddings", max_positions)
    factor = block.number("factor", max_positions / max(original, 1))
    attention_factor = None
    mscale, mscale_all = block.number("mscale", 0.0), block.number("mscale_all_dim", 0.0)
    if block.raw.get("attention_factor") is not None:
        attention_factor = block.number("attention_factor", 1.0)
    elif mscale and mscale_all and factor > 1:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    values = {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": block.number("beta_fast", 32.0),
        "beta_slow": block.number("beta_slow", 1.0),
        "attention_factor": attention_factor,
        "truncate": block.flag("truncate", True),
    }
    return _checked(YarnConfig, values, block.where.removesuffix("."))


def _read_dual_chunk(config: _Fields) -> DualChunkConfig | None:
    block = config.block("dual_chunk_attention_config", "an object with chunk_size and local_size")
    if not block.raw:
        return None
    where = block.where.removesuffix(".")
    # Length temperature and sparse attention are inference options of vLLM's former backend.
    ignored = [key for key in ("original_max_position_embeddings", "sparse_attention_enabled") if block.raw.get(key)]
    if ignored:
        logger.warning("%s: %s not applied: dual chunk attention is computed exactly", where, " and ".join(ignored))
    values = {"chunk_size": block.whole("chunk_size", 8192), "local_size": block.whole("local_size", 1024)}
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

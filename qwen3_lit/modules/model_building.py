"""A phase's model with its weights: whole, or sharded without ever being whole in one process."""

from typing import Any

import torch

from qwen3_lit.distributed.fsdp2_strategy import FSDP2Strategy
from qwen3_lit.model.config import POSITION_FIELDS, ModelConfig
from qwen3_lit.model.hf_checkpoint import load_hf, load_hf_weights, read_hf_config
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.transformer import Qwen3


def position_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a phase's config that win over those of the folder it starts from."""
    return {name: getattr(config, name) for name in POSITION_FIELDS}


def build_model(config: ModelConfig, init_from: str | None, strategy: FSDP2Strategy | None) -> Qwen3:
    """The model of ``config`` in fp32, with random weights or those of a Hugging Face folder.

    With a strategy it is sharded while its parameters have no memory, then filled one parameter at a time: whole,
    30B-A3B takes 122 GB in every process. The weights and the random stream are the same in both ways.
    """
    if strategy is None:
        if init_from is None:
            return Qwen3(config)
        return load_hf(init_from, dtype=torch.float32, overrides=position_fields(config))
    if init_from is None:
        model = Qwen3(config, empty=True)
    else:
        with torch.device("meta"):
            model = Qwen3(read_hf_config(init_from, position_fields(config)))
    strategy.shard(model)
    model.to_empty(device=strategy.root_device)
    model.rope.reset_parameters()
    if init_from is None:
        init_weights(model)
    else:
        load_hf_weights(model, init_from)
    return model

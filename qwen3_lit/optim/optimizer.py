"""From a model and its hyper-parameters to one optimizer."""

import logging
from typing import Any

import torch
from torch import nn

from qwen3_lit.optim.param_groups import OptimizerConfig, OptimizerFactory, build_param_groups, describe_groups

logger = logging.getLogger(__name__)

FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu"})


class AdamWFactory(OptimizerFactory):
    """torch.optim.AdamW, fused where every parameter lies on a device that has the fused kernel (CPU is one)."""

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = devices <= FUSED_DEVICES
        if not fused:
            logger.info("AdamW runs unfused: no fused kernel for %s", ", ".join(sorted(devices - FUSED_DEVICES)))
        groups = [{key: value for key, value in group.items() if key != "parameter_names"} for group in groups]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters of ``model``; logs the table of groups once.

    Call it after sharding and on the parameters' final device. Each group has ``name``, ``lr`` (base times
    ``lr_scale``) and ``weight_decay``, so a ``LambdaLR`` with one multiplier keeps the scales.

    Raises:
        UserError: nothing is trainable, or the factory cannot take a parameter.
    """
    groups = build_param_groups(model, config)
    logger.info("parameter groups\n%s", describe_groups(groups, config.learning_rate))
    factory = AdamWFactory() if config.factory is None else config.factory
    return factory.build([group.as_dict(config.learning_rate) for group in groups], config)

"""Every initial distribution in one place.

| parameter                                             | distribution                                 |
|-------------------------------------------------------|----------------------------------------------|
| embedding, head, projections, router, experts         | normal, mean 0, std ``initializer_range``    |
| every norm weight                                     | ones                                         |

Qwen3 publishes only ``initializer_range`` = 0.02 (its configuration files); the rest is transformers' rule for it.
"""

import torch
from torch import nn


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter of a ``Qwen3`` (or of a part of it that carries ``config``) in place.

    Does nothing for parameters on the meta device: call it again once they have memory.
    """
    std: float = model.config.initializer_range  # type: ignore[union-attr, assignment]
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, std, generator=generator)

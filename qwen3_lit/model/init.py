"""Every initial distribution in one place.

| parameter                                             | distribution                                 |
|-------------------------------------------------------|----------------------------------------------|
| embedding, head, projections, router, experts         | normal, mean 0, std ``initializer_range``    |
| every norm weight                                     | ones                                         |

Qwen3 publishes only ``initializer_range`` = 0.02 (its configuration files); the rest is transformers' rule for it.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter of a ``Qwen3`` (or of a part of it that carries ``config``) in place.

    Does nothing for parameters on the meta device: call it again once they have memory. A sharded parameter gets its
    part of what a whole one would get: every rank draws the same numbers, on the CPU, one parameter at a time.
    """
    std: float = model.config.initializer_range  # type: ignore[union-attr, assignment]
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif isinstance(parameter, DTensor):
            copy_whole(parameter, torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
        else:
            parameter.normal_(0.0, std, generator=generator)


@torch.no_grad()
def copy_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a parameter that may be sharded: each rank keeps its part."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = value.to(device=mesh.device_type, dtype=parameter.dtype)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)

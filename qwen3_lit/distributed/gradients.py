"""Gradient norm and clipping over parameters that may be sharded on different device meshes.

torch's own ``clip_grad_norm_`` stacks the norms of all gradients, which fails when dense and expert parameters live on
two meshes. Here every gradient contributes the square sum of its local part, summed over the mesh dimensions it is
sharded on; plain tensors count as they are. Works for any strategy, one process included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from qwen3_lit.errors import UserError

Shards = tuple[DeviceMesh, tuple[int, ...]]
"""A mesh and the dimensions of it that a gradient is sharded on."""


def _local_part(gradient: Tensor) -> tuple[Tensor, Shards | None]:
    if not isinstance(gradient, DTensor):
        return gradient, None
    if any(placement.is_partial() for placement in gradient.placements):
        raise RuntimeError(
            "gradient norm: a gradient is not reduced yet (partial placement); reduce it before clipping"
        )
    dims = tuple(i for i, placement in enumerate(gradient.placements) if isinstance(placement, Shard))
    return gradient.to_local(), (gradient.device_mesh, dims)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, the same 0-d fp32 tensor on every rank; no wait for the device.

    Every rank has to call it with the same parameters in the same order. Parameters without a gradient count as zero.
    """
    parts: dict[Shards | None, list[Tensor]] = defaultdict(list)
    device: torch.device | None = None
    for parameter in parameters:
        if device is None:
            device = parameter.device
        if isinstance(parameter, DTensor):
            # A mesh takes part in the reduction on every rank even if a rank's own gradients are missing.
            dims = tuple(i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
            parts[(parameter.device_mesh, dims)] += []
        if parameter.grad is not None:
            local, shards = _local_part(parameter.grad)
            if local.numel():
                parts[shards].append(local)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for shards, tensors in parts.items():
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32) if tensors else []
        squares = (
            torch.stack([norm.to(total.device) for norm in norms]).square().sum() if norms else torch.zeros_like(total)
        )
        if shards is not None:
            mesh, dims = shards
            for dim in dims:
                dist.all_reduce(squares, op=dist.ReduceOp.SUM, group=mesh.get_group(dim))
        total = total + squares
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales all gradients so that their global norm is at most ``max_norm``; gives back the norm before clipping.

    Args:
        parameters: the parameters of the optimizer, or of the model.
        max_norm: None measures without clipping.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    if max_norm is not None:
        scale_gradients(parameters, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies every gradient by ``factor`` in place, to exchange a nominal token count for the true one, say."""
    gradients = [_local_part(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_device[gradient.device].append(gradient)
    for device, tensors in by_device.items():
        torch._foreach_mul_(tensors, factor.to(device) if isinstance(factor, Tensor) else factor)


class NormWatch:
    """Remembers on the device the first optimizer step whose gradient norm was not finite: only asking waits for it.

    The weights behind such a step are lost. A run asks before it keeps anything of them, and every few steps.
    """

    def __init__(self) -> None:
        self._bad_step: Tensor | None = None

    def see(self, norm: Tensor, step: int) -> None:
        """Take note of the norm (0-d) of optimizer step ``step`` >= 1."""
        if self._bad_step is None:
            self._bad_step = torch.zeros((), dtype=torch.int64, device=norm.device)
        newly_bad = ~torch.isfinite(norm) & (self._bad_step == 0)
        self._bad_step = torch.where(newly_bad, step, self._bad_step)

    def require_finite(self) -> None:
        """Raises UserError when a norm was not finite; the same on every rank."""
        step = 0 if self._bad_step is None else int(self._bad_step)
        if step:
            raise UserError(
                f"gradient norm of step {step} is not finite: nothing is saved from that step on, the last checkpoint "
                "before it is kept, and the same command continues there; if the step fails again, lower "
                "optimizer.learning_rate or optimizer.grad_clip_norm, or look at its data"
            )

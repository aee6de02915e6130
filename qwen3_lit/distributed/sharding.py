"""FSDP2 over a model's blocks: block by block and the rest at the root, fp32 masters, gradients summed over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def mixed_precision(device_type: str, compute_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """fp32 masters, bf16 compute and fp32 reduction; on the CPU fp32 throughout (bf16 has no speed there).

    Inputs are not cast: position tables and router statistics stay in fp32.
    """
    if compute_dtype is None:
        compute_dtype = torch.float32 if device_type == "cpu" else torch.bfloat16
    if compute_dtype == torch.float32:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    *,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Shards ``model.layers[i]`` one by one and everything else at the root, in place; gives back ``model``.

    The root is not resharded after its forward: losses read the output head's weight between forward and backward.
    Gradients are summed over ranks, not averaged, to match losses that are divided by global counts
    (`qwen3_lit.losses.reduction`). Expert parameters on a mesh of their own have to be sharded before this is called:
    FSDP2 leaves modules alone that it has sharded already.

    Args:
        model: has a ``layers`` sequence of blocks; parameters in fp32.
        mesh: the 1-D data-parallel mesh.
        policy: mixed precision of every unit.
        reshard_after_forward: free a block's gathered weights after its forward (less memory, one more gather a step).

    Raises:
        TypeError: the model has no ``layers``.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        raise TypeError(
            f"shard_model: {type(model).__name__} has no `layers` (ModuleList, ModuleDict or Sequential) to shard"
        )
    for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    return shard_unit(model, mesh, policy)


def shard_unit(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> nn.Module:
    """Shards everything in ``module`` that no unit inside it holds as one unit, not resharded after its forward, in
    place; gives back ``module``. Gradients of all its units are summed over ranks."""
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for unit in fsdp_modules(module):
        # A plain sum on every backend: gloo knows no pre-multiplied sum, and a factor of one needs none.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    return module


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every sharded unit in ``model``, itself included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def whole_gradient_fits(model: nn.Module, memory: int) -> bool:
    """Whether one rank can hold every trainable parameter's fp32 gradient beside all else: in a tenth of ``memory``
    bytes."""
    return 10 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) <= memory


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside keep their gradients local; the first one outside reduces the sum of all."""
    units = fsdp_modules(model)
    for unit in units:
        unit.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def gathered_parameters(model: nn.Module, *, reshard_after_forward: bool = True) -> Iterator[None]:
    """Keeps the whole model gathered, so that ranks may run any number of forward passes inside, each its own.

    Generation needs it: ranks decode different numbers of tokens, and a gather in every forward would wait for ranks
    that have none left. Costs one full copy in compute precision. No backward inside.

    Args:
        model: the sharded model; without sharded units nothing happens.
        reshard_after_forward: the setting of `shard_model`, restored afterwards.
    """
    units = fsdp_modules(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)

"""Lightning strategy ``fsdp2``: data parallel over all ranks with FSDP2, on GPUs (NCCL) and on CPUs (gloo).

Beyond `ModelParallelStrategy`: all ranks on the data-parallel dimension by default; mixed precision by FSDP2's own
policy (leave the Trainer's ``precision`` at 32-true); no reduction on accumulation micro-steps of models whose whole
gradient fits; gradients summed, not averaged; gradient norm over every mesh; checkpoints written in the background,
committed atomically, with every rank's own state.

Importing this module registers the name. A module shards in ``configure_model``::

    shard = getattr(self.trainer.strategy, "shard", None)
    if shard is not None:
        shard(self.model)
"""

import contextlib
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from qwen3_lit.distributed.checkpoint import CheckpointWriter, load_rest, recover, require_complete
from qwen3_lit.distributed.gradients import clip_gradients
from qwen3_lit.distributed.sharding import (
    device_memory,
    gathered_parameters,
    mixed_precision,
    no_gradient_sync,
    shard_model,
    shard_unit,
    whole_gradient_fits,
)
from qwen3_lit.errors import UserError

COMPUTE_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel, version 2, over all ranks."""

    sums_gradients = True
    """Losses are divided by global counts and gradients summed over ranks; `loss_scale` tells modules."""

    def __init__(
        self,
        compute_dtype: Literal["auto", "bf16", "fp32"] = "auto",
        reshard_after_forward: bool = True,
        reduce_every_micro_step: bool | None = None,
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """
        Args:
            compute_dtype: of forward and backward; auto is bf16 on a GPU and fp32 on a CPU. Master weights, reduction
                and optimizer are fp32.
            reshard_after_forward: free each block's gathered weights after its forward.
            reduce_every_micro_step: whether accumulation micro-steps reduce their gradients too. That keeps gradients
                sharded and sends 4 bytes a parameter more in each micro-step, as much as the two bf16 gathers of the
                weights. Without it every rank holds the whole fp32 gradient while it accumulates: 122 GB for 30B-A3B.
                null reduces unless that gradient fits into a tenth of the device's memory.
            save_distributed_checkpoint: a folder with each rank's shards; false writes one file from rank 0.
            async_checkpoint: write folders in the background.
            process_group_backend: null takes nccl on GPUs and gloo on CPUs.
            timeout: of collectives.
        """
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"fsdp2.compute_dtype: got {compute_dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}")
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_micro_step = reduce_every_micro_step
        self.async_checkpoint = async_checkpoint
        self._writer: CheckpointWriter | None = None

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        # The parent resolves its "auto" sizes after this, to tensor parallelism inside a node; the world is known now.
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1

    @property
    def param_dtype(self) -> torch.dtype:
        """Type of the gathered weights, which is that of forward and backward."""
        return mixed_precision(self.root_device.type, self.compute_dtype).param_dtype or torch.float32

    @property
    def writer(self) -> CheckpointWriter:
        """The checkpoint writer; opened at the first save or removal, which all ranks reach together."""
        if self._writer is None:
            self._writer = CheckpointWriter(asynchronous=self.async_checkpoint)
        return self._writer

    def shard(self, model: nn.Module) -> nn.Module:
        """Shards ``model`` (with ``.layers``) over the data-parallel mesh in place; call it in ``configure_model``,
        once."""
        if self.reduce_every_micro_step is None:
            self.reduce_every_micro_step = not whole_gradient_fits(model, device_memory(self.root_device))
        policy = mixed_precision(self.root_device.type, self.compute_dtype)
        mesh = self.device_mesh["data_parallel"]
        return shard_model(model, mesh, policy, reshard_after_forward=self.reshard_after_forward)

    def shard_head(self, head: nn.Module) -> nn.Module:
        """Shards a small module beside the model as one unit of the same mesh, computed in fp32."""
        policy = mixed_precision(self.root_device.type, torch.float32)
        return shard_unit(head, self.device_mesh["data_parallel"], policy)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator:
        """No reduction inside, unless micro-steps reduce: Lightning enters it on accumulation micro-steps, manual
        optimization enters it itself."""
        if self.reduce_every_micro_step or self.model is None:
            yield
        else:
            with no_gradient_sync(self.model):
                yield

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Generator:
        """The whole model gathered on every rank, for generation; see `gathered_parameters`."""
        with gathered_parameters(model, reshard_after_forward=self.reshard_after_forward):
            yield

    def clip_gradients(self, optimizer: Optimizer | LightningOptimizer, max_norm: float | None) -> Tensor:
        """Clips to a global norm over every mesh and gives back the norm; for automatic and manual optimization."""
        return clip_gradients((p for group in optimizer.param_groups for p in group["params"]), max_norm)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        # The writer makes the one copy to the CPU.
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, inner)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError("fsdp2: storage_options are not supported, checkpoints do not go through a CheckpointIO")
        folder = Path(self.broadcast(filepath))
        rest = dict(checkpoint)
        state = {"state_dict": rest.pop("state_dict")}
        for index, optimizer_state in enumerate(rest.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer_state
        self.writer.save(state, rest, folder)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(self.broadcast(checkpoint_path))
        if self._writer is not None:
            self._writer.wait()
        if self.is_global_zero:
            recover(folder)
        self.barrier()
        if not folder.is_file():
            require_complete(folder)
        assert self.lightning_module is not None
        state = {
            "state_dict": self.model,
            **{f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)},
        }
        rest = _load_checkpoint(
            path=folder,
            state=state,
            strict=self.lightning_module.strict_loading,
            optimizer_states_from_list=True,
            weights_only=weights_only,
        )
        if folder.is_dir():
            rest = load_rest(folder, self.global_rank, self.world_size, weights_only=weights_only)
        return rest

    def remove_checkpoint(self, filepath: Any) -> None:
        if not self._save_distributed_checkpoint:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero and self._writer is not None:
            self._writer.remove(Path(filepath))
        elif self.is_global_zero:
            super().remove_checkpoint(filepath)

    def teardown(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        super().teardown()


def loss_scale(strategy: Strategy, world_size: int) -> float:
    """Factor for a loss that is divided by global counts: 1 where gradients are summed over ranks (fsdp2, one process),
    the number of ranks where they are averaged (DDP)."""
    return 1.0 if getattr(strategy, "sums_gradients", False) else float(world_size)


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks, fp32 master weights")

"""Builds a phase's model as one rank of many, or alone. Arguments: rank, world size (0: alone, unsharded), folder.

The folder holds ``hf``, which the second model starts from. Written are both models' whole weights and buffers, and the
next number of the random generator.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from qwen3_lit.distributed.fsdp2_strategy import FSDP2Strategy
from qwen3_lit.losses.load_balance import AuxFreeBias
from qwen3_lit.model.hf_checkpoint import read_hf_config
from qwen3_lit.modules.reward_model import RewardModule

rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
CONFIG = read_hf_config(folder / "hf")


class Sharding(FSDP2Strategy):
    """Fails when a parameter has memory before it is sharded."""

    def shard(self, model: nn.Module) -> nn.Module:
        assert all(parameter.is_meta for parameter in model.parameters())
        return super().shard(model)


class Phase(RewardModule):
    """A phase without data: it is only built."""

    def setup(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> list[int]:
        return [0]


class Collect(Callback):
    """What the model holds when training would begin."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        self.tensors: dict[str, Tensor] = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in tensors.items()
        }


def build(**options: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    collect = Collect()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=max(1, world_size),
        strategy=Sharding() if world_size else "auto",
        max_steps=0,
        callbacks=[collect],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Phase(config=CONFIG, balance=AuxFreeBias(), **options)
    trainer.fit(module)
    return {"tensors": collect.tensors, "next": torch.rand(()).item()}


# The launcher's own variables: Lightning then joins these processes instead of starting its own.
os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(max(1, world_size)), MASTER_ADDR="127.0.0.1")
built = {"random": build(), "init_from": build(init_from=str(folder / "hf"))}
torch.save(built, folder / f"built_{world_size}_{rank}.pt")

"""Gradients of accumulation micro-steps: kept whole where that fits, reduced each time where it would not."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_group
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qwen3_lit.cli.recipe_files import recipes_folder
from qwen3_lit.distributed import fsdp2_strategy
from qwen3_lit.distributed.sharding import device_memory, whole_gradient_fits
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.transformer import Qwen3

ACCUMULATE = 3


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows.square().sum()


class Phase(L.LightningModule):
    def configure_model(self) -> None:
        self.model = TwoBlocks()
        self.trainer.strategy.shard(self.model)

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        return self.model(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients = [p.grad.full_tensor() for p in self.model.parameters()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def one_rank() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def reductions(folder: Path, memory: int) -> tuple[int, list[Tensor]]:
    """Gradient reductions of one optimizer step on a device of ``memory`` bytes, and the gradients."""
    torch.manual_seed(0)
    module = Phase()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="fsdp2",
        max_steps=1,
        accumulate_grad_batches=ACCUMULATE,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    reduce = mock.patch.object(fsdp_group, "foreach_reduce", wraps=fsdp_group.foreach_reduce)
    with mock.patch.object(fsdp2_strategy, "device_memory", lambda device: memory), reduce as counted:
        trainer.fit(module, DataLoader(torch.randn(ACCUMULATE, 4)))
    return counted.call_count, module.gradients


def test_micro_steps_reduce_where_the_whole_gradient_does_not_fit(tmp_path: Path, one_rank: None) -> None:
    blocks, gradient_bytes = 2, 2 * (4 * 4 + 4) * 4
    once, expected = reductions(tmp_path, 10 * gradient_bytes)
    each, seen = reductions(tmp_path, 10 * gradient_bytes - 1)
    assert (once, each) == (blocks, blocks * ACCUMULATE)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(("size", "fits"), [("0_6b", True), ("30b_a3b", False)])
def test_what_an_80_gb_gpu_keeps_whole(size: str, fits: bool) -> None:
    recipe = yaml.safe_load((recipes_folder() / "size" / f"{size}.yaml").read_text())
    with torch.device("meta"):
        model = Qwen3(ModelConfig(**recipe["model"]["init_args"]["config"]))
    assert whole_gradient_fits(model, 80 * 10**9) == fits


def test_the_memory_of_the_host_is_known() -> None:
    assert 2**28 < device_memory(torch.device("cpu")) < 2**50

"""Training that the fsdp2 tests run with one rank or two. Arguments: rank, world size, folder, scenario.

Every global batch is the same for any number of ranks: rank r takes every world-size-th row. Losses are divided by
global counts, so one process and two have to agree.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_group
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import qwen3_lit.distributed.fsdp2_strategy  # noqa: F401  (registers "fsdp2")
from qwen3_lit.distributed.gradients import clip_gradients
from qwen3_lit.distributed.rng import collect_rng_state, restore_rng_state
from qwen3_lit.distributed.sharding import fsdp_modules
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.optim.muon import MuonFactory
from qwen3_lit.optim.optimizer import build_optimizer
from qwen3_lit.optim.param_groups import OptimizerConfig

ROWS, LENGTH, ACCUMULATE, CLIP = 4, 12, 2, 0.5
CONFIG = ModelConfig(
    vocab_size=33,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
)


def forward(model: nn.Module, rows: Tensor) -> Tensor:
    """The rows as one packed batch of documents."""
    count, length = rows.shape
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    return model(rows.flatten(), torch.arange(length).repeat(count), cu_seqlens, length).hidden_TD


class Rows(Dataset[Tensor]):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        rows = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
        return rows[self.rank :: self.world_size]


class Phase(L.LightningModule):
    def __init__(self, manual: bool, muon: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.optimizer_config = OptimizerConfig(learning_rate=0.01, factory=MuonFactory() if muon else None)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.draws: list[float] = []
        self.restored_rng: dict[str, Any] | None = None
        self.model: Qwen3 | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = Qwen3(CONFIG)
        init_weights(self.model, torch.Generator().manual_seed(1))
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            shard(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optimizer_config)

    def loss(self, rows: Tensor) -> Tensor:
        hidden_TD = forward(self.model, rows[:, :-1])
        logits_TV = hidden_TD @ self.model.lm_head_weight.T
        total = nn.functional.cross_entropy(logits_TV, rows[:, 1:].flatten(), reduction="sum")
        return total / (ROWS * (LENGTH - 1))

    def record(self, loss: Tensor) -> None:
        loss = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
        self.losses.append(loss.item())
        self.draws.append(torch.rand(()).item())

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self.restored_rng is not None:
            restore_rng_state(self.restored_rng)
            self.restored_rng = None

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor | None:
        # The index goes on after a resume, where a plain DataLoader would start over.
        rows = Rows(self.global_rank, self.trainer.world_size)[batch_index]
        if self.automatic_optimization:
            loss = self.loss(rows)
            self.record(loss)
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        parts = rows.chunk(ACCUMULATE)
        for index, part in enumerate(parts):
            with self.trainer.strategy.block_backward_sync() if index + 1 < len(parts) else torch.enable_grad():
                loss = self.loss(part)
                self.manual_backward(loss)
            self.record(loss)
        self.norms.append(clip_gradients(self.parameters(), CLIP).item())
        optimizer.step()
        return None

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        self.norms.append(clip_gradients(self.parameters(), CLIP).item())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"], checkpoint["rank"] = collect_rng_state(), self.global_rank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("saved_world_size") == self.trainer.world_size:
            assert checkpoint["rank"] == self.global_rank
            self.restored_rng = checkpoint["rng"]


@contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """How many gradient reductions FSDP makes."""
    counts: list[int] = []
    original = fsdp_group.foreach_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return original(*args, **kwargs)

    with mock.patch.object(fsdp_group, "foreach_reduce", counted):
        yield counts


def fit(folder: Path, rank: int, world_size: int, steps: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(100 + rank)
    manual = options.get("manual", False)
    module = Phase(manual, options.get("muon", False))
    checkpoints = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=-1 if manual else 1,
        save_last=True,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=options.get("strategy", "fsdp2"),
        max_steps=steps,
        accumulate_grad_batches=1 if manual else ACCUMULATE,
        callbacks=[checkpoints] if options.get("save") else [],
        enable_checkpointing=bool(options.get("save")),
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with counted_reductions() as reductions:
        trainer.fit(module, DataLoader(Rows(rank, world_size)), ckpt_path=options.get("resume"))
    weights = {}
    if options.get("weights"):
        weights = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in module.state_dict().items()
        }
    return {
        "losses": module.losses,
        "norms": module.norms,
        "draws": module.draws,
        "weights": weights,
        "reductions": len(reductions),
        "units": len(fsdp_modules(module)),
        "micro_steps": len(module.losses),
    }


def scenario_equal(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    return {
        "automatic": fit(folder, rank, world_size, 4, weights=True),
        "manual": fit(folder, rank, world_size, 3, manual=True),
        "muon": fit(folder, rank, world_size, 3, muon=True, weights=True),
    }


def scenario_save(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    whole = fit(folder / "whole", rank, world_size, 6)
    first = fit(folder, rank, world_size, 4, save=True)
    last = str(folder / "checkpoints" / "last.ckpt")
    second = fit(folder, rank, world_size, 6, resume=last)
    return {"whole": whole, "first": first, "second": second}


def scenario_resume(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Continues, with another number of ranks, what scenario_save wrote."""
    return {"second": fit(folder, rank, world_size, 6, resume=str(folder / "checkpoints" / "last.ckpt"))}


def scenario_gathered(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Ranks run different numbers of forwards on gathered weights, then train on."""
    from qwen3_lit.distributed.sharding import gathered_parameters, mixed_precision, shard_model

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    model = Qwen3(CONFIG)
    init_weights(model, torch.Generator().manual_seed(1))
    rows = torch.arange(LENGTH)[None]
    before = forward(model, rows).detach()
    shard_model(model, mesh, mixed_precision("cpu"))
    with torch.no_grad(), gathered_parameters(model):
        outputs = [forward(model, rows) for _ in range(1 + 2 * rank)]
    forward(model, rows).square().sum().backward()
    norm = clip_gradients(model.parameters(), None)
    dist.destroy_process_group()
    return {"equal": all(torch.equal(output, before) for output in outputs), "norm": norm.item()}


if __name__ == "__main__":
    rank, world_size, folder, scenario = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    # The launcher's own variables: Lightning then joins these processes instead of starting its own.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    result = globals()[f"scenario_{scenario}"](folder, rank, world_size)
    torch.save(result, folder / f"{scenario}_{world_size}_{rank}.pt")

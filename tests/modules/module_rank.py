"""Phases that the tests of this folder run with one rank or two. Arguments: rank, world size, folder, scenario.

The documents of a step are the same for any number of ranks: rank r packs every world-size-th of them into its row.
The folder holds a tokenizer.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import qwen3_lit.distributed.fsdp2_strategy  # noqa: F401  (registers "fsdp2")
from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.losses.load_balance import CombinedBalance, GlobalBatchBalance, RouterZLoss
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.modules.cold_start_sft import ColdStartSFTModule
from qwen3_lit.modules.phase_module import PhaseModule

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=8,
    num_experts_per_tok=2,
)


def document(length: int, trained: int, seed: int) -> Document:
    ids = torch.randint(40, 280, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Document(ids, [False] * (length - trained) + [True] * trained)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


class Rows(TextDataModule):
    """One given batch a rank, for ever."""

    def __init__(self, folder: Path, rows: list[Any]) -> None:
        super().__init__(str(folder / "tokenizer"), batch_tokens=256, prefetch_batches=0)
        self.rows = rows

    def load_data(self) -> None:
        pass

    def make_batch(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


class Recording:
    """Keeps the gradients that each optimizer step sees, and what is logged."""

    def clip_gradients_and_log(self: Any, optimizer: Any) -> None:
        gradients = {name: whole(p.grad) for name, p in self.named_parameters() if p.grad is not None}
        self.__dict__.setdefault("seen", []).append(gradients)

    def log(self: Any, name: str, value: Any, **options: Any) -> None:
        self.__dict__.setdefault("logged", {}).setdefault(name, []).append(float(value))
        super().log(name, value, **options)  # type: ignore[misc]


def fit(module: PhaseModule, data: L.LightningDataModule, world_size: int, folder: Path, **options: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"strategy": "fsdp2", "max_steps": 1, **options},
    )
    torch.manual_seed(0)
    trainer.fit(module, data)


class Imitation(Recording, ColdStartSFTModule):
    pass


def scenario_balance(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    documents = [document(20, 15, 0), document(12, 2, 1), document(9, 1, 2), document(30, 9, 3)]
    rows = [pack_row(documents[r::world_size]) for r in range(world_size)]
    balance = CombinedBalance([GlobalBatchBalance(0.5), RouterZLoss(0.1)])
    module = Imitation(config=CONFIG, balance=balance)
    fit(module, Rows(folder, rows), world_size, folder)
    return {"gradients": module.seen[0], "logged": module.logged}


if __name__ == "__main__":
    rank, world_size, folder, scenario = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    # The launcher's own variables: Lightning then joins these processes instead of starting its own.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    result = globals()[f"scenario_{scenario}"](folder, rank, world_size)
    torch.save(result, folder / f"{scenario}_{world_size}_{rank}.pt")

"""One of two ranks that train a phase and export it. Arguments: rank, run folder, tokenizer folder."""

import datetime as dt
import os
import resource
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import ROW_TOKENS, TinyData, TinyPhase, tiny_config
from lightning.pytorch.strategies import DDPStrategy

from qwen3_lit.callbacks.hf_export import HFExport
from qwen3_lit.errors import UserError


def main(rank: int, root: Path, tokenizer: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=dt.timedelta(seconds=20)),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    module = TinyPhase(config=tiny_config(num_experts=0))
    trainer.fit(module, TinyData(tokenizer_path=tokenizer, batch_tokens=ROW_TOKENS, prefetch_batches=0))

    with pytest.raises(UserError, match="thesis: holds files"):
        HFExport(folder="thesis").on_train_end(trainer, module)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:  # the disk of rank 0 is full before the weights are written
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    with pytest.raises(OSError, match="File too large"):
        HFExport().on_train_end(trainer, module)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (root / "hf").exists()
    HFExport().on_train_end(trainer, module)
    assert (root / "hf" / "provenance.json").is_file(), "no rank leaves before rank 0 has swapped the folder in"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""One of two gloo ranks of the report test: two steps under DDP. Arguments: rank, folder with a tokenizer."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L

from qwen3_lit.callbacks.run_report import RunReport

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("conftest.py"))
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


class Generating(cases.TinyPhase):
    """Every rank generates another number of tokens, in another time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counters.rollout_tokens += 10 + rank
        self.counters.rollout_seconds += 1.0 + rank
        return super().training_step(batch, batch_idx)


# The launcher's own variables: Lightning then joins these processes instead of starting its own.
os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
L.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_steps=2,
    callbacks=[RunReport(evaluate=False)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    use_distributed_sampler=False,
    default_root_dir=folder,
).fit(
    Generating(config=cases.tiny_config(num_experts=0)),
    cases.TinyData(tokenizer_path=str(folder / "tokenizer"), batch_tokens=cases.ROW_TOKENS, prefetch_batches=0),
)

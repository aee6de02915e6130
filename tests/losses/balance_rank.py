"""One of two gloo ranks of the balance-loss test: two micro-steps of unequal size. Arguments: rank, folder."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3_lit.losses.load_balance import GlobalBatchBalance

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_load_balance.py"))
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)

dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, strategy = cases.Routers(recompute=True), GlobalBatchBalance(weight=1.0)
parts = cases.tokens(60).split([5, 15, 30, 10])
loss = torch.zeros(())
for step in range(2):
    loss = loss + strategy.loss(model(parts[2 * step + rank]), num_tokens_total=60)
gradient = cases.gradient(loss, model)
counts_LE = strategy.state_dict()["counts_LE"]
torch.save({"loss": loss.detach(), "gradient": gradient, "counts_LE": counts_LE}, folder / f"rank{rank}.pt")
dist.destroy_process_group()

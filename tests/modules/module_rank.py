"""Phases that the tests of this folder run with one rank or two. Arguments: rank, world size, folder, scenario.

The documents of a step are the same for any number of ranks: rank r packs every world-size-th of them into its row.
The folder holds a tokenizer.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

import qwen3_lit.distributed.fsdp2_strategy  # noqa: F401  (registers "fsdp2")
from qwen3_lit.data.batch import PreferenceBatch, PromptBatch
from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.data.prompt_data import PromptData
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.losses.load_balance import CombinedBalance, GlobalBatchBalance, RouterZLoss
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.modules.cold_start_sft import ColdStartSFTModule
from qwen3_lit.modules.distill import DistillModule
from qwen3_lit.modules.grpo import GRPOModule
from qwen3_lit.modules.phase_module import PhaseModule
from qwen3_lit.modules.policy_module import EngineConfig, pack_for_ranks
from qwen3_lit.modules.reward_model import RewardModule
from qwen3_lit.rl.rewards.reward import Reward, RewardInput
from qwen3_lit.rl.rollout import Rollout

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


class Problems(PromptData):
    """Long prompts on rank 0 and short ones on rank 1, four a rank."""

    def __init__(self, folder: Path, world_size: int) -> None:
        file = folder / f"problems_{os.getpid()}.jsonl"
        prompts = [" the cat sat" * (8 if index < 4 else 1) + str(index) for index in range(8)]
        file.write_text("".join(json.dumps({"prompt": p, "answer": "1", "task": "cats"}) + "\n" for p in prompts))
        super().__init__(str(folder / "tokenizer"), [str(file)], prompts_per_step=4 * world_size)

    def make_batch(self, index: int) -> PromptBatch:
        first = 4 * (index % 2)
        indices = list(range(first, first + 4))
        return PromptBatch([self.problems[i] for i in indices], indices, batch_index=index)


class RankReward(Reward):
    """Completions differ on rank 0 and are all alike on the others."""

    in_process = True

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        return [float(dist.get_rank() == 0 and index % 2 == 0) for index in range(len(items))]


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


class Scorer(Recording, RewardModule):
    def clip_gradients_and_log(self, optimizer: Any) -> None:
        super().clip_gradients_and_log(optimizer)
        # The loss of a head of zeros says nothing of its gradient's way into the backbone.
        if len(self.seen) == 1:
            with torch.no_grad():
                self.score_head.weight.fill_(0.5)


def scenario_reward(folder: Path, rank: int, world_size: int, strategy: str = "fsdp2") -> dict[str, Any]:
    """Two steps of one row a rank; three pairs, of which one rank of two has two."""
    pairs = [(document(8 + n, 4, 2 * n), document(6, 3, 2 * n + 1)) for n in range(3)]
    rows = []
    for r in range(world_size):
        packed = pack_row([answer for pair in pairs[r::world_size] for answer in pair])
        ends = torch.tensor([end - 1 for _, end in packed.document_spans()])
        rows.append(PreferenceBatch(packed, ends[0::2], ends[1::2]))
    module = Scorer(config=CONFIG, balance=GlobalBatchBalance(0.5))
    fit(module, Rows(folder, rows), world_size, folder, strategy=strategy, max_steps=2)
    module.export(folder / f"{strategy}_{world_size}")
    return {"gradients": module.seen, "logged": module.logged}


def scenario_reward_plain(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    return scenario_reward(folder, rank, world_size, strategy="auto")


class Policy(Recording, GRPOModule):
    pass


class Student(Recording, DistillModule):
    pass


ENGINE = EngineConfig(max_batch_size=8, max_cached_tokens=4096)


def scenario_refill(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Rank 1 asks for more problems twice, rank 0 never."""
    module = Policy(
        config=CONFIG,
        rewards=[RankReward()],
        sampling=SamplingParams(max_new_tokens=6),
        group_size=2,
        num_minibatches=2,
        micro_batch_tokens=100,
        mask_truncated=False,
        engine=ENGINE,
    )
    fit(module, Problems(folder, world_size), world_size, folder, max_steps=2)
    return {"gradients": module.seen[-1], "logged": module.logged, "groups": module._groups_sampled}


def scenario_distill(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Rank 0's rollouts need one micro-batch each, rank 1's fit into fewer."""
    module = Student(
        config=CONFIG,
        on_policy=True,
        teacher=str(folder / "teacher"),
        sampling=SamplingParams(max_new_tokens=6),
        micro_batch_tokens=100,
        engine=ENGINE,
    )
    forwards: list[int] = []
    original = module.run_model
    module.run_model = lambda *a, **o: (forwards.append(1), original(*a, **o))[1]  # type: ignore[method-assign]
    fit(module, Problems(folder, world_size), world_size, folder, max_steps=1)
    mine = [Rollout([1] * 30, [2] * 4, [-1.0] * 4, [True] * 4, "stop", "think", i, {}) for i in range(3 - rank)]
    rows = pack_for_ranks(mine, 40, mask_truncated=True, device=torch.device("cpu"))
    trained = [(row.num_trained_tokens, row.num_sequences) for row in rows]
    return {"gradients": module.seen[-1], "logged": module.logged, "forwards": len(forwards), "trained": trained}


if __name__ == "__main__":
    rank, world_size, folder, scenario = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    # The launcher's own variables: Lightning then joins these processes instead of starting its own.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    result = globals()[f"scenario_{scenario}"](folder, rank, world_size)
    torch.save(result, folder / f"{scenario}_{world_size}_{rank}.pt")

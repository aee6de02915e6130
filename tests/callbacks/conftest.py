"""A phase that trains a tiny mixture of experts for a few steps, with the real Trainer and the real checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.callbacks.hf_export import HFExport
from qwen3_lit.callbacks.run_report import RunReport
from qwen3_lit.cli.phase_checkpoint import PhaseCheckpoint
from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.data.tokenizer import train_tokenizer
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.modules.phase_module import PhaseModule

ROW_TOKENS = 32


class TinyData(TextDataModule):
    """Rows of two documents with rising token ids."""

    def load_data(self) -> None:
        """Nothing to read."""

    def make_batch(self, index: int) -> PackedBatch:
        """A pure function of the index."""
        documents = [Document([(index + start + i) % 250 for i in range(16)]) for start in (0, 7)]
        return pack_row(documents)


class TinyPhase(PhaseModule):
    """Next-token prediction; its figure is the sum of all weights, which only training changes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.evaluations: list[tuple[int, float]] = []
        self.step_losses: list[float] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        loss = self.language_model_step(batch)
        self.samples = [
            {"task": "rising", "prompt": "1 2", "completion": f"3 | 4\n<b>{self.global_step}", "reward": 0.5}
        ]
        self.step_losses.append(loss.item())
        return loss

    def evaluate(self) -> dict[str, float]:
        assert not self.training and not torch.is_grad_enabled()
        torch.rand(3)  # an evaluation that draws must not move the training's random stream
        total = float(sum(p.double().abs().sum() for p in self.parameters()))
        self.evaluations.append((self.global_step, total))
        self.samples = [{"task": "rising", "completion": "evaluated"}]
        return {"weight": total}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["one two three 1 2 3\n" * 20], 285, folder)
    return str(folder)


@pytest.fixture
def tiny_data(tokenizer_dir: str) -> Callable[[], TinyData]:
    return lambda: TinyData(tokenizer_path=tokenizer_dir, batch_tokens=ROW_TOKENS, prefetch_batches=0)


def tiny_config(num_experts: int = 4) -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


@pytest.fixture
def make_phase() -> Callable[..., TinyPhase]:
    def make(num_experts: int = 4, kind: type[TinyPhase] = TinyPhase, **kwargs: Any) -> TinyPhase:
        torch.manual_seed(1)
        return kind(config=tiny_config(num_experts), **kwargs)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A trainer in ``tmp_path/phase`` with a checkpoint at every step, the given callbacks, and none of Lightning's."""

    def make(callbacks: list[L.Callback], max_steps: int = 4, **options: Any) -> L.Trainer:
        root = tmp_path / "phase"
        checkpoint = PhaseCheckpoint(
            dirpath=root / "checkpoints", filename="{step:08d}", every_n_train_steps=1, enable_version_counter=False
        )
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": max_steps,
            "logger": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            "log_every_n_steps": 1,
        }
        if not any(isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in callbacks):
            settings["enable_progress_bar"] = False
        return L.Trainer(callbacks=[checkpoint, *callbacks], **{**settings, **options})

    return make


@pytest.fixture
def fit(
    make_trainer: Callable[..., L.Trainer], make_phase: Callable[..., TinyPhase], tiny_data: Callable[[], TinyData]
):  # type: ignore[no-untyped-def]
    """Train a fresh phase, from the newest checkpoint of the folder where there is one; gives module and trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    def run(
        callbacks: list[L.Callback] | None = None, module: TinyPhase | None = None, resume: bool = True, **options: Any
    ) -> tuple[TinyPhase, L.Trainer]:
        module = module or make_phase()
        trainer = make_trainer([RunReport(), HFExport()] if callbacks is None else callbacks, **options)
        found = sorted((Path(trainer.default_root_dir) / "checkpoints").glob("step=*.ckpt"))
        trainer.fit(module, tiny_data(), ckpt_path=str(found[-1]) if resume and found else None)
        return module, trainer

    return run

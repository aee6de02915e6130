"""Pre-training, all three stages: next-token prediction over packed documents (Technical Report, section 3.2)."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.model.config import DualChunkConfig
from qwen3_lit.modules.phase_module import PhaseModule


class PretrainModule(PhaseModule):
    """Stages S1 (general), S2 (reasoning) and S3 (long context)."""

    def __init__(self, extrapolation_chunks: DualChunkConfig | None = None, **kwargs: Any) -> None:
        """
        Args:
            extrapolation_chunks: evaluate documents of four times the trained length as well, by plain attention and by
                dual chunk attention with these sizes; null leaves this out.
            kwargs: see PhaseModule.
        """
        super().__init__(**kwargs)
        self.extrapolation_chunks = extrapolation_chunks

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """One micro-step."""
        return self.language_model_step(batch)

    @torch.no_grad()
    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Log the held-out loss during training."""
        self.log_held_out_loss(batch)

    @torch.no_grad()
    def held_out_loss(self, batches: Iterable[PackedBatch]) -> float:
        """Mean nats a token over rows, all ranks together."""
        was_training = self.training
        self.eval()
        nll, tokens = torch.zeros((), device=self.device), 0
        for batch in batches:
            row_nll, row_tokens = self.held_out_nll(batch)
            nll, tokens = nll + row_nll, tokens + row_tokens
        self.train(was_training)
        total = sum_over_ranks(torch.stack([nll, torch.tensor(float(tokens), device=self.device)]))
        return (total[0] / total[1]).item() if total[1] > 0 else math.nan

    def evaluate(self) -> dict[str, float]:
        """``held_out_loss`` in nats a token; with extrapolation_chunks the two figures at four times the length."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        figures = {"held_out_loss": self.held_out_loss(data.val_dataloader())}
        if self.extrapolation_chunks is not None:
            rows = list(data.long_val_batches(4 * data.sequence_length))
            figures["held_out_loss_4x_plain"] = self.held_out_loss(rows)
            with self._dual_chunks(self.extrapolation_chunks):
                figures["held_out_loss_4x_dca"] = self.held_out_loss(rows)
        return figures

    @contextlib.contextmanager
    def _dual_chunks(self, chunks: DualChunkConfig) -> Iterator[None]:
        before, self.model.rope.dual_chunk = self.model.rope.dual_chunk, chunks
        try:
            yield
        finally:
            self.model.rope.dual_chunk = before

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """Held-out loss before and after; the extrapolation figures of the trained model."""
        figures = {"held_out_loss_before": before["held_out_loss"], "held_out_loss_after": after["held_out_loss"]}
        return figures | {name: after[name] for name in after if "_4x_" in name}

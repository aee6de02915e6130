"""Long chain-of-thought cold start: supervised fine-tuning on filtered reasoning (Technical Report, section 4.1)."""

import torch
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.modules.policy_module import PolicyModule


class ColdStartSFTModule(PolicyModule):
    """Next-token prediction on the assistant's tokens; held-out problems show what was learned."""

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """One micro-step."""
        return self.language_model_step(batch)

    @torch.no_grad()
    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Log the held-out loss during training."""
        self.log_held_out_loss(batch)

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """The figures after the phase; those before it only where they were measured and say something."""
        return after

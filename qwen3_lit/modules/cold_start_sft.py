"""Long chain-of-thought cold start: supervised fine-tuning on filtered reasoning (Technical Report, section 4.1)."""

import torch
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.losses.language_model import language_model_loss
from qwen3_lit.modules.policy_module import PolicyModule


class ColdStartSFTModule(PolicyModule):
    """Next-token prediction on the assistant's tokens; held-out problems show what was learned."""

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """One micro-step."""
        return self.language_model_step(batch)

    @torch.no_grad()
    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Log the loss on held-out conversations."""
        hidden_TD = self.run_model(batch).hidden_TD
        result = language_model_loss(
            hidden_TD, self.model.lm_head_weight, batch.target_ids_T, num_tokens_total=1.0, valid_vocab=self.valid_vocab
        )
        tokens = max(1, batch.num_loss_tokens)
        self.log("val/loss", result.nll_sum / tokens, batch_size=tokens, sync_dist=True, prog_bar=True)

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """The figures after the phase; those before it only where they were measured and say something."""
        return after

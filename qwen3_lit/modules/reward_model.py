"""The scalar reward model of general RL, trained on preferences (Technical Report, section 4.4).

Bradley-Terry: ``loss = -log sigmoid(score(chosen) - score(rejected))``, the score being a linear head on the hidden
state of the answer's last token. With a reference answer in the prompt it becomes a judge with reference.

Legend: T tokens, P pairs, D model width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen3_lit.data.batch import PreferenceBatch
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.modules.phase_module import PhaseModule
from qwen3_lit.rl.rewards.reward_model import SCORE_HEAD_FILE, SCORE_HEAD_KEY


class RewardModule(PhaseModule):
    """Learns to score answers from pairs of a chosen and a rejected one."""

    def __init__(self, centering: float = 0.01, **kwargs: Any) -> None:
        """
        Args:
            centering: weight of the squared sum of a pair's scores, which keeps scores around zero (arXiv 2312.09244).
            kwargs: see PhaseModule.
        """
        super().__init__(**kwargs)
        self.centering = centering

    def build_heads(self) -> None:
        """A linear head that starts at zero: every answer scores alike."""
        self.score_head = nn.Linear(self.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score_head.weight)

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Raw scores [P] of the chosen and of the rejected answers."""
        hidden_TD = self.run_model(batch.packed).hidden_TD.float()
        head_D = self.score_head.weight[0].float()
        return hidden_TD[batch.chosen_end_P] @ head_D, hidden_TD[batch.rejected_end_P] @ head_D

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean Bradley-Terry loss over the row's pairs."""
        chosen_P, rejected_P = self.scores(batch)
        loss = -F.logsigmoid(chosen_P - rejected_P).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=batch.num_pairs)
        self.log("train/accuracy", (chosen_P > rejected_P).float().mean(), prog_bar=True, batch_size=batch.num_pairs)
        return loss + self.centering * (chosen_P + rejected_P).square().mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``pair_accuracy``: share of held-out pairs whose chosen answer scores higher; ties count half."""
        was_training = self.training
        self.eval()
        right = torch.zeros(2, device=self.device)
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            chosen_P, rejected_P = self.scores(batch.to(self.device))
            right[0] += (chosen_P > rejected_P).sum() + 0.5 * (chosen_P == rejected_P).sum()
            right[1] += batch.num_pairs
        self.train(was_training)
        right = sum_over_ranks(right)
        return {"pair_accuracy": (right[0] / right[1].clamp(min=1)).item()}

    def export(self, folder: str | Path) -> None:
        """The backbone as a Hugging Face folder, and the head beside it."""
        super().export(folder)
        if self.trainer.is_global_zero:
            head_1D = self.score_head.weight.detach().cpu().contiguous()
            save_file({SCORE_HEAD_KEY: head_1D}, Path(folder) / SCORE_HEAD_FILE)

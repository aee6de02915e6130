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
from torch.distributed.tensor import DTensor

from qwen3_lit.data.batch import PreferenceBatch
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.model.transformer import ModelOutput
from qwen3_lit.modules.phase_module import PhaseModule
from qwen3_lit.rl.rewards.reward_model import SCORE_HEAD_FILE, SCORE_HEAD_KEY


class ScoreHead(nn.Module):
    """One number from a hidden state, in fp32; starts at zero: every answer scores alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, hidden_PD: Tensor) -> Tensor:
        """Raw scores [P]."""
        with torch.autocast(hidden_PD.device.type, enabled=False):
            return hidden_PD.float() @ self.weight[0].float()


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

    def build_heads(self) -> list[nn.Module]:
        """The score head."""
        self.score_head = ScoreHead(self.config.hidden_size)
        return [self.score_head]

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor, ModelOutput]:
        """Raw scores [P] of the chosen and of the rejected answers, and the model's output."""
        output = self.run_model(batch.packed)
        ends = torch.cat([batch.chosen_end_P, batch.rejected_end_P])
        # One call for both: a sharded head reduces its gradient once for each.
        chosen_P, rejected_P = self.score_head(output.hidden_TD[ends]).chunk(2)
        return chosen_P, rejected_P, output

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Bradley-Terry loss of one micro-step; its mean is over the pairs of the whole optimizer step."""
        chosen_P, rejected_P, output = self.scores(batch)
        ranking = -F.logsigmoid(chosen_P - rejected_P).sum()
        shown = {"loss": ranking, "accuracy": (chosen_P > rejected_P).sum()}
        loss = ranking + self.centering * (chosen_P + rejected_P).square().sum()
        return self.micro_step_loss(loss, batch.num_pairs, output, shown)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``pair_accuracy``: share of held-out pairs whose chosen answer scores higher; ties count half."""
        was_training = self.training
        self.eval()
        right = torch.zeros(2, device=self.device)
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            chosen_P, rejected_P, _ = self.scores(batch.to(self.device))
            right[0] += (chosen_P > rejected_P).sum() + 0.5 * (chosen_P == rejected_P).sum()
            right[1] += batch.num_pairs
        self.train(was_training)
        right = sum_over_ranks(right)
        return {"pair_accuracy": (right[0] / right[1].clamp(min=1)).item()}

    def export(self, folder: str | Path) -> None:
        """The backbone as a Hugging Face folder, and the head beside it."""
        super().export(folder)
        head_1D = self.score_head.state_dict()["weight"].detach()
        head_1D = head_1D.full_tensor() if isinstance(head_1D, DTensor) else head_1D  # every rank takes part
        if self.trainer.is_global_zero:
            save_file({SCORE_HEAD_KEY: head_1D.cpu().contiguous()}, Path(folder) / SCORE_HEAD_FILE)

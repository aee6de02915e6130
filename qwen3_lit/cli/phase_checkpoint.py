"""The checkpoint callback of every run: one newest checkpoint, by time or steps, and one at the end of the phase."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class PhaseCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves the last step.

    With a time interval Lightning leaves the steps since the last tick unsaved, so the same command would train them
    again after the phase ended. The last step is saved where every other one is, inside the epoch: a checkpoint made
    after the epoch was closed counts one batch and one epoch too many when a longer run continues from it.
    """

    def _save_now(self, trainer: L.Trainer) -> None:
        if self.save_top_k != 0 and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the checkpoint that this run continued from: Lightning keeps it, so every kill would leave one."""
        folder = Path(str(self.dirpath)).absolute()
        return previous != current and folder in Path(previous).absolute().parents

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by the recipe's rhythm, and at ``max_steps``."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
            self._save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final step of a phase that its data ended, unless it is saved already."""
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

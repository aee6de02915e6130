"""The checkpoint callback of every run: one newest checkpoint, by time or steps, and one at the end of the phase."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from qwen3_lit.cli.resume_point import is_complete, newest_checkpoint, step_of


class PhaseCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also saves the last step.

    With a time interval Lightning leaves the steps since the last tick unsaved, so the same command would train them
    again after the phase ended. The last step is saved where every other one is, inside the epoch: a checkpoint made
    after the epoch was closed counts one batch and one epoch too many when a longer run continues from it.

    A step's figures are logged before the step is saved. Lightning logs them afterwards: a run killed between the two
    would continue behind the step, and never have its figures.

    A kill behind a save leaves the checkpoint before it, and ``last`` pointing there. The next start clears that up.
    """

    _step_ended = False

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self._step_ended:
            trainer._logger_connector.update_train_step_metrics()
        super()._save_checkpoint(trainer, filepath)

    def _save_now(self, trainer: L.Trainer) -> None:
        if self.save_top_k != 0 and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the checkpoint that this run continued from: Lightning keeps it, so every kill would leave one."""
        folder = Path(str(self.dirpath)).absolute()
        return previous != current and folder in Path(previous).absolute().parents

    def _finish_killed_save(self, trainer: L.Trainer) -> None:
        """When the newest checkpoint is this step: point ``last`` to it, and remove those that it replaced."""
        folder = Path(str(self.dirpath)).absolute()
        newest = newest_checkpoint(folder) if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False) else None
        if newest is None or step_of(newest) != trainer.global_step or self.save_top_k != 1 or self.monitor is not None:
            return
        for path in folder.iterdir():
            if path != newest and step_of(path) is not None and is_complete(path):
                self._remove_checkpoint(trainer, str(path))
        if self.save_last == "link":
            link = folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            if link.is_symlink() and 
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by the recipe's rhythm, and at ``max_steps``."""
        self._step_ended = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
            self._save_now(trainer)
        self._step_ended = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final step of a phase that its data ended, unless it is saved already."""
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

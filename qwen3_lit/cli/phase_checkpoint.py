"""The checkpoint callback of every run: one newest checkpoint, by time or steps, and one at the end of the phase."""

import contextlib
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

    Nothing is saved between the micro-steps of an accumulated step: no checkpoint holds gradients, so a run continued
    from there would take a step on what is left of them. Lightning does it when a time interval ends there, and at the
    first micro-step after a resume.

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
        if not trainer.is_global_zero or self.save_top_k != 1 or self.monitor is not None:
            return
        folder = Path(str(self.dirpath)).absolute()
        newest = newest_checkpoint(folder)
        if newest is None or step_of(newest) != trainer.global_step:
            return
        for path in folder.iterdir():
            if path != newest and step_of(path) is not None and is_complete(path):
                self._remove_checkpoint(trainer, str(path))
        link = folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        if self.save_last == "link" and (link.is_symlink() or not link.exists()) and link.resolve() != newest.resolve():
            link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without links
                link.symlink_to(newest.name)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear up behind a kill, now that its checkpoint could be loaded."""
        super().on_train_start(trainer, pl_module)
        self._finish_killed_save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where nothing was left to train."""
        self._finish_killed_save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by the recipe's rhythm, and at ``max_steps``."""
        if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
            return
        self._step_ended = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
            self._save_now(trainer)
        self._step_ended = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final step of a phase that its data ended, unless it is saved already."""
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

"""Hands a phase's weights on: a Hugging Face folder at its end, and on request beside every kept checkpoint.

The folder appears whole or not at all, and only when the phase ended by itself. ``provenance.json`` in it names the
phases that the weights went through; ``README.md`` is the model card.
"""

import logging
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from qwen3_lit.callbacks.model_card import write_model_card
from qwen3_lit.callbacks.phase_record import PHASE_FILE, git_commit, is_trial, read_record, write_record
from qwen3_lit.errors import UserError
from qwen3_lit.model.failing_together import failing_together
from qwen3_lit.model.folder_swap import swapped_folder
from qwen3_lit.model.hf_weights import is_hf_folder
from qwen3_lit.modules.phase_module import PhaseModule

PROVENANCE_FILE = "provenance.json"
_STEP = re.compile(r"step=(\d+)")

log = logging.getLogger(__name__)


class HFExport(Checkpoint):
    """Writes ``<run folder>/hf`` when the phase is finished.

    A ``Checkpoint`` callback, for Lightning runs these last and in their order: put it after ``RunReport``, whose
    figures the model card shows.
    """

    def __init__(self, folder: str = "hf", every_checkpoint: bool = False) -> None:
        """
        Args:
            folder: name inside the run folder.
            every_checkpoint: also write ``<folder>_steps/step=N`` at every checkpoint, as long as that is kept.
        """
        super().__init__()
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise UserError(f"hf_export.folder: seen {folder!r}, expected a name inside the run folder, such as hf")
        self.folder = folder
        self.every_checkpoint = every_checkpoint
        self._trained_here = False
        self._finished = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember that the weights have moved."""
        self._trained_here = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Export beside the checkpoint that is being saved."""
        if self.every_checkpoint and trainer.global_step > 0 and trainer.training:
            assert isinstance(pl_module, PhaseModule)
            self._prune(trainer, keep_step=trainer.global_step)
            self._export(trainer, pl_module, self._steps_folder(trainer) / f"step={trainer.global_step:08d}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the finished phase."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for a phase whose training had ended in an earlier start, which was killed before the export."""
        if not self._finished:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PhaseModule)
        self._finished = True
        if is_trial(trainer) or trainer.global_step == 0:
            return
        target = Path(trainer.default_root_dir) / self.folder
        known = read_record(target / PROVENANCE_FILE) if not self._trained_here else None
        done = known is not None and known["phases"][-1]["steps"] == trainer.global_step and is_hf_folder(target)
        if trainer.strategy.broadcast(done):
            return
        pl_module.to(trainer.strategy.root_device)
        self._export(trainer, pl_module, target)
        if self.every_checkpoint:
            self._prune(trainer)
        log.info("exported %s", target)

    def _export(self, trainer: L.Trainer, module: PhaseModule, target: Path) -> None:
        """Every rank takes part in gathering; rank 0 swaps the finished folder in. They succeed or fail together."""
        with failing_together(), ExitStack() as stack:
            incoming = target
            with failing_together():
                if trainer.is_global_zero:
                    incoming = stack.enter_context(swapped_folder(target, is_hf_folder))
            module.export(incoming)
            if trainer.is_global_zero:
                phases = self._phases(trainer, module)
                write_record(incoming / PROVENANCE_FILE, {"phases": phases})
                record = read_record(Path(trainer.default_root_dir) / PHASE_FILE)
                write_model_card(incoming, module.config, phases, record)

    def _phases(self, trainer: L.Trainer, module: PhaseModule) -> list[dict[str, Any]]:
        """The phases behind ``init_from``, and this one."""
        origin = Path(module.init_from) if module.init_from else None
        known = read_record(origin / PROVENANCE_FILE) if origin is not None else None
        chain = list(known["phases"]) if known else ([{"name": module.init_from}] if module.init_from else [])
        this = {
            "name": Path(trainer.default_root_dir).resolve().name,
            "module": type(module).__name__,
            "steps": trainer.global_step,
            "commit": git_commit(),
        }
        return [*chain, this]

    def _steps_folder(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / f"{self.folder}_steps"

    def _prune(self, trainer: L.Trainer, keep_step: int | None = None) -> None:
        """Remove the folders whose checkpoint is gone."""
        if not trainer.is_global_zero or not self._steps_folder(trainer).is_dir():
            return
        kept = set() if keep_step is None else {keep_step}
        for callback in trainer.checkpoint_callbacks:
            dirpath = getattr(callback, "dirpath", None)
            if dirpath and Path(dirpath).is_dir():
                kept |= {int(match[1]) for path in Path(dirpath).iterdir() if (match := _STEP.search(path.name))}
        for path in self._steps_folder(trainer).iterdir():
            match = _STEP.search(path.name)
            if match and int(match[1]) not in kept:
                shutil.rmtree(path)

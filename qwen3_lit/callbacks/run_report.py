"""Evaluates a phase before and after its training and writes ``phase.json``, the record that the report is made from.

The figures before the phase are measured once, at step 0, and kept in ``before.json`` and in every checkpoint, so a run
that was killed never takes a half-trained model for the untrained one. ``phase.json`` appears only when the phase ended
by itself; a finished phase that is started again leaves it as it is.

Evaluation happens in ``on_train_end``, because Lightning takes the module off its device before ``on_fit_end``. A
phase whose last checkpoint was saved, but which was killed while it was evaluated, has nothing left to train: Lightning
then skips the loop, and ``on_fit_end`` makes up for it.
"""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint

from qwen3_lit.callbacks.phase_record import PHASE_FILE, is_trial, read_record, run_facts, work_done, write_record
from qwen3_lit.callbacks.samples import SAMPLES_FILE, replace_stage
from qwen3_lit.callbacks.throughput import peak_memory_gb
from qwen3_lit.distributed.rng import collect_rng_state, restore_rng_state
from qwen3_lit.modules.phase_module import PhaseModule

BEFORE_FILE = "before.json"

log = logging.getLogger(__name__)


class RunReport(Checkpoint):
    """Figures before and after, training seconds, and the facts of the run.

    A ``Checkpoint`` callback, for Lightning runs these last and in their order: the final weights are saved before the
    evaluation of them begins.
    """

    def __init__(self, evaluate: bool = True) -> None:
        """
        Args:
            evaluate: call the module's ``evaluate()`` before and after the phase; without it the record has no figures.
        """
        super().__init__()
        self.evaluate = evaluate
        self._before: dict[str, float] | None = None
        self._seconds = 0.0
        self._eval_seconds = 0.0
        self._clock: float | None = None
        self._trained_here = False
        self._finished = False

    # ---- hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the figures before the phase, unless an earlier start of it did."""
        assert isinstance(pl_module, PhaseModule)
        self._trained_here = self._finished = False
        if is_trial(trainer):
            return
        self._recall_before(trainer)
        if self._before is None and trainer.global_step == 0:
            self._before = self._evaluate(trainer, pl_module, "before")
            if trainer.is_global_zero:
                record = {"settings": self._settings(trainer), "figures": self._before, "seconds": self._eval_seconds}
                write_record(self._folder(trainer) / BEFORE_FILE, record)
        elif self._before is None:
            log.warning(
                "%s: neither %s nor the checkpoint has the figures before the phase: only those after it are reported",
                self._folder(trainer),
                BEFORE_FILE,
            )
        self._clock = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on the weights are no longer those that an older record speaks of."""
        if not self._trained_here:
            self._trained_here = True
            if trainer.is_global_zero and not is_trial(trainer):
                (self._folder(trainer) / PHASE_FILE).unlink(missing_ok=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the figures after the phase and write the record."""
        self._seconds, self._clock = self._elapsed(), None
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for a phase whose training had ended in an earlier start."""
        if not self._finished:
            self._recall_before(trainer)
            self._finish(trainer, pl_module)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Training seconds so far, and the figures before the phase."""
        return {"seconds": self._elapsed(), "eval_seconds": self._eval_seconds, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was saved."""
        self._seconds, self._eval_seconds = state_dict["seconds"], state_dict["eval_seconds"]
        self._before = state_dict["before"]

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._clock is None else time.monotonic() - self._clock)

    def _recall_before(self, trainer: L.Trainer) -> None:
        """Take the figures of an earlier start, if they are those of this phase with these settings."""
        record = read_record(self._folder(trainer) / BEFORE_FILE) if trainer.is_global_zero else None
        if record is not None and trainer.global_step == 0 and record["settings"] != self._settings(trainer):
            log.info("the recipe changed since %s was written: evaluating anew", BEFORE_FILE)
            record = None
        record = trainer.strategy.broadcast(record)
        if record is not None and self._before is None:
            self._before, self._eval_seconds = record["figures"], record["seconds"]

    def _settings(self, trainer: L.Trainer) -> str | None:
        """Hash of the recipe's model and data as saved in the run folder; None when the run has no recipe."""
        recipe = self._folder(trainer) / "config.yaml"
        if not recipe.is_file():
            return None
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        decisive = yaml.safe_dump({key: content.get(key) for key in ("model", "data", "seed_everything")})
        return hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir)

    # ---- work

    def _evaluate(self, trainer: L.Trainer, module: PhaseModule, stage: str) -> dict[str, float]:
        """The module's figures; its mode, its random streams and its samples are as before afterwards."""
        if not self.evaluate:
            return {}
        log.info("evaluating %s the phase", stage)
        started = time.monotonic()
        module.to(trainer.strategy.root_device)
        training = {part: part.training for part in module.modules()}
        rng = collect_rng_state()
        module.samples = []
        try:
            module.eval()
            # Outside of its own steps Lightning sets no precision: the model is measured as it is trained.
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                figures = {name: float(value) for name, value in module.evaluate().items()}
        finally:
            restore_rng_state(rng)
            for part, mode in training.items():
                part.training = mode
        if trainer.is_global_zero:
            replace_stage(self._folder(trainer) / SAMPLES_FILE, module.samples, stage, trainer.global_step)
        module.samples = []
        seconds = time.monotonic() - started
        self._eval_seconds += seconds
        overall = {name: value for name, value in figures.items() if "/" not in name}
        log.info("%s (%.0f s): %s", stage, seconds, ", ".join(f"{k} {v:.4g}" for k, v in overall.items()))
        return figures

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PhaseModule)
        self._finished = True
        if is_trial(trainer) or trainer.global_step == 0:
            return
        file = self._folder(trainer) / PHASE_FILE
        known = read_record(file) if trainer.is_global_zero and not self._trained_here else None
        if trainer.strategy.broadcast(known is not None and known.get("steps") == trainer.global_step):
            log.info("%s is finished: %s stays as it is", self._folder(trainer), PHASE_FILE)
            return
        before = self._before or {}
        after = self._evaluate(trainer, pl_module, "after")
        missing = bool(after) and not before
        metrics = (
            {f"{name}_after": value for name, value in after.items()}
            if missing or not self.evaluate
            else pl_module.report_metrics(before, after, self._seconds)
        )
        work = work_done(pl_module)
        if trainer.is_global_zero:
            record = {
                "name": self._folder(trainer).resolve().name,
                "seconds": round(self._seconds, 2),
                "eval_seconds": round(self._eval_seconds, 2),
                "metrics": metrics,
                "before": before,
                "after": after,
                "peak_memory_gb": peak_memory_gb(trainer.strategy.root_device),
                **work,
                **run_facts(trainer, pl_module),
            }
            write_record(file, record)
        trainer.strategy.barrier("run_report")

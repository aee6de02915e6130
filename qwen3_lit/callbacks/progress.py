"""Where a run stands: a bar in a terminal, a plain line every few seconds elsewhere (a log file, a pipe).

One step is an optimizer step when the trainer has ``max_steps``, else a batch: in manual optimization a batch may
hold several optimizer steps, or none. The time left is judged by recent steps; the first ones, which compile kernels
and fill caches, are left out.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from qwen3_lit.callbacks.throughput import Rates, WorkMeter, memory_gb, peak_flops
from qwen3_lit.errors import UserError
from qwen3_lit.modules.phase_module import PhaseModule

RECENT_STEPS = 50
SHOWN_FIRST = ("train/loss", "train/divergence", "reward")


class Progress(ProgressBar):
    """Step, loss or reward, tokens a second, MFU, memory and time left."""

    def __init__(self, refresh_seconds: float = 0.5, line_seconds: float = 10.0, warmup_steps: int = 3) -> None:
        """
        Args:
            refresh_seconds: between two redraws of the bar in a terminal.
            line_seconds: between two lines where the output is no terminal.
            warmup_steps: steps that the time left ignores.
        """
        super().__init__()
        for name, value in (("refresh_seconds", refresh_seconds), ("line_seconds", line_seconds)):
            if value <= 0:
                raise UserError(f"progress.{name}: seen {value}, expected more than 0 seconds")
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self.warmup_steps = warmup_steps
        self._enabled = True
        self._meter = WorkMeter()
        self._bar: RichProgress | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._reset(0)

    def _reset(self, steps_done: int) -> None:
        self._stamps: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self._first_step = steps_done
        self._shown_at = time.monotonic()
        self._text = ""

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    # ---- hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where this start of the run begins."""
        self._reset(steps_done(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the bar at the first batch, when nothing else writes to the terminal any more."""
        assert isinstance(pl_module, PhaseModule)
        if self._enabled and not self._stamps:
            self._stamps.append((time.monotonic(), steps_done(trainer)))
            self._meter.start(pl_module.counters)
            if sys.stdout.isatty():
                self._open_bar(trainer, steps_done(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw or write a line, if it is time."""
        if not self._enabled:
            return
        now, done = time.monotonic(), steps_done(trainer)
        if done - self._first_step <= self.warmup_steps:
            self._stamps.clear()  # the clock for the time left starts behind the warm-up
            self._stamps.append((now, done))
        elif done != self._stamps[-1][1]:
            self._stamps.append((now, done))
        if now - self._shown_at >= (self.refresh_seconds if self._bar else self.line_seconds):
            self._show(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so, and stop the clock."""
        self._meter.pause()
        if self._bar is not None and not trainer.sanity_checking:
            self._bar.update(self._bar.task_ids[0], description="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        self._meter.go_on()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="step")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step."""
        if self._enabled and self._stamps:
            self._show(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    # ---- showing

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PhaseModule)
        done, total = steps_done(trainer), steps_total(trainer)
        rates = self._meter.read(pl_module.counters)
        if rates.tokens or rates.rollout_tokens:
            self._meter.start(pl_module.counters)
            self._text = "  ".join(_rates(rates, pl_module.device, trainer.world_size))
        figures = list(_figures(self.get_metrics(trainer, pl_module)))
        parts = [*figures, self._text, f"{memory_gb(pl_module.device):.1f} GB"]
        self._shown_at = time.monotonic()
        if self._bar is not None:
            parts.append(f"ETA {duration(self._seconds_left(done, total))}")
            self._bar.update(self._bar.task_ids[0], completed=done, text="  ".join(filter(None, parts)))
            self._bar.refresh()
            return
        if total is None or done < total:
            parts.append(f"ETA {duration(self._seconds_left(done, total))}")
        place = f"step {done}" if total is None else f"step {done}/{total}"
        print("  ".join(filter(None, [place, *parts])), flush=True)

    def _seconds_left(self, done: int, total: int | None) -> float | None:
        (start, first), (end, last) = self._stamps[0], self._stamps[-1]
        if total is None or last <= first:
            return None
        return (total - done) * (end - start) / (last - first)

    def _open_bar(self, trainer: L.Trainer, done: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            TextColumn("{task.completed}/{task.total}" if steps_total(trainer) else "{task.completed}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = RichProgress(*columns, console=Console(), auto_refresh=False)
        self._bar.add_task("step", total=steps_total(trainer), completed=done, text="")
        self._bar.start()
        # Log handlers hold the stream of their birth; through rich's stand-in their lines appear above the bar.
        for name in ("qwen3_lit", "qwen3_kernels"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stderr__, sys.__stdout__):
                    self._streams.append((handler, handler.setStream(sys.stderr)))

    def _close(self) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def steps_done(trainer: L.Trainer) -> int:
    """Optimizer steps when the trainer counts these, else batches."""
    if trainer.max_steps > 0:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def steps_total(trainer: L.Trainer) -> int | None:
    """Steps of the whole run in the unit of ``steps_done``; None when it has no end."""
    if trainer.max_steps > 0:
        return int(trainer.max_steps)
    epochs = trainer.max_epochs
    batches = trainer.num_training_batches
    if epochs is None or epochs < 0 or not math.isfinite(batches):
        return None
    return int(batches) * epochs


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: 8 s, 2:05, 1:02:03, 3 d 4 h; ? when unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def quantity(number: float) -> str:
    """Three digits and a unit: 950, 7.52k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _figures(metrics: dict[str, Any]) -> Iterator[str]:
    """The step's loss or reward first, then what else the phase shows."""
    values = {name: value for name, value in metrics.items() if name != "v_num" and not isinstance(value, str)}
    for name in sorted(values, key=lambda name: (name not in SHOWN_FIRST, name)):
        yield f"{name.removeprefix('train/')} {float(values[name]):.4g}"


def _rates(rates: Rates, device: torch.device, world_size: int) -> Iterator[str]:
    """Rates of this rank, times the ranks, which all do alike."""
    if rates.rollout_tokens:
        yield f"rollout {quantity(rates.rollout_tokens_per_second * world_size)} tok/s"
    if rates.tokens:
        yield f"{quantity(rates.tokens_per_second * world_size)} tok/s"
    peak = peak_flops(device)
    if peak is not None and rates.flops:
        yield f"MFU {100 * rates.flops_per_second / peak:.1f} %"

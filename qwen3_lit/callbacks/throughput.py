"""Rates from the module's counters: tokens a second, model TFLOP/s, MFU, rollout tokens a second, memory.

FLOPs are the model's own (6 x active weights + causal attention), recomputation not counted. Training rates are taken
over the time that is not spent on rollouts; validation and checkpoints are left out. MFU compares with the dense bf16
peak, and is absent on a device whose peak is not in the table.
"""

import re
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.modules.phase_module import Counters, PhaseModule

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"H[12]00.*NVL", 835e12),
    (r"H100.*PCIe", 756e12),
    (r"H[12]00", 989e12),
    (r"A100", 312e12),
)
"""Pattern in the device's name -> dense bf16 FLOP/s, first match wins. Source: NVIDIA's data sheets, whose figures with
sparsity are twice these."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None when unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, name, re.IGNORECASE)), None)


def memory_gb(device: torch.device) -> float:
    """Memory in use in GB (10^9 bytes): allocated on an accelerator, resident in a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e9
    except OSError:  # no /proc: macOS
        return peak_memory_gb(device)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in use so far, in GB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


@dataclass(frozen=True)
class Rates:
    """Work of one rank between two readings, or of all ranks together."""

    seconds: float
    """Wall clock without pauses."""
    tokens: float
    """Trained tokens."""
    flops: float
    """Model FLOPs of them."""
    rollout_tokens: float
    """Generated tokens."""
    rollout_seconds: float
    """Wall clock spent on generating and scoring."""

    @property
    def update_seconds(self) -> float:
        """Time that was not spent on rollouts."""
        return max(self.seconds - self.rollout_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second of update time."""
        return self.tokens / self.update_seconds

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s in the update time."""
        return self.flops / self.update_seconds

    @property
    def rollout_tokens_per_second(self) -> float:
        """Generated tokens a second of rollout time; 0 without rollouts."""
        return self.rollout_tokens / self.rollout_seconds if self.rollout_seconds > 0 else 0.0

    def over_ranks(self, device: torch.device, world_size: int) -> "Rates":
        """Work summed and rollout time averaged over all ranks, which have to call it together."""
        kind = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor(
            [self.tokens, self.flops, self.rollout_tokens, self.rollout_seconds / world_size], dtype=kind, device=device
        )
        tokens, flops, rollout_tokens, rollout_seconds = sum_over_ranks(mine).tolist()
        return Rates(self.seconds, tokens, flops, rollout_tokens, rollout_seconds)


class WorkMeter:
    """Reads the counters of a module at two moments; pauses do not count."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._since = 0.0
        self._paused: float | None = None

    def start(self, counters: Counters) -> None:
        """Begin to count here."""
        self._before = dict(vars(counters))
        self._since = time.perf_counter()
        self._paused = None

    def pause(self) -> None:
        """Stop the clock."""
        if self._paused is None:
            self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Let the clock run again."""
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    def read(self, counters: Counters) -> Rates:
        """The work since ``start``, or since the counters were restored from a checkpoint."""
        seconds = time.perf_counter() - self._since
        done = {name: value - self._before.get(name, 0) for name, value in vars(counters).items()}
        return Rates(
            seconds=max(seconds, 1e-9),
            tokens=done["tokens"],
            flops=done["flops"],
            rollout_tokens=done["rollout_tokens"],
            rollout_seconds=done["rollout_seconds"],
        )


def is_log_step(trainer: L.Trainer) -> bool:
    """Whether what is logged in this ``on_train_batch_end`` reaches the loggers."""
    # The trainer's own monitors ask the same private questions; there is no public way.
    if trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization:
        return False
    return bool(trainer._logger_connector.should_update_logs)


class Throughput(L.Callback):
    """Logs the rates of the steps since the last log, all ranks together, under ``throughput/``."""

    def __init__(self) -> None:
        super().__init__()
        self._meter = WorkMeter()
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing was counted yet."""
        self._steps = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count at the first batch, behind what other callbacks do when training starts."""
        assert isinstance(pl_module, PhaseModule)
        if self._steps < 0:
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._meter.start(pl_module.counters)
            self._steps = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, at the steps at which the trainer logs."""
        assert isinstance(pl_module, PhaseModule)
        self._steps += not (trainer.fit_loop._should_accumulate() and pl_module.automatic_optimization)
        if not is_log_step(trainer):
            return
        # Kernels that are queued are not done: without this the first reading after a pause would be too good.
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        mine = self._meter.read(pl_module.counters)
        rates = mine.over_ranks(pl_module.device, trainer.world_size)
        figures = {
            "tokens_per_second": rates.tokens_per_second,
            "tflops_per_device": rates.flops_per_second / trainer.world_size / 1e12,
            "step_seconds": rates.seconds / max(1, self._steps),
            "peak_memory_gb": peak_memory_gb(pl_module.device),
        }
        peak = peak_flops(pl_module.device)
        if peak is not None:
            figures["mfu"] = rates.flops_per_second / trainer.world_size / peak
        if rates.rollout_seconds > 0:
            figures["rollout_tokens_per_second"] = rates.rollout_tokens_per_second
            figures["rollout_share"] = rates.rollout_seconds / rates.seconds
        pl_module.log_dict({f"throughput/{name}": float(value) for name, value in figures.items()})
        self._meter.start(pl_module.counters)
        self._steps = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out."""
        self._meter.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count again."""
        self._meter.go_on()

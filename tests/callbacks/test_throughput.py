"""Rates: right work over right time."""

import time
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.callbacks.throughput import Rates, Throughput, WorkMeter, peak_flops
from qwen3_lit.modules.phase_module import Counters


class Recorder(L.Callback):
    """Keeps what reached the loggers, after each batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_meter_counts_work_since_its_start_and_skips_pauses(clock: list[float]) -> None:
    counters, meter = Counters(tokens=1000, flops=1e6), WorkMeter()
    meter.start(counters)
    counters.tokens, counters.flops = 1600, 4e6
    clock[0] += 2
    meter.pause()
    clock[0] += 50
    meter.pause()
    clock[0] += 50
    meter.go_on()
    clock[0] += 1
    rates = meter.read(counters)
    assert (rates.seconds, rates.tokens, rates.flops) == (3.0, 600, 3e6)
    assert rates.tokens_per_second == 200 and rates.rollout_tokens_per_second == 0


def test_training_rates_leave_rollouts_out() -> None:
    rates = Rates(seconds=10, tokens=400, flops=8e12, rollout_tokens=1200, rollout_seconds=6)
    assert rates.tokens_per_second == 100
    assert rates.flops_per_second == 2e12
    assert rates.rollout_tokens_per_second == 200


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_peak_is_known_or_absent_never_guessed(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_no_mfu_on_a_processor() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_rates_are_logged_where_the_trainer_logs(fit: Any) -> None:
    throughput, recorder = Throughput(), Recorder()
    fit([throughput, recorder], log_every_n_steps=2)
    with_rates = ["throughput/tokens_per_second" in row for row in recorder.rows]
    # What was logged stays in callback_metrics, so the first appearance counts.
    assert with_rates == [False, True, True, True]
    assert recorder.rows[-1]["throughput/tokens_per_second"] > 0
    assert recorder.rows[-1]["throughput/peak_memory_gb"] > 0
    assert "throughput/mfu" not in recorder.rows[-1]
    assert "throughput/rollout_tokens_per_second" not in recorder.rows[-1]


def test_accumulated_micro_steps_are_one_step(fit: Any) -> None:
    throughput, recorder = Throughput(), Recorder()
    fit([throughput, recorder], accumulate_grad_batches=2, max_steps=2)
    assert ["throughput/step_seconds" in row for row in recorder.rows] == [False, True, True, True]


class SlowStart(L.Callback):
    """Takes its time before the training, as an evaluation does."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock[0] += 1000.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock[0] += 1.0


def test_what_happens_before_the_first_batch_does_not_count(fit: Any, clock: list[float]) -> None:
    recorder = Recorder()
    fit([Throughput(), SlowStart(clock), recorder], max_steps=2)
    assert recorder.rows[1]["throughput/step_seconds"] == pytest.approx(1.0)

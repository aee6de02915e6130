"""Time and memory of a call, and the two ceilings of a device.

Device time is measured by events around one call. Before each call a spin kernel keeps the device busy for as long as
the host needs to enqueue it, so that launches are hidden unless the call waits for the device itself. Inputs rotate
among enough sets to leave no trace in the cache. What a call needs made anew each time, the graph of a backward pass,
is made outside of the events.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

CACHE_BYTES = 200 * 2**20
"""Sets of inputs together are at least this large: four times the L2 of an H200."""
MOST_SETS = 64
SPIN_CYCLES_PER_SECOND = 2.0e9
"""A little above the clock of any card that runs this, so that the spin is never too short."""
LONGEST_SPIN = 0.02


class Step(NamedTuple):
    """What is timed, ``run(prepare())``, of which ``run`` counts."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


class Ceilings(NamedTuple):
    """What the device reaches in this process: the roof that results are compared with."""

    copy_gbps: float
    """Device-to-device copy, bytes read and bytes written, in GB/s."""
    matmul_tflops: float
    """Square product of random matrices in TFLOP/s."""


def time_steps(steps: Sequence[Step], device: torch.device, *, seconds: float = 0.4) -> Timing:
    """Median, 20th and 80th percentile over 5 to 100 runs, going round ``steps``; about ``seconds`` in all."""
    steps[-1].run(steps[-1].prepare())
    prepared = steps[0].prepare()
    _synchronize(device)
    start = time.perf_counter()
    steps[0].run(prepared)
    enqueued = time.perf_counter() - start
    _synchronize(device)
    once = time.perf_counter() - start
    repeats = min(max(int(seconds / once), 5), 100)
    for i in range(min(repeats // 5, 5)):
        step = steps[i % len(steps)]
        step.run(step.prepare())
    if device.type != "cuda":
        return _quantiles([_host_time(steps[i % len(steps)]) for i in range(repeats)])
    spin = int(min(1.5 * enqueued + 1e-4, LONGEST_SPIN) * SPIN_CYCLES_PER_SECOND)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (before, after) in enumerate(pairs):
        step = steps[i % len(steps)]
        prepared = step.prepare()
        torch.cuda._sleep(spin)
        before.record()
        step.run(prepared)
        after.record()
    torch.cuda.synchronize(device)
    return _quantiles([before.elapsed_time(after) for before, after in pairs])


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """Device memory that a run takes on top of what is there, its results included; None without a GPU."""
    if device.type != "cuda":
        return None
    prepared = step.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step.run(prepared)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_ceilings(device: torch.device, *, copy_bytes: int = 2 * 2**30, width: int = 8192) -> Ceilings:
    """A large copy and a ``width``-cubed product, bfloat16 on a GPU and small in float32 on a CPU."""
    dtype = torch.bfloat16
    if device.type != "cuda":
        copy_bytes, width, dtype = 2**24, 256, torch.float32
    source = torch.randn(copy_bytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = time_steps([Step(lambda _: target.copy_(source))], device).median
    a, b = torch.randn(2, width, width, device=device, dtype=dtype).unbind()
    out = torch.empty_like(a)
    product_ms = time_steps([Step(lambda _: torch.mm(a, b, out=out))], device).median
    return Ceilings(2 * copy_bytes / copy_ms / 1e6, 2 * width**3 / product_ms / 1e9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_time(step: Step) -> float:
    prepared = step.prepare()
    start = time.perf_counter()
    step.run(prepared)
    return 1e3 * (time.perf_counter() - start)


def _quantiles(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(
        statistics.median(ordered),
        ordered[round(0.2 * (len(ordered) - 1))],
        ordered[round(0.8 * (len(ordered) - 1))],
    )

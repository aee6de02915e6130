"""Time and memory of a call, and the two ceilings of a device.

Device time is measured by events around one call. Before each call a scratch buffer of 256 MB is read, so that no
input is left in the cache (50 MB of L2 on an H200, 126 on a B200); overwriting it, as ``triton.testing.do_bench`` does,
would leave the cache full of lines that the call has to write back: 2 to 9 us of its time on an H200. Then a spin
kernel keeps the device busy for as long as the host needs to enqueue the call, so that launches are hidden unless
the call waits for the device itself. Both stand outside of the events, and so does what a call needs made anew each
time, the graph of a backward pass.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SCRATCH_BYTES = 256 * 2**20
"""Read before every call: more than any L2."""
SPIN_CYCLES_PER_SECOND = 2.0e9
"""A little above the clock of any card that runs this, so that the spin is never too short."""
LONGEST_SPIN = 0.02
SLOW = 0.1
"""Seconds of a call from which three runs suffice."""


class Step(NamedTuple):
    """What is timed, ``run(prepare())``, of which ``run`` counts."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Timing(NamedTuple):
    """Milliseconds, and memory."""

    median: float
    p20: float
    p80: float
    extra_bytes: int | None
    """Device memory that a run takes on top of what is there, its results included; None without a GPU."""


class Ceilings(NamedTuple):
    """What the device reaches in this process: the roof that results are compared with."""

    copy_gbps: float
    """Device-to-device copy, bytes read and bytes written, in GB/s."""
    matmul_tflops: float
    """Square product of random matrices in TFLOP/s."""


def time_step(step: Step, device: torch.device, *, seconds: float = 0.4) -> Timing:
    """Median, 20th and 80th percentile over 5 to 100 runs, 3 of a slow call; about ``seconds`` in all."""
    step.run(step.prepare())  # compiles, and allocates what stays
    _synchronize(device)
    start = time.perf_counter()
    prepared = step.prepare()
    _synchronize(device)
    held = _start_counting_memory(device)
    begin = time.perf_counter()
    step.run(prepared)
    enqueued = time.perf_counter() - begin
    _synchronize(device)
    once = time.perf_counter() - start
    extra_bytes = None if held is None else torch.cuda.max_memory_allocated(device) - held
    del prepared
    repeats = min(max(int(seconds / once), 3 if once > SLOW else 5), 100)
    for _ in range(min(repeats // 5, 5)):
        step.run(step.prepare())
    if device.type != "cuda":
        return Timing(*_quantiles([_host_time(step) for _ in range(repeats)]), extra_bytes)
    scratch = torch.zeros(SCRATCH_BYTES // 4, device=device)
    spin = int(min(1.5 * enqueued + 1e-4, LONGEST_SPIN) * SPIN_CYCLES_PER_SECOND)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in pairs:
        prepared = step.prepare()
        scratch.sum()
        torch.cuda._sleep(spin)
        before.record()
        step.run(prepared)
        after.record()
        del prepared  # before the next one is made: it may be a graph of tens of gigabytes
    torch.cuda.synchronize(device)
    return Timing(*_quantiles([before.elapsed_time(after) for before, after in pairs]), extra_bytes)


def measure_ceilings(device: torch.device, *, copy_bytes: int = 2 * 2**30, width: int = 8192) -> Ceilings:
    """A large copy and a ``width``-cubed product, bfloat16 on a GPU and small in float32 on a CPU."""
    dtype = torch.bfloat16
    if device.type != "cuda":
        copy_bytes, width, dtype = 2**24, 256, torch.float32
    source = torch.randn(copy_bytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = time_step(Step(lambda _: target.copy_(source)), device).median
    a, b = torch.randn(2, width, width, device=device, dtype=dtype).unbind()
    out = torch.empty_like(a)
    product_ms = time_step(Step(lambda _: torch.mm(a, b, out=out)), device).median
    return Ceilings(2 * copy_bytes / copy_ms / 1e6, 2 * width**3 / product_ms / 1e9)


def _start_counting_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_time(step: Step) -> float:
    prepared = step.prepare()
    start = time.perf_counter()
    step.run(prepared)
    return 1e3 * (time.perf_counter() - start)


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]

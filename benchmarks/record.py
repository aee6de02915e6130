"""Rows of results: what was measured, on what, with which versions; appended to a CSV that only ever grows."""

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
FOLDER = ROOT / RESULTS


@dataclass
class Row:
    """One measurement; empty where it does not apply."""

    date: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    opponent: str = ""
    """Packages and versions behind what is measured, other than ours and torch."""
    commit: str = ""
    """Short hash, with ``+dirty`` where the tree, new files included, differs from it."""
    op: str = ""
    implementation: str = ""
    shape: str = ""
    direction: str = ""
    """forward, backward or both."""
    status: str = "ok"
    """ok, or why there is no time: skipped, wrong, out of memory, failed."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    flops: float | None = None
    bytes: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    copy_ceiling_gbps: float | None = None
    matmul_ceiling_tflops: float | None = None
    share_of_ceiling: float | None = None
    """Time that the ceiling in force (the slower of bytes and FLOPs) would take, over the median."""
    peak_extra_mb: float | None = None
    """Device memory on top of the inputs; of a whole training step or rollout all of it, weights included."""
    error: float | None = None
    """Largest |out - truth| / |truth| of what the direction computes: outputs, gradients or both."""
    tokens_per_s: float | None = None
    first_step_s: float | None = None
    """Seconds until the first step was done, compilation included."""


COLUMNS = [field.name for field in fields(Row)]


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def results_file(device: torch.device) -> Path:
    """The file of this kind of device: ``results/nvidia_h200.csv``."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_") + ".csv")


@functools.cache
def commit() -> str:
    """The state of the source when the process began, results aside; it is never filled in afterwards.

    ``BENCHMARK_COMMIT`` where the folder is a copy without history; empty where neither is known.
    """
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given
    try:
        folder, head = _git("rev-parse", "--show-toplevel", "--short", "HEAD").splitlines()
        if Path(folder) != ROOT:  # a copy inside of another repository
            return ""
        changes = _git("status", "--porcelain", "--", ".", f":!{RESULTS}")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+dirty" if changes else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def ready(path: Path) -> None:
    """Asked before anything is measured: raises ValueError where a row could not be added to ``path`` afterwards."""
    if not commit():
        raise ValueError(
            f"{path}: the commit of these rows is unknown, because {ROOT} has no history; set BENCHMARK_COMMIT to what "
            "`python benchmarks/record.py` prints where it has"
        )
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            raise ValueError(f"{path}: its columns are {header}, expected {COLUMNS}; move the file away")


def new_row(device: torch.device, **values: object) -> Row:
    """A row of now, here and this version of everything."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Row(now, device_name(device), torch.__version__, triton, commit=commit(), **values)  # type: ignore[arg-type]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file; raises ValueError where it is not ``ready``."""
    ready(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _rounded(value) for name, value in asdict(row).items()})


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            for values in csv.DictReader(file):
                kinds = {field.name: field.type for field in fields(Row)}
                rows.append(
                    Row(**{n: v if kinds[n] is str else float(v) if v else None for n, v in values.items()})  # type: ignore[arg-type]
                )
    return rows


if __name__ == "__main__":
    print(commit())

"""Rows of results: what was measured, on what, with which versions; appended to a CSV that only ever grows."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measurement; empty where it does not apply."""

    date: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    opponent: str = ""
    """Package and version of what is measured, where it is not ours or torch's."""
    commit: str = ""
    """Short hash, with ``+dirty`` where tracked files differ from it."""
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
    """Largest |out - truth| / |truth| over outputs and gradients."""
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


def commit() -> str:
    """The state of the source; ``BENCHMARK_COMMIT`` where the folder is a copy without history."""
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changes.strip() else "")


def new_row(device: torch.device, **values: object) -> Row:
    """A row of now, here and this version of everything."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Row(now, device_name(device), torch.__version__, triton, commit=commit(), **values)  # type: ignore[arg-type]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file; raises ValueError where the file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            raise ValueError(f"{path}: its columns are {header}, expected {COLUMNS}; move the file away")
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

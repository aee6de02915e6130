"""Reads ``metrics.jsonl``: every logged figure as a curve over steps."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Curve:
    """One figure over a run."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self, window: int | None = None) -> np.ndarray:
        """Running mean over the last ``window`` points; by default a twentieth of the curve, at least 5."""
        width = window or max(5, len(self.values) // 20)
        sums = np.cumsum(np.concatenate([[0.0], self.values]))
        ends = np.arange(1, len(self.values) + 1)
        starts = np.maximum(0, ends - width)
        return (sums[ends] - sums[starts]) / (ends - starts)


def read_curves(file: Path) -> dict[str, Curve]:
    """Figure -> curve; empty without the file. Null values and a half-written last line are left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            for name, value in row.items():
                if name not in ("step", "seconds", "epoch") and isinstance(value, int | float):
                    points.setdefault(name, []).append((int(row["step"]), float(value)))
    curves = {}
    for name, pairs in points.items():
        steps, values = zip(*pairs, strict=True)
        curves[name] = Curve(np.array(steps), np.array(values))
    return curves

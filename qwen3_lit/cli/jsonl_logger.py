"""A Lightning logger that appends every logged row of training to ``metrics.jsonl``.

Each line is ``{"step": int, "seconds": wall clock since the epoch, name: value, ...}``. After a kill the run
repeats the steps since its checkpoint: their old rows, and a half-written last line, are dropped when the first new row
comes. The other verbs append to ``validate.jsonl`` and ``test.jsonl``: they log at step 0, which is no step of the run.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class JsonlLogger(Logger):
    """Writes ``<folder>/metrics.jsonl``, or the file of another verb than fit, one JSON object a line, flushed."""

    def __init__(self, folder: str | Path, verb: str = "fit") -> None:
        super().__init__()
        self.path = Path(folder) / ("metrics.jsonl" if verb == "fit" else f"{verb}.jsonl")
        self._continued = verb != "fit"
        self._latest: tuple[int, frozenset[str]] | None = None

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """The run folder is the version; there is one file in it."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved recipe lies beside the file as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; non-finite values are written as null, which every JSON reader accepts.

        The same figures of the same step are one row, however often they come: before the step is saved, and after.
        """
        step = 0 if step is None else int(step)
        if self._latest == (step, frozenset(metrics)):
            return
        self._latest = step, frozenset(metrics)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._continued:
            self._drop_repeated(step)
            self._continued = True
        row: dict[str, Any] = {"step": step, "seconds": round(time.time(), 3)}
        for name, value in metrics.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _drop_repeated(self, first_step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] < first_step:
                kept.append(line + "\n")
        half = self.path.with_suffix(".jsonl.half")
        half.write_text("".join(kept), encoding="utf-8")
        os.replace(half, self.path)

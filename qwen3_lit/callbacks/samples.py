"""Keeps what the model said: ``samples.jsonl`` in the run folder and a table in TensorBoard.

Each line is a sample of ``PhaseModule.samples`` with ``stage`` (before, train or after) and ``global_step``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from qwen3_lit.callbacks.phase_record import is_trial
from qwen3_lit.data.atomic_files import write_text
from qwen3_lit.errors import UserError
from qwen3_lit.modules.phase_module import PhaseModule

SAMPLES_FILE = "samples.jsonl"
COLUMNS = ("task", "mode", "prompt", "completion", "reference", "reward", "advantage")

Sample = Mapping[str, Any]


class Samples(L.Callback):
    """Writes the completions that a phase generates while it trains."""

    def __init__(
        self, every_n_steps: int = 10, max_per_step: int = 4, max_rows: int = 2000, max_chars: int = 600
    ) -> None:
        """
        Args:
            every_n_steps: training steps between two writes; phases that generate nothing write nothing.
            max_per_step: samples of one write.
            max_rows: most rows of the file; the oldest training rows make room.
            max_chars: characters of a text in the TensorBoard table; the file has the whole text.
        """
        super().__init__()
        if every_n_steps < 1:
            raise UserError(f"samples.every_n_steps: seen {every_n_steps}, expected 1 or more")
        self.every_n_steps = every_n_steps
        self.max_per_step = max_per_step
        self.max_rows = max_rows
        self.max_chars = max_chars
        self._rows = 0
        self._seen: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the rows of steps that a resumed run repeats."""
        self._seen = None
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / SAMPLES_FILE
            rows = [
                row
                for row in read_samples(file)
                if row["stage"] != "train" or row["global_step"] <= trainer.global_step
            ]
            self._rows = len(rows)
            if file.exists():
                _write(file, rows)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the newest samples."""
        assert isinstance(pl_module, PhaseModule)
        if not trainer.is_global_zero or is_trial(trainer) or batch_idx % self.every_n_steps:
            return
        if not pl_module.samples or pl_module.samples is self._seen:
            return
        self._seen = pl_module.samples
        rows = _labelled(self._seen[: self.max_per_step], "train", trainer.global_step)
        file = Path(trainer.default_root_dir) / SAMPLES_FILE
        if self._rows + len(rows) > self.max_rows:
            kept = _thinned(read_samples(file), self.max_rows // 2)
            _write(file, kept)
            self._rows = len(kept)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(_line(row) for row in rows)
        self._rows += len(rows)
        table = markdown_table(rows, self.max_chars)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", table, trainer.global_step)


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The rows of a sample file; a half-written last line, left by a kill, is dropped."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def replace_stage(file: Path, samples: Sequence[Sample], stage: str, step: int) -> None:
    """Write the samples of an evaluation in place of older ones of the same stage."""
    rows = [row for row in read_samples(file) if row["stage"] != stage]
    if samples or file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, rows + _labelled(samples, stage, step))


def markdown_table(rows: Sequence[Sample], max_chars: int = 600) -> str:
    """Samples as a Markdown table: the known columns that occur, then one for each reward."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    rewards = sorted({name for row in rows for name in row.get("rewards") or {}})
    lines = [" | ".join(["", *columns, *rewards, ""]).strip(), "|" + " --- |" * (len(columns) + len(rewards))]
    for row in rows:
        values = [row.get(name) for name in columns] + [(row.get("rewards") or {}).get(name) for name in rewards]
        lines.append("| " + " | ".join(_cell(value, max_chars) for value in values) + " |")
    return "\n".join(lines)


def _cell(value: Any, max_chars: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    if len(text) > max_chars:
        text = text[: max_chars // 2] + " [...] " + text[-max_chars // 2 :]
    for sign, replacement in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(sign, replacement)
    return text


def _labelled(samples: Sequence[Sample], stage: str, step: int) -> list[dict[str, Any]]:
    return [{"stage": stage, "global_step": step, **sample} for sample in samples]


def _thinned(rows: list[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """All evaluation rows and the newest training rows."""
    evaluation = [row for row in rows if row["stage"] != "train"]
    return evaluation + [row for row in rows if row["stage"] == "train"][-keep:]


def _line(row: Sample) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _write(file: Path, rows: Sequence[Sample]) -> None:
    write_text(file, "".join(_line(row) for row in rows))

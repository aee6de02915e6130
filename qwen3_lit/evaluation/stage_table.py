"""What a run folder holds, as one table: every finished phase with its figures, seconds and memory.

Reads ``<run folder>/<phase>/phase.json``, ``pipeline_state.json`` and the report of the curation. A phase is numbered
when its name begins with a digit; in a folder with numbered phases the others are listed apart, as supporting ones.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_lit.errors import UserError

PHASE_FILE = "phase.json"
STATE_FILE = "pipeline_state.json"
CURATION_FILE = "data/cold_start_report.json"

EXPECTED: dict[int, tuple[str, ...]] = {
    1: ("held_out_loss_before", "held_out_loss_after"),
    2: ("held_out_loss_before", "held_out_loss_after"),
    3: ("held_out_loss_before", "held_out_loss_after", "held_out_loss_4x_plain", "held_out_loss_4x_dca"),
    4: ("accuracy", "kept_fraction", "dropped"),
    5: ("accuracy_before", "accuracy_after"),
    6: ("think_follow", "accuracy_think", "accuracy_no_think"),
    7: ("reward_before", "reward_after", "think_follow"),
    8: ("accuracy_think", "accuracy_no_think"),
    9: ("accuracy_before", "accuracy_after", "seconds_per_point", "rl_seconds_per_point"),
}
"""Number of a phase -> the figures that its row has to have."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """One finished phase."""

    folder: Path
    record: Mapping[str, Any]
    """Content of its phase.json."""
    metrics: dict[str, Any]
    """Its figures, with those that come from other files."""
    seconds: float
    """Wall clock of the whole step, start-up and evaluation included."""
    peak_rss_gb: float
    """Peak memory of its processes."""

    @property
    def name(self) -> str:
        """Name of the phase, that of its folder."""
        return str(self.record["name"])

    @property
    def number(self) -> int | None:
        """Place in the published pipeline, None for supporting phases."""
        match = re.match(r"(\d+)", self.name)
        return int(match[1]) if match else None

    def row(self) -> dict[str, Any]:
        """The phase in ``report.json``."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 2),
            "metrics": self.metrics,
            "train_seconds": self.record["seconds"],
            "eval_seconds": self.record["eval_seconds"],
            "peak_rss_gb": self.peak_rss_gb,
            "module": self.record["module"],
        }


@dataclass(frozen=True)
class StageTable:
    """A run folder."""

    run_dir: Path
    phases: list[Phase]
    """The pipeline's phases in order."""
    supporting: list[Phase]
    """Finished phases beside them: reward model, comparison runs."""
    steps: dict[str, dict[str, Any]]
    """Every step of the pipeline with its seconds and memory; empty for a run without pipeline."""
    total_seconds: float
    peak_rss_gb: float
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Phase -> expected figures that it does not have."""

    def as_json(self) -> dict[str, Any]:
        """Content of ``report.json``."""
        return {
            "total_seconds": round(self.total_seconds, 1),
            "peak_rss_gb": self.peak_rss_gb,
            "phases": [phase.row() for phase in self.phases],
            "supporting_phases": [phase.row() for phase in self.supporting],
            "steps": [{"name": name, **_figures(step)} for name, step in self.steps.items()],
            "missing": self.missing,
        }


def _figures(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: step.get(key) for key in ("seconds", "peak_rss_gb", "done")}


def read_json(file: Path) -> Any:
    """The content of a JSON file that this project writes whole, None when there is none. UserError when damaged."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); delete it and run its step again") from error


def stage_table(run_dir: str | Path) -> StageTable:
    """Collect a run folder, or the folder of one phase.

    Raises:
        UserError: no such folder, no finished phase in it, or a damaged file.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; expected a run folder such as runs/my_run")
    state = read_json(run_dir / STATE_FILE) or {}
    steps: dict[str, dict[str, Any]] = state.get("steps", {})
    files = [run_dir / PHASE_FILE] if (run_dir / PHASE_FILE).is_file() else sorted(run_dir.glob(f"*/{PHASE_FILE}"))
    if not files:
        raise UserError(f"{run_dir}: no finished phase ({PHASE_FILE}) in it or one folder below; run a phase first")
    places = {name: place for place, name in enumerate(steps)}
    found = [_read_phase(file, steps) for file in files]
    found.sort(key=lambda phase: (places.get(phase.folder.name, len(places)), phase.number or 0, phase.name))
    numbered = [phase for phase in found if phase.number is not None]
    phases = numbered or found
    supporting = [phase for phase in found if phase not in phases]
    missing = {}
    for phase in phases:
        _add_from_elsewhere(phase, found, run_dir)
        expected = EXPECTED.get(phase.number or 0, ()) if numbered else ()
        absent = [name for name in expected if phase.metrics.get(name) is None]
        if absent:
            missing[phase.name] = absent
            log.warning("%s: the report lacks %s", phase.name, ", ".join(absent))
    return StageTable(
        run_dir=run_dir,
        phases=phases,
        supporting=supporting,
        steps=steps,
        total_seconds=state.get("total_seconds") or sum(phase.seconds for phase in found),
        peak_rss_gb=max([state.get("peak_rss_gb") or 0.0, *(phase.peak_rss_gb for phase in found)]),
        missing=missing,
    )


def _read_phase(file: Path, steps: Mapping[str, Mapping[str, Any]]) -> Phase:
    record = read_json(file)
    for key in ("name", "seconds", "metrics", "before", "after"):
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"{file}: {key} is missing; expected the record of a finished phase; run the phase again")
    record = {"eval_seconds": 0.0, "module": "", "peak_memory_gb": 0.0, **record}
    step = steps.get(file.parent.resolve().name, {})
    return Phase(
        folder=file.parent,
        record=record,
        metrics=dict(record["metrics"]),
        seconds=step.get("seconds") or record["seconds"] + record["eval_seconds"],
        peak_rss_gb=step.get("peak_rss_gb") or record["peak_memory_gb"],
    )


def _add_from_elsewhere(phase: Phase, found: list[Phase], run_dir: Path) -> None:
    """Figures of a phase's row that another file knows: the curation's counts, the cost of the comparison run."""
    _name_over_modes(phase.metrics, EXPECTED.get(phase.number or 0, ()))
    if phase.number == 4:
        curation = read_json(run_dir / CURATION_FILE)
        if curation is not None:
            phase.metrics["kept_fraction"] = curation["kept_fraction"]
            phase.metrics["dropped"] = curation["dropped"]
    if phase.number == 9:
        other = _comparison(phase, found)
        figure = "accuracy"
        if other is not None:
            _name_over_modes(other.metrics, ("accuracy_before", "accuracy_after"))
            both_think = all("accuracy_think_after" in row.metrics for row in (phase, other))
            figure = "accuracy_think" if both_think else "accuracy"  # the costs have to be those of the same figure
            phase.metrics["rl_seconds_per_point"] = seconds_per_point(other, figure)
            for when in ("before", "after"):
                phase.metrics[f"rl_accuracy_{when}"] = other.metrics.get(f"{figure}_{when}")
        phase.metrics["seconds_per_point"] = seconds_per_point(phase, figure)


def _name_over_modes(metrics: dict[str, Any], expected: Iterable[str]) -> None:
    """Give the expected figures of a phase that was evaluated by mode: the only mode's, or the mean of both."""
    for name in expected:
        base = re.sub("_(before|after)$", "", name)
        if base not in ("accuracy", "reward"):
            continue
        end = name.removeprefix(base)
        by_mode = [metrics[key] for key in (f"{base}_think{end}", f"{base}_no_think{end}") if key in metrics]
        if name not in metrics and by_mode:
            metrics[name] = sum(by_mode) / len(by_mode)


def seconds_per_point(phase: Phase, figure: str = "accuracy") -> float | None:
    """Training seconds for each percentage point of a held-out accuracy; None when it did not rise."""
    before, after = phase.metrics.get(f"{figure}_before"), phase.metrics.get(f"{figure}_after")
    if before is None or after is None or after <= before:
        return None
    return float(phase.record["seconds"]) / (100 * (after - before))


def _comparison(phase: Phase, found: list[Phase]) -> Phase | None:
    """Reinforcement learning from the checkpoint that ``phase`` started from."""

    def start(other: Phase) -> str:
        return os.path.normpath(str(other.record.get("init_from")))

    for other in found:
        same_start = other.record["module"] == "GRPOModule" and start(other) == start(phase)
        if "rl_comparison" in other.name or same_start:
            return other
    return None

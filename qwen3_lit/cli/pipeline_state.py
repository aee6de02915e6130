"""``<run_dir>/pipeline_state.json``: what every step of a run folder has come to.

For each step a fingerprint of what it does, whether it is done, ``seconds`` of its process over all its starts,
``wall_seconds`` of them in which the pipeline had nothing to do in front of it, and the peak memory of its processes.
"""

import json
import os
from pathlib import Path
from typing import Any

from qwen3_lit.cli.pipeline_file import Step
from qwen3_lit.errors import UserError


class PipelineState:
    """The recorded progress of one run folder; written atomically."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipeline_state.json"
        self.steps: dict[str, dict[str, Any]] = {}
        self.forced: dict[str, Any] = {}
        self.peak_rss_gb = 0.0
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.steps, self.forced = content["steps"], content["forced"]
                self.peak_rss_gb = content["peak_rss_gb"]
                for step in self.steps.values():
                    step.setdefault("wall_seconds", step["seconds"])  # written by a version without steps side by side
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}: not a pipeline state ({error}); delete it to start anew") from error

    @property
    def total_seconds(self) -> float:
        """Seconds in which a step ran; those of steps side by side count once."""
        return sum(step["wall_seconds"] for step in self.steps.values())

    def write(self) -> None:
        """Replace the file."""
        content = {
            "total_seconds": round(self.total_seconds, 1),
            "peak_rss_gb": self.peak_rss_gb,
            "steps": self.steps,
            "forced": self.forced,
        }
        half = self.path.with_suffix(".json.half")
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(half, self.path)

    def is_done(self, step: Step, fingerprint: str) -> bool:
        """Whether the step ran to its end as it is defined now."""
        entry = self.steps.get(step.name)
        return bool(entry and entry["done"] and entry["hash"] == fingerprint)

    def begin(self, step: Step, fingerprint: str) -> None:
        """Record a step that starts clean."""
        figures = {"seconds": 0.0, "wall_seconds": 0.0, "peak_rss_gb": 0.0}
        self.steps[step.name] = {"hash": fingerprint, "done": False, **figures}

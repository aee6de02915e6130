"""The report's pictures: curves of a phase, and one overview of the run. Drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from qwen3_lit.data.atomic_files import write_bytes
from qwen3_lit.evaluation.metrics_file import Curve
from qwen3_lit.evaluation.stage_table import StageTable

INK, FAINT, ACCENT, SECOND = "#1b1f24", "#c9ced6", "#2463a8", "#d1652b"

PANELS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("reward",), "reward"),
    (("train/divergence",), "divergence from the teacher"),
    (("train/loss",), "loss"),
    (("train/accuracy",), "pairs ranked right"),
    (("policy/entropy",), "entropy"),
    (("rollout/completion_tokens/mean", "rollout/completion_tokens"), "tokens a completion"),
    (("router/max_violation",), "router: excess load of the busiest expert"),
    (("train/grad_norm",), "gradient norm"),
)
"""Figures that are worth a panel, the most telling first; each under the names it may have."""
MAX_PANELS = 3
BESIDE = {"train/loss": ("val/loss", "held-out")}
"""A figure that is drawn into the panel of another one."""


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, file: Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())


def draw_curves(curves: Mapping[str, Curve]) -> Figure | None:
    """The phase's most telling curves side by side; None when nothing was logged."""
    chosen = [
        (name, title) for names, title in PANELS for name in names if name in curves and len(curves[name].steps) > 1
    ][:MAX_PANELS]
    if not chosen:
        return None
    figure = _canvas(3.6 * len(chosen), 2.5)
    for place, (name, title) in enumerate(chosen):
        axes = figure.add_subplot(1, len(chosen), place + 1)
        _tidy(axes, title)
        _draw_curve(axes, curves[name])
        if name in BESIDE and BESIDE[name][0] in curves:
            other, label = BESIDE[name]
            points = curves[other]
            axes.plot(points.steps, points.values, "o-", color=SECOND, markersize=3.5, linewidth=1.2, label=label)
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def _draw_curve(axes: Axes, curve: Curve) -> None:
    many = len(curve.values) > 12
    axes.plot(curve.steps, curve.values, color=FAINT if many else ACCENT, linewidth=0.9 if many else 1.6)
    if many:
        axes.plot(curve.steps, curve.smoothed(), color=ACCENT, linewidth=1.6)
        # A spike of the first steps must not flatten the rest.
        low, high = np.quantile(curve.values, [0.0, 1.0])
        calm = np.quantile(curve.values[len(curve.values) // 20 :], [0.0, 1.0])
        if high - low > 4 * (calm[1] - calm[0]) > 0:
            margin = 0.08 * (calm[1] - calm[0])
            axes.set_ylim(calm[0] - margin, calm[1] + margin)


def draw_overview(table: StageTable) -> Figure:
    """Accuracy on held-out problems after each phase, and where the time went."""
    bars = _accuracies(table)
    steps = [(name, float(step.get("seconds") or 0.0)) for name, step in table.steps.items()]
    steps = steps or [(phase.name, phase.seconds) for phase in [*table.phases, *table.supporting]]
    height = max(2.8, 0.5 + 0.2 * len(steps))
    figure = _canvas(10.5, height)
    if bars:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1.0])
        _draw_accuracies(left, bars)
    else:
        right = figure.add_subplot()
    _draw_seconds(right, steps)
    return figure


def _accuracies(table: StageTable) -> list[tuple[str, dict[str, float]]]:
    found = []
    for phase in table.phases:
        after: Mapping[str, Any] = phase.record["after"]
        names = {"accuracy": "own mode", "accuracy_think": "thinking", "accuracy_no_think": "not thinking"}
        values = {label: after[name] for name, label in names.items() if after.get(name) is not None}
        if "thinking" in values:
            values.pop("own mode", None)
        if values:
            found.append((phase.name, values))
    return found


def _draw_accuracies(axes: Axes, bars: Sequence[tuple[str, dict[str, float]]]) -> None:
    _tidy(axes, "accuracy on the held-out problems of each phase, after it")
    colors = {"own mode": "#7a8794", "thinking": ACCENT, "not thinking": SECOND}
    shown: set[str] = set()
    for place, (_, values) in enumerate(bars):
        width = 0.8 / len(values)
        for index, (label, value) in enumerate(values.items()):
            x = place - 0.4 + width * (index + 0.5)
            axes.bar(x, value, width * 0.92, color=colors[label], label=None if label in shown else label)
            axes.text(x, value + 0.012, f"{100 * value:.0f}", ha="center", fontsize=7.5, color=INK)
            shown.add(label)
    axes.set_xticks(range(len(bars)), [name.replace("_", "\n") for name, _ in bars], fontsize=7)
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(shown))


def _draw_seconds(axes: Axes, steps: Sequence[tuple[str, float]]) -> None:
    _tidy(axes, f"seconds of each step ({sum(seconds for _, seconds in steps):,.0f} in all)")
    names = [name for name, _ in steps]
    seconds = [value for _, value in steps]
    colors = [ACCENT if name[:1].isdigit() else "#9db4cf" for name in names]
    axes.barh(range(len(steps)), seconds, color=colors, height=0.75)
    for place, value in enumerate(seconds):
        axes.text(value, place, f" {value:,.0f}", va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(steps)), names, fontsize=7)
    axes.set_xlim(0, max([*seconds, 1.0]) * 1.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.6)

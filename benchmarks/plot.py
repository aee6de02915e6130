"""Figures of the README from the results: ``python benchmarks/plot.py [CSV ...] [--out FOLDER]``.

``roofline.png``: FLOP/s over FLOPs a byte, under the ceilings measured in the same runs. ``speedup.png``: our time
beside the alternatives', for each operation and shape. The latest row of a measurement counts.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from operation import operations
from record import FOLDER, Row, read

OURS_COLOUR, BEST_COLOUR, OTHER_COLOUR = "#0b6e4f", "#444444", "#b9bec5"
MARKERS = "os^vDPX<>*"
OUR_KERNELS = ("triton", "mixed", "ours")
"""What else ``dispatch`` knows is torch's or another package's work behind our interface."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*", help="default: every file of benchmarks/results")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    parser.add_argument("--gpu", help="only rows of this GPU; needed where the files hold several")
    options = parser.parse_args(arguments)
    files = options.csv or sorted(FOLDER.glob("*.csv"))
    rows = latest(row for row in read(files) if row.status == "ok" and row.op in operations())
    gpus = sorted({row.gpu for row in rows})
    if options.gpu:
        rows = [row for row in rows if row.gpu == options.gpu]
    elif len(gpus) > 1:
        parser.error(f"the files hold {', '.join(gpus)}; say --gpu")
    if not rows:
        parser.error(f"no measurement in {', '.join(map(str, files)) or FOLDER}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("roofline", roofline), ("speedup", speedup)):
        figure = draw(rows)
        figure.savefig(options.out / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        print(options.out / f"{name}.png")
    return 0


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each contender, shape, direction and GPU."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.gpu, row.op, row.shape, row.implementation, row.direction)
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


def our_best(rows: Sequence[Row]) -> Row | None:
    """The fastest of our kernels among the contenders of one measurement."""
    ours = [row for row in rows if row.implementation in OUR_KERNELS]
    return min(ours, key=_milliseconds) if ours else None


def _milliseconds(row: Row) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _by_measurement(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.shape, row.direction].append(row)
    return dict(sorted(groups.items()))


def roofline(rows: Sequence[Row]) -> plt.Figure:
    """Our fastest implementation of each operation, every shape and direction, under the measured roof."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    copy = max(row.copy_ceiling_gbps or 0.0 for row in rows) / 1e3
    peak = max(row.matmul_ceiling_tflops or 0.0 for row in rows)
    found = {key: best for key, group in _by_measurement(rows).items() if (best := our_best(group)) is not None}
    intensities = [row.flops / row.bytes for row in found.values() if row.flops and row.bytes]
    low, high = min([*intensities, 1.0]) / 2, max([*intensities, 2 * peak / copy]) * 2
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color="black", linewidth=1.5)
    axes.text(high, peak * 1.08, f"product {peak:.0f} TFLOP/s", ha="right", va="bottom")
    axes.text(low * 1.1, low * 1.1 * copy * 1.25, f"copy {copy:.2f} TB/s", rotation=35, rotation_mode="anchor")
    for number, op in enumerate(sorted({op for op, _, _ in found})):
        points = [row for (name, _, _), row in found.items() if name == op and row.flops and row.bytes and row.tflops]
        axes.scatter(
            [row.flops / row.bytes for row in points if row.flops and row.bytes],
            [row.tflops for row in points if row.tflops],
            marker=MARKERS[number % len(MARKERS)],
            s=42,
            alpha=0.85,
            label=op,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, at least", ylabel="TFLOP/s", ylim=(None, peak * 2.5))
    axes.set_title(f"{rows[0].gpu}: our kernels under the measured roof", loc="left")
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    _strip(axes)
    return figure


def speedup(rows: Sequence[Row]) -> plt.Figure:
    """One line an operation and shape: times of all contenders over ours, of a training step where there is one."""
    measured = {key: group for key, group in _by_measurement(rows).items() if our_best(group) and len(group) > 1}
    groups = {
        (op, shape, direction): group
        for (op, shape, direction), group in measured.items()
        if direction == "both" or (direction == "forward" and (op, shape, "both") not in measured)
    }
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * max(len(groups), 1)))
    labels = []
    for line, (key, group) in enumerate(groups.items()):
        ours = our_best(group)
        assert ours is not None
        others = [row for row in group if row.implementation not in OUR_KERNELS]
        axes.scatter([1.0], [line], color=OURS_COLOUR, marker="D", s=34, zorder=3)
        for row in others:
            axes.scatter([_milliseconds(row) / _milliseconds(ours)], [line], color=OTHER_COLOUR, s=26, zorder=2)
        if others:
            best = min(others, key=_milliseconds)
            ratio = _milliseconds(best) / _milliseconds(ours)
            axes.plot([1.0, ratio], [line, line], color=BEST_COLOUR, linewidth=1.2, zorder=1)
            axes.scatter([ratio], [line], color=BEST_COLOUR, s=30, zorder=3)
            axes.annotate(
                f"{ratio:.2f}x  {best.implementation}",
                (max(ratio, 1.0), line),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
                zorder=4,
            )
        direction = {"both": "forward + backward"}.get(key[2], key[2])
        labels.append(f"{key[0]}  {key[1]}  {direction}  {_milliseconds(ours):.4g} ms")
    axes.axvline(1.0, color=OURS_COLOUR, linewidth=1.0)
    axes.set(xscale="log", xlabel="time over ours (right of 1: ours is faster); dark: the best alternative")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(len(labels) - 0.3, -0.7)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"{rows[0].gpu}: our time beside the alternatives", loc="left")
    _strip(axes)
    return figure


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())

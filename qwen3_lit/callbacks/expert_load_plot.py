"""The routing heatmap: one row a layer, one column an expert, colour = load relative to a fair share.

Legend: L MoE layers, E experts.
"""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DEAD = "#ffd800"
LIMIT = 2.0
"""Colours end at a quarter and at four times the fair share."""


def draw_heatmap(counts_LE: np.ndarray, title: str) -> Figure:
    """Figure of the loads; an expert that got nothing is yellow, which no load is.

    Args:
        counts_LE: routed rows of each expert.
        title: what span of training they come from.
    """
    layers, experts = counts_LE.shape
    share_LE = counts_LE * experts / np.maximum(counts_LE.sum(-1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        color_LE = np.ma.masked_invalid(np.log2(share_LE))
    figure = Figure(figsize=(8.0, float(np.clip(1.3 + 0.22 * layers, 2.2, 9.0))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = _colors()
    image = axes.imshow(color_LE, aspect="auto", cmap=colors, norm=Normalize(-LIMIT, LIMIT), interpolation="nearest")
    dead = int((counts_LE == 0).sum())
    busiest = float(share_LE.max())
    found = f"busiest {busiest:.1f} x fair share, {dead} dead" + (" (yellow)" if dead else "")
    axes.set_title(f"Expert load, {title}: {found}", fontsize=10, loc="left")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load / fair share")
    return figure


def _colors():  # type: ignore[no-untyped-def]
    from matplotlib import colormaps

    colors = colormaps["RdBu_r"].copy()
    colors.set_bad(DEAD)
    return colors


def pixels(figure: Figure) -> np.ndarray:
    """The figure as an image [height, width, 3] of bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

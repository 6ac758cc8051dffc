"""How figures look: a light background, few lines, colours that the colour-blind tell apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from scipy.optimize import isotonic_regression

from capgap.law import scale_text

INK, SOFT, FAINT, PAPER = "#1f2430", "#6b7280", "#e3e6eb", "#ffffff"
# Okabe and Ito 2008.
BLUE, VERMILLION, ORANGE = "#0072B2", "#D55E00", "#E69F00"
ROLE_COLOURS = {"scratch": "#9aa1ad", "coupled": BLUE, "apart": VERMILLION}
DPI = 160

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot's global state; sizes in inches. Call inside `look()`."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def look():
    """A context in which figures get the house's looks, and nothing outside it does."""
    return rc_context(RC)


def colours(count: int) -> list[str]:
    """`count` colours from light to dark, ordered for the colour-blind too (a cut of viridis, reversed)."""
    ramp = colormaps["viridis"].reversed()
    return [to_hex(ramp(0.15 + 0.8 * (i / max(count - 1, 1)))) for i in range(count)]


def nice_scales(low: float, high: float, most: int = 5) -> list[float]:
    """Round parameter counts within [low, high], spaced as 1, 2, 5 or wider, `most` at most."""
    ticks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**p for p in range(16) for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def scale_axis(axes: Axes, which: str, low: float, high: float, most: int = 5) -> None:
    """Makes one axis a log axis of parameter counts, with ticks such as 100k and 2M."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ticks = nice_scales(low, high, most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(ticks, [scale_text(t) for t in ticks])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `wanted` (least squares) in [low, high] and at least `gap` apart, in its order.

    The gap shrinks where the room is too small for all.
    """
    count = len(wanted)
    if not count:
        return []
    gap = min(gap, (high - low) / max(count - 1, 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(count)
    # Less its steps, a sequence with gaps is one that only has to ascend.
    ascending = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.empty(count)
    placed[order] = np.clip(ascending, low, high - steps[-1]) + steps
    return placed.tolist()

"""Figures over tokens and over both roles: as PNG files and for the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from capgap.law import scale_text
from capgap.records import RunRecord
from capgap.report.analysis import Analysis
from capgap.report.figures import panels, save
from capgap.report.interactive import PlotlyFigure, layout_of, line_of
from capgap.report.style import INK, ORANGE, PAPER, SOFT, VERMILLION, colours, look, new_figure

Cells = dict[tuple[str, str], float]
RANDOM, NONE = "random", "none"


def ratio_over_tokens(analysis: Analysis, path: Path, names: Mapping[float, str]) -> Path | None:
    """T*/S over tokens per parameter, a line a student; triangles are censored. A PNG, or None with one budget."""
    series = _ratios(analysis)
    if len(analysis.budgets) < 2 or not series:
        return None
    with look():
        figure = new_figure(7.6, 4.6)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axhline(2.5, color=ORANGE, lw=1.6, ls=(0, (4, 3)), zorder=1)
        axes.text(0.99, 2.55, "published: 2.5", color="#9a6a00", fontsize=10, ha="right", transform=_x_axes(axes))
        for (student, points), colour in zip(series.items(), colours(len(series)), strict=True):
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=colour,
                lw=1.8,
                label=names.get(student, scale_text(student)),
                zorder=2,
            )
            for at, ratio, side in points:
                marker = {0: "D", -1: "v", 1: "^"}[side]
                axes.plot(at, ratio, marker, ms=8, mfc=PAPER if side else colour, mec=colour, mew=1.8, zorder=3)
        axes.set_xlabel("tokens per parameter of the student")
        axes.set_ylabel("best teacher T*/S")
        _plain_ticks(
            axes, [p[0] for pts in series.values() for p in pts], [p[1] for pts in series.values() for p in pts]
        )
        axes.legend(title="student; open: censored", fontsize=9.5, title_fontsize=9.5)
        return save(figure, path)


def tokens_plot(analysis: Analysis, names: Mapping[float, str]) -> PlotlyFigure:
    """The same for the page."""
    series = _ratios(analysis)
    traces: list[dict[str, Any]] = []
    for (student, points), colour in zip(series.items(), colours(len(series)), strict=True):
        name = names.get(student, scale_text(student))
        x, y, sides = zip(*points, strict=True)
        words = [
            f"{name}: T*/S {_sign(side)}{ratio:.2f} at {at:.3g} tokens per parameter" for at, ratio, side in points
        ]
        trace = line_of(x, y, colour, name) | {"mode": "lines+markers", "text": words, "showlegend": True}
        symbols = [{0: "diamond", -1: "triangle-down-open", 1: "triangle-up-open"}[side] for side in sides]
        trace |= {"hovertemplate": "%{text}<extra></extra>", "marker": {"size": 11, "symbol": symbols, "color": colour}}
        traces.append(trace)
    layout = layout_of("tokens per parameter of the student", "best teacher T*/S")
    layout["xaxis"] |= {"type": "log"}
    layout["yaxis"] |= {"type": "log"}
    line = {"color": ORANGE, "width": 2, "dash": "dash"}
    layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 2.5, "y1": 2.5, "line": line}]
    return {"data": traces, "layout": layout}


def cells_of(records: Sequence[RunRecord]) -> tuple[list[str], list[str], Cells]:
    """Starts, teachers (both from small to large, random and none first) and the mean loss of each pair."""
    starts = {r.start or RANDOM: r.start_scale or 0 for r in records}
    teachers = {r.teacher or NONE: r.teacher_scale or 0 for r in records}
    groups: dict[tuple[str, str], list[float]] = {}
    for r in records:
        groups.setdefault((r.start or RANDOM, r.teacher or NONE), []).append(r.loss)
    cells = {pair: float(np.mean(losses)) for pair, losses in groups.items()}
    return sorted(starts, key=lambda n: starts[n]), sorted(teachers, key=lambda n: teachers[n]), cells


def roles_map(groups: Mapping[str, Sequence[RunRecord]], path: Path) -> Path:
    """Losses over start and teacher, a panel a group; the lowest and the best model for both are marked. A PNG."""
    with look():
        figure, found = panels(len(groups), 1.5)
        for axes, (title, records) in zip(found, groups.items(), strict=True):
            starts, teachers, cells = cells_of(records)
            grid = np.array([[cells.get((s, t), np.nan) for t in teachers] for s in starts])
            shown = grid - np.nanmin(grid)
            axes.imshow(
                shown, cmap=_ramp(), vmin=0, vmax=float(np.nanquantile(shown, 0.8)), aspect="auto", origin="lower"
            )
            axes.grid(visible=False)
            axes.set_xticks(range(len(teachers)), teachers, rotation=60, ha="right", fontsize=8.5)
            axes.set_yticks(range(len(starts)), starts, fontsize=8.5)
            for pair, marker in ((best(cells), "*"), (best_coupled(cells), "o")):
                if pair is not None:
                    at = teachers.index(pair[1]), starts.index(pair[0])
                    axes.plot(*at, marker, ms=11, mfc=PAPER, mec=VERMILLION, mew=1.6)
            axes.set_title(title, fontsize=10.5)
        figure.supxlabel("teacher", fontsize=11)
        figure.supylabel("start", fontsize=11)
        return save(figure, path)


def roles_heat(records: Sequence[RunRecord]) -> PlotlyFigure:
    """The same of one student and budget for the page."""
    starts, teachers, cells = cells_of(records)
    grid = [[cells.get((s, t)) for t in teachers] for s in starts]
    scale = [[i / 8, _hex(i / 8)] for i in range(9)]
    trace = {
        "type": "heatmap", "x": teachers, "y": starts, "z": grid, "colorscale": scale, "hoverongaps": False,
        "text": [["" if v is None else f"{v:.3f}" for v in row] for row in grid], "texttemplate": "%{text}",
        "hovertemplate": "cut from %{y}, taught by %{x}: %{z:.4f}<extra></extra>",
        "colorbar": {"title": {"text": "nats"}}, "textfont": {"size": 11, "color": INK},
    }  # fmt: skip
    layout = layout_of("teacher", "start")
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"type": "category"}
    return {"data": [trace], "layout": layout | {"height": 140 + 34 * len(starts)}}


def best(cells: Cells) -> tuple[str, str] | None:
    """The pair with the lowest loss."""
    return min(cells, key=lambda pair: cells[pair], default=None)


def best_coupled(cells: Cells) -> tuple[str, str] | None:
    """The best model in both roles."""
    return best({pair: loss for pair, loss in cells.items() if pair[0] == pair[1]})


def _ratios(analysis: Analysis) -> dict[float, list[tuple[float, float, int]]]:
    """For each student (tokens per parameter, T*/S, side)."""
    found: dict[float, list[tuple[float, float, int]]] = {}
    for budget in analysis.budgets:
        for row in budget.law.optima if budget.law else ():
            point = (budget.per_parameter, row.optimum.teacher / row.student, row.side)
            found.setdefault(row.student, []).append(point)
    return dict(sorted(found.items()))


def _sign(side: int) -> str:
    return {0: "= ", -1: "≤ ", 1: "≥ "}[side]


def _ramp() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("loss", [_hex(i / 8) for i in range(9)])


def _hex(share: float) -> str:
    """From a clear blue, where the loss is low, to white."""
    low, high = np.array([0x56, 0xB4, 0xE9]), np.array([0xFF, 0xFF, 0xFF])
    return "#" + "".join(f"{round(v):02x}" for v in low + share * (high - low))


def _x_axes(axes: Any) -> Any:
    return axes.get_yaxis_transform()


def _plain_ticks(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    at = sorted({float(f"{v:.2g}") for v in x})
    axes.set_xticks(at, [f"{v:.3g}" for v in at])
    ticks = [v for v in (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70) if min(y) / 1.3 <= v <= max(*y, 2.5) * 1.3]
    axes.set_yticks(ticks, [f"{v:g}" for v in ticks])
    axes.minorticks_off()
    axes.tick_params(colors=SOFT)

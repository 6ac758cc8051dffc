"""The page's figures, as plain Plotly figures (dictionaries with data and layout)."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from capgap.law import PUBLISHED, LawFit, Observation, StudentOptimum, published_teacher, scale_text
from capgap.records import RunRecord
from capgap.report.figures import curve_of, law_words, run_label
from capgap.report.rows import RoleBar
from capgap.report.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    PAPER,
    ROLE_COLOURS,
    SOFT,
    VERMILLION,
    colours,
    nice_scales,
)

PlotlyFigure = dict[str, Any]


def loss_plot(student: float, observations: Sequence[Observation], row: StudentOptimum | None) -> PlotlyFigure:
    """Held-out loss over teacher scale of one student."""
    mine = [o for o in observations if o.student == student]
    published = published_teacher(student).teacher
    teachers = [o.teacher for o in mine]
    traces = [_points(teachers, [o.loss for o in mine], [
        f"teacher {scale_text(o.teacher)} ({o.teacher / student:.2f} S), seed {o.seed}: {o.loss:.4f}"
        for o in mine
    ])]  # fmt: skip
    if row is not None:
        found = row.optimum
        at = np.geomspace(found.grid[0], found.grid[-1], 80)
        traces.insert(0, line_of(at, found.curve(at), BLUE, "parabola"))
        if row.low is not None and row.high is not None:
            traces.append(line_of([row.low, row.high], [found.loss] * 2, VERMILLION, "interval of T*", width=5))
        traces.append(_optimum(found.teacher, found.loss, found.censored, (
            f"{optimum_words(row)}, loss {found.loss:.4f}"
        ), "triangle-left" if found.censored == "low" else "triangle-right"))  # fmt: skip
    layout = layout_of("teacher, parameters", "held-out loss, nats per token")
    layout["xaxis"] |= _scale_axis(min(*teachers, published) / 1.2, max(*teachers, published) * 1.2)
    layout["shapes"] = [{
        "type": "line", "x0": published, "x1": published, "yref": "paper", "y0": 0, "y1": 1,
        "line": {"color": ORANGE, "width": 2, "dash": "dash"},
    }]  # fmt: skip
    layout["annotations"] = [{
        "x": float(np.log10(published)), "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False,
        "text": "published law", "font": {"color": "#9a6a00", "size": 12},
    }]  # fmt: skip
    return {"data": traces, "layout": layout}


def optimum_words(row: StudentOptimum) -> str:
    """One student's optimum in words, such as T* = 164k (2.82 S); a censored one is called so."""
    found = row.optimum
    if found.censored is None:
        return f"T* = {scale_text(found.teacher)} ({found.teacher / row.student:.2f} S)"
    sign = "≤" if found.censored == "low" else "≥"
    return f"T* {sign} {scale_text(found.teacher)} (censored)"


def law_plot(law: LawFit, names: Mapping[float, str]) -> PlotlyFigure:
    """Optimal teacher over student scale, with the fit, its band and the published 2.5 S."""
    students = [row.student for row in law.optima]
    low, high = min(students) / 1.5, max(students) * 1.5
    at = np.geomspace(low, high, 80)
    traces: list[dict[str, Any]] = []
    if law.ratio is not None:
        predicted = [law.predict(float(s)) for s in at]
        lows = [p.low for p in predicted if p.low is not None]
        highs = [p.high for p in predicted if p.high is not None]
        if len(lows) == len(highs) == len(at):
            outline = line_of([*at, *at[::-1]], [*highs, *lows[::-1]], "rgba(0,0,0,0)", "interval")
            band = {"fill": "toself", "fillcolor": "rgba(0,114,178,0.13)", "hoverinfo": "skip"}
            traces.append(outline | band)
        traces.append(line_of(at, [p.teacher for p in predicted], BLUE, "this law", width=3))
    traces.append(line_of(at, PUBLISHED.slope * at, ORANGE, "published: 2.5 S", dash="dash"))
    for row in law.optima:
        found = row.optimum
        if row.low is not None and row.high is not None:
            traces.append(line_of([row.student] * 2, [row.low, row.high], VERMILLION, "interval", width=3))
        name = escape(names.get(row.student, scale_text(row.student)))
        symbol = "triangle-down" if found.censored == "low" else "triangle-up"
        traces.append(_optimum(row.student, found.teacher, found.censored, f"{name}: {optimum_words(row)}", symbol))
    teachers = [row.optimum.teacher for row in law.optima] + [2.5 * low, 2.5 * high]
    layout = layout_of("student S, parameters", "optimal teacher T*, parameters")
    layout["xaxis"] |= _scale_axis(low, high)
    layout["yaxis"] |= _scale_axis(min(teachers) / 1.15, max(teachers) * 1.15)
    layout["annotations"] = [{
        "xref": "paper", "yref": "paper", "x": 0.01, "y": 0.99, "xanchor": "left", "yanchor": "top",
        "align": "left", "showarrow": False, "text": law_words(law).replace("\n", "<br>"),
        "font": {"color": BLUE, "size": 14},
    }]  # fmt: skip
    return {"data": traces, "layout": layout}


def curve_plot(records: Sequence[RunRecord]) -> PlotlyFigure | None:
    """Held-out loss over tokens of one student's runs; None where none has a curve."""
    shown = [r for r in records if len(curve_of(r)) > 1]
    if not shown:
        return None
    scales = sorted({r.teacher_scale or 0 for r in shown if r.teacher is not None})
    colour = dict(zip(scales, colours(len(scales)), strict=True))
    traces, settled = [], []
    for r in sorted(shown, key=lambda r: (r.teacher_scale or 0, r.start_scale or 0, r.seed)):
        tokens, losses = zip(*curve_of(r), strict=True)
        line = SOFT if r.teacher is None else colour[r.teacher_scale or 0]
        dash = "dash" if r.teacher is None else "solid" if r.start == r.teacher else "dashdot"
        name = escape(f"{run_label(r)}, seed {r.seed}")
        template = f"{name}<br>%{{x:.3s}} tokens: %{{y:.4f}}<extra></extra>"
        trace = line_of(tokens, losses, line, name, dash=dash) | {"hoverinfo": "all", "hovertemplate": template}
        traces.append(trace | {"showlegend": True})
        settled += [loss for t, loss in zip(tokens, losses, strict=True) if t >= 0.3 * tokens[-1]]
    room = 0.05 * (max(settled) - min(settled) or 0.1)
    layout = layout_of("tokens", "held-out loss, nats per token")
    layout["xaxis"]["tickformat"] = "~s"
    layout["yaxis"]["range"] = [min(settled) - room, max(settled) + room]
    return {"data": traces, "layout": layout | {"legend": {"orientation": "h", "y": -0.22}}}


def roles_plot(bars: Sequence[RoleBar]) -> PlotlyFigure:
    """Held-out loss of the ways to make one student, as horizontal bars."""
    everything = [loss for bar in bars for loss in bar.losses]
    room = max(everything) - min(everything) or 0.1
    labels = [f"{escape(bar.label)}<br><i>{escape(bar.tag)}</i>" for bar in bars]
    traces: list[dict[str, Any]] = [{
        "type": "bar", "orientation": "h", "x": [bar.mean for bar in bars], "y": labels,
        "marker": {"color": [ROLE_COLOURS[bar.kind] for bar in bars]}, "width": 0.6, "showlegend": False,
        "text": [f"{bar.mean:.4f}" for bar in bars], "textposition": "inside", "insidetextanchor": "end",
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }]  # fmt: skip
    several = [(loss, label) for bar, label in zip(bars, labels, strict=True) if len(bar.losses) > 1
               for loss in bar.losses]  # fmt: skip
    if several:
        words = [f"one seed: {loss:.4f}" for loss, _ in several]
        traces.append(_points([loss for loss, _ in several], [label for _, label in several], words, INK, 7))
    layout = layout_of("held-out loss, nats per token (does not start at 0)", "")
    layout["xaxis"]["range"] = [min(everything) - 0.5 * room, max(everything) + 0.1 * room]
    layout["yaxis"] |= {"autorange": "reversed", "automargin": True, "showgrid": False}
    return {"data": traces, "layout": layout | {"height": 150 + 62 * len(bars)}}


def _points(
    x: Sequence[Any], y: Sequence[Any], words: Sequence[str], colour: str = BLUE, size: int = 9
) -> dict[str, Any]:
    marker = {"size": size, "color": colour, "line": {"color": PAPER, "width": 1}}
    return {
        "type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "text": list(words),
        "hovertemplate": "%{text}<extra></extra>", "marker": marker, "showlegend": False,
    }  # fmt: skip


def line_of(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, colour: str, name: str,
    *, width: int = 2, dash: str = "solid",
) -> dict[str, Any]:  # fmt: skip
    """A trace of a line."""
    return {
        "type": "scatter", "mode": "lines", "x": [float(v) for v in x], "y": [float(v) for v in y],
        "name": name, "line": {"color": colour, "width": width, "dash": dash}, "hoverinfo": "name",
        "showlegend": False,
    }  # fmt: skip


def _optimum(x: float, y: float, censored: str | None, words: str, open_symbol: str) -> dict[str, Any]:
    trace = _points([x], [y], [words], PAPER if censored else VERMILLION, 13)
    outline = {"color": VERMILLION, "width": 2}
    trace["marker"] |= {"symbol": open_symbol if censored else "diamond", "line": outline}
    return trace


def _scale_axis(low: float, high: float) -> dict[str, Any]:
    ticks = nice_scales(low, high, 6)
    return {
        "type": "log", "range": [float(np.log10(low)), float(np.log10(high))], "tickmode": "array",
        "tickvals": ticks, "ticktext": [scale_text(t) for t in ticks],
    }  # fmt: skip


def layout_of(x: str, y: str) -> dict[str, Any]:
    """The layout of a figure with these titles of its axes."""
    axis = {"gridcolor": FAINT, "linecolor": SOFT, "zeroline": False, "ticks": "outside"}
    return {
        "xaxis": axis | {"title": {"text": x}}, "yaxis": axis | {"title": {"text": y}, "automargin": True},
        "paper_bgcolor": PAPER, "plot_bgcolor": PAPER, "hovermode": "closest", "height": 380,
        "margin": {"l": 64, "r": 16, "t": 28, "b": 56},
        "font": {"family": "system-ui, Segoe UI, Roboto, sans-serif", "color": INK, "size": 13},
    }  # fmt: skip

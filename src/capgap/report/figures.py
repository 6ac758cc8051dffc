"""The report's figures as PNG files: losses over teachers, the law, training, the roles."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from capgap.files import atomic_file
from capgap.law import PUBLISHED, LawFit, Observation, StudentOptimum, published_teacher, scale_text
from capgap.records import RunRecord
from capgap.report.rows import RoleBar
from capgap.report.style import (
    BLUE,
    INK,
    ORANGE,
    PAPER,
    ROLE_COLOURS,
    SOFT,
    VERMILLION,
    colours,
    look,
    new_figure,
    scale_axis,
    spread,
)

SETTLED = 0.3


def loss_against_teacher(
    observations: Sequence[Observation],
    path: Path,
    *,
    law: LawFit | None = None,
    names: Mapping[float, str] | None = None,
) -> Path:
    """Held-out loss over teacher scale, one panel a student: points, parabola, optimum, 2.5 S.

    Args:
        observations: the points; scales in parameters, losses in nats per token.
        law: adds parabolas and optima for the students it holds.
        names: student names by scale.
    Returns: `path`, a PNG.
    """
    students = sorted({o.student for o in observations})
    optima = {row.student: row for row in law.optima} if law else {}
    low, high = _padded([o.teacher for o in observations], 1.25)
    with look():
        figure, grid = panels(len(students))
        for axes, student in zip(grid, students, strict=True):
            points = [(o.teacher, o.loss) for o in observations if o.student == student]
            _loss_panel(axes, student, points, optima.get(student))
            scale_axis(axes, "x", low, high)
            axes.set_title(_name(student, names), pad=18)
        figure.supxlabel("teacher, parameters", fontsize=11)
        figure.supylabel("student's held-out loss, nats per token", fontsize=11)
        columns = 2 if len(students) < 3 else 4
        figure.legend(handles=_loss_legend(optima), loc="outside upper left", ncols=columns, fontsize=10)
        return save(figure, path)


def _loss_panel(axes: Axes, student: float, points: list[tuple[float, float]], row: StudentOptimum | None) -> None:
    teachers, losses = zip(*points, strict=True)
    pad = 0.16 * (max(losses) - min(losses) or 0.1)
    axes.set_ylim(min(losses) - 1.6 * pad, max(losses) + pad)
    published = published_teacher(student).teacher
    axes.axvline(published, color=ORANGE, lw=1.6, ls=(0, (4, 3)), zorder=1)
    axes.scatter(teachers, losses, s=34, color=BLUE, edgecolor=PAPER, linewidth=0.8, zorder=4)
    axes.locator_params(axis="y", nbins=5)
    if row is None:
        return
    found = row.optimum
    at = np.geomspace(found.grid[0], found.grid[-1], 200)
    axes.plot(at, found.curve(at), color=BLUE, lw=1.8, alpha=0.75, zorder=3)
    if row.low is not None and row.high is not None:
        base = min(losses) - 1.05 * pad
        axes.plot([row.low, row.high], [base, base], color=VERMILLION, lw=3, solid_capstyle="round", zorder=3)
    marker = {None: "D", "low": "<", "high": ">"}[found.censored]
    face = VERMILLION if found.censored is None else PAPER
    axes.plot(found.teacher, found.loss, marker, ms=9, mfc=face, mec=VERMILLION, mew=1.8, zorder=5, clip_on=False)
    word = {None: "T* = ", "low": "T* ≤ ", "high": "T* ≥ "}[found.censored] + scale_text(found.teacher)
    word += f"  ({found.teacher / student:.2f} S)" if found.censored is None else "  (censored)"
    axes.text(0, 1.025, word, transform=axes.transAxes, color=VERMILLION, fontsize=10.5)


def _loss_legend(optima: Mapping[float, StudentOptimum]) -> list[Line2D]:
    runs = "runs and parabola" if optima else "runs"
    handles = [
        Line2D([], [], marker="o", color=BLUE, lw=1.8 if optima else 0, label=runs),
        Line2D([], [], color=ORANGE, lw=1.6, ls=(0, (4, 3)), label="published law"),
    ]
    if any(row.optimum.censored is None for row in optima.values()):
        label = "optimum" + ", interval" * any(row.low is not None for row in optima.values())
        handles.append(Line2D([], [], marker="D", color=VERMILLION, lw=3 * (", " in label), label=label))
    if any(row.optimum.censored for row in optima.values()):
        label = "censored: beyond the grid"
        handles.append(Line2D([], [], marker=">", mfc=PAPER, mec=VERMILLION, mew=1.8, lw=0, label=label))
    return handles


def law_figure(law: LawFit, path: Path, *, names: Mapping[float, str] | None = None) -> Path:
    """Optimal teacher over student scale, both log: optima, fit, interval band, the published 2.5 S.

    Returns: `path`, a PNG.
    """
    low, high = _padded([row.student for row in law.optima], 1.5)
    at = np.geomspace(low, high, 120)
    with look():
        figure = new_figure(7.6, 5.0)
        axes = figure.add_subplot()
        bottom, top = _padded([row.optimum.teacher for row in law.optima] + [2.5 * low, 2.5 * high], 1.15)
        axes.plot(at, PUBLISHED.slope * at, color=ORANGE, lw=1.8, ls=(0, (4, 3)), zorder=2)
        axes.annotate(
            "published: 2.5 S", (at[6], PUBLISHED.slope * at[6]), (10, -6), textcoords="offset points",
            ha="left", va="top", color="#9a6a00", fontsize=10.5,
        )  # fmt: skip
        if law.ratio is not None:
            _fit_and_band(axes, law, at)
        for row in law.optima:
            _law_point(axes, row, names)
        scale_axis(axes, "x", low, high, 7)
        scale_axis(axes, "y", bottom, top, 7)
        axes.set_xlabel("student S, parameters")
        axes.set_ylabel("optimal teacher T*, parameters")
        return save(figure, path)


def _fit_and_band(axes: Axes, law: LawFit, at: np.ndarray) -> None:
    predicted = [law.predict(float(s)) for s in at]
    axes.plot(at, [p.teacher for p in predicted], color=BLUE, lw=2.2, zorder=3)
    lows = [p.low for p in predicted if p.low is not None]
    highs = [p.high for p in predicted if p.high is not None]
    if len(lows) == len(highs) == len(at):
        axes.fill_between(at, lows, highs, color=BLUE, alpha=0.13, lw=0, zorder=1)
    axes.text(0.02, 0.98, law_words(law), transform=axes.transAxes, va="top", color=BLUE, fontsize=11.5)


def law_words(law: LawFit) -> str:
    """The fitted law in a line or two, such as T* = 2.41 S - 3.2k (slope 2.2 to 2.6)."""
    if law.ratio is None:
        return "no law: no optimum inside its grid"
    words = f"T* = {law.ratio.value:.2f} S"
    spread_of, name = law.ratio, "ratio"
    if law.slope is not None and law.intercept is not None:
        sign = "+" if law.intercept.value >= 0 else "−"
        words = f"T* = {law.slope.value:.2f} S {sign} {scale_text(abs(law.intercept.value))}"
        spread_of, name = law.slope, "slope"
    if spread_of.low is not None and spread_of.high is not None:
        words += f"\n{law.level:.0%} interval of the {name}: {spread_of.low:.2f} to {spread_of.high:.2f}"
    return words + (f"\nR² = {law.r_squared.value:.4f}" if law.r_squared is not None else "")


def _law_point(axes: Axes, row: StudentOptimum, names: Mapping[float, str] | None) -> None:
    found = row.optimum
    if row.low is not None and row.high is not None:
        axes.plot([row.student] * 2, [row.low, row.high], color=VERMILLION, lw=2.4, zorder=4)
    marker = {None: "D", "low": "v", "high": "^"}[found.censored]
    face = VERMILLION if found.censored is None else PAPER
    axes.plot(row.student, found.teacher, marker, ms=9, mfc=face, mec=VERMILLION, mew=1.8, zorder=5)
    label = (names or {}).get(row.student, scale_text(row.student)) + (", censored" if found.censored else "")
    axes.annotate(label, (row.student, found.teacher), (9, -5), textcoords="offset points", va="top", fontsize=10)


def training_curves(records: Sequence[RunRecord], path: Path) -> Path | None:
    """Held-out loss over tokens, one panel a student, one line a run, coloured by teacher scale.

    The vertical axis shows what each run does after its first three tenths; what lies above is cut off.

    Returns: `path`, a PNG, or None where no record has a curve with `loss` and `tokens`.
    """
    shown = [r for r in records if r.kind != "pretrain" and len(curve_of(r)) > 1]
    if not shown:
        return None
    students = sorted({r.student_scale for r in shown})
    scales = sorted({r.teacher_scale or 0 for r in shown if r.teacher is not None})
    colour = dict(zip(scales, colours(len(scales)), strict=True))
    with look():
        figure, grid = panels(len(students), 1.3)
        for axes, student in zip(grid, students, strict=True):
            mine = [r for r in shown if r.student_scale == student]
            _curve_panel(axes, mine, colour)
            axes.set_title(_name(student, {student: mine[0].student}))
        figure.supxlabel("tokens", fontsize=11)
        figure.supylabel("held-out loss, nats per token", fontsize=11)
        return save(figure, path)


def curve_of(record: RunRecord) -> list[tuple[float, float]]:
    """(tokens, held-out nats per token) of a run, ascending in tokens."""
    rows = [(row["tokens"], row["loss"]) for row in record.curve if "loss" in row and "tokens" in row]
    return sorted(row for row in rows if math.isfinite(row[1]))


def run_label(record: RunRecord) -> str:
    """How a run is called among those of its student: its teacher, and its start where that is another."""
    if record.teacher is None:
        return "scratch"
    if record.start == record.teacher:
        return record.teacher
    return f"{record.start or 'random'} → {record.teacher}"


def _curve_panel(axes: Axes, records: list[RunRecord], colour: Mapping[int, str]) -> None:
    ends: dict[str, tuple[list[float], str]] = {}
    settled = []
    for r in records:
        tokens, losses = zip(*curve_of(r), strict=True)
        line = SOFT if r.teacher is None else colour[r.teacher_scale or 0]
        style = "--" if r.teacher is None else "-" if r.start == r.teacher else "-."
        axes.plot(tokens, losses, color=line, ls=style, lw=1.7)
        settled += [loss for t, loss in zip(tokens, losses, strict=True) if t >= SETTLED * tokens[-1]]
        ends.setdefault(run_label(r), ([], line))[0].append(losses[-1])
    low, high = min(settled), max(settled)
    pad = 0.06 * (high - low or 0.1)
    axes.set_ylim(low - pad, high + pad)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: scale_text(value) if value else "0")
    last = max(curve_of(r)[-1][0] for r in records)
    axes.set_xlim(0, last)
    wanted = [(sum(e) / len(e) - axes.get_ylim()[0]) / (high - low + 2 * pad) for e, _ in ends.values()]
    for (label, (_, line)), y in zip(ends.items(), spread(wanted, 0.075, 0.0, 1.0), strict=True):
        axes.text(1.02, y, label, transform=axes.transAxes, color=line, fontsize=9.5, va="center")


def roles_figure(bars: Sequence[RoleBar], path: Path, *, title: str) -> Path:
    """Held-out loss of the ways to make one student, as horizontal bars; seeds as points.

    The axis starts near the lowest loss, not at zero, and says so.

    Returns: `path`, a PNG.
    """
    means = [bar.mean for bar in bars]
    everything = [loss for bar in bars for loss in bar.losses]
    room = (max(everything) - min(everything)) or 0.1
    left, right = min(everything) - 0.35 * room, max(everything) + 0.3 * room
    with look():
        figure = new_figure(8.4, 1.5 + 0.62 * len(bars))
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        for y, (bar, mean) in enumerate(zip(bars, means, strict=True)):
            axes.barh(y, mean - left, left=left, height=0.56, color=ROLE_COLOURS[bar.kind], alpha=0.9)
            if len(bar.losses) > 1:
                heights = [y] * len(bar.losses)
                axes.scatter(bar.losses, heights, s=22, color=INK, ec=PAPER, lw=0.7, zorder=3)
            axes.text(max(mean, *bar.losses) + 0.02 * room, y, f"{mean:.3f}", va="center", fontweight="bold")
        axes.set_yticks(range(len(bars)), [f"{bar.label}\n{bar.tag}" for bar in bars])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.set_xlim(left, right)
        words = "held-out loss, nats per token: lower is better, the axis does not start at 0"
        figure.supxlabel(words, fontsize=11)
        axes.set_title(title, pad=10, fontsize=13)
        return save(figure, path)


def panels(count: int, width_factor: float = 1.0) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels. Call inside `look()`."""
    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = math.ceil(count / columns)
    figure = new_figure(max(6.4, 3.5 * columns * min(width_factor, 1.15)), 1.0 + 3.1 * rows)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)  # type: ignore[union-attr]
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _name(student: float, names: Mapping[float, str] | None) -> str:
    name = (names or {}).get(student)
    return f"{name}: {scale_text(student)} parameters" if name else f"{scale_text(student)} parameters"


def _padded(values: Sequence[float], factor: float) -> tuple[float, float]:
    return min(values) / factor, max(values) * factor


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, whole or not at all; `path`."""
    with atomic_file(Path(path)) as beside:
        figure.savefig(beside, format="png", dpi=160, metadata={"Software": None})
    return Path(path)

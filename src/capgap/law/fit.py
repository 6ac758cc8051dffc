"""The law of capacity gap fitted to a study: from losses to T* = a S + b, with intervals."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from capgap.errors import LawError
from capgap.law.bootstrap import (
    LawNumbers,
    Noise,
    StudentPoints,
    gather,
    law_numbers,
    noise_of,
    resample_optima,
)
from capgap.law.lawfit import Estimate, LawFit, Observation, Status, StudentOptimum
from capgap.law.optimum import Floats, find_optimum
from capgap.law.published import check_scale, scale_text

FEW_DEGREES = 5


def fit_law(
    observations: Iterable[Observation], *, replicates: int = 2000, seed: int = 0, level: float = 0.95
) -> LawFit:
    """Fits each student's optimal teacher, and the law through the optima.

    The line T* = a S + b is an unweighted least-squares fit, the ratio T* = r S a geometric mean, the
    exponent the slope of ln T* in ln S. An optimum at the edge of its grid is censored: it is reported, and
    never enters a fit. Two optima inside their grids make the law "linear", one makes it "proportional", none
    "none".

    Intervals are bootstrap percentiles over the whole chain, so that two students, whose line leaves no
    residual, get an honest interval too: new losses are drawn around each student's parabola (residuals
    pooled over students and scaled by sqrt(n / (n - 3)); where a teacher has several seeds, seeds are drawn
    as well), and the optima and the law are computed anew. In a replicate an optimum that leaves its grid is
    put at the grid's edge, so an interval that touches an edge is open on that side; `notes` says where that
    matters. With three teachers a student and one seed no scatter is left, and the intervals are None.

    Args:
        observations: one per run, in any order; scales in parameters, losses in nats per token.
        replicates: bootstrap replicates; 0 for no intervals.
        seed: of the bootstrap; the same observations and seed give the same law.
        level: of the intervals, between 0 and 1.
    Raises: LawError if there is nothing to fit, a student has fewer than three teachers, a run is there
        twice, or a number is not finite.
    """
    if replicates < 0:
        raise LawError(f"replicates = {replicates} must be 0 (no intervals) or more")
    if not 0 < level < 1:
        raise LawError(f"level = {level} must lie between 0 and 1, such as 0.95")
    ordered = _checked(observations)
    points, optima = [], []
    for scale in sorted({o.student for o in ordered}):
        mine = [o for o in ordered if o.student == scale]
        teachers, losses = np.array([o.teacher for o in mine]), np.array([o.loss for o in mine])
        optima.append(find_optimum(teachers, losses, student=f"student {scale_text(scale)}"))
        points.append(gather(scale, teachers, losses))
    inside = [i for i, optimum in enumerate(optima) if optimum.censored is None]
    status: Status = "linear" if len(inside) > 1 else "proportional" if inside else "none"
    noise = noise_of(points, optima)

    draws = np.empty((0, len(inside)))
    clamped = np.zeros(len(inside))
    if inside and replicates and noise.degrees:
        rng = np.random.default_rng(seed)
        draws, clamped = resample_optima(
            [points[i] for i in inside], [optima[i] for i in inside], noise, replicates, rng
        )
    students = np.array([points[i].student for i in inside])
    best = np.array([[optima[i].teacher for i in inside]])
    found = law_numbers(students, best) if inside else None
    drawn = law_numbers(students, draws) if len(draws) else None
    rows = []
    for i, (at, optimum) in enumerate(zip(points, optima, strict=True)):
        low, high = _interval(draws[:, inside.index(i)], level) if i in inside else (None, None)
        rows.append(StudentOptimum(at.student, optimum, low, high))
    left = dict(zip(students.tolist(), clamped.tolist(), strict=True))
    return LawFit(
        status=status,
        optima=tuple(rows),
        slope=_estimate("slope", found, drawn, level),
        intercept=_estimate("intercept", found, drawn, level),
        r_squared=_estimate("r_squared", found, drawn, level),
        ratio=_estimate("ratio", found, drawn, level),
        exponent=_estimate("exponent", found, drawn, level),
        notes=_notes(rows, points, noise, replicates, left, (1 - level) / 2),
        observations=tuple(ordered),
        replicates=replicates,
        seed=seed,
        level=level,
        line_draws=_lines(drawn),
    )


def law_from_dict(tree: Any) -> LawFit:
    """The law that `LawFit.to_dict` wrote, computed anew from the observations it holds.

    Raises: LawError if keys are missing, or if the numbers written do not follow from the observations.
    """
    try:
        law = fit_law(
            [Observation(**row) for row in tree["observations"]],
            replicates=tree["replicates"],
            seed=tree["seed"],
            level=tree["level"],
        )
        written = {"status": tree["status"]} | {key: tree[key] for key in _CHECKED}
    except (KeyError, TypeError) as error:
        raise LawError(f"not a fitted law: {error}; write it with LawFit.to_dict") from None
    if written["status"] != law.status:
        raise LawError(f"status = {written['status']!r}, but the observations give {law.status!r}; fit again")
    for key in _CHECKED:
        estimate, then = getattr(law, key), written[key]
        now = None if estimate is None else estimate.value
        value = then.get("value") if isinstance(then, dict) else None
        if (now is None) != (value is None) or not math.isclose(now or 0.0, value or 0.0, rel_tol=1e-6):
            raise LawError(
                f"{key}.value = {value}, but the observations give {now}; the law was changed after it was "
                "fitted: fit again"
            )
    return law


_CHECKED = ("slope", "intercept", "r_squared", "ratio", "exponent")


def _checked(observations: Iterable[Observation]) -> list[Observation]:
    ordered = sorted(observations, key=lambda o: (o.student, o.teacher, o.seed))
    if not ordered:
        raise LawError("no observations; a law needs losses of at least one student under three teachers")
    for o in ordered:
        check_scale(o.student, "a student's scale")
    for o, after in itertools.pairwise(ordered):
        if (o.student, o.teacher, o.seed) == (after.student, after.teacher, after.seed):
            raise LawError(
                f"student {scale_text(after.student)} under teacher {scale_text(after.teacher)} with seed "
                f"{after.seed} is there twice; give each run once, and repeated runs a seed each"
            )
    return ordered


def _interval(draws_R: Floats, level: float) -> tuple[float | None, float | None]:
    if not len(draws_R) or not np.isfinite(draws_R).all():
        return None, None
    low, high = np.quantile(draws_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _estimate(name: str, found: LawNumbers | None, drawn: LawNumbers | None, level: float) -> Estimate | None:
    value = np.nan if found is None else float(getattr(found, name)[0])
    if not np.isfinite(value):
        return None
    low, high = (None, None) if drawn is None else _interval(getattr(drawn, name), level)
    return Estimate(value, low, high)


def _lines(drawn: LawNumbers | None) -> Floats:
    if drawn is None or not np.isfinite(drawn.slope).all():
        return np.empty((0, 2))
    return np.stack([drawn.slope, drawn.intercept], axis=1)


def _notes(
    rows: Sequence[StudentOptimum],
    points: Sequence[StudentPoints],
    noise: Noise,
    replicates: int,
    clamped: dict[float, float],
    tail: float,
) -> tuple[str, ...]:
    notes = []
    for row in rows:
        if row.optimum.censored:
            edge = scale_text(row.optimum.teacher)
            beyond = "smaller" if row.optimum.censored == "low" else "larger"
            notes.append(
                f"student {scale_text(row.student)}: censored at the grid's {row.optimum.censored} edge "
                f"({edge}); its optimal teacher may be {beyond}, so it does not enter the fit"
            )
    inside = sum(row.optimum.censored is None for row in rows)
    if inside == 2:
        notes.append("two optima: a line through two points fits by construction, so R^2 is not reported")
    if inside == 1:
        notes.append("one optimum inside its grid: a ratio can be given, a line cannot")
    if inside == 0:
        notes.append("no optimum lies inside its grid of teachers, so there is no law; widen the grid")
    if inside and not noise.degrees:
        teachers = max(len(at.teachers) for at in points)
        notes.append(
            f"no intervals: {teachers} teachers a student and one seed leave no scatter to measure; "
            "add a teacher or a seed"
        )
    elif inside and not replicates:
        notes.append("no intervals: none were asked for (replicates = 0)")
    elif inside and noise.degrees < FEW_DEGREES:
        notes.append(
            f"the intervals rest on {noise.degrees} degree{'s' * (noise.degrees != 1)} of freedom: take them as rough"
        )
    for scale, share in clamped.items():
        if share > tail:
            notes.append(
                f"student {scale_text(scale)}: in {share:.0%} of the replicates the optimum left the grid "
                "and was put at its edge, so its interval is open there"
            )
    return tuple(notes)

"""The law of capacity gap fitted to a study: from losses to T* = a S + b, with intervals."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from capgap.errors import LawError
from capgap.law.bootstrap import Draws, Noise, StudentPoints, gather, noise_of, optimum_errors, resample_optima
from capgap.law.chain import Chain, Optima, interval
from capgap.law.lawfit import LawFit, Observation, Status, StudentOptimum
from capgap.law.optimum import find_optimum
from capgap.law.published import check_scale, scale_text

FEW_DEGREES = 5


def fit_law(
    observations: Iterable[Observation], *, replicates: int = 2000, seed: int = 0, level: float = 0.95
) -> LawFit:
    """Fits each student's optimal teacher, and the law through the optima.

    The line T* = a S + b, the ratio T* = r S and the power T* = c S^k are fitted by maximum likelihood in ln T*. Each
    optimum weighs by its own error and by how far optima scatter about the curve beyond their errors. An optimum at the
    edge of its grid is censored: it enters as the probability of lying beyond the edge, never as a point. Two optima
    inside their grids make the law "linear", one makes it "proportional", none "none".

    Intervals are bootstrap percentiles over the whole chain, so that two students, whose line leaves no
    residual, get an honest interval too: new losses are drawn around each student's parabola (residuals
    pooled over students and scaled by sqrt(n / (n - 3)); where a teacher has several seeds, seeds are drawn
    as well), and the optima, censored ones too, and the law are found anew. Where more optima are inside their grids
    than a curve has parameters, how they scatter about it tells more, and replicates are drawn about the optima (see
    `chain`).
    In a replicate an optimum may leave its grid, so an interval that touches an edge is open on that side; `notes` says
    where that matters. With three teachers a student and one seed no scatter is left, and the intervals are None.

    Where every teacher tried is larger than its student, as it is where students are cut, an optimum that is at most
    some scale lies between that and the student's own.

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
    inside = np.array([optimum.censored is None for optimum in optima])
    status: Status = "linear" if inside.sum() > 1 else "proportional" if inside.any() else "none"
    noise = noise_of(points, optima)
    known = bool(inside.any() and noise.degrees)
    errors_N = None
    if known:
        # Errors in S enter as if T* were proportional to it.
        unsure = [max(o.student_error for o in ordered if o.student == at.student) for at in points]
        errors_N = np.hypot(optimum_errors(points, optima, noise), unsure)
    draws = None
    if known and replicates:
        draws = resample_optima(points, optima, noise, replicates, np.random.default_rng(seed))
    rows = tuple(
        StudentOptimum(
            at.student,
            optimum,
            *(interval(np.exp(draws.logs[:, n]), level) if draws and inside[n] else (None, None)),
            error=None if errors_N is None else float(errors_N[n]),
            degrees=noise.degrees or None,
        )
        for n, (at, optimum) in enumerate(zip(points, optima, strict=True))
    )
    chain = Chain(Optima.of(rows), draws, replicates if known else 0, np.random.default_rng([seed, 1]), level)
    linear = status == "linear"
    line = chain.fit("line") if linear else None
    power = chain.fit("power") if linear else None
    ratio = chain.fit("ratio") if inside.any() else None
    deciding = line or ratio
    return LawFit(
        status=status,
        optima=rows,
        slope=line and line.estimate(lambda fitted: fitted.line()[0]),
        intercept=line and line.estimate(lambda fitted: fitted.line()[1]),
        r_squared=line and line.r_squared(),
        ratio=ratio and ratio.estimate(lambda fitted: np.exp(fitted.theta_RK[:, 0])),
        exponent=power and power.estimate(lambda fitted: fitted.theta_RK[:, 1]),
        p_linear=power and power.p_value(1.0),
        scatter=deciding and deciding.scatter,
        notes=_notes(rows, points, noise, replicates, draws, (1 - level) / 2),
        observations=tuple(ordered),
        replicates=replicates,
        seed=seed,
        level=level,
        line_draws=line.draws() if line else np.empty((0, 3)),
        ratio_draws=ratio.draws() if ratio else np.empty((0, 2)),
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


def _notes(
    rows: Sequence[StudentOptimum],
    points: Sequence[StudentPoints],
    noise: Noise,
    replicates: int,
    draws: Draws | None,
    tail: float,
) -> tuple[str, ...]:
    notes = []
    for row in rows:
        if row.optimum.censored:
            beyond, most = ("smaller", "most") if row.optimum.censored == "low" else ("larger", "least")
            bound = scale_text(row.optimum.teacher)
            why = f"censored at the grid's {row.optimum.censored} edge ({bound}); its optimal teacher may be {beyond}"
            if not row.optimum.at_edge:
                why = "its lowest loss is inside the grid, but the parabola's vertex is not; its optimal teacher is at "
                why += f"{most} {bound}"
            notes.append(f"student {scale_text(row.student)}: {why}, so it enters the fit as a bound, not as a point")
        elif not row.optimum.agrees:
            low, high = map(scale_text, row.optimum.turn)
            notes.append(
                f"student {scale_text(row.student)}: the parabola's optimum, {scale_text(row.optimum.teacher)}, lies "
                f"outside {low} to {high}, where losses that first fall and then rise turn: the parabola fits badly"
            )
    inside = sum(row.optimum.censored is None for row in rows)
    if inside == 2:
        notes.append(
            "two optima: a line through two points fits by construction, so R^2 is not reported, nor whether the "
            "exponent is 1, and its interval takes optima not to scatter about it"
        )
    if inside == 1:
        notes.append("one optimum inside its grid: a ratio can be given, a line cannot")
    if inside == 0:
        notes.append("no optimum lies inside its grid of teachers, so there is no law; widen the grid")
    if inside == 3:
        notes.append("three optima hardly tell how optima scatter about a line: its intervals are very wide")
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
    for n, row in enumerate(rows):
        share = 0.0 if draws is None or row.side else float(np.mean(draws.sides[:, n] != 0))
        if share > tail:
            notes.append(
                f"student {scale_text(row.student)}: in {share:.0%} of the replicates the optimum left the grid, so "
                "its interval is open there"
            )
    return tuple(notes)

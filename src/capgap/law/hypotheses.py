"""The paper's three hypotheses as tests, with an effect size and a p value each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from capgap.errors import LawError
from capgap.law.censored import Curve, fit_curve, misfit
from capgap.law.chain import Optima
from capgap.law.compare import BudgetOptimum
from capgap.law.lawfit import Observation
from capgap.law.optimum import Floats, parabola
from capgap.law.published import scale_text


@dataclass(frozen=True)
class Test:
    """A hypothesis and what the measurements say of it.

    Attributes:
        name: H1, H2 or H3, and what it says.
        statistic: in words, such as "F(4, 30) = 12.1".
        p: of the measurements, or ones further off, where the null hypothesis holds.
        effect: in words, with its unit.
        details: for each student or group.
    """

    __test__ = False  # of pytest

    name: str
    statistic: str
    p: float
    effect: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fit:
    """A parabola in ln T for each student: coefficients, their covariances less a factor, pooled residual variance."""

    students: list[float]
    edges: list[tuple[float, float]]
    coefficients: list[Floats]
    covariances: list[Floats]
    variance: float
    degrees: int
    explained: float
    residual: float
    ranges: list[float]


def teacher_matters(observations: Sequence[Observation]) -> Test:
    """H1: at one student scale the loss depends on the teacher's scale.

    The F test of a parabola in ln T for each student against a constant for each. The effect is partial eta squared,
    and by how many nats the seed-mean losses of a student differ.

    Raises: LawError without degrees of freedom.
    """
    fit = _fit_parabolas(observations)
    n = 2 * len(fit.students)
    f = fit.explained / n / fit.variance if fit.variance else np.inf
    share = fit.explained / (fit.explained + fit.residual)
    ranges = [
        f"{scale_text(s)}: {r:.3f} nats from best to worst" for s, r in zip(fit.students, fit.ranges, strict=True)
    ]
    return Test(
        "H1: the teacher's scale matters",
        f"F({n}, {fit.degrees}) = {f:.3g}",
        float(stats.f.sf(f, n, fit.degrees)),
        f"partial eta squared {share:.3f}; {np.mean(fit.ranges):.3f} nats between a student's best and worst teacher",
        tuple(ranges),
    )


def interior_optimum(observations: Sequence[Observation]) -> Test:
    """H2: the loss first falls, then rises with the teacher's scale.

    For each student the test of Lind and Mehlum (2010): the parabola falls at the smallest teacher and rises at the
    largest, the larger of both one-sided p values. `p` is that of any student, by Holm's correction. The effect is the
    smaller of the rises from the vertex to the grid's edges, in nats.

    Raises: LawError without degrees of freedom.
    """
    fit = _fit_parabolas(observations)
    values, details, shown = [], [], 0
    for student, edges, c, covariance in zip(fit.students, fit.edges, fit.coefficients, fit.covariances, strict=True):
        ps = []
        for edge, sign in zip(edges, (-1, 1), strict=True):
            gradient = np.array([0.0, 1.0, 2 * edge])
            error = np.sqrt(fit.variance * gradient @ covariance @ gradient)
            ps.append(
                float(stats.t.sf(sign * (gradient @ c) / error, fit.degrees))
                if error
                else float(sign * gradient @ c <= 0)
            )
        depth = min(_rise(c, edge) for edge in edges)
        values.append(max(ps))
        shown += values[-1] < 0.05
        words = f"{depth:.4f} nats deep" if depth > 0 else "none inside the grid"
        details.append(f"{scale_text(student)}: p = {values[-1]:.2g}, {words}")
    p = min(1.0, len(values) * min(values))
    effect = f"{shown} of {len(values)} students have one at p < 0.05"
    return Test("H2: an interior optimum exists", f"{len(values)} Lind-Mehlum tests, Holm", p, effect, tuple(details))


def constant_ratio(
    measured: Sequence[BudgetOptimum], across: str = "scales", *, draws: int = 4000, seed: int = 0
) -> Test:
    """H3: T*/S is the same everywhere.

    The likelihood ratio of one ratio for all against one for each student (`across` "scales") or each group ("groups"),
    censored optima in it as bounds, also of those that have no others. Its distribution under one ratio is drawn, as
    few optima, some of them censored, make no chi-square; so is the size of their errors, which is itself measured with
    few degrees of freedom. A small p value speaks against the hypothesis. The effect is by which factor ratios differ,
    of the students or groups with an optimum inside its grid.

    Raises: LawError with fewer than two students or groups, without any optimum inside its grid, or without errors.
    """
    optima = Optima.of([m.optimum for m in measured])
    names = [m.group if across == "groups" else scale_text(m.optimum.student) for m in measured]
    groups = list(dict.fromkeys(names))
    place = np.array([groups.index(name) for name in names])
    known = [bool((optima.sides[place == g] == 0).any()) for g in range(len(groups))]
    if len(groups) < 2 or not any(known) or not optima.errors.all():
        raise LawError(
            f"{len(groups)} {across}, {sum(known)} with an optimum inside its grid; comparing needs two, one of them "
            "with such an optimum, and errors"
        )
    errors = optima.whole_errors(0.0)
    one = Curve("ratio", optima.students, np.empty((len(place), 0)), optima.floors)
    # A column for each group but one, for which the ratio itself stands.
    base = known.index(True)
    others = [g for g in range(len(groups)) if g != base]
    columns = np.stack([place == g for g in others], axis=1).astype(float)
    each = Curve("ratio", optima.students, columns, optima.floors)
    common = fit_curve(one, optima.logs, optima.sides, errors)
    separate = fit_curve(each, optima.logs, optima.sides, errors)
    ratio = 2 * (_misfit(one, common, optima, errors) - _misfit(each, separate, optima, errors))[0]
    rng = np.random.default_rng(seed)
    degrees = min((m.optimum.degrees for m in measured if m.optimum.degrees), default=None)
    scale = np.sqrt(degrees / rng.chisquare(degrees, (draws, 1))) if degrees else np.ones((draws, 1))
    drawn = optima.drawn(one.at(common)[0][0], errors * scale, rng)
    under = misfit(one, fit_curve(one, drawn.logs, drawn.sides, errors), drawn.logs, drawn.sides, errors)
    under -= misfit(each, fit_curve(each, drawn.logs, drawn.sides, errors), drawn.logs, drawn.sides, errors)
    p = (1 + np.sum(2 * under >= ratio)) / (1 + draws)
    found = {base: separate[0, 0]} | {g: separate[0, 0] + separate[0, 1 + n] for n, g in enumerate(others)}
    logs = np.array([found[g] for g in range(len(groups)) if known[g]])
    details = [
        f"{name}: T*/S = {np.exp(found[g]):.2f}" if known[g] else f"{name}: bounds only"
        for g, name in enumerate(groups)
    ]
    return Test(
        f"H3: T*/S is constant across {across}",
        f"likelihood ratio {ratio:.3g}, {each.size - 1} more parameters",
        float(p),
        f"ratios differ by up to a factor {np.exp(logs.max() - logs.min()):.2f}"
        if len(logs) > 1
        else "bounds beside the optima of one alone",
        tuple(details),
    )


def _misfit(curve: Curve, theta: Floats, optima: Optima, errors: Floats) -> Floats:
    return misfit(curve, theta, optima.logs, optima.sides, errors)


def _rise(c: Floats, edge: float) -> float:
    """From the vertex to an edge of the grid, nats; 0 where the vertex is beyond it or a maximum."""
    if c[2] <= 0:
        return 0.0
    vertex = -c[1] / (2 * c[2])
    return float(c[2] * (edge - vertex) ** 2) * float(np.sign((edge - vertex) * edge) > 0)


def _fit_parabolas(observations: Sequence[Observation]) -> _Fit:
    students = sorted({o.student for o in observations})
    edges, coefficients, covariances, ranges = [], [], [], []
    explained = residual = 0.0
    for student in students:
        mine = [o for o in observations if o.student == student]
        x, y = np.log([o.teacher for o in mine]), np.array([o.loss for o in mine])
        x = x - (x.min() + x.max()) / 2
        design = parabola(x)
        c = np.linalg.lstsq(design, y, rcond=None)[0]
        left = float(((y - design @ c) ** 2).sum())
        explained += float(((y - y.mean()) ** 2).sum()) - left
        residual += left
        edges.append((float(x.min()), float(x.max())))
        coefficients.append(c)
        covariances.append(np.linalg.inv(design.T @ design))
        means = [y[x == at].mean() for at in np.unique(x)]
        ranges.append(float(max(means) - min(means)))
    degrees = len(observations) - 3 * len(students)
    if degrees < 1:
        raise LawError("each student has three runs: none is left to tell scatter from shape; add teachers or seeds")
    return _Fit(students, edges, coefficients, covariances, residual / degrees, degrees, explained, residual, ranges)

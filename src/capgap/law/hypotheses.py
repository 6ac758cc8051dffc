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
    censored optima in it as bounds. Its distribution under one ratio is drawn, as few optima, some of them censored,
    make no chi-square. A small p value speaks against the hypothesis. The effect is by which factor ratios differ.

    Raises: LawError with fewer than two students or groups with an optimum inside their grids, or without errors.
    """
    optima = Optima.of([m.optimum for m in measured])
    names = [m.group if across == "groups" else scale_text(m.optimum.student) for m in measured]
    groups = list(dict.fromkeys(names))
    place = np.array([groups.index(name) for name in names])
    inside = [g for g in range(len(groups)) if (optima.sides[place == g] == 0).any()]
    if len(inside) < 2 or not optima.errors.all():
        raise LawError(
            f"ratios of {len(inside)} {across} with an optimum inside its grid; comparing needs two, and errors"
        )
    errors = optima.whole_errors(0.0)
    keep = np.isin(place, inside)
    optima, place, errors = optima.only(keep), place[keep], errors[keep]
    one = Curve("ratio", optima.students, np.empty((len(place), 0)))
    # A column for each further group; the first is what the ratio itself stands for.
    each = Curve("ratio", optima.students, np.stack([place == g for g in inside[1:]], axis=1).astype(float))
    common = fit_curve(one, optima.logs, optima.sides, errors)
    separate = fit_curve(each, optima.logs, optima.sides, errors)
    ratio = 2 * (_misfit(one, common, optima, errors) - _misfit(each, separate, optima, errors))[0]
    drawn = optima.drawn(one.at(common)[0][0], np.tile(errors, (draws, 1)), np.random.default_rng(seed))
    under = misfit(one, fit_curve(one, drawn.logs, drawn.sides, errors), drawn.logs, drawn.sides, errors)
    under -= misfit(each, fit_curve(each, drawn.logs, drawn.sides, errors), drawn.logs, drawn.sides, errors)
    p = (1 + np.sum(2 * under >= ratio)) / (1 + draws)
    logs = separate[0, 0] + np.concatenate([[0.0], separate[0, 1:]])
    details = [f"{groups[g]}: T*/S = {np.exp(r):.2f}" for g, r in zip(inside, logs, strict=True)]
    return Test(
        f"H3: T*/S is constant across {across}",
        f"likelihood ratio {ratio:.3g}, {each.size - 1} more parameters",
        float(p),
        f"ratios differ by up to a factor {np.exp(logs.max() - logs.min()):.2f}",
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

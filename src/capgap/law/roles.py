"""The two roles apart: which model to cut a student from, and which to teach it by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capgap.errors import LawError
from capgap.law.chain import Chain, Optima, interval
from capgap.law.lawfit import Estimate
from capgap.law.optimum import Floats
from capgap.law.published import check_scale, scale_text

_COEFFICIENTS = 6


@dataclass(frozen=True)
class RoleObservation:
    """One distilled run: scales of start and teacher in parameters, held-out loss in nats per token."""

    start: float
    teacher: float
    loss: float
    seed: int = 0


@dataclass(frozen=True)
class RoleOptimum:
    """One role's best model, parameters: -1 or 1 in `side` where it is at most, or at least, its grid's edge.

    Attributes:
        low, high: of its 95 % interval, parameters; None where no scatter was left to measure.
        error: standard deviation of its logarithm; None likewise.
        edges: the grid's smallest and largest model, parameters.
    """

    scale: float
    side: int
    low: float | None
    high: float | None
    error: float | None
    edges: tuple[float, float]


@dataclass(frozen=True)
class RoleSurface:
    """A student's loss over start P and teacher T.

    L = c0 + c1 p + c2 t + c3 p^2 + c4 p t + c5 t^2, with p and t the logarithms of P and T over `middle`.

    Attributes:
        student: parameters.
        start, teacher: P* and T*, where the surface is lowest within the grid.
        coupled: the best model for both roles, the paper's way.
        loss: at (P*, T*); gain: by how much it is lower than at the best model for both; nats per token.
        error: root mean square of measured less fitted loss, nats per token.
        runs: how many it rests on.
    """

    student: float
    start: RoleOptimum
    teacher: RoleOptimum
    coupled: RoleOptimum
    loss: Estimate
    gain: Estimate
    coefficients: tuple[float, ...]
    middle: float
    error: float
    runs: int

    def at(self, start: float, teacher: float) -> float:
        """The loss of a start and a teacher, parameters: nats per token."""
        p, t = np.log(start / self.middle), np.log(teacher / self.middle)
        return float(_design(np.array([p]), np.array([t]))[0] @ np.array(self.coefficients))


def find_roles(
    student: float, observations: Sequence[RoleObservation], *, replicates: int = 2000, seed: int = 0
) -> RoleSurface:
    """Fits the surface and finds the best start and teacher, and the best model for both.

    Intervals are those of normal draws of the coefficients, with the residuals' variance; a draw finds its minimum
    within the grid anew. An optimum at the grid's edge is censored.

    Raises: LawError with fewer than three starts or three teachers, or no more runs than the surface has coefficients.
    """
    name = f"student {scale_text(check_scale(student, 'the student'))}"
    starts = np.log([check_scale(o.start, f"{name}: a start's scale") for o in observations])
    teachers = np.log([check_scale(o.teacher, f"{name}: a teacher's scale") for o in observations])
    losses = np.array([o.loss for o in observations])
    if not np.isfinite(losses).all():
        raise LawError(f"{name}: a loss is not finite")
    counts = len(np.unique(starts)), len(np.unique(teachers))
    if min(counts) < 3 or len(losses) <= _COEFFICIENTS:
        raise LawError(
            f"{name}: {len(losses)} runs of {counts[0]} starts and {counts[1]} teachers; roles apart need three of "
            f"each and more than {_COEFFICIENTS} runs"
        )
    middle = (min(starts.min(), teachers.min()) + max(starts.max(), teachers.max())) / 2
    p, t = starts - middle, teachers - middle
    design = _design(p, t)
    if np.linalg.matrix_rank(design) < _COEFFICIENTS:
        raise LawError(f"{name}: start and teacher were not varied apart from each other; their effects cannot be told")
    found = np.linalg.lstsq(design, losses, rcond=None)[0]
    left = losses - design @ found
    variance = float((left**2).sum()) / (len(losses) - _COEFFICIENTS)
    covariance = variance * np.linalg.inv(design.T @ design)
    rng = np.random.default_rng(seed)
    drawn = (
        rng.multivariate_normal(found, covariance, size=replicates, method="cholesky") if variance > 0 else found[None]
    )
    both: Floats = np.concatenate([found[None], drawn]).astype(np.float64)
    box = (p.min(), p.max()), (t.min(), t.max())
    # One model for both roles is one that was tried in both.
    common = max(box[0][0], box[1][0]), min(box[0][1], box[1][1])
    best, lowest = _lowest(both, *box)
    coupled, coupled_lowest = _lowest_coupled(both, *common)
    return RoleSurface(
        student=float(student),
        start=_optimum(best[:, 0], box[0], middle),
        teacher=_optimum(best[:, 1], box[1], middle),
        coupled=_optimum(coupled, common, middle),
        loss=_estimate(lowest),
        gain=_estimate(coupled_lowest - lowest),
        coefficients=tuple(found.tolist()),
        middle=float(np.exp(middle)),
        error=float(np.sqrt(np.mean(left**2))),
        runs=len(losses),
    )


@dataclass(frozen=True)
class RoleLaw:
    """P* = p S and T* = t S with the roles apart, and T* = c S for one model in both.

    Attributes:
        start, teacher, coupled: the ratios p, t and c, with intervals.
        sides: -1 or 1 where all optima of start, teacher or coupled are at most, or at least, their grids' edge.
        budget: at which they were measured, in words.
        gain: mean over students of what a second model gains, nats per token.
        students: how many it rests on.
    """

    start: Estimate
    teacher: Estimate
    coupled: Estimate
    gain: float
    students: int
    sides: tuple[int, int, int] = (0, 0, 0)
    budget: str = ""

    def predict(self, student: float) -> tuple[float, float, float]:
        """The best start and teacher, and the best model for both, of a student; parameters."""
        scale = check_scale(student, "the student's scale")
        return self.start.value * scale, self.teacher.value * scale, self.coupled.value * scale


def fit_roles(surfaces: Sequence[RoleSurface], *, budget: str = "", replicates: int = 2000, seed: int = 0) -> RoleLaw:
    """The ratios of both roles through the optima of several students, censored ones as bounds.

    A role all of whose optima are censored has no ratio of its own: the geometric mean of the edges is given, without
    an interval.

    Raises: LawError without any surface.
    """
    if not surfaces:
        raise LawError("no student's roles were varied apart; a law of them needs one at least")
    students = np.array([surface.student for surface in surfaces])
    ratios, bounds = [], []
    for role in ("start", "teacher", "coupled"):
        rows: list[RoleOptimum] = [getattr(surface, role) for surface in surfaces]
        logs, sides = np.log([row.scale for row in rows]), np.array([row.side for row in rows])
        edges = np.log([row.edges for row in rows])
        errors = np.array([np.nan if row.error is None else row.error for row in rows])
        errors = np.where(np.isnan(errors), np.nanmedian(errors) if not np.isnan(errors).all() else 0.0, errors)
        # What a student is cut from is larger than it; what teaches it need not be.
        cut = (edges[:, 0] > np.log(students)) & (role != "teacher")
        floors = np.where(cut, np.log(students), -np.inf)
        optima = Optima(students, logs, sides, errors, edges, floors)
        bounds.append(int(sides[0]) if (sides == sides[0]).all() else 0)
        if not (sides == 0).any():
            ratios.append(Estimate(float(np.exp((logs - np.log(students)).mean())), None, None))
            continue
        fitted = Chain(optima, None, replicates, np.random.default_rng(seed), 0.95).fit("ratio")
        ratio = fitted.estimate(lambda f: np.exp(f.theta_RK[:, 0]))
        only = rows[int(np.argmax(sides == 0))]
        if ratio.low is None and len(rows) == 1 and only.low is not None and only.high is not None:
            ratio = Estimate(ratio.value, only.low / students[0], only.high / students[0])
        ratios.append(ratio)
    gain, (start, teacher, coupled) = float(np.mean([s.gain.value for s in surfaces])), bounds
    return RoleLaw(*ratios, gain=gain, students=len(surfaces), sides=(start, teacher, coupled), budget=budget)


def _design(p: Floats, t: Floats) -> Floats:
    return np.stack([np.ones_like(p), p, t, p**2, p * t, t**2], axis=1)


def _lowest(c_RK: Floats, starts: tuple[float, float], teachers: tuple[float, float]) -> tuple[Floats, Floats]:
    """Where R surfaces are lowest within a box, [R, 2], and their values there, [R].

    The stationary point, where it is a minimum inside; else the lowest point of the four edges.
    """
    c0, c1, c2, c3, c4, c5 = c_RK.T
    with np.errstate(divide="ignore", invalid="ignore"):
        determinant = 4 * c3 * c5 - c4**2
        points = [np.stack([(c4 * c2 - 2 * c5 * c1) / determinant, (c4 * c1 - 2 * c3 * c2) / determinant], axis=1)]
    inside = (determinant > 0) & (c3 > 0)
    for axis, (low, high) in enumerate((starts, teachers)):
        inside &= (points[0][:, axis] >= low) & (points[0][:, axis] <= high)
    usable = [inside]
    for t in teachers:
        points.append(np.stack([_lowest_on_a_line(c1 + c4 * t, c3, *starts), np.full_like(c0, t)], axis=1))
    for p in starts:
        points.append(np.stack([np.full_like(c0, p), _lowest_on_a_line(c2 + c4 * p, c5, *teachers)], axis=1))
    usable += [np.ones_like(inside)] * 4
    values = np.stack(
        [
            np.where(use, (_design(at[:, 0], at[:, 1]) * c_RK).sum(axis=1), np.inf)
            for at, use in zip((np.nan_to_num(at) for at in points), usable, strict=True)
        ]
    )
    which = values.argmin(axis=0)
    return np.stack(points)[which, np.arange(len(c0))], values.min(axis=0)


def _lowest_coupled(c_RK: Floats, low: float, high: float) -> tuple[Floats, Floats]:
    c0, c1, c2, c3, c4, c5 = c_RK.T
    x = _lowest_on_a_line(c1 + c2, c3 + c4 + c5, low, high)
    return x, c0 + (c1 + c2) * x + (c3 + c4 + c5) * x**2


def _lowest_on_a_line(slope: Floats, bend: Floats, low: float, high: float) -> Floats:
    """Where slope x + bend x^2 is lowest between two ends, [R]."""
    ends = np.where(slope * low + bend * low**2 <= slope * high + bend * high**2, low, high)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.clip(-slope / (2 * bend), low, high)
    return np.where(bend > 0, vertex, ends)


def _optimum(x_R: Floats, edges: tuple[float, float], middle: float) -> RoleOptimum:
    """The first is what was found, the others are draws."""
    low, high = interval(np.exp(x_R[1:] + middle), 0.95) if len(x_R) > 2 else (None, None)
    near = 1e-9 * (edges[1] - edges[0])
    side = -1 if x_R[0] <= edges[0] + near else 1 if x_R[0] >= edges[1] - near else 0
    return RoleOptimum(
        scale=float(np.exp(x_R[0] + middle)),
        side=side,
        low=low,
        high=high,
        # Draws that all lie at an edge tell nothing of the error.
        error=error if len(x_R) > 2 and (error := float(x_R[1:].std())) > 1e-9 else None,
        edges=(float(np.exp(edges[0] + middle)), float(np.exp(edges[1] + middle))),
    )


def _estimate(draws_R: Floats) -> Estimate:
    return Estimate(float(draws_R[0]), *(interval(draws_R[1:], 0.95) if len(draws_R) > 2 else (None, None)))

"""Curves through optima of which some are known only to lie beyond an edge: maximum likelihood, many at a time.

An optimum's logarithm is taken to be normal about the curve, as the vertex of a parabola in ln T is. One that is
censored at its grid's edge enters with the probability of lying beyond it (Tobin 1958), never as a point. Where nothing
can lie below a floor, as no teacher is smaller than the student that is cut from it, that is the probability of lying
between the two.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import log_ndtr

from capgap.law.optimum import Floats

Form = Literal["ratio", "power", "line"]
FORMS: tuple[Form, ...] = ("line", "ratio", "power")
LOW, INSIDE, HIGH = -1, 0, 1
_STEPS = 60
_DAMPED = 1e9
_LARGEST = 300.0
"""Of ln (phi / P), so that squares stay finite."""
_SCATTERS = 48
_MOST = 1.0
"""The largest scatter that is told apart: a factor e. More would only say that optima and bounds contradict."""


@dataclass(frozen=True)
class Curve:
    """ln T* as a function of ln S and, where there are more columns, of those: what is fitted to N optima.

    The ratio is T* = r S, the power T* = c S^k, the line T* = a S + b; further columns add their multiples to ln T*.
    The parameters are ln r; ln T* at the first student and k; ln T* at the smallest and at the largest student: so a
    line is positive wherever it was measured.

    Attributes:
        form: which of them.
        students: parameters, [N].
        more: further columns, [N, M].
        floors: ln of the least that each T* can be, -inf where there is no such bound, [N]; None for no bounds. It
            counts where an optimum is at most some scale.
    """

    form: Form
    students: Floats
    more: Floats
    floors: Floats | None = None

    @property
    def size(self) -> int:
        """How many parameters are fitted."""
        return (1 if self.form == "ratio" else 2) + self.more.shape[1]

    def at(self, theta_RK: Floats) -> tuple[Floats, Floats]:
        """ln T* of R sets of K parameters, [R, N], and its derivatives, [R, N, K]."""
        replicates, n = len(theta_RK), len(self.students)
        logs, first = np.log(self.students), np.ones((replicates, n))
        if self.form == "ratio":
            mean, columns = theta_RK[:, :1] + logs, [first]
        elif self.form == "power":
            x = logs - logs[0]
            mean, columns = theta_RK[:, :1] + theta_RK[:, 1:2] * x, [first, first * x]
        else:
            share = self._share(self.students)
            with np.errstate(divide="ignore"):
                low, high = theta_RK[:, :1] + np.log1p(-share), theta_RK[:, 1:2] + np.log(share)
            mean = np.logaddexp(low, high)
            columns = [np.exp(low - mean), np.exp(high - mean)]
        start = 1 if self.form == "ratio" else 2
        mean = mean + theta_RK[:, start:] @ self.more.T
        return mean, np.stack([*columns, *(first * column for column in self.more.T)], axis=2)

    def begin(self, y_RN: Floats) -> Floats:
        """Parameters to begin with, [R, K]: least squares over all optima as if each were a point."""
        logs = np.log(self.students)
        shape: Form = "power" if self.form == "line" else self.form
        design = Curve(shape, self.students, self.more).at(np.zeros((1, self.size)))[1][0]
        offset = logs if shape == "ratio" else 0.0
        theta = (np.linalg.pinv(design) @ (y_RN - offset).T).T
        if self.form == "line":
            ends = np.log([self.students.min(), self.students.max()]) - logs[0]
            theta[:, :2] = theta[:, :1] + theta[:, 1:2] * ends
        return theta

    def line(self, theta_RK: Floats) -> tuple[Floats, Floats]:
        """Slope (dimensionless) and intercept (parameters) of R lines."""
        low, high = self.students.min(), self.students.max()
        ends = np.exp(theta_RK[:, :2])
        slope = (ends[:, 1] - ends[:, 0]) / (high - low)
        return slope, ends[:, 0] - slope * low

    def _share(self, students: Floats) -> Floats:
        low, high = self.students.min(), self.students.max()
        return (students - low) / (high - low)


def fit_curve(curve: Curve, y_RN: Floats, side_RN: Floats, error_RN: Floats) -> Floats:
    """Maximum-likelihood parameters [R, K] for R sets of N optima.

    Levenberg-Marquardt on the negative log-likelihood, all sets at once.

    Args:
        y_RN: ln T*, or where censored ln of the grid's edge.
        side_RN: 0 inside the grid, -1 where the optimum lies at most at the edge, 1 where at least.
        error_RN: standard deviation of ln T*, or shape [N].
    """
    y_RN = np.atleast_2d(y_RN)
    side_RN = np.broadcast_to(side_RN, y_RN.shape)
    error_RN = np.broadcast_to(error_RN, y_RN.shape)
    theta = curve.begin(y_RN)
    damping = np.full(len(theta), 1e-3)
    mean, jacobian = curve.at(theta)
    floor_N = curve.floors
    value = _misfit(y_RN, mean, side_RN, error_RN, floor_N)
    for _ in range(_STEPS):
        slope, bend = _derivatives(y_RN, mean, side_RN, error_RN, floor_N)
        gradient = np.einsum("rnk,rn->rk", jacobian, slope)
        hessian = np.einsum("rnk,rn,rnl->rkl", jacobian, bend, jacobian)
        size = np.maximum(np.einsum("rkk->rk", hessian), 1e-9)
        damped = hessian + (damping[:, None] * size)[:, :, None] * np.eye(curve.size)
        # A step over more than some e-folds is where the likelihood is flat; there is no hurry.
        step = np.clip(np.linalg.solve(damped, -gradient[:, :, None])[:, :, 0], -2, 2)
        tried = theta + step
        tried_mean, tried_jacobian = curve.at(tried)
        tried_value = _misfit(y_RN, tried_mean, side_RN, error_RN, floor_N)
        better = tried_value <= value
        theta = np.where(better[:, None], tried, theta)
        mean, value = np.where(better[:, None], tried_mean, mean), np.where(better, tried_value, value)
        jacobian = np.where(better[:, None, None], tried_jacobian, jacobian)
        damping = np.clip(np.where(better, damping / 8, damping * 5), 1e-12, _DAMPED)
        if ((np.abs(step).max(axis=1) < 1e-10) | (damping >= _DAMPED)).all():
            break
    return theta


def misfit(curve: Curve, theta_RK: Floats, y_RN: Floats, side_RN: Floats, error_RN: Floats) -> Floats:
    """The negative log-likelihood [R] of parameters, up to what errors alone decide; nats."""
    y_RN = np.atleast_2d(y_RN)
    return _misfit(
        y_RN,
        curve.at(theta_RK)[0],
        np.broadcast_to(side_RN, y_RN.shape),
        np.broadcast_to(error_RN, y_RN.shape),
        curve.floors,
    )


def find_scatter(curve: Curve, y_N: Floats, side_N: Floats, error_N: Floats) -> float:
    """By how much optima scatter about a curve beyond their errors: a standard deviation of ln T*.

    That under which the likelihood of optima and bounds is highest, restricted as in Patterson and Thompson (1971): of
    the optima inside their grids, I in number, ln error counts (I - K) / I, so that with equal errors and without
    bounds the squared residuals come to I - K. It counts 1 / I at least, so that where I is not larger than K bounds
    that contradict the optima still tell of scatter, and others do not. 1 at most.
    """
    inside = int((side_N == INSIDE).sum())
    if not inside:
        return 0.0
    weight = max(inside - curve.size, 1) / inside
    tried = np.concatenate([[0.0], np.geomspace(1e-4, _MOST, _SCATTERS)])
    for refined in (False, True):
        error_RN = np.maximum(np.hypot(error_N, tried[:, None]), 1e-9)
        y_RN = np.broadcast_to(y_N, error_RN.shape)
        cost = misfit(curve, fit_curve(curve, y_RN, side_N, error_RN), y_RN, side_N, error_RN)
        cost += weight * np.where(side_N == INSIDE, np.log(error_RN), 0.0).sum(axis=1)
        best = int(np.argmin(cost))
        if best == 0 or refined:
            break
        tried = np.linspace(tried[best - 1], tried[min(best + 1, len(tried) - 1)], _SCATTERS)
    return float(tried[best])


def squares_of(curve: Curve, theta_RK: Floats, y_RN: Floats, side_N: Floats, error_RN: Floats) -> Floats:
    """Sum over the optima inside their grids of squared deviations in units of their errors, [R]."""
    z = (y_RN - curve.at(theta_RK)[0]) / error_RN
    return np.where(side_N == INSIDE, z**2, 0.0).sum(axis=1)


def _misfit(y_RN: Floats, mean_RN: Floats, side_RN: Floats, error_RN: Floats, floor_N: Floats | None) -> Floats:
    z = (y_RN - mean_RN) / error_RN
    log_p, _, _ = _beyond(z, mean_RN, side_RN, error_RN, floor_N)
    return np.where(side_RN == INSIDE, z**2 / 2, -log_p).sum(axis=1)


def _derivatives(
    y_RN: Floats, mean_RN: Floats, side_RN: Floats, error_RN: Floats, floor_N: Floats | None
) -> tuple[Floats, Floats]:
    """First and second derivative of the misfit in ln T*, [R, N] each."""
    z = (y_RN - mean_RN) / error_RN
    _, near, far = _beyond(z, mean_RN, side_RN, error_RN, floor_N)
    # Of -ln (Phi(b) - Phi(a)), with a and b falling as ln T* rises: (phi(b) - phi(a)) / P, and its own.
    slope = np.where(side_RN == INSIDE, -z, -side_RN * (near[0] - far[0])) / error_RN
    bend = np.where(side_RN == INSIDE, 1.0, near[1] - far[1] + (near[0] - far[0]) ** 2) / error_RN**2
    return slope, np.maximum(bend, 0.0)


Hazard = tuple[Floats, Floats]


def _beyond(
    z_RN: Floats, mean_RN: Floats, side_RN: Floats, error_RN: Floats, floor_N: Floats | None
) -> tuple[Floats, Hazard, Hazard]:
    """Of optima that are bounds, ln P of lying where they may, P = Phi(b) - Phi(a) with b at the bound, a at the floor.

    Also phi / P and z phi / P at each of the two; those at the floor are 0 where there is none.
    """
    b = np.where(side_RN == INSIDE, 0.0, -side_RN * z_RN)
    log_p = log_ndtr(b)
    far = np.zeros_like(b), np.zeros_like(b)
    if floor_N is not None:
        a = np.where(side_RN == LOW, (floor_N - mean_RN) / error_RN, -np.inf)
        # Of the same sign, and so that neither tail is lost in a difference from 1.
        right = a > 0
        more, less = log_ndtr(np.where(right, -a, b)), log_ndtr(np.where(right, -b, a))
        log_p = more + np.log1p(-np.exp(np.minimum(less - more, -1e-12)))
        far = _hazard(a, log_p)
    return log_p, _hazard(b, log_p), far


def _hazard(z: Floats, log_p: Floats) -> Hazard:
    """phi(z) / P, and z times that; 0 at z = -inf."""
    finite = np.where(np.isfinite(z), z, 0.0)
    log = np.minimum(-(finite**2) / 2 - 0.5 * np.log(2 * np.pi) - log_p, _LARGEST)
    density = np.where(np.isfinite(z), np.exp(log), 0.0)
    return density, finite * density

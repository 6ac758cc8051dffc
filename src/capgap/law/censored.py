"""Curves through optima of which some are known only to lie beyond an edge: maximum likelihood, many at a time.

An optimum's logarithm is taken to be normal about the curve, as the vertex of a parabola in ln T is. One that is
censored at its grid's edge enters with the probability of lying beyond it (Tobin 1958), never as a point.
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
    """

    form: Form
    students: Floats
    more: Floats

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
    value = _misfit(y_RN, mean, side_RN, error_RN)
    for _ in range(_STEPS):
        slope, bend = _derivatives(y_RN, mean, side_RN, error_RN)
        gradient = np.einsum("rnk,rn->rk", jacobian, slope)
        hessian = np.einsum("rnk,rn,rnl->rkl", jacobian, bend, jacobian)
        size = np.maximum(np.einsum("rkk->rk", hessian), 1e-9)
        damped = hessian + (damping[:, None] * size)[:, :, None] * np.eye(curve.size)
        # A step over more than some e-folds is where the likelihood is flat; there is no hurry.
        step = np.clip(np.linalg.solve(damped, -gradient[:, :, None])[:, :, 0], -2, 2)
        tried = theta + step
        tried_mean, tried_jacobian = curve.at(tried)
        tried_value = _misfit(y_RN, tried_mean, side_RN, error_RN)
        better = tried_value <= value
        theta = np.where(better[:, None], tried, theta)
        mean, value = np.where(better[:, None], tried_mean, mean), np.where(better, tried_value, value)
        jacobian = np.where(better[:, None, None], tried_jacobian, jacobian)
        damping = np.clip(np.where(better, damping / 8, damping * 5), 1e-12, 1e9)
        if (np.abs(step).max(axis=1) < 1e-10)[better].all() and better.any():
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
    )


def find_scatter(curve: Curve, y_N: Floats, side_N: Floats, error_N: Floats) -> float:
    """By how much optima scatter about a curve beyond their errors: a standard deviation of ln T*.

    That for which the squared deviations, in units of all their errors, come to N - K, K parameters being fitted
    (Paule and Mandel 1982); of a censored optimum the expected square, given the side. 0 where they are smaller
    without any, and where N is not larger than K; 1 at most.
    """
    degrees = len(y_N) - curve.size
    if degrees < 1:
        return 0.0
    tried = np.concatenate([[0.0], np.geomspace(1e-4, _MOST, _SCATTERS)])
    for _ in range(2):
        error_RN = np.maximum(np.hypot(error_N, tried[:, None]), 1e-9)
        y_RN = np.broadcast_to(y_N, error_RN.shape)
        enough = squares_of(curve, fit_curve(curve, y_RN, side_N, error_RN), y_RN, side_N, error_RN) <= degrees
        if enough[0]:
            return float(tried[0])
        if not enough[-1]:
            return float(tried[-1])
        first = int(np.argmax(enough))
        tried = np.linspace(tried[first - 1], tried[first], _SCATTERS)
    return float(tried[-1])


def squares_of(curve: Curve, theta_RK: Floats, y_RN: Floats, side_N: Floats, error_RN: Floats) -> Floats:
    """Sum of squared deviations in units of their errors, [R]; of a censored optimum the expected square."""
    z = (y_RN - curve.at(theta_RK)[0]) / error_RN
    away = -side_N * z
    return np.where(side_N == INSIDE, z**2, 1 - away * _hazard(away)).sum(axis=1)


def _misfit(y_RN: Floats, mean_RN: Floats, side_RN: Floats, error_RN: Floats) -> Floats:
    z = (y_RN - mean_RN) / error_RN
    beyond = -log_ndtr(np.where(side_RN == INSIDE, 0.0, -side_RN * z))
    return np.where(side_RN == INSIDE, z**2 / 2, beyond).sum(axis=1)


def _derivatives(y_RN: Floats, mean_RN: Floats, side_RN: Floats, error_RN: Floats) -> tuple[Floats, Floats]:
    """First and second derivative of the misfit in ln T*, [R, N] each."""
    z = (y_RN - mean_RN) / error_RN
    away = np.where(side_RN == INSIDE, 0.0, -side_RN * z)
    hazard = _hazard(away)
    slope = np.where(side_RN == INSIDE, -z, -side_RN * hazard) / error_RN
    bend = np.where(side_RN == INSIDE, 1.0, hazard * (away + hazard)) / error_RN**2
    return slope, bend


def _hazard(z: Floats) -> Floats:
    """phi(z) / Phi(z)."""
    return np.exp(-(z**2) / 2 - 0.5 * np.log(2 * np.pi) - log_ndtr(z))

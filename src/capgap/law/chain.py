"""From a study's optima to one curve through them, with the bootstrap's replicates of both.

Where there are more optima inside their grids than a curve has parameters (three for a line), how they scatter about it
tells how sure it is. Replicates are drawn about the optima, and their errors' size is drawn with them: it is itself
found from few optima, so that squares are those of the residuals over a chi-square draw, as in Student's t and in
Hartung and Knapp's (2001) adjustment to meta-regression. With one optimum more, squares are taken to be no smaller than
the errors say: one residual is small by luck too often. With none, only the losses' scatter tells anything: the
replicates are those of the losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capgap.law.bootstrap import Draws
from capgap.law.censored import Curve, Form, find_scatter, fit_curve, squares_of
from capgap.law.lawfit import Estimate, StudentOptimum
from capgap.law.optimum import Floats

_WIDEST = 100.0
"""How many times wider than found errors are drawn at most; beyond any interval, it only keeps numbers finite."""
_UNKNOWN = 0.1
"""Standard deviation of ln T* where nothing tells it; it matters only beside a censored optimum."""


@dataclass(frozen=True)
class Optima:
    """N optima as a curve is fitted to them.

    Attributes:
        students: parameters, [N].
        logs: ln T*, or where censored ln of the grid's edge, [N].
        sides: 0 inside the grid, -1 at most at its edge, 1 at least, [N].
        errors: standard deviations of ln T*, 0 where not known, [N].
        edges: ln of the scales beyond which an optimum is but a bound, [N, 2]: of each grid's lowest and highest
            teacher, or of the bound itself.
        floors: ln of the least that each T* can be, [N]: of the student itself where all teachers tried are larger, as
            they are where students are cut from them; -inf elsewhere. None for no floors.
    """

    students: Floats
    logs: Floats
    sides: Floats
    errors: Floats
    edges: Floats
    floors: Floats | None = None

    @staticmethod
    def of(rows: Sequence[StudentOptimum]) -> "Optima":
        students = np.array([row.student for row in rows])
        least = np.array([row.optimum.grid[0] for row in rows])
        low = [row.optimum.teacher if row.side < 0 else row.optimum.grid[0] for row in rows]
        high = [row.optimum.teacher if row.side > 0 else row.optimum.grid[-1] for row in rows]
        return Optima(
            students=students,
            logs=np.log([row.optimum.teacher for row in rows]),
            sides=np.array([row.side for row in rows]),
            errors=np.array([row.error or 0.0 for row in rows]),
            edges=np.log(np.stack([low, high], axis=1)),
            floors=np.where(least > students, np.log(students), -np.inf),
        )

    def only(self, which_N: NDArray[np.bool_]) -> "Optima":
        """Those of them."""
        return Optima(
            self.students[which_N],
            self.logs[which_N],
            self.sides[which_N],
            self.errors[which_N],
            self.edges[which_N],
            None if self.floors is None else self.floors[which_N],
        )

    def whole_errors(self, scatter: float) -> Floats:
        """Errors with the scatter about a curve, [N]."""
        errors = np.hypot(self.errors, scatter)
        return np.full(len(errors), _UNKNOWN) if not errors.any() else np.maximum(errors, 1e-7)

    def drawn(self, middle_N: Floats, errors_RN: Floats, rng: np.random.Generator) -> Draws:
        """Normal draws of as many optima about `middle_N` (ln T*); one beyond its grid is censored at the edge."""
        return self._within(middle_N + errors_RN * rng.standard_normal(errors_RN.shape))

    def scattered(self, draws: Draws, scatter: float, rng: np.random.Generator) -> Draws:
        """Draws of the optima's own errors, with a scatter about the curve added to those that are no bounds."""
        moved = self._within(draws.logs + scatter * rng.standard_normal(draws.logs.shape))
        inside = draws.sides == 0
        return Draws(np.where(inside, moved.logs, draws.logs), np.where(inside, moved.sides, draws.sides))

    def _within(self, logs: Floats) -> Draws:
        low, high = self.edges.T
        return Draws(np.clip(logs, low, high), np.where(logs < low, -1, np.where(logs > high, 1, 0)))


@dataclass(frozen=True)
class Fitted:
    """Parameters of R fits of one curve, [R, K]."""

    curve: Curve
    theta_RK: Floats

    def line(self) -> tuple[Floats, Floats]:
        """Slopes and intercepts (parameters), [R]."""
        return self.curve.line(self.theta_RK)


@dataclass(frozen=True)
class Chain:
    """Optima, and what replicates of a curve through them are drawn with.

    Attributes:
        draws: replicates of the optima from their losses; None if there are none.
        replicates: how many to draw about a curve; 0 for none.
    """

    optima: Optima
    draws: Draws | None
    replicates: int
    rng: np.random.Generator
    level: float

    def fit(self, form: Form, more: Floats | None = None) -> "ChainFit":
        """The curve through the optima, and through each replicate's.

        Args:
            more: further columns, [N, M].
        """
        found = self.optima
        columns = np.empty((len(found.students), 0)) if more is None else more
        curve = Curve(form, found.students, columns, found.floors)
        scatter = find_scatter(curve, found.logs, found.sides, found.errors)
        errors = found.whole_errors(scatter)
        theta = fit_curve(curve, found.logs, found.sides, errors)
        fitted = Fitted(curve, theta)
        degrees = int((found.sides == 0).sum()) - curve.size
        if degrees > 0 and self.replicates:
            squares = float(squares_of(curve, theta, found.logs, found.sides, errors)[0])
            squares = max(squares, degrees) if scatter or degrees == 1 else squares
            scale = np.minimum(np.sqrt(squares / self.rng.chisquare(degrees, self.replicates)), _WIDEST)
            middle = np.where(found.sides == 0, found.logs, curve.at(theta)[0][0])
            draws = found.drawn(middle, errors * scale[:, None], self.rng)
        elif self.draws is not None:
            draws, scale = self.draws, np.ones(len(self.draws.logs))
            draws = found.scattered(draws, scatter, self.rng) if scatter else draws
        else:
            return ChainFit(found, fitted, None, np.empty(0), scatter, self.level)
        drawn = Fitted(curve, fit_curve(curve, draws.logs, draws.sides, errors))
        deviations = scatter * scale * self.rng.standard_normal(len(scale))
        return ChainFit(found, fitted, drawn, deviations, scatter, self.level)


@dataclass(frozen=True)
class ChainFit:
    """One curve: as fitted, its replicates (None without), a new optimum's deviation in each [R], the scatter."""

    optima: Optima
    found: Fitted
    drawn: Fitted | None
    deviations: Floats
    scatter: float
    level: float

    def estimate(self, number: Callable[[Fitted], Floats]) -> Estimate:
        """A number of the fit, with its percentile interval."""
        value = float(number(self.found)[0])
        low, high = interval(number(self.drawn), self.level) if self.drawn else (None, None)
        return Estimate(value, low, high)

    def r_squared(self) -> Estimate | None:
        """1 - residual / total sum of squares of T* over the optima inside their grids; None below three."""
        inside = self.optima.sides == 0
        if inside.sum() < 3:
            return None
        measured = np.exp(self.optima.logs)[inside]
        fitted = np.exp(self.found.curve.at(self.found.theta_RK)[0][0])[inside]
        total = ((measured - measured.mean()) ** 2).sum()
        return Estimate(float(1 - ((measured - fitted) ** 2).sum() / total), None, None) if total else None

    def p_value(self, value: float, place: int = 1) -> float | None:
        """Two-sided bootstrap p value of a parameter, the second one, being `value`; at least 1 / R.

        None where no more optima are inside their grids than the curve has parameters: nothing says then how optima
        scatter about it.
        """
        if self.drawn is None or (self.optima.sides == 0).sum() <= self.found.curve.size:
            return None
        drawn = self.drawn.theta_RK[:, place]
        below = float(np.mean(drawn <= value)), float(np.mean(drawn >= value))
        return min(1.0, max(2 * min(below), 1 / len(drawn)))

    def draws(self) -> Floats:
        """Columns of the replicates: slope, intercept and deviation of a line, ratio and deviation of a ratio."""
        if self.drawn is None:
            return np.empty((0, 3 if self.found.curve.form == "line" else 2))
        if self.found.curve.form == "line":
            return np.stack([*self.drawn.line(), self.deviations], axis=1)
        return np.stack([np.exp(self.drawn.theta_RK[:, 0]), self.deviations], axis=1)


def interval(draws_R: Floats, level: float) -> tuple[float | None, float | None]:
    """The percentile interval of draws; None twice where there are none."""
    if not len(draws_R) or not np.isfinite(draws_R).all():
        return None, None
    low, high = np.quantile(draws_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""The optimal teacher of one student, from the losses the student reached under several teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from capgap.errors import LawError
from capgap.law.published import check_scale, scale_text

Floats = NDArray[np.float64]
TEACHERS_NEEDED = 3


@dataclass(frozen=True)
class Optimum:
    """Where a student's loss is lowest over teachers.

    The parabola is L(T) = c0 + c1 x + c2 x^2 with x = ln(T / reference).

    Attributes:
        teacher: parameters; the parabola's vertex, or where censored the bound: the grid's edge, or the teacher next to
            the lowest one.
        loss: nats per token; the parabola at its vertex, or where censored the mean loss at that teacher.
        censored: None inside the grid; "low" or "high" where only a bound is known: at most, or at least, `teacher`.
        curvature: second derivative of the loss in ln T, 2 c2, nats per token.
        coefficients: c0, c1, c2, nats per token.
        reference: parameters; the geometric middle of the grid.
        residuals: measured less fitted loss, nats per token, in the order the points were given.
        grid: the distinct teacher scales, parameters, ascending.
        turn: the same without a parabola: the neighbours, parameters, of the teacher at which losses that first fall
            and then rise have their lowest, by least squares. T* lies between them if that is their only shape.
    """

    teacher: float
    loss: float
    censored: Literal["low", "high"] | None
    curvature: float
    coefficients: tuple[float, float, float]
    reference: float
    residuals: tuple[float, ...]
    grid: tuple[float, ...]
    turn: tuple[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss was at the grid's edge, which bounds the optimum."""
        return self.teacher == {None: None, "low": self.grid[0], "high": self.grid[-1]}[self.censored]

    @property
    def agrees(self) -> bool:
        """Whether the parabola's optimum lies where losses turn without a parabola."""
        return self.turn[0] <= self.teacher <= self.turn[1]

    def curve(self, teachers: Sequence[float] | Floats) -> Floats:
        """The parabola at `teachers` (parameters): nats per token, same shape."""
        x = np.log(np.asarray(teachers, dtype=np.float64) / self.reference)
        c0, c1, c2 = self.coefficients
        return c0 + c1 * x + c2 * x**2


def find_optimum(
    teacher_scales: Sequence[float] | Floats,
    losses: Sequence[float] | Floats,
    *,
    student: str = "the student",
) -> Optimum:
    """Fits loss as a parabola in ln(teacher scale) and finds its minimum.

    Least squares over all points; several seeds are several points at one scale. The optimum is censored if
    and only if (1) the curvature is not positive, or (2) the vertex lies outside the grid, or (3) the lowest
    of the seed-mean losses is at the grid's edge, where nothing was measured on its other side. It is then a bound, on
    the side of the edge with the lower seed-mean loss: at that edge in the case (3), else, where the lowest loss is
    inside and the parabola alone points beyond the grid, at the next teacher after the lowest one.

    Args:
        teacher_scales: parameters, one per point.
        losses: nats per token, one per point.
        student: how the student is called in errors.
    Raises: LawError for fewer than three distinct teachers, for lengths that differ, and for values that are
        not finite or scales that are not positive.
    """
    if len(teacher_scales) != len(losses):
        raise LawError(
            f"{student}: {len(teacher_scales)} teacher scales but {len(losses)} losses; give one loss per scale"
        )
    teachers_P = np.array([check_scale(t, f"{student}: a teacher's scale") for t in teacher_scales])
    losses_P = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(losses_P).all():
        where = int(np.flatnonzero(~np.isfinite(losses_P))[0])
        raise LawError(
            f"{student}: the loss under teacher {scale_text(teachers_P[where])} is {losses_P[where]}; "
            "it must be a finite number of nats per token"
        )
    grid = np.unique(teachers_P)
    if len(grid) < TEACHERS_NEEDED:
        raise LawError(
            f"{student}: {len(grid)} teacher scale{'s' * (len(grid) != 1)} measured "
            f"({', '.join(map(scale_text, grid)) or 'none'}); "
            f"an optimum needs at least {TEACHERS_NEEDED} distinct ones"
        )
    means = np.array([losses_P[teachers_P == t].mean() for t in grid])
    reference = float(np.sqrt(grid[0] * grid[-1]))
    design = parabola(np.log(teachers_P / reference))
    # A shift by the mean loss keeps the digits that matter where losses differ little.
    shift = float(losses_P.mean())
    c0, c1, c2 = np.linalg.lstsq(design, losses_P - shift, rcond=None)[0]
    residuals = losses_P - shift - design @ np.array([c0, c1, c2])

    censored: Literal["low", "high"] | None = None
    lowest = int(means.argmin())
    with np.errstate(all="ignore"):
        teacher = float(reference * np.exp(-c1 / (2 * c2))) if c2 > 0 else np.nan
    inside = bool(grid[0] <= teacher <= grid[-1])
    loss = float(shift + c0 - c1**2 / (4 * c2)) if inside else np.nan
    if not inside or lowest in (0, len(grid) - 1):
        bound, censored = _bound(means)
        teacher, loss = float(grid[bound]), float(means[bound])
    return Optimum(
        teacher=teacher,
        loss=loss,
        censored=censored,
        curvature=float(2 * c2),
        coefficients=(float(shift + c0), float(c1), float(c2)),
        reference=reference,
        residuals=tuple(residuals.tolist()),
        grid=tuple(grid.tolist()),
        turn=_turn(grid, means, np.array([float((teachers_P == t).sum()) for t in grid])),
    )


def _bound(means_C: Floats) -> tuple[int, Literal["low", "high"]]:
    """The place of the teacher that bounds a censored optimum, and on which side of the grid it is."""
    lowest, last = int(means_C.argmin()), len(means_C) - 1
    if means_C[0] <= means_C[-1]:
        return (lowest + 1 if 0 < lowest < last else 0), "low"
    return (lowest - 1 if 0 < lowest < last else last), "high"


def _turn(grid: Floats, means_C: Floats, counts_C: Floats) -> tuple[float, float]:
    """The neighbours of the teacher up to which losses fall, and from which they rise, with the least squared error.

    Both parts are isotonic regressions.
    """
    errors = []
    for place in range(len(grid)):
        left, right = slice(0, place + 1), slice(place, None)
        fall = isotonic_regression(means_C[left], weights=counts_C[left], increasing=False).x
        rise = isotonic_regression(means_C[right], weights=counts_C[right]).x
        # The teacher at the turn is in both parts and is counted with the worse.
        error = counts_C[left][:-1] @ (means_C[left][:-1] - fall[:-1]) ** 2
        error += counts_C[right][1:] @ (means_C[right][1:] - rise[1:]) ** 2
        error += counts_C[place] * max((means_C[place] - fall[-1]) ** 2, (means_C[place] - rise[0]) ** 2)
        errors.append(float(error))
    lowest = min(errors)
    places = [i for i, error in enumerate(errors) if error <= lowest * (1 + 1e-9) + 1e-15]
    return float(grid[max(places[0] - 1, 0)]), float(grid[min(places[-1] + 1, len(grid) - 1)])


def parabola(x_P: Floats) -> Floats:
    """The design matrix [P, 3] with columns 1, x, x^2."""
    return np.stack([np.ones_like(x_P), x_P, x_P**2], axis=1)

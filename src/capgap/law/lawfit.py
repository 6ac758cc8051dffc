"""A fitted law: what it says, how sure it is, and the teacher it names for a student."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from capgap.errors import LawError
from capgap.law.optimum import Floats, Optimum
from capgap.law.published import MILLION, PUBLISHED, check_scale, scale_text

Status = Literal["linear", "proportional", "none"]


@dataclass(frozen=True)
class Observation:
    """One distilled run: scales in parameters, held-out loss in nats per token.

    `student_error` is the standard deviation of ln S, where the student's scale varies with what it is cut from.
    """

    student: float
    teacher: float
    loss: float
    seed: int = 0
    student_error: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap percentile interval, None where there is none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class StudentOptimum:
    """One student's optimum.

    Attributes:
        student: parameters.
        low, high: of the interval of its teacher's scale, parameters; None where censored or unknown.
        error: standard deviation of ln T*, with which the optimum enters the law; of a censored one the median of the
            others. None where no scatter was left to measure it by.
        degrees: of freedom behind the error; None where there is none.
    """

    student: float
    optimum: Optimum
    low: float | None
    high: float | None
    error: float | None = None
    degrees: int | None = None

    @property
    def side(self) -> int:
        """0 inside the grid; -1 where the optimum is at most the grid's edge, 1 where it is at least that."""
        return {None: 0, "low": -1, "high": 1}[self.optimum.censored]


@dataclass(frozen=True)
class Prediction:
    """A student's teacher: parameters; `ratio` = teacher / student; `note` is empty inside the study."""

    teacher: float
    low: float | None
    high: float | None
    ratio: float
    method: Literal["linear", "proportional", "bound", "with tokens"]
    note: str


@dataclass(frozen=True)
class Beside:
    """One quantity here and as published, as text, and how they stand to each other."""

    quantity: str
    here: str
    published: str
    reading: str


@dataclass(frozen=True)
class LawFit:
    """The law fitted to a study.

    Attributes:
        status: "linear" (two or more optima inside their grids), "proportional" (one) or "none".
        optima: one per student, ascending, censored ones too.
        slope: a in T* = a S + b, dimensionless; None unless linear.
        intercept: b, parameters; None unless linear.
        r_squared: of the line, over the optima inside their grids; None below three, where it says nothing.
        ratio: r in T* = r S; None if the status is "none".
        exponent: k in T* = c S^k; None unless linear.
        p_linear: two-sided bootstrap p value of the exponent being 1; None without intervals.
        scatter: standard deviation of ln T* about the line (the ratio, if proportional) beyond the optima's errors.
        notes: what limits the law, one sentence each.
        observations: what it was fitted to, ordered.
        replicates, seed, level: of the bootstrap.
        line_draws: of each replicate slope, intercept (parameters) and a new optimum's deviation from the line in
            ln T*, [R, 3]; ratio_draws: ratio and deviation, [R, 2]; empty without intervals.
    """

    status: Status
    optima: tuple[StudentOptimum, ...]
    slope: Estimate | None
    intercept: Estimate | None
    r_squared: Estimate | None
    ratio: Estimate | None
    exponent: Estimate | None
    p_linear: float | None
    scatter: float | None
    notes: tuple[str, ...]
    observations: tuple[Observation, ...]
    replicates: int
    seed: int
    level: float
    line_draws: Floats = field(repr=False, compare=False)
    ratio_draws: Floats = field(repr=False, compare=False)

    @property
    def intercept_millions(self) -> Estimate | None:
        """The intercept in millions of parameters, as the paper prints it."""
        if (b := self.intercept) is None:
            return None
        low, high = (None if edge is None else edge / MILLION for edge in (b.low, b.high))
        return Estimate(b.value / MILLION, low, high)

    @property
    def interior(self) -> tuple[StudentOptimum, ...]:
        """The optima inside their grids, which enter the fit as points."""
        return tuple(row for row in self.optima if row.optimum.censored is None)

    def predict(self, student: float) -> Prediction:
        """The optimal teacher of a student of `student` parameters.

        The line where there is one and where it names a teacher larger than the student; else the ratio, and where
        every optimum is censored at the same edge, the ratio of the edges, as a bound. Neither a teacher nor an
        interval's lower end is taken below the student's own scale, of which nothing can be cut. The interval is that
        of a new student's optimum: how far the law is known, and how far optima scatter about it. `note` says so where
        the student lies outside the scales that the law was fitted to, or the teacher outside the teachers measured.

        Raises: LawError if the law has no optimum to rest on, or the scale is not positive and finite.
        """
        student = check_scale(student, "the student's scale")
        if self.ratio is None:
            return self._bound(student)
        notes = []
        teacher, method = self.ratio.value * student, "proportional"
        low, high = self._interval(student * self.ratio_draws[:, 0] * np.exp(self.ratio_draws[:, 1]))
        if self.slope is not None and self.intercept is not None:
            line = self.slope.value * student + self.intercept.value
            if line > student:
                teacher, method = line, "linear"
                slopes, intercepts, deviations = self.line_draws.T
                low, high = self._interval((slopes * student + intercepts) * np.exp(deviations))
            else:
                notes.append("the line names a teacher no larger than the student, so the ratio is used")
        if teacher < student:
            teacher = student
            notes.append("the law names no teacher larger than the student: the next larger model is the best")
        if low is not None and high is not None:
            low, high = max(low, student), max(high, student)
        scales = [row.student for row in self.interior]
        if not scales[0] <= student <= scales[-1]:
            factor = scales[0] / student if student < scales[0] else student / scales[-1]
            side = "below the smallest" if student < scales[0] else "above the largest"
            notes.append(
                f"extrapolated: the student is {factor:.3g} times {side} that the law rests on "
                f"({scale_text(scales[0] if student < scales[0] else scales[-1])})"
            )
        teachers = [o.teacher for o in self.observations]
        if not min(teachers) <= teacher <= max(teachers):
            notes.append(
                f"no teacher of that scale was measured (they were {scale_text(min(teachers))} to "
                f"{scale_text(max(teachers))})"
            )
        return Prediction(teacher, low, high, teacher / student, method, "; ".join(notes))

    def _bound(self, student: float) -> Prediction:
        """Where every optimum lies beyond the same edge of its grid."""
        sides = {row.side for row in self.optima}
        if len(sides) > 1:
            raise LawError("this law has no optimum inside its grid of teachers, so it names no teacher")
        logs = [math.log(row.optimum.teacher / row.student) for row in self.optima]
        ratio = math.exp(math.fsum(logs) / len(logs))
        words = ("most", "smaller, so the next larger model is the best") if sides == {-1} else ("least", "larger")
        note = (
            f"a bound: of every student the best teacher is known to be at {words[0]} some scale; it may be {words[1]}"
        )
        low, high = (student, ratio * student) if sides == {-1} else (ratio * student, None)
        return Prediction(ratio * student, low, high, ratio, "bound", note)

    def _interval(self, drawn_R: Floats) -> tuple[float | None, float | None]:
        if not len(drawn_R):
            return None, None
        low, high = np.quantile(drawn_R, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def beside_published(self) -> tuple[Beside, ...]:
        """This law beside the published one: slope, intercept, R^2, ratio, exponent."""
        low, high = PUBLISHED.slope_interval(self.level)
        assumed = f"({low:.2f} to {high:.2f} with n = {PUBLISHED.students_assumed} assumed)"
        return (
            Beside(
                "slope a",
                _shown(self.slope),
                f"{PUBLISHED.slope} {assumed}",
                _reading(self.slope, PUBLISHED.slope),
            ),
            Beside(
                "intercept b, millions",
                _shown(self.intercept_millions, ".4g"),
                f"{PUBLISHED.intercept / MILLION:.3f}",
                "depends on the range of scales; not comparable",
            ),
            Beside(
                "R²",
                _shown(self.r_squared, ".4f"),
                f"{PUBLISHED.r_squared}",
                "" if self.r_squared else "needs three optima inside their grids",
            ),
            Beside("ratio T*/S", _shown(self.ratio), "about 2.5", _reading(self.ratio, 2.5)),
            Beside("exponent of S", _shown(self.exponent), "1 (linear)", self._reading_of_exponent()),
        )

    def _reading_of_exponent(self) -> str:
        words = _reading(self.exponent, 1.0)
        return words if self.p_linear is None else f"{words} (p = {self.p_linear:.2g} that it is 1)"

    def to_dict(self) -> dict[str, Any]:
        """The law as plain JSON-like values; `law_from_dict` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.endswith("_draws")}
        return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _shown(estimate: Estimate | None, form: str = ".3f") -> str:
    if estimate is None:
        return "none"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}} (no interval)"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _reading(estimate: Estimate | None, published: float) -> str:
    if estimate is None:
        return "not fitted here"
    if estimate.low is None or estimate.high is None:
        return "no interval to judge by"
    within = estimate.low <= published <= estimate.high
    return "published value inside our interval" if within else "published value outside our interval"

"""A law through optima that are given, such as those that a paper prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from capgap.errors import LawError
from capgap.law.lawfit import Estimate
from capgap.law.published import check_scale


@dataclass(frozen=True)
class LineFit:
    """T* = a S + b through n optima by ordinary least squares, and ln T* over ln S.

    Attributes:
        slope: dimensionless; intercept: parameters; exponent: of S; ratio: geometric mean of T* / S.
        r_squared: of the line.
        p_linear: two-sided p value of the exponent being 1; None below three optima.
        optima: how many.

    Intervals are Student's t intervals under independent, equal normal errors; None below three optima.
    """

    slope: Estimate
    intercept: Estimate
    exponent: Estimate
    ratio: Estimate
    r_squared: float | None
    p_linear: float | None
    optima: int
    level: float


def fit_optima(students: Sequence[float], teachers: Sequence[float], *, level: float = 0.95) -> LineFit:
    """Fits the law to optima: scales in parameters, one teacher for each student.

    Raises: LawError with fewer than two different students, unequal lengths, or scales that are not positive.
    """
    if len(students) != len(teachers):
        raise LawError(f"{len(students)} students but {len(teachers)} optimal teachers; give one for each")
    x = np.array([check_scale(s, "a student's scale") for s in students])
    y = np.array([check_scale(t, "a teacher's scale") for t in teachers])
    if len(np.unique(x)) < 2:
        raise LawError(f"{len(np.unique(x))} student scale is given; a line needs at least two")
    line: Any = stats.linregress(x, y)
    power: Any = stats.linregress(np.log(x), np.log(y))
    few = len(x) < 3
    quantile = None if few else float(stats.t.ppf((1 + level) / 2, len(x) - 2))
    logs = np.log(y / x)
    mean, error = float(logs.mean()), float(logs.std(ddof=1) / np.sqrt(len(x)))
    spread = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * error
    p = None
    if not few and power.stderr > 0:
        p = float(2 * stats.t.sf(abs(power.slope - 1) / power.stderr, len(x) - 2))
    return LineFit(
        slope=_with_interval(line.slope, line.stderr, quantile),
        intercept=_with_interval(line.intercept, line.intercept_stderr, quantile),
        exponent=_with_interval(power.slope, power.stderr, quantile),
        ratio=Estimate(float(np.exp(mean)), float(np.exp(mean - spread)), float(np.exp(mean + spread))),
        r_squared=None if few else float(line.rvalue**2),
        p_linear=p,
        optima=len(x),
        level=level,
    )


def _with_interval(value: float, error: float, quantile: float | None) -> Estimate:
    if quantile is None:
        return Estimate(float(value), None, None)
    return Estimate(float(value), float(value - quantile * error), float(value + quantile * error))

"""The published law of capacity gap, and the teacher it names for a student."""

import math
from dataclasses import dataclass

from scipy import stats

from capgap.errors import LawError

MILLION = 1e6


@dataclass(frozen=True)
class PublishedLaw:
    """T* = slope * S + intercept, as printed, and the range it was fitted in.

    Attributes:
        slope: dimensionless.
        intercept: parameters (printed in millions).
        r_squared: of the linear fit.
        students_assumed: how many student scales the fit is taken to rest on. The number is not known to us;
            it is used for nothing but the width of the slope's interval.
        smallest_student: parameters; 0.4 of the smallest pilot teacher (70M), where the optimum was seen.
        largest_teacher: parameters; the pilot study stayed below this.
        source: where it is printed.
    """

    slope: float = 2.498
    intercept: float = -11.498 * MILLION
    r_squared: float = 0.9957
    students_assumed: int = 6
    smallest_student: float = 28 * MILLION
    largest_teacher: float = 3000 * MILLION
    source: str = (
        "Zhang, Li, Song, Ye, Gao, Hu: Towards the Law of Capacity Gap in Distilling Language Models, "
        "ACL 2025, arXiv:2311.07052"
    )

    @property
    def slope_error(self) -> float:
        """Standard error of the slope: |a| sqrt((1/R^2 - 1) / (n - 2)), an identity of simple regression."""
        return abs(self.slope) * math.sqrt((1 / self.r_squared - 1) / (self.students_assumed - 2))

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the slope, under the assumed number of student scales."""
        half = float(stats.t.ppf((1 + level) / 2, self.students_assumed - 2)) * self.slope_error
        return self.slope - half, self.slope + half


PUBLISHED = PublishedLaw()


@dataclass(frozen=True)
class PublishedPick:
    """The published law's teacher for one student: scales in parameters, `ratio` = teacher / student."""

    teacher: float
    ratio: float
    low: float
    high: float
    note: str


def published_teacher(student_params: float) -> PublishedPick:
    """The optimal teacher of a student by the published law, with a 95 % interval.

    From the smallest pilot student (28M parameters) up, the law as printed: 2.498 S - 11.498M. Below it the
    intercept outweighs the slope (at 4.6M the law names no teacher at all), so the ratio alone is used:
    2.498 S. The rule steps by 11.498M at 28M; both values lie within a model family's usual spacing.

    The paper prints no interval. This one moves the slope only, by a t quantile times the standard error that
    R^2 = 0.9957 implies for n student scales; n is not known to us and n = 6 is assumed.

    Args:
        student_params: the student's parameters, shared weights counted once.
    Returns: scales in parameters; `note` says which form was used and what the interval assumes.
    Raises: LawError if the scale is not a positive finite number.
    Source: arXiv:2311.07052, pilot study.
    """
    student = check_scale(student_params, "the student's scale")
    law = PUBLISHED
    notes = []
    intercept = law.intercept
    if student < law.smallest_student:
        intercept = 0.0
        notes.append(
            f"below the smallest pilot student (about {law.smallest_student / MILLION:.0f}M) the published "
            f"intercept means nothing, so the ratio {law.slope} is used alone; this is an extrapolation"
        )
    teacher = law.slope * student + intercept
    if teacher > law.largest_teacher:
        notes.append(f"extrapolated: the pilot study stayed below {law.largest_teacher / 1e9:.0f}B teachers")
    slopes = law.slope_interval()
    notes.append(
        f"the interval is ours: 95 %, from R^2 = {law.r_squared}, with n = {law.students_assumed} "
        "student scales assumed"
    )
    low, high = (slope * student + intercept for slope in slopes)
    return PublishedPick(teacher, teacher / student, low, high, "; ".join(notes))


def check_scale(value: float, what: str) -> float:
    """`value` as a float. Raises LawError, which names `what`, if it is not a positive finite number."""
    if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise LawError(f"{what} = {value!r} must be a positive, finite count of parameters")
    return float(value)


def scale_text(scale: float) -> str:
    """A count of parameters for reading: three significant digits and k, M, B or T, such as 58.2k, 3B."""
    rounded = float(f"{scale:.3g}")
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g}{suffix}"
    return f"{rounded:.3g}"

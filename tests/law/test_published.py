import math

import numpy as np
import pytest
import statsmodels.api as sm

from capgap.errors import LawError
from capgap.law import PUBLISHED, published_teacher, scale_text
from capgap.law.published import PublishedLaw
from reference.law import slope_standard_error


def test_the_constants_are_those_printed():
    assert (PUBLISHED.slope, PUBLISHED.intercept, PUBLISHED.r_squared) == (2.498, -11.498e6, 0.9957)
    assert "2311.07052" in PUBLISHED.source


def test_a_three_billion_student_wants_a_seven_billion_teacher():
    pick = published_teacher(3e9)
    assert pick.teacher == pytest.approx(2.498 * 3e9 - 11.498e6, rel=1e-12)
    assert pick.ratio == pytest.approx(pick.teacher / 3e9)
    assert pick.low < pick.teacher < pick.high
    assert "below 3B teachers" in pick.note
    assert "n = 6" in pick.note


def test_inside_the_pilot_range_only_the_interval_needs_a_word():
    pick = published_teacher(500e6)
    assert pick.teacher == pytest.approx(1237.502e6)
    assert "extrapol" not in pick.note
    assert "interval is ours" in pick.note


def test_below_the_smallest_pilot_student_the_ratio_is_used_alone():
    pick = published_teacher(58_000)
    assert pick.teacher == pytest.approx(2.498 * 58_000)
    assert pick.ratio == pytest.approx(2.498)
    assert "smallest pilot student" in pick.note
    at = PUBLISHED.smallest_student
    assert published_teacher(at).teacher == pytest.approx(2.498 * at - 11.498e6)
    assert published_teacher(at * (1 - 1e-9)).teacher == pytest.approx(2.498 * at)


def test_the_slope_error_is_the_textbook_one():
    rng = np.random.default_rng(0)
    students = np.array([30e6, 60e6, 120e6, 300e6, 600e6, 1100e6])
    optima = 2.5 * students - 11e6 + rng.normal(0, 60e6, 6)
    fit = sm.OLS(optima, sm.add_constant(students)).fit()
    law = PublishedLaw(slope=fit.params[1], intercept=fit.params[0], r_squared=fit.rsquared, students_assumed=6)
    assert law.slope_error == pytest.approx(fit.bse[1], rel=1e-9)
    assert law.slope_error == pytest.approx(slope_standard_error(list(students), list(optima)), rel=1e-9)
    assert law.slope_interval() == pytest.approx(tuple(fit.conf_int(0.05)[1]), rel=1e-9)


def test_the_published_slope_interval():
    low, high = PUBLISHED.slope_interval()
    assert (low, high) == pytest.approx((2.498 - 2.7764 * 0.08208, 2.498 + 2.7764 * 0.08208), abs=1e-3)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, True])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(LawError, match="student's scale"):
        published_teacher(scale)


@pytest.mark.parametrize(
    ("scale", "text"),
    [(58_213, "58.2k"), (3e9, "3B"), (999_999, "1M"), (230_000, "230k"), (12, "12"), (7.4825e9, "7.48B")],
)
def test_scales_for_reading(scale, text):
    assert scale_text(scale) == text

"""The line through given optima, beside statsmodels and the published constants."""

import numpy as np
import pytest
import statsmodels.api as sm

from capgap.errors import LawError
from capgap.law import PUBLISHED, fit_optima

STUDENTS = np.array([28e6, 64e6, 160e6, 400e6, 560e6, 1100e6])


def test_optima_on_the_published_line_give_its_constants():
    line = fit_optima(STUDENTS, PUBLISHED.slope * STUDENTS + PUBLISHED.intercept)
    assert line.slope.value == pytest.approx(2.498, rel=1e-9)
    assert line.intercept.value == pytest.approx(-11.498e6, rel=1e-6)
    assert line.r_squared == pytest.approx(1.0)


def test_intervals_and_the_test_of_linearity_are_those_of_statsmodels():
    teachers = STUDENTS**0.9 * 20 * np.exp(np.random.default_rng(0).normal(0, 0.1, 6))
    line = fit_optima(STUDENTS, teachers)
    # In millions, as its intervals lose digits where the columns differ by 1e9.
    ols = sm.OLS(teachers / 1e6, sm.add_constant(STUDENTS / 1e6)).fit()
    (b, a), (interval_b, interval_a) = ols.params, ols.conf_int()
    assert line.slope.value == pytest.approx(a)
    assert (line.slope.low, line.slope.high) == pytest.approx(tuple(interval_a))
    assert line.intercept.value == pytest.approx(b * 1e6)
    assert (line.intercept.low, line.intercept.high) == pytest.approx(tuple(interval_b * 1e6))
    assert line.r_squared == pytest.approx(ols.rsquared)
    power = sm.OLS(np.log(teachers), sm.add_constant(np.log(STUDENTS))).fit()
    assert line.exponent.value == pytest.approx(power.params[1])
    assert line.p_linear == pytest.approx(float(power.t_test("x1 = 1").pvalue))


def test_two_optima_give_a_line_without_an_interval():
    line = fit_optima([1e6, 2e6], [3e6, 5e6])
    assert (line.slope.value, line.slope.low, line.r_squared, line.p_linear) == (2.0, None, None, None)


def test_what_gives_no_line_is_refused():
    with pytest.raises(LawError, match="1 student scale is given"):
        fit_optima([1e6, 1e6], [3e6, 5e6])
    with pytest.raises(LawError, match="2 students but 1 optimal"):
        fit_optima([1e6, 2e6], [3e6])

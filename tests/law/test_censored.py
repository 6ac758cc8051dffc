import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import norm

from capgap.law.censored import FORMS, Curve, find_scatter, fit_curve, misfit

STUDENTS = np.geomspace(15e3, 300e3, 6)
ERRORS = np.array([0.1, 0.2, 0.15, 0.1, 0.3, 0.1])


def optima(seed, replicates=8, censor=True):
    """ln T* about T = 2.5 S - 10k; those of the smallest student below its edge, of the largest above it."""
    rng = np.random.default_rng(seed)
    y = np.log(2.5 * STUDENTS - 1e4) + ERRORS * rng.standard_normal((replicates, 6))
    side = np.zeros((replicates, 6))
    if censor:
        low, high = np.log(1.8 * STUDENTS[0]), np.log(2.5 * STUDENTS[-1])
        side[:, 0], side[:, -1] = np.where(y[:, 0] < low, -1, 0), y[:, -1] > high
        y[:, 0], y[:, -1] = np.maximum(y[:, 0], low), np.minimum(y[:, -1], high)
    return y, side


def cost(mean, y, side, errors):
    z = (y - mean) / errors
    inside = side == 0
    return np.sum(z[inside] ** 2) / 2 - norm.logcdf(-side[~inside] * z[~inside]).sum()


def mean_of(form, p, students, more=None, m=()):
    """The curves written out in their own parameters."""
    if form == "ratio":
        mean = np.log(np.exp(p[0]) * students)
    elif form == "power":
        mean = p[0] + p[1] * np.log(students / students[0])
    else:
        low, high = np.exp(p[0]), np.exp(p[1])
        slope = (high - low) / (students.max() - students.min())
        mean = np.log(low + slope * (students - students.min()))
    return mean + (0 if more is None else more @ np.array(m))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [0, 1])
def test_it_maximises_the_likelihood(form, columns):
    y, side = optima(3)
    assert {-1, 0, 1} == set(np.unique(side))
    more = np.random.default_rng(0).normal(size=(6, columns))
    curve = Curve(form, STUDENTS, more)
    found = fit_curve(curve, y, side, ERRORS)
    for r in range(len(y)):

        def value(p, r=r):
            k = curve.size - columns
            return cost(mean_of(form, p[:k], STUDENTS, more, p[k:]), y[r], side[r], ERRORS)

        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20000, "maxfev": 20000}
        best = minimize(value, found[r] + 0.05, method="Nelder-Mead", options=options)
        assert found[r] == pytest.approx(best.x, abs=1e-5)
        assert misfit(curve, found[r : r + 1], y[r], side[r], ERRORS)[0] == pytest.approx(value(found[r]), rel=1e-9)


def test_without_censoring_power_and_ratio_are_weighted_least_squares():
    y, side = optima(1, censor=False)
    weights = ERRORS**-2
    ratio = fit_curve(Curve("ratio", STUDENTS, np.empty((6, 0))), y, side, ERRORS)
    assert ratio[:, 0] == pytest.approx(np.average(y - np.log(STUDENTS), axis=1, weights=weights), rel=1e-8)
    power = fit_curve(Curve("power", STUDENTS, np.empty((6, 0))), y, side, ERRORS)
    for r in range(len(y)):
        k, c = np.polyfit(np.log(STUDENTS / STUDENTS[0]), y[r], 1, w=1 / ERRORS)
        assert power[r] == pytest.approx([c, k], rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_derivatives_are_those_of_the_curve(form):
    curve = Curve(form, STUDENTS, np.random.default_rng(0).normal(size=(6, 2)))
    theta = np.array([[10.2, 13.0, 0.3, -0.2][-curve.size :]])
    _, jacobian = curve.at(theta)
    for k in range(curve.size):
        step = np.zeros_like(theta)
        step[0, k] = 1e-6
        numeric = (curve.at(theta + step)[0] - curve.at(theta - step)[0]) / 2e-6
        assert jacobian[:, :, k] == pytest.approx(numeric, abs=1e-6)


def test_a_line_gives_its_slope_and_intercept():
    curve = Curve("line", STUDENTS, np.empty((6, 0)))
    slope, intercept = curve.line(np.log([[2.5 * STUDENTS[0] - 1e4, 2.5 * STUDENTS[-1] - 1e4]]))
    assert (slope[0], intercept[0]) == pytest.approx((2.5, -1e4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), away=st.floats(3, 30))
def test_a_bound_far_beyond_the_curve_says_nothing(seed, away):
    y, side = optima(seed, 1, censor=False)
    curve = Curve("power", STUDENTS, np.empty((6, 0)))
    alone = fit_curve(Curve("power", STUDENTS[1:], np.empty((5, 0))), y[:, 1:], side[:, 1:], ERRORS[1:])
    wanted = alone[0, 0] + alone[0, 1] * np.log(STUDENTS[0] / STUDENTS[1])
    y[0, 0], side[0, 0] = wanted + away, -1  # at most far above
    found = fit_curve(curve, y, side, ERRORS)
    assert found[0, 1] == pytest.approx(alone[0, 1], abs=1e-6)


def test_the_scatter_makes_residuals_what_they_should_be():
    rng = np.random.default_rng(5)
    curve = Curve("power", STUDENTS, np.empty((6, 0)))
    y = np.log(2.5 * STUDENTS) + rng.normal(0, 0.5, 6)
    scatter = find_scatter(curve, y, np.zeros(6), np.full(6, 0.1))
    error = np.hypot(0.1, scatter)
    k, c = np.polyfit(np.log(STUDENTS), y, 1)
    assert np.sum(((y - k * np.log(STUDENTS) - c) / error) ** 2) == pytest.approx(6 - 2, abs=0.02)


def test_the_scatter_has_the_highest_restricted_likelihood():
    """Bounds included: worked out with scipy's normal and its own minimiser."""
    y, side = optima(3)
    which = next(r for r in range(len(y)) if {-1, 1} <= set(side[r]))
    y, side = y[which] + np.random.default_rng(1).normal(0, 0.4, 6) * (side[which] == 0), side[which]
    inside = side == 0

    def restricted(scatter):
        errors = np.hypot(ERRORS, scatter)

        def value(p):
            return cost(mean_of("power", p, STUDENTS), y, side, errors)

        best = minimize(value, [y[0], 1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-11})
        return best.fun + (inside.sum() - 2) / inside.sum() * np.log(errors[inside]).sum()

    found = find_scatter(Curve("power", STUDENTS, np.empty((6, 0))), y, side, ERRORS)
    expected = minimize_scalar(restricted, bounds=(1e-4, 1), method="bounded", options={"xatol": 1e-4}).x
    assert found > 0.05
    assert found == pytest.approx(expected, abs=0.01)


def test_bounds_tell_of_scatter_only_where_they_contradict():
    curve = Curve("ratio", STUDENTS[:5], np.empty((5, 0)))
    y, side = np.log([1.35, 1.27, 1.3, 1.31, 1.35]) + np.log(STUDENTS[:5]), np.array([-1, -1, -1, -1, 0])
    assert find_scatter(curve, y, side, np.full(5, 0.1)) == 0
    y[-1] += 1.5
    assert find_scatter(curve, y, side, np.full(5, 0.1)) > 0.3


def test_between_a_bound_and_a_floor_the_probability_is_that_of_both():
    students = STUDENTS[:4]
    y, side = np.log(1.3 * students), np.array([-1.0, -1.0, 1.0, 0.0])
    floors = np.log(students)
    curve = Curve("ratio", students, np.empty((4, 0)), floors)
    for ratio in (0.5, 1.1, 1.3, 2.0, 5.0):
        theta = np.log([[ratio]])
        a, b = (floors - np.log(ratio * students)) / ERRORS[:4], (y - np.log(ratio * students)) / ERRORS[:4]
        expected = -np.log(norm.cdf(b) - norm.cdf(a))[:2].sum() - norm.logsf(b[2]) + b[3] ** 2 / 2
        if np.isfinite(expected):
            assert misfit(curve, theta, y, side, ERRORS[:4])[0] == pytest.approx(expected, rel=1e-6)
        # Far out in both tails it stays finite, and falls towards the interval.
        assert np.isfinite(misfit(curve, theta * 100, y, side, ERRORS[:4])).all()
    # Between floor and bound alone, the middle is likeliest: of equal intervals, the very middle.
    alone = Curve("ratio", students[:2], np.empty((2, 0)), floors[:2])
    found = fit_curve(alone, y[None, :2], side[:2], np.full(2, 0.1))
    assert np.exp(found[0, 0]) == pytest.approx(np.sqrt(1.3), rel=1e-6)
    assert fit_curve(alone, y[None, :2] + 30, side[:2], np.full(2, 0.1))[0, 0] > 1


def test_there_is_no_scatter_where_errors_explain_everything():
    curve = Curve("power", STUDENTS, np.empty((6, 0)))
    assert find_scatter(curve, np.log(2.5 * STUDENTS), np.zeros(6), ERRORS) == 0
    two = Curve("power", STUDENTS[:2], np.empty((2, 0)))
    assert find_scatter(two, np.array([1.0, 9.0]), np.zeros(2), ERRORS[:2]) == 0


def test_the_scatter_is_right_on_average():
    rng = np.random.default_rng(6)
    students = np.geomspace(1e4, 1e6, 12)
    curve = Curve("power", students, np.empty((12, 0)))
    found = [
        find_scatter(curve, np.log(students) + rng.normal(0, np.hypot(0.1, 0.2), 12), np.zeros(12), np.full(12, 0.1))
        for _ in range(200)
    ]
    assert np.mean(np.square(found)) == pytest.approx(0.04, rel=0.1)

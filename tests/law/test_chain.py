import numpy as np
import pytest

from capgap.law.chain import Chain, Optima

STUDENTS = np.geomspace(2e4, 3e5, 6)


def optima(seed=0, scatter=0.1, errors=0.05):
    rng = np.random.default_rng(seed)
    logs = np.log(2.5 * STUDENTS) + rng.normal(0, np.hypot(scatter, errors), 6)
    edges = np.stack([logs - 2, logs + 2], axis=1)
    return Optima(STUDENTS, logs, np.zeros(6), np.full(6, errors), edges)


def chain(found, replicates=4000):
    return Chain(found, None, replicates, np.random.default_rng(1), 0.95)


def test_draws_about_optima_are_normal_and_censored_at_the_edges():
    found = Optima(STUDENTS[:2], np.zeros(2), np.zeros(2), np.zeros(2), np.array([[0.0, 1.0], [0.0, 2.0]]))
    drawn = found.drawn(np.array([0.5, 2.0]), np.full((4000, 2), [0.1, 0.5]), np.random.default_rng(0))
    assert drawn.logs[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.logs[:, 0].std() == pytest.approx(0.1, rel=0.05)
    assert np.mean(drawn.sides[:, 1] == 1) == pytest.approx(0.5, abs=0.03)
    assert (drawn.logs[drawn.sides[:, 1] == 1, 1] == 2).all()
    assert set(np.unique(drawn.sides[:, 0])) <= {-1, 0, 1}


def test_with_equal_errors_the_interval_is_students_t():
    """Of the exponent: the textbook interval of a regression's slope, from its residuals."""
    import statsmodels.api as sm

    found = optima(scatter=0.2, errors=0.02)
    textbook = sm.OLS(found.logs, sm.add_constant(np.log(STUDENTS))).fit()
    fitted = chain(found, 40000).fit("power").estimate(lambda f: f.theta_RK[:, 1])
    assert fitted.value == pytest.approx(textbook.params[1], rel=1e-6)
    assert (fitted.low, fitted.high) == pytest.approx(tuple(textbook.conf_int()[1]), abs=0.02)
    p = chain(found, 40000).fit("power").p_value(1.0)
    assert p == pytest.approx(float(textbook.t_test("x1 = 1").pvalue), abs=0.02)


def test_further_columns_are_fitted_beside():
    found = optima(scatter=0, errors=0.01)
    column = np.array([0.0, 1, 0, 1, 0, 1])
    moved = Optima(STUDENTS, found.logs + 0.7 * column, found.sides, found.errors, found.edges)
    fitted = chain(moved).fit("power", column[:, None])
    assert fitted.found.theta_RK[0, 2] == pytest.approx(0.7, abs=0.03)
    assert fitted.p_value(0.7, 2) > 0.05
    assert fitted.p_value(0.0, 2) < 0.01


def test_few_optima_and_no_losses_leave_no_replicates():
    few = optima().only(np.arange(6) < 2)
    fitted = chain(few).fit("line")
    assert fitted.drawn is None
    assert fitted.estimate(lambda f: f.line()[0]).low is None


@pytest.mark.parametrize(("count", "least", "most"), [(3, 0.96, 1.0), (5, 0.9, 0.99)])
def test_intervals_and_p_values_know_of_scatter_however_few_the_optima(count, least, most):
    """Optima that scatter by 0.3 about T* = 2.5 S: the exponent's interval covers 1, and 1 is seldom refused."""
    covered, refused = [], []
    for i in range(80):
        rng, students = np.random.default_rng(i), np.geomspace(2e4, 3e5, count)
        logs = np.log(2.5 * students) + rng.normal(0, np.hypot(0.3, 0.1), count)
        found = Optima(students, logs, np.zeros(count), np.full(count, 0.1), np.stack([logs - 3, logs + 3], axis=1))
        fitted = chain(found, 400).fit("power")
        exponent = fitted.estimate(lambda f: f.theta_RK[:, 1])
        covered.append(exponent.low <= 1 <= exponent.high)
        refused.append(fitted.p_value(1.0) < 0.05)
    assert least <= np.mean(covered) <= most
    assert np.mean(refused) < 0.12


def test_bounds_that_say_nothing_widen_no_interval():
    found = optima(scatter=0, errors=0.2)
    far = Optima(
        np.append(found.students, STUDENTS[:3]),
        np.append(found.logs, np.log(0.1 * STUDENTS[:3])),
        np.append(found.sides, [1, 1, 1]),
        np.append(found.errors, [0.2] * 3),
        np.concatenate([found.edges, np.log([[0.05, 0.1]]) + np.log(STUDENTS[:3, None])]),
    )
    widths = []
    for one in (found, far):
        exponent = chain(one, 20000).fit("power").estimate(lambda f: f.theta_RK[:, 1])
        widths.append(exponent.high - exponent.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from capgap.errors import LawError
from capgap.law import RoleObservation, find_roles, fit_roles

MODELS = [30e3, 53e3, 89e3, 145e3, 250e3, 400e3, 700e3]


def surface(p, t, best_p=60e3, best_t=300e3, twist=0.0):
    x, y = math.log(p / best_p), math.log(t / best_t)
    return 3 + 0.03 * x * x + 0.02 * y * y + twist * x * y


def observations(sigma=0.0, seeds=1, seed=0, **more):
    rng = np.random.default_rng(seed)
    return [
        RoleObservation(p, t, surface(p, t, **more) + rng.normal(0, sigma) if sigma else surface(p, t, **more), k)
        for p in MODELS
        for t in MODELS
        for k in range(seeds)
    ]


def test_an_exact_surface_is_recovered():
    found = find_roles(23e3, observations(twist=0.01))
    assert (found.start.scale, found.teacher.scale) == pytest.approx((60e3, 300e3), rel=1e-6)
    assert (found.start.side, found.teacher.side) == (0, 0)
    assert found.loss.value == pytest.approx(3, abs=1e-9)
    assert found.at(100e3, 200e3) == pytest.approx(surface(100e3, 200e3, twist=0.01), abs=1e-9)
    one = minimize(
        lambda x: surface(math.exp(x[0]), math.exp(x[0]), twist=0.01), [11.5], method="Nelder-Mead", tol=1e-12
    )
    assert found.coupled.scale == pytest.approx(math.exp(one.x[0]), rel=1e-4)
    assert found.gain.value == pytest.approx(one.fun - 3, abs=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_the_minimum_is_found_within_the_grid_whatever_the_surface(seed):
    """Against scipy from many starting points, for surfaces that need not be bowls."""
    from capgap.law.roles import _design, _lowest

    rng = np.random.default_rng(seed)
    c = rng.normal(size=(20, 6))
    at, value = _lowest(c, (-1.0, 2.0), (-1.5, 0.7))
    for r in range(20):

        def loss(x, r=r):
            return float(_design(np.array([x[0]]), np.array([x[1]]))[0] @ c[r])

        tries = [
            minimize(loss, [p, t], bounds=[(-1, 2), (-1.5, 0.7)], method="L-BFGS-B").fun
            for p in (-1, 0.3, 2)
            for t in (-1.5, -0.4, 0.7)
        ]
        assert value[r] == pytest.approx(min(tries), abs=1e-5)
        assert loss(at[r]) == pytest.approx(value[r], abs=1e-9)


def test_an_optimum_at_the_edge_is_censored():
    found = find_roles(23e3, observations(best_p=5e3, best_t=5e6))
    assert (found.start.side, found.start.scale) == (-1, pytest.approx(30e3))
    assert (found.teacher.side, found.teacher.scale) == (1, pytest.approx(700e3))
    assert found.gain.value > 0


def test_intervals_cover():
    covered = []
    for i in range(200):
        found = find_roles(23e3, observations(0.006, 2, seed=i, best_t=200e3), replicates=400)
        one = 3 + 0.03 * 0.02 / 0.05 * math.log(200 / 60) ** 2
        covered.append(
            [
                found.start.low <= 60e3 <= found.start.high,
                found.teacher.low <= 200e3 <= found.teacher.high,
                found.gain.low <= one - 3 <= found.gain.high,
            ]
        )
    assert (np.mean(covered, axis=0) > 0.9).all()


def test_a_law_of_roles_has_the_ratios():
    surfaces = [
        find_roles(s, observations(0.002, seed=i, best_p=2 * s, best_t=8 * s)) for i, s in enumerate((25e3, 35e3, 45e3))
    ]
    law = fit_roles(surfaces)
    assert law.start.value == pytest.approx(2, rel=0.1)
    assert law.teacher.value == pytest.approx(8, rel=0.15)
    assert law.students == 3
    start, teacher, coupled = law.predict(40e3)
    assert start < coupled < teacher
    assert law.gain == pytest.approx(np.mean([s.gain.value for s in surfaces]))


def test_one_student_gives_a_ratio_with_its_own_interval():
    found = find_roles(25e3, observations(0.002))
    law = fit_roles([found])
    assert law.start.value == pytest.approx(found.start.scale / 25e3)
    assert law.start.low == pytest.approx(found.start.low / 25e3)


def test_a_role_that_is_censored_everywhere_has_no_interval():
    law = fit_roles([find_roles(25e3, observations(0.002, best_p=5e3))])
    assert law.start.low is None
    assert law.start.value == pytest.approx(30 / 25)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (observations()[:7], "1 starts and 7 teachers"),
        ([o for o in observations() if o.start == o.teacher] * 2, "not varied apart"),
        ([*observations(), RoleObservation(1e5, 1e5, math.nan)], "not finite"),
        ([*observations(), RoleObservation(-1, 1e5, 3.0)], "a start's scale"),
    ],
)
def test_what_cannot_be_fitted_is_said(rows, message):
    with pytest.raises(LawError, match=message):
        find_roles(23e3, rows)
    with pytest.raises(LawError, match="no student's roles"):
        fit_roles([])

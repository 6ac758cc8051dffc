"""The set of teachers that a race goes on with, beside closed forms and beside sets drawn anew."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from capgap.study.choice import MOST, best_set
from capgap.study.forecast import Forecast


def forecast_of(losses, errors, correlation=0.0) -> Forecast:
    errors = np.array(errors, dtype=float)
    covariance = np.outer(errors, errors) * (correlation + (1 - correlation) * np.eye(len(errors)))
    return Forecast(np.array(losses, dtype=float), covariance)


def lower_of_two(losses, errors) -> float:
    """Expected lower of two independent normal losses. Source: Clark 1961, Operations Research 9."""
    (a, b), spread = losses, float(np.hypot(*errors))
    z = (b - a) / spread
    return a * norm.cdf(z) + b * norm.cdf(-z) - spread * norm.pdf(z)


def test_all_that_can_be_paid_for_go_on_the_least_promising_last():
    seen = forecast_of([0.0, 0.01, 0.02, 1.0], [0.02, 0.02, 0.02, 0.01])
    costs = (1.0, 2.0, 3.0, 4.0)
    found = [best_set(seen, (0, 1, 2, 3), costs, costs, left) for left in (10.0, 9.9, 5.9, 2.9, 0.99)]
    # With 9.9 and 2.9, what is left over is not spent on a teacher that is sure to lose, or cannot arrive.
    assert found == [(0, 1, 2, 3), (0, 1, 2), (0, 1), (0,), ()]
    assert best_set(seen, (1, 3), costs[1:3], costs[1:3], 3.0) == (1,)


@pytest.mark.parametrize("error", [0.001, 0.005, 0.02, 0.04, 0.1])
def test_a_costly_favourite_or_two_others(error):
    """For the FLOPs of the favourite two others can be run: which is better, by the closed form."""
    losses = [0.0, 0.02, 0.021]
    seen = forecast_of(losses, [error] * 3)
    two = lower_of_two(losses[1:], [error, error])
    assert abs(two) > 0.001
    assert best_set(seen, (0, 1, 2), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), 2.5) == ((1, 2) if two < 0 else (0,))


def test_those_that_differ_are_worth_more_than_those_alike():
    correlated = np.array([[1.0, 0.98, 0.0], [0.98, 1.0, 0.0], [0.0, 0.0, 1.0]]) * 0.05**2
    seen = Forecast(np.array([0.0, 0.001, 0.01]), correlated)
    assert best_set(seen, (0, 1, 2), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 2.0) == (0, 2)


def test_one_of_the_set_must_be_able_to_arrive():
    seen = forecast_of([0.0, 0.001, 0.002], [0.05, 0.05, 0.05])
    now, whole = (1.0, 1.0, 1.0), (9.0, 5.0, 5.0)
    assert best_set(seen, (0, 1, 2), now, whole, 11.0) == (0, 1, 2)  # each can arrive after a heat of all three
    assert best_set(seen, (0, 1, 2), now, whole, 10.9) == (0, 1)  # the favourite only beside one other
    assert best_set(seen, (0, 1, 2), now, whole, 9.9) == (1, 2)  # or alone, which two others are worth more than
    assert best_set(seen, (0, 1, 2), now, whole, 5.9) == (1,)
    assert best_set(seen, (0, 1, 2), now, (9.0, 9.0, 9.0), 8.9) == ()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_set_that_can_be_paid_for_is_expected_to_do_better(data):
    count = data.draw(st.integers(1, 5))
    numbers = st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count)
    losses, errors, now, more = (tuple(data.draw(numbers)) for _ in range(4))
    left = data.draw(st.floats(0.01, 2.0 * count))
    seen = forecast_of(losses, errors, data.draw(st.floats(0.0, 0.9)))
    whole = tuple(map(sum, zip(now, more, strict=True)))
    drawn = multivariate_normal(seen.loss_N, seen.covariance_NN, seed=1).rvs(20_000).reshape(20_000, count)

    def expected(chosen, left=left) -> float:
        heat = sum(now[i] for i in chosen)
        arrive = [i for i in chosen if heat + more[i] <= left * (1 + 1e-9)]
        return float(drawn[:, arrive].min(axis=1).mean()) if arrive else np.inf

    sets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
    found = best_set(seen, tuple(range(count)), now, whole, left)
    best = min(map(expected, sets))
    if not found:
        assert min(whole) > left * (1 - 1e-9)
    else:
        # Both are means over draws: off by a few standard errors.
        assert expected(found) <= best + 4 * max(errors) / np.sqrt(20_000)
        # With more FLOPs it does no worse, and the order in which they come does not matter.
        richer = best_set(seen, tuple(range(count)), now, whole, 1.5 * left)
        back = tuple(reversed(range(count)))
        assert expected(richer, 1.5 * left) <= expected(found) + 4 * max(errors) / np.sqrt(20_000)
        assert best_set(seen, back, now[::-1], whole[::-1], left) == found


def test_of_very_many_the_best_forecasts_are_looked_at():
    count = 2 * MOST
    seen = forecast_of(np.linspace(0.5, 0, count), [1.0] * count)
    costs = (1.0,) * count
    assert best_set(seen, tuple(range(count)), costs, costs, 100.0) == tuple(range(MOST, count))

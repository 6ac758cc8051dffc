"""Forecasts, against generalised least squares in plain numpy and ordinary least squares of statsmodels."""

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.study import forecast as module
from capgap.study.forecast import Point, forecast

SCALES = (20e3, 30e3, 53e3, 90e3, 150e3, 250e3)
TOKENS = 1_000_000


def points(seed: int, scales=SCALES, noise=0.01) -> tuple[Point, ...]:
    """Six teachers at four times, the last in two parts; one was stopped before it."""
    rng = np.random.default_rng(seed)
    found = []
    times = [(0, 25_000), (0, 50_000), (0, 75_000), (100_000, 100_000), (0, 100_000)]
    for part, tokens in times:
        for runner, scale in enumerate(scales):
            if runner == 1 and tokens == 100_000:
                continue
            x = np.log(scale / scales[0])
            loss = 3 + (tokens / 1e4) ** -0.5 * (1 + 0.3 * x) + 0.02 * (x - 1) ** 2 + rng.normal(0, noise)
            found.append(Point(runner, tokens, (0, part), float(loss)))
    return tuple(found)


def matrices(scales, seen, power, tokens=TOKENS):
    """y, its fixed and random parts' designs, those of the forecast, and the points' variances, by loops."""
    x = np.log(scales)
    x = (x - x.mean()) / x.std()
    last, first = max(p.tokens for p in seen), min(p.tokens for p in seen)

    def h(tokens):
        def raw(t):
            return np.log(t) if power == 0 else -(float(t) ** -power)

        return (raw(tokens) - raw(last)) / (raw(last) - raw(first))

    def terms(runner, tokens):
        e = np.eye(len(scales))[runner]
        return [x[runner], x[runner] ** 2, x[runner] * h(tokens), x[runner] ** 2 * h(tokens)], [*e, *(e * h(tokens))]

    groups = list(dict.fromkeys((p.part, p.tokens) for p in seen))
    fixed = np.array([[g == (p.part, p.tokens) for g in groups] + terms(p.runner, p.tokens)[0] for p in seen], float)
    effects = np.array([terms(p.runner, p.tokens)[1] for p in seen])
    there = [terms(runner, tokens) for runner in range(len(scales))]
    fixed_there = np.array([[0.0] * len(groups) + t[0] for t in there])
    y = np.array([p.loss for p in seen])
    return y, fixed, effects, fixed_there, np.array([t[1] for t in there]), np.array([last / p.tokens for p in seen])


def generalised(scales, seen, power, ratio, tokens=TOKENS):
    """(restricted log-likelihood, mean, covariance) of the forecast, by the covariance matrix of the points."""
    y, fixed, effects, fixed_there, effects_there, variances = matrices(scales, seen, power, tokens)
    v = np.diag(variances) + ratio * effects @ effects.T
    inverse = np.linalg.inv(v)
    information = fixed.T @ inverse @ fixed
    beta = np.linalg.solve(information, fixed.T @ inverse @ y)
    rest = y - fixed @ beta
    degrees = len(y) - fixed.shape[1]
    variance = rest @ inverse @ rest / degrees
    c = ratio * effects_there @ effects.T
    mean = fixed_there @ beta + c @ inverse @ rest
    d = fixed_there - c @ inverse @ fixed
    covariance = ratio * effects_there @ effects_there.T - c @ inverse @ c.T + d @ np.linalg.solve(information, d.T)
    covariance += np.eye(len(scales)) * variances.min()  # a run's own noise falls no further
    logs = degrees * np.log(variance) + np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1]
    return -0.5 * logs, mean, variance * covariance


def movements_off(moved, ahead):
    """The covariance that movements are found to be off by."""
    moved = moved - moved.mean()
    share = module.MOVES * np.log(ahead)
    return share**2 * (np.outer(moved, moved) + module.OWN_MOVES * np.mean(moved**2) * np.eye(len(moved)))


def test_it_is_the_mean_over_powers_and_ratios_of_generalised_least_squares():
    seen = points(0)
    last = max(p.tokens for p in seen)
    fits, there = (
        [generalised(SCALES, seen, power, ratio, tokens) for power in module.POWERS for ratio in module.RATIOS]
        for tokens in (TOKENS, last)
    )
    weights = np.exp([fit[0] - max(f[0] for f in fits) for fit in fits])
    weights /= weights.sum()
    mean = sum(w * fit[1] for w, fit in zip(weights, fits, strict=True))
    second = sum(w * (fit[2] + np.outer(fit[1], fit[1])) for w, fit in zip(weights, fits, strict=True))
    found = forecast(SCALES, seen, TOKENS)
    np.testing.assert_allclose(found.loss_N, mean, rtol=1e-5, atol=1e-7)
    moved = mean - sum(w * fit[1] for w, fit in zip(weights, there, strict=True))
    expected = second - np.outer(mean, mean) + movements_off(moved, TOKENS / last)
    np.testing.assert_allclose(found.covariance_NN, expected, rtol=1e-4, atol=1e-8)
    above, error = found.above(2)
    assert above[2] == error[2] == 0
    assert above[0] == pytest.approx(mean[0] - mean[2], abs=1e-7)
    difference = np.array([1, 0, -1, 0, 0, 0])
    assert error[0] ** 2 == pytest.approx(difference @ expected @ difference, rel=1e-4)


def test_without_effects_of_the_teachers_own_it_is_weighted_least_squares(monkeypatch):
    monkeypatch.setattr(module, "POWERS", (0.5,))
    monkeypatch.setattr(module, "RATIOS", (1e-9,))
    seen = points(1)
    y, fixed, _, there, _, variances = matrices(SCALES, seen, 0.5)
    before = matrices(SCALES, seen, 0.5, 100_000)[3]
    fit = sm.WLS(y, fixed, weights=1 / variances).fit()
    difference = there[5] - there[0]
    expected = fit.t_test(difference)
    found = forecast.__wrapped__(SCALES, seen, TOKENS)
    above, error = found.above(0)
    assert above[5] == pytest.approx(float(expected.effect[0]), rel=1e-5)
    moved = (there - before) @ fit.params
    off = movements_off(moved, TOKENS / 100_000)
    more = off[5, 5] + off[0, 0] - 2 * off[5, 0]
    assert error[5] ** 2 == pytest.approx(float(expected.sd[0, 0]) ** 2 + 2 * fit.scale + more, rel=1e-4)


def test_seeds_make_what_was_measured_surer_but_not_how_it_goes_on():
    few, many = (
        forecast(
            SCALES, tuple(Point(p.runner, p.tokens, (s, p.part[1]), p.loss) for s in seeds for p in points(s)), TOKENS
        )
        for seeds in (range(1), range(30))
    )
    moved = np.array([generalised(SCALES, points(0, noise=0), 0.5, 1.0, t)[1] for t in (TOKENS, 100_000)])
    least = movements_off(moved[0] - moved[1], TOKENS / 100_000)
    floor = np.sqrt(least[5, 5] + least[0, 0] - 2 * least[5, 0])
    assert few.above(0)[1][5] > many.above(0)[1][5] > 0.9 * floor


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(SCALES))), st.integers(0, 100))
def test_the_order_of_teachers_and_points_does_not_matter(order, seed):
    seen = points(seed)
    moved = [Point(order.index(p.runner), p.tokens, p.part, p.loss) for p in seen]
    np.random.default_rng(seed).shuffle(moved)
    found = forecast(tuple(SCALES[i] for i in order), tuple(moved), TOKENS)
    expected = forecast(SCALES, seen, TOKENS)
    np.testing.assert_allclose(found.above(0)[0], expected.above(order[0])[0][list(order)], atol=1e-6)
    np.testing.assert_allclose(found.above(0)[1], expected.above(order[0])[1][list(order)], rtol=1e-3, atol=1e-6)


def test_what_all_teachers_share_does_not_matter():
    seen = points(3)
    moved = tuple(Point(p.runner, p.tokens, p.part, p.loss + 7e4 / p.tokens + (p.part[1] > 0)) for p in seen)
    np.testing.assert_allclose(
        forecast(SCALES, moved, TOKENS).above(0)[0], forecast(SCALES, seen, TOKENS).above(0)[0], atol=1e-6
    )


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_without_noise_it_finds_a_winner_that_is_behind(power):
    """Differences that fade as a power of the tokens: the largest lead at first, and lose."""
    seen = []
    x = np.log(np.array(SCALES) / SCALES[0])

    def loss(tokens):
        return 3 + 0.3 * x * (tokens / 25_000) ** -power - 0.1 * x + 0.02 * x**2

    for tokens in (25_000, 50_000, 75_000, 100_000):
        seen += [Point(i, tokens, 0, float(value)) for i, value in enumerate(loss(tokens))]
    far = 100_000_000
    found = forecast(SCALES, tuple(seen), far)
    assert loss(100_000).argmin() != loss(far).argmin()
    assert found.loss_N.argmin() == loss(far).argmin()
    np.testing.assert_allclose(found.above(0)[0], loss(far) - loss(far)[0], atol=1e-3)


def test_what_cannot_tell_forecasts_nothing():
    seen = points(0)
    assert forecast(SCALES, tuple(p for p in seen if p.tokens == 25_000), TOKENS) is None
    assert forecast((20e3, 20e3), tuple(p for p in seen if p.runner < 2), TOKENS) is None
    two = tuple(p for p in seen if p.runner < 3 and p.runner != 1 and p.tokens < 60_000)
    assert forecast(SCALES[:3], two, TOKENS) is None  # four points, four free terms


def test_three_teachers_are_on_a_straight_line(monkeypatch):
    monkeypatch.setattr(module, "RATIOS", (1e-9,))
    seen = points(5, scales=SCALES[:3])
    found = forecast.__wrapped__(SCALES[:3], seen, TOKENS)
    above, _ = found.above(0)
    x = np.log(np.array(SCALES[:3]) / SCALES[0])
    assert above[1] / x[1] == pytest.approx(above[2] / x[2], rel=1e-4)

import numpy as np
import pytest

from capgap.law import Observation, find_optimum, fit_law
from capgap.law.bootstrap import gather, law_numbers, noise_of, resample_optima
from reference.law import law_losses, parabola_minimum

STUDENTS = [60e3, 120e3, 240e3, 480e3, 960e3]
FACTORS = [0.36, 0.6, 1.0, 1.7, 2.8]


def simulated(rng, sigma, seeds=1, students=STUDENTS, slope=2.5, intercept=-10e3):
    return [
        Observation(s, t, loss + rng.normal(0, sigma), seed)
        for s, t, loss in law_losses(slope, intercept, students, FACTORS)
        for seed in range(seeds)
    ]


def points_of(observations):
    points, optima = [], []
    for s in sorted({o.student for o in observations}):
        teachers = np.array([o.teacher for o in observations if o.student == s])
        losses = np.array([o.loss for o in observations if o.student == s])
        points.append(gather(s, teachers, losses))
        optima.append(find_optimum(teachers, losses))
    return points, optima


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_95_percent_interval_of_the_slope_covers_it(seeds):
    laws = [fit_law(simulated(np.random.default_rng(i), 0.006, seeds), replicates=200) for i in range(60)]
    covered = [law.slope.low <= 2.5 <= law.slope.high for law in laws if law.slope]
    assert len(covered) == 60
    assert np.mean(covered) >= 0.85


def test_two_students_get_an_interval_that_covers():
    laws = [fit_law(simulated(np.random.default_rng(i), 0.004, 2, STUDENTS[1:4:2]), replicates=200) for i in range(60)]
    covered = [law.slope.low <= 2.5 <= law.slope.high for law in laws if law.slope]
    assert np.mean(covered) >= 0.85


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_noise_is_unbiased(seeds):
    """Draws of a seed mean vary as sigma^2 / m, whether scatter or seeds tell."""
    drawn = []
    for i in range(150):
        noise = noise_of(*points_of(simulated(np.random.default_rng(i), 0.01, seeds)))
        variance = (noise.scatter**2).mean() if len(noise.scatter) else 0.0
        drawn.append(variance + ((noise.seeds**2).mean() / seeds if len(noise.seeds) else 0.0))
    # The larger of two estimates is taken with seeds, so that one lies somewhat high.
    assert 0.85 <= np.mean(drawn) / (0.01**2 / seeds) <= (1.15 if seeds == 1 else 1.5)


def test_degrees_of_freedom_are_counted_over_points():
    assert noise_of(*points_of(simulated(np.random.default_rng(0), 0.01))).degrees == 5 * (5 - 3)
    assert noise_of(*points_of(simulated(np.random.default_rng(0), 0.01, 3))).degrees == 5 * (15 - 3)


def test_each_replicate_is_a_least_squares_fit_of_its_own(monkeypatch):
    observations = simulated(np.random.default_rng(3), 0.004, students=[120e3])
    (points,), (optimum,) = points_of(observations)
    losses = np.array([3.2, 3.05, 3.0, 3.06, 3.3])
    drawn = (losses - optimum.curve(points.teachers))[None]
    monkeypatch.setattr("capgap.law.bootstrap._draw", lambda *_: drawn)
    found, clamped = resample_optima([points], [optimum], noise_of([points], [optimum]), 1, np.random.default_rng(0))
    assert found[0, 0] == pytest.approx(parabola_minimum(list(points.teachers), list(losses))[1], rel=1e-9)
    assert clamped[0] == 0


@pytest.mark.parametrize(("losses", "edge"), [([3.0, 3.1, 3.2, 3.3, 3.41], 0), ([3.0, 3.1, 3.15, 3.05, 2.9], -1)])
def test_an_optimum_that_leaves_the_grid_is_put_at_its_edge(monkeypatch, losses, edge):
    (points,), (optimum,) = points_of(simulated(np.random.default_rng(3), 0.004, students=[120e3]))
    drawn = (np.array(losses) - optimum.curve(points.teachers))[None]
    monkeypatch.setattr("capgap.law.bootstrap._draw", lambda *_: drawn)
    noise = noise_of([points], [optimum])
    found, clamped = resample_optima([points], [optimum], noise, 1, np.random.default_rng(0))
    assert found[0, 0] == pytest.approx(points.teachers[edge], rel=1e-12)
    assert clamped[0] == 1


def test_the_laws_numbers_agree_with_polyfit():
    rng = np.random.default_rng(5)
    students = np.array(STUDENTS)
    optima = 2.4 * students * np.exp(rng.normal(0, 0.1, (7, 5)))
    numbers = law_numbers(students, optima)
    for r in range(7):
        a, b = np.polyfit(students, optima[r], 1)
        assert (numbers.slope[r], numbers.intercept[r]) == pytest.approx((a, b), rel=1e-9)
        assert numbers.r_squared[r] == pytest.approx(np.corrcoef(students, optima[r])[0, 1] ** 2, rel=1e-9)
        assert numbers.exponent[r] == pytest.approx(np.polyfit(np.log(students), np.log(optima[r]), 1)[0])
        assert numbers.ratio[r] == pytest.approx(np.prod(optima[r] / students) ** 0.2)

import numpy as np
import pytest

from capgap.law import Observation, find_optimum
from capgap.law.bootstrap import gather, noise_of, optimum_errors, resample_optima
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
    found = resample_optima([points], [optimum], noise_of([points], [optimum]), 1, np.random.default_rng(0))
    assert np.exp(found.logs[0, 0]) == pytest.approx(parabola_minimum(list(points.teachers), list(losses))[1], rel=1e-9)
    assert found.sides[0, 0] == 0


@pytest.mark.parametrize(("losses", "edge"), [([3.0, 3.1, 3.2, 3.3, 3.41], 0), ([3.0, 3.1, 3.15, 3.05, 2.9], -1)])
def test_an_optimum_that_leaves_the_grid_is_censored_at_its_edge(monkeypatch, losses, edge):
    (points,), (optimum,) = points_of(simulated(np.random.default_rng(3), 0.004, students=[120e3]))
    drawn = (np.array(losses) - optimum.curve(points.teachers))[None]
    monkeypatch.setattr("capgap.law.bootstrap._draw", lambda *_: drawn)
    found = resample_optima([points], [optimum], noise_of([points], [optimum]), 1, np.random.default_rng(0))
    assert np.exp(found.logs[0, 0]) == pytest.approx(points.teachers[edge], rel=1e-12)
    assert found.sides[0, 0] == (-1 if edge == 0 else 1)


def test_replicates_follow_the_rule_of_the_fit(monkeypatch):
    """Each replicate's optimum is what find_optimum says of the losses drawn."""
    (points,), (optimum,) = points_of(simulated(np.random.default_rng(3), 0.004, students=[120e3]))
    noise = np.random.default_rng(7).normal(0, 0.05, (200, 5))
    monkeypatch.setattr("capgap.law.bootstrap._draw", lambda *_: noise)
    found = resample_optima([points], [optimum], noise_of([points], [optimum]), 200, np.random.default_rng(0))
    for r in range(200):
        alone = find_optimum(points.teachers, optimum.curve(points.teachers) + noise[r])
        assert np.exp(found.logs[r, 0]) == pytest.approx(alone.teacher, rel=1e-6)
        assert found.sides[r, 0] == {None: 0, "low": -1, "high": 1}[alone.censored]
    assert 0 < np.mean(found.sides == 0) < 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_delta_methods_error_is_how_optima_scatter(seeds):
    drawn, errors = [], []
    for i in range(300):
        points, optima = points_of(simulated(np.random.default_rng(i), 0.004, seeds, STUDENTS[1:3]))
        errors.append(optimum_errors(points, optima, noise_of(points, optima))[0])
        drawn.append(np.log(optima[0].teacher))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(drawn), rel=0.2)


def test_a_censored_optimum_gets_the_median_error():
    points, optima = points_of(simulated(np.random.default_rng(0), 0.004))
    slanted = find_optimum(points[0].teachers, [5.0, 4.8, 4.6, 4.4, 4.2])
    assert slanted.censored == "high"
    errors = optimum_errors(points, [slanted, *optima[1:]], noise_of(points, optima))
    assert errors[0] == np.median(errors[1:])

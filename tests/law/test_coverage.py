"""Intervals cover what they say: studies simulated with a known law, drawn and fitted a thousand times."""

import math

import numpy as np
import pytest

from capgap.law import Observation, fit_law

pytestmark = pytest.mark.slow
SLOPE, INTERCEPT = 2.5, -10e3
STUDENTS = np.geomspace(26e3, 240e3, 5)
TEACHERS = np.geomspace(20e3, 2.4e6, 9)


def simulated(rng, seeds, students=STUDENTS):
    """Losses of a study like that of the nano family: noise of 0.004 nats, neighbours 1.8 apart."""
    return [
        Observation(s, t, 5 + 0.08 * math.log(t / (SLOPE * s + INTERCEPT)) ** 2 + rng.normal(0, 0.004), seed)
        for s in students
        for t in TEACHERS
        if t > 1.25 * s
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_95_percent_intervals_cover_between_93_and_97_percent(seeds):
    covered = []
    for i in range(1000):
        law = fit_law(simulated(np.random.default_rng(i), seeds), replicates=200, seed=i)
        at = law.predict(100e3)
        covered.append(
            [
                law.slope.low <= SLOPE <= law.slope.high,
                law.intercept.low <= INTERCEPT <= law.intercept.high,
                at.low <= SLOPE * 100e3 + INTERCEPT <= at.high,
            ]
        )
    shares = np.mean(covered, axis=0)
    assert ((shares >= 0.93) & (shares <= 0.97)).all(), shares


def test_so_do_those_of_the_ratio_and_the_exponent():
    covered, significant = [], []
    for i in range(1000):
        rng = np.random.default_rng(i)
        rows = [
            Observation(s, t, 5 + 0.08 * math.log(t / (2.5 * s)) ** 2 + rng.normal(0, 0.004), seed)
            for s in STUDENTS
            for t in TEACHERS
            if t > 1.25 * s
            for seed in range(3)
        ]
        law = fit_law(rows, replicates=200, seed=i)
        covered.append([law.ratio.low <= 2.5 <= law.ratio.high, law.exponent.low <= 1 <= law.exponent.high])
        significant.append(law.p_linear < 0.05)
    shares = np.mean(covered, axis=0)
    assert ((shares >= 0.93) & (shares <= 0.97)).all(), shares
    assert 0.03 <= np.mean(significant) <= 0.07


def test_two_optima_get_an_interval_that_covers():
    laws = [fit_law(simulated(np.random.default_rng(i), 2, STUDENTS[1:4:2]), replicates=200) for i in range(400)]
    covered = [law.slope.low <= SLOPE <= law.slope.high for law in laws if law.slope]
    assert len(covered) > 390
    assert 0.91 <= np.mean(covered) <= 0.98

"""The second law beside a plain re-derivation, its limits, and that a refit finds a law that is there."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap.errors import LawError
from capgap.law.busbridge import PUBLISHED_SECOND, Alone, Measured, Taught, fit_second_law

LAW = PUBLISHED_SECOND


def by_hand(teacher, n, d):
    """The formula as printed, number by number."""
    alone = 1.220 + (3355 / n**0.408 + 18186 / d**0.431) ** 0.452
    ratio = teacher / (alone * 1.315)
    room = (2243 / n**0.321 + 24181 / d**0.637) ** 0.764
    return alone, teacher + teacher**-2.549 * (1 + ratio ** (1 / 0.090)) ** (-522.61 * 0.090) * room


@given(st.floats(1.3, 3.5), st.floats(1e8, 1e10), st.floats(1e9, 1e12))
def test_losses_are_those_of_the_formula(teacher, n, d):
    alone, taught = by_hand(teacher, n, d)
    assert float(LAW.supervised.loss(n, d)) == pytest.approx(alone, rel=1e-12)
    assert float(LAW.student_loss(teacher, n, d)) == pytest.approx(taught, rel=1e-9)


def test_arrays_are_taken_as_one_by_one():
    teachers, n = np.array([1.8, 2.0, 2.4]), np.array([[3e8], [3e9]])
    table = LAW.student_loss(teachers, n, 1e11)
    assert table.shape == (2, 3)
    assert table[1, 2] == float(LAW.student_loss(2.4, 3e9, 1e11))


def test_a_better_teacher_is_not_always_better_and_a_hopeless_one_teaches_its_own_loss():
    losses = np.linspace(1.3, 2.6, 200)
    best = int(np.argmin(LAW.student_loss(losses, 1e9, 512e9)))
    assert 0 < best < 199
    assert losses[best] == pytest.approx(LAW.best_loss(1e9, 512e9), abs=0.01)
    assert LAW.best_teacher(losses.tolist(), 1e9, 512e9) == best
    assert float(LAW.student_loss(5.0, 1e9, 512e9)) == pytest.approx(5.0, abs=1e-3)


def test_short_runs_want_larger_teachers_than_long_ones():
    """As the paper says of about 20 tokens a parameter."""
    assert LAW.best_loss(1e9, 20e9) < LAW.best_loss(1e9, 512e9)


def runs(law, noise, rng):
    alone = [
        Alone(n, d, float(law.supervised.loss(n, d)) * math.exp(rng.normal(0, noise)))
        for n in np.geomspace(1e7, 1e9, 6)
        for d in np.geomspace(2e8, 1e11, 5)
    ]
    taught = [
        Taught(run.n, run.d, float(law.student_loss(t, run.n, run.d)) * math.exp(rng.normal(0, noise)), t)
        for run in alone
        for t in (1.9, 2.2, 2.6, 3.0)
    ]
    return alone, taught


def test_a_refit_predicts_what_another_law_gives():
    other = type(LAW)(
        type(LAW.supervised)(1.5, 2000.0, 30000.0, 0.38, 0.45, 0.5),
        type(LAW.distillation)(1500.0, 30000.0, 0.30, 0.60, 0.8, 2.2, 400.0, 0.12, 1.2),
        "made up",
        LAW.fitted,
    )
    alone, taught = runs(other, 0.002, np.random.default_rng(0))
    fit = fit_second_law(alone, taught)
    assert fit.runs == (30, 120)
    assert fit.law.fitted == Measured((1e7, 1e9), 1e9, (2e8, 1e11), embeddings=False)
    assert fit_second_law(alone, taught, embeddings=True).law.fitted.embeddings
    assert max(fit.error) < 0.01
    for n, d, teacher in ((3e7, 1e9, 2.4), (5e8, 5e10, 2.1)):
        assert float(fit.law.student_loss(teacher, n, d)) == pytest.approx(
            float(other.student_loss(teacher, n, d)), rel=0.01
        )
    # The published law does not: the data moved it.
    assert abs(float(LAW.supervised.loss(3e7, 1e9)) - float(other.supervised.loss(3e7, 1e9))) > 0.05


def test_too_few_runs_and_impossible_numbers_are_refused():
    alone, taught = runs(LAW, 0.0, np.random.default_rng(0))
    with pytest.raises(LawError, match="5 runs without a teacher from random weights; this law needs at least 6"):
        fit_second_law(alone[:5], taught)
    with pytest.raises(LawError, match="8 runs under a teacher"):
        fit_second_law(alone, taught[:8])
    with pytest.raises(LawError, match="must be positive, finite"):
        LAW.best_teacher([], 1e9, 1e9)
    with pytest.raises(LawError, match="the tokens = 0"):
        LAW.best_teacher([2.0], 1e9, 0)

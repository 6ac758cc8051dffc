import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.errors import LawError
from capgap.law import Observation, fit_law, law_from_dict
from reference.law import law_losses, parabola_minimum

STUDENTS = [60e3, 120e3, 240e3, 480e3]
FACTORS = [0.4, 0.7, 1.1, 1.9]


def exact(slope=2.5, intercept=-20e3, students=STUDENTS, factors=FACTORS):
    return [Observation(s, t, loss) for s, t, loss in law_losses(slope, intercept, students, factors)]


def noisy(sigma=0.003, students=STUDENTS, seeds=1, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Observation(o.student, o.teacher, o.loss + rng.normal(0, sigma), k)
        for o in exact(students=students)
        for k in range(seeds)
    ]


def slanted(student=30e3):
    """Losses that fall over the whole grid: the optimum lies beyond its upper edge."""
    return [Observation(student, student * f, 4 - 0.1 * math.log(f)) for f in (2, 3, 4, 6)]


@pytest.mark.parametrize(("slope", "intercept"), [(2.498, -11.498e3), (2.0, 0.0), (3.1, 40e3)])
def test_an_exact_line_is_recovered(slope, intercept):
    law = fit_law(exact(slope, intercept))
    assert law.status == "linear"
    assert law.slope.value == pytest.approx(slope, rel=1e-9)
    assert law.intercept.value == pytest.approx(intercept, rel=1e-9, abs=1e-3)
    assert law.intercept_millions.value == pytest.approx(intercept / 1e6, rel=1e-9, abs=1e-9)
    assert law.r_squared.value == pytest.approx(1, abs=1e-12)
    assert (law.slope.low, law.slope.high) == pytest.approx((slope, slope), rel=1e-6)


def test_an_exact_power_law_has_its_exponent():
    rows = [Observation(s, 3 * s**0.9 * f, 2 + math.log(f) ** 2) for s in STUDENTS for f in FACTORS]
    law = fit_law(rows, replicates=10)
    assert law.exponent.value == pytest.approx(0.9, rel=1e-9)
    assert law.ratio.value == pytest.approx(np.prod([3 * s**-0.1 for s in STUDENTS]) ** 0.25, rel=1e-9)


def test_noisy_optima_agree_with_the_reference():
    observations = noisy()
    law = fit_law(observations, replicates=50)
    best = []
    for s in STUDENTS:
        mine = [o for o in observations if o.student == s]
        best.append(parabola_minimum([o.teacher for o in mine], [o.loss for o in mine])[1])
    assert [row.optimum.teacher for row in law.optima] == pytest.approx(best, rel=1e-7)
    assert law.slope.value == pytest.approx(np.polyfit(STUDENTS, best, 1)[0], rel=1e-7)
    for row in law.optima:
        assert row.low < row.optimum.teacher < row.high


def test_two_optima_have_no_r_squared_and_yet_an_interval():
    law = fit_law(noisy(students=STUDENTS[:2]))
    assert law.status == "linear"
    assert law.r_squared is None
    assert any("by construction" in note for note in law.notes)
    assert any("2 degrees of freedom" in note for note in law.notes)
    assert law.slope.low < law.slope.value < law.slope.high


def test_three_teachers_and_one_seed_leave_no_interval():
    law = fit_law(exact(factors=FACTORS[1:]))
    assert law.slope.low is None
    assert law.predict(100e3).low is None
    assert any("no intervals: 3 teachers a student and one seed" in note for note in law.notes)


def test_three_teachers_and_two_seeds_leave_one():
    rows = [o for o in noisy(seeds=2) if o.teacher > 0.5 * (2.5 * o.student - 20e3)]
    law = fit_law(rows)
    assert law.slope.low < law.slope.high


def test_censored_optima_are_reported_and_never_enter():
    without = fit_law(exact())
    law = fit_law([*slanted(), *exact()])
    assert law.optima[0].optimum.censored == "high"
    assert law.optima[0].low is None
    assert len(law.interior) == len(STUDENTS)
    assert law.slope.value == pytest.approx(without.slope.value, rel=1e-9)
    assert any("student 30k: censored at the grid's high edge (180k)" in note for note in law.notes)


def test_one_optimum_gives_a_ratio():
    law = fit_law([*exact(students=STUDENTS[:1]), *slanted()])
    assert law.status == "proportional"
    assert (law.slope, law.intercept, law.exponent, law.r_squared) == (None, None, None, None)
    assert law.ratio.value == pytest.approx(130e3 / 60e3)
    prediction = law.predict(90e3)
    assert (prediction.method, prediction.ratio) == ("proportional", law.ratio.value)
    assert "1.5 times above the largest" in prediction.note


def test_no_optimum_gives_no_law():
    law = fit_law(slanted())
    assert law.status == "none"
    assert law.ratio is None
    assert any("widen the grid" in note for note in law.notes)
    with pytest.raises(LawError, match="names no teacher"):
        law.predict(1e6)


def test_predictions_inside_and_outside_the_study():
    law = fit_law(noisy())
    inside = law.predict(100e3)
    assert inside.method == "linear"
    assert inside.note == ""
    assert inside.teacher == pytest.approx(law.slope.value * 100e3 + law.intercept.value)
    assert inside.low < inside.teacher < inside.high
    far = law.predict(4.8e6)
    assert "10 times above the largest that the law rests on (480k)" in far.note
    assert "no teacher of that scale was measured" in far.note
    with pytest.raises(LawError):
        law.predict(0)


def test_a_line_that_names_too_small_a_teacher_gives_way_to_the_ratio():
    law = fit_law(noisy())
    small = law.predict(10e3)
    assert law.slope.value * 10e3 + law.intercept.value < 10e3
    assert small.method == "proportional"
    assert "ratio is used" in small.note


def test_an_interval_never_falls_below_the_student():
    law = fit_law(noisy(0.012))
    for student in np.geomspace(10e3, 1e6, 25):
        prediction = law.predict(student)
        assert student <= prediction.low <= prediction.high


def test_an_optimum_that_often_leaves_the_grid_is_said():
    law = fit_law(noisy(0.02, students=STUDENTS[:2], seed=3))
    assert any("of the replicates the optimum left the grid" in note for note in law.notes)


def test_the_published_law_beside_it():
    rows = {row.quantity: row for row in fit_law(noisy()).beside_published()}
    assert rows["slope a"].published.startswith("2.498 (2.27 to 2.73 with n = 6")
    assert "inside our interval" in rows["slope a"].reading
    rows = {row.quantity: row for row in fit_law(slanted()).beside_published()}
    assert rows["slope a"].here == "none"
    assert rows["ratio T*/S"].reading == "not fitted here"
    rows = {row.quantity: row for row in fit_law(noisy(), replicates=0).beside_published()}
    assert "no interval" in rows["slope a"].here


def test_a_law_survives_json():
    for observations in (noisy(seeds=2), noisy(students=STUDENTS[:2]), exact(factors=FACTORS[1:]), slanted()):
        law = fit_law(observations, replicates=100, seed=3, level=0.9)
        again = law_from_dict(json.loads(json.dumps(law.to_dict(), allow_nan=False)))
        assert again == law
        assert np.array_equal(again.line_draws, law.line_draws)


def test_a_law_changed_by_hand_is_refused():
    tree = fit_law(noisy(), replicates=10).to_dict()
    with pytest.raises(LawError, match=r"slope\.value = 9\.9"):
        law_from_dict(tree | {"slope": {"value": 9.9, "low": None, "high": None}})
    with pytest.raises(LawError, match="status = 'none'"):
        law_from_dict(tree | {"status": "none"})
    with pytest.raises(LawError, match="not a fitted law"):
        law_from_dict({"slope": 1})
    with pytest.raises(LawError, match="not a fitted law"):
        law_from_dict([])


@pytest.mark.parametrize(
    ("observations", "options", "message"),
    [
        ([], {}, "no observations"),
        (exact()[:-2], {}, "student 480k: 2 teacher scales measured"),
        ([*exact(), exact()[0]], {}, "student 60k under teacher 52k with seed 0 is there twice"),
        ([*exact(), Observation(-1, 1e5, 3.0)], {}, "a student's scale"),
        ([*exact()[1:], Observation(60e3, 52e3, math.inf)], {}, "loss under teacher 52k is inf"),
        (exact(), {"replicates": -1}, "replicates"),
        (exact(), {"level": 1.0}, "level"),
    ],
)
def test_what_cannot_be_fitted_is_said(observations, options, message):
    with pytest.raises(LawError, match=message):
        fit_law(observations, **options)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-2, 1e5), shift=st.floats(-3, 3), shuffle=st.randoms(use_true_random=False))
def test_scale_shift_and_order_change_nothing_that_matters(factor, shift, shuffle):
    observations = noisy(seeds=2)
    law = fit_law(observations, replicates=50)
    changed = [Observation(o.student * factor, o.teacher * factor, o.loss + shift, o.seed) for o in observations]
    shuffle.shuffle(changed)
    other = fit_law(changed, replicates=50)
    assert other.status == law.status
    for now, before in zip(other.optima, law.optima, strict=True):
        assert now.optimum.teacher == pytest.approx(factor * before.optimum.teacher, rel=1e-7)
        assert now.low == pytest.approx(factor * before.low, rel=1e-6)
    assert other.slope.value == pytest.approx(law.slope.value, rel=1e-7)
    assert other.slope.high == pytest.approx(law.slope.high, rel=1e-6)
    assert other.intercept.value == pytest.approx(factor * law.intercept.value, rel=1e-6)
    assert other.exponent.value == pytest.approx(law.exponent.value, rel=1e-7)


def test_the_same_seed_gives_the_same_law_and_another_nearly():
    assert fit_law(noisy(), seed=1) == fit_law(reversed(noisy()), seed=1)
    one, two = fit_law(noisy(), seed=1).slope, fit_law(noisy(), seed=2).slope
    assert one.high != two.high
    assert one.high == pytest.approx(two.high, rel=0.05)

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize
from scipy.stats import norm

from capgap.errors import LawError
from capgap.law import Observation, fit_law, law_from_dict
from capgap.law.chain import Chain, Optima
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


def ratio_fit(best, errors):
    rows = [
        Observation(s, t * f, 3 + 0.08 * math.log(f) ** 2) for s, t in zip(STUDENTS, best, strict=True) for f in FACTORS
    ]
    optima = fit_law(rows, replicates=0).optima
    weighted = tuple(dataclasses.replace(row, error=e) for row, e in zip(optima, errors, strict=True))
    # So large that no scatter beyond them is found.
    weighted = tuple(dataclasses.replace(row, error=100 * row.error) for row in weighted)
    fitted = Chain(Optima.of(weighted), None, 0, np.random.default_rng(0), 0.95).fit("ratio")
    return float(np.exp(fitted.found.theta_RK[0, 0]))


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
    errors = [row.error for row in law.optima]
    line = curve_fit(lambda s, a, b: np.log(a * s + b), STUDENTS, np.log(best), [2.5, -1e4], sigma=errors)[0]
    assert law.scatter == 0
    assert law.slope.value == pytest.approx(line[0], rel=1e-6)
    assert law.intercept.value == pytest.approx(line[1], rel=1e-5)
    weights = np.square(np.reciprocal(errors))
    ratio = np.exp(np.average(np.log(best) - np.log(STUDENTS), weights=weights))
    assert ratio_fit(best, errors) == pytest.approx(ratio, rel=1e-9)
    fitted = line[0] * np.array(STUDENTS) + line[1]
    r_squared = 1 - np.sum((fitted - best) ** 2) / np.sum((np.array(best) - np.mean(best)) ** 2)
    assert law.r_squared.value == pytest.approx(r_squared, abs=1e-8)
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


def beyond(best, student=30e3):
    """Noisy losses of a student whose optimum lies below its grid."""
    rng = np.random.default_rng(11)
    return [
        Observation(student, t, 3.5 + 0.08 * math.log(t / best) ** 2 + rng.normal(0, 0.003), seed)
        for t in (70e3, 100e3, 140e3, 200e3)
        for seed in range(2)
    ]


def test_a_censored_optimum_enters_as_a_bound():
    """Beyond its edge, where the line wants it, it changes little; where the line wants it inside, it pulls."""
    without = fit_law(noisy(seeds=2), replicates=20)
    agreeing = fit_law([*beyond(55e3), *noisy(seeds=2)], replicates=20)
    assert agreeing.optima[0].optimum.censored == "low"
    assert agreeing.optima[0].low is None
    assert agreeing.optima[0].error == pytest.approx(np.median([row.error for row in agreeing.interior]))
    assert agreeing.slope.value == pytest.approx(without.slope.value, rel=1e-3)
    assert any("student 30k: censored at the grid's low edge (70k)" in note for note in agreeing.notes)

    far = [Observation(80e3, o.teacher, o.loss, o.seed) for o in beyond(20e3)]  # at most 70k, the line says 180k
    pulled = fit_law([*far, *noisy(seeds=2)], replicates=20)
    assert pulled.optima[1].optimum.censored == "low"
    assert pulled.predict(80e3).teacher < 0.97 * without.predict(80e3).teacher
    assert pulled.scatter > 0.1


def test_the_fit_maximises_the_likelihood():
    """Against a direct minimisation of the Tobit likelihood, the scatter taken as found."""
    law = fit_law([*beyond(55e3), *noisy(0.02, seeds=2, seed=5)], replicates=0)
    y = np.log([row.optimum.teacher for row in law.optima])
    side = np.array([row.side for row in law.optima])
    s = np.array([row.student for row in law.optima])
    error = np.hypot([row.error for row in law.optima], law.scatter)
    assert -1 in side

    def cost(p):
        z = (y - np.log(np.maximum(p[0] * s + p[1] * 1e3, 1.0))) / error
        return -np.where(side == 0, norm.logpdf(z), norm.logcdf(-side * z)).sum()

    best = minimize(cost, [2.4, -15.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000})
    assert law.slope.value == pytest.approx(best.x[0], rel=1e-4)
    assert law.intercept.value == pytest.approx(best.x[1] * 1e3, rel=1e-3)


def test_scatter_beyond_the_errors_widens_the_intervals():
    rng = np.random.default_rng(2)
    odd = [
        Observation(s, 2.5 * s * math.exp(d) * f, 3 + 0.08 * math.log(f) ** 2 + rng.normal(0, 0.0005))
        for s, d in zip(np.geomspace(50e3, 800e3, 6), (0.3, -0.3, 0.2, -0.2, 0.3, -0.3), strict=True)
        for f in (0.3, 0.55, 1.0, 1.8, 3.2)
    ]
    law = fit_law(odd)
    assert law.scatter == pytest.approx(np.std([0.3, -0.3, 0.2, -0.2, 0.3, -0.3], ddof=2), rel=0.3)
    assert law.slope.high - law.slope.low > 0.5
    at = law.predict(200e3)
    assert math.log(at.high / at.low) > 4 * law.scatter  # of a new optimum, not of the line alone
    assert law.p_linear > 0.05


def test_the_exponent_is_tested_against_one():
    rows = [
        Observation(o.student, 3 * o.student**0.7 * f, 2 + 0.08 * math.log(f) ** 2 + rng.normal(0, 0.002), k)
        for rng in [np.random.default_rng(1)]
        for o in exact()[:: len(FACTORS)]
        for f in FACTORS
        for k in range(2)
    ]
    assert fit_law(rows).p_linear < 0.01
    assert fit_law(noisy(seeds=2)).p_linear > 0.0005
    assert fit_law(noisy(), replicates=0).p_linear is None


def test_one_optimum_gives_a_ratio():
    low = [Observation(30e3, 30e3 * f, 4 + 0.1 * math.log(f)) for f in (3, 4, 6)]
    law = fit_law([*exact(students=STUDENTS[:1]), *low])
    assert law.status == "proportional"
    assert (law.slope, law.intercept, law.exponent, law.r_squared) == (None, None, None, None)
    assert law.ratio.value == pytest.approx(130e3 / 60e3, rel=1e-3)  # the bound of the other pulls hardly
    prediction = law.predict(90e3)
    assert (prediction.method, prediction.ratio) == ("proportional", law.ratio.value)
    assert "1.5 times above the largest" in prediction.note


def test_a_bound_that_contradicts_makes_the_ratio_unsure():
    law = fit_law([*noisy(students=STUDENTS[:1], seeds=2), *slanted()])  # 2.2 S, and at least 6 S
    assert law.scatter > 0.8
    assert 2.2 < law.ratio.value < 12
    assert law.ratio.high > 3 * law.ratio.low
    at = law.predict(60e3)
    assert at.high > 8 * at.low


def test_no_optimum_gives_no_law():
    law = fit_law(slanted())
    assert law.status == "none"
    assert law.ratio is None
    assert any("widen the grid" in note for note in law.notes)
    rising = [Observation(40e3, 40e3 * f, 4 + 0.1 * math.log(f)) for f in (2, 3, 4, 6)]
    with pytest.raises(LawError, match="names no teacher"):
        fit_law([*slanted(), *rising]).predict(1e6)


def test_optima_censored_at_one_edge_name_a_bound():
    high = fit_law(slanted()).predict(1e6)
    assert (high.method, high.ratio, high.low, high.high) == ("bound", pytest.approx(6), pytest.approx(6e6), None)
    assert "at least some scale" in high.note
    rising = [Observation(s, s * f, 4 + 0.1 * math.log(f)) for s in (40e3, 80e3) for f in (1.2, 3, 4, 6)]
    low = fit_law(rising).predict(1e6)
    assert (low.ratio, low.low, low.high) == pytest.approx((1.2, 1e6, 1.2e6))
    assert "next larger model is the best" in low.note


def test_a_ratio_below_one_names_the_student_itself():
    rows = [Observation(s, s * f, 4 + 0.05 * math.log(f / 0.8) ** 2) for s in (40e3, 80e3) for f in (0.5, 0.7, 1, 1.4)]
    at = fit_law(rows).predict(60e3)
    assert at.teacher == 60e3
    assert "the next larger model is the best" in at.note


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


def test_errors_in_the_students_scale_lower_its_weight():
    rows = noisy(seeds=2)
    unsure = [dataclasses.replace(o, student_error=0.5) if o.student == STUDENTS[1] else o for o in rows]
    before, law = fit_law(rows, replicates=0), fit_law(unsure, replicates=0)
    errors = [np.hypot(row.error, 0.5 if row.student == STUDENTS[1] else 0) for row in before.optima]
    assert [row.error for row in law.optima] == pytest.approx(errors)
    rest = fit_law([o for o in rows if o.student != STUDENTS[1]], replicates=0)
    assert law.slope.value == pytest.approx(rest.slope.value, rel=5e-3)
    assert law.slope.value != pytest.approx(before.slope.value, rel=1e-6)

import math

import numpy as np
import pytest

from capgap.errors import LawError
from capgap.law import BudgetOptimum, Observation, compare_laws, fit_law, fit_tokens, influence

STUDENTS = [20e3, 40e3, 80e3, 160e3, 320e3]
TEACHERS = np.geomspace(26e3, 8e6, 11)


def measured(best, budgets=(1.0,), sigma=0.001, seed=0, students=STUDENTS):
    """Optima of simulated losses whose minimum is at best(student, tokens per parameter)."""
    rng = np.random.default_rng(seed)
    found = []
    for d in budgets:
        rows = [
            Observation(s, t, 4 + 0.08 * math.log(t / best(s, d)) ** 2 + rng.normal(0, sigma), k)
            for s in students
            for t in TEACHERS
            if t > 1.25 * s
            for k in range(2)
        ]
        found += [BudgetOptimum(row, d) for row in fit_law(rows, replicates=0).optima]
    return found


def test_the_law_that_holds_foretells_best():
    scores = compare_laws(measured(lambda s, _: 3 * s))
    assert {s.law for s in scores} == {"2.5 S", "ratio", "line", "power"}
    assert next(s for s in scores if s.law == "ratio").factor < 1.05
    fixed = next(s for s in scores if s.law == "2.5 S")
    assert fixed.error == pytest.approx(math.log(3 / 2.5), abs=0.02)
    curved = compare_laws(measured(lambda s, _: 3 * 80e3 * (s / 80e3) ** 0.6))
    assert curved[0].law == "power"
    straight = {s.law: s for s in compare_laws(measured(lambda s, _: 2 * s + 40e3))}
    assert straight["line"].error < min(straight["ratio"].error, straight["power"].error)


def test_the_error_is_that_of_leaving_one_out():
    rows = measured(lambda s, _: 3 * s, sigma=0.01)
    logs = np.array([math.log(m.optimum.optimum.teacher / m.optimum.student) for m in rows])
    weights = np.array([m.optimum.error**-2 for m in rows])
    from capgap.law.censored import Curve, find_scatter

    errors = []
    for i in range(len(rows)):
        rest = np.arange(len(rows)) != i
        students = np.array(STUDENTS)[rest]
        error = np.sqrt(1 / weights[rest])
        scatter = find_scatter(
            Curve("ratio", students, np.empty((4, 0))), logs[rest] + np.log(students), np.zeros(4), error
        )
        errors.append(logs[i] - np.average(logs[rest], weights=1 / (error**2 + scatter**2)))
    found = next(s for s in compare_laws(rows) if s.law == "ratio")
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    assert (found.parameters, found.optima, found.broken) == (1, 5, (0, 0))


def test_with_several_budgets_tokens_may_stand_beside():
    rows = measured(lambda s, d: 2 * s * d**0.5, budgets=(1, 3, 10))
    scores = compare_laws(rows)
    assert len(scores) == 7
    assert scores[0].law.endswith("with tokens")
    assert scores[0].factor < 1.1
    alone = next(s for s in scores if s.law == "ratio")
    assert alone.factor > 1.5


def test_censored_optima_are_judged_by_their_side():
    rows = measured(lambda s, _: 3 * s)
    low = measured(lambda s, _: 15e3, students=[20e3])  # at most the smallest teacher, 26k; 3 S would be 60k
    assert low[0].optimum.side == -1
    found = next(s for s in compare_laws([*rows[1:], *low]) if s.law == "ratio")
    assert found.broken == (1, 1)
    assert found.optima == 4


def test_few_scales_are_not_compared():
    with pytest.raises(LawError, match="three with an optimum"):
        compare_laws(measured(lambda s, _: 3 * s, students=STUDENTS[:2]))


def test_influence_is_the_law_without_each():
    rows = [m.optimum for m in measured(lambda s, _: 3 * s if s < 300e3 else 6 * s)]
    found = influence(rows)
    assert [i.without for i in found] == STUDENTS
    assert found[-1].slope == pytest.approx(3, rel=0.05)
    assert found[-1].exponent == pytest.approx(1, abs=0.03)
    assert min(i.slope for i in found[:-1]) > 3.3
    assert influence(rows[:2]) == []


def test_a_law_with_tokens_is_recovered():
    rows = measured(lambda s, d: 2.5 * s * (s / 80e3) ** 0.2 * (d / 30) ** 0.4, budgets=(10, 30, 100), sigma=0.003)
    law = fit_tokens(rows)
    assert law.exponent.low < 1.2 < law.exponent.high
    assert law.tokens.low < 0.4 < law.tokens.high
    assert law.p_tokens < 0.01
    at = law.predict(80e3, 80e3 * 30)
    assert at.teacher == pytest.approx(2.5 * 80e3, rel=0.06)
    assert at.low < 2.5 * 80e3 < at.high
    assert at.note == "at 30 tokens per parameter"
    assert law.at(80e3 * 30).predict(80e3) == at
    far = law.predict(80e3, 80e3 * 3000)
    assert "10 to 100 tokens per parameter were measured" in far.note
    assert "students of 20k to 320k were measured" in law.predict(5e6, 5e6 * 30).note
    few = law.predict(80e3, 80e3 * 0.1)
    assert (few.teacher, few.low) == (80e3, 80e3)
    assert "next larger model is the best" in few.note
    assert far.teacher == pytest.approx(2.5 * 80e3 * 100**0.4, rel=0.2)
    assert far.high / far.low > at.high / at.low
    assert law.optima == (15 - law.optima[1], law.optima[1])


def test_tokens_need_budgets_and_scales():
    with pytest.raises(LawError, match="two budgets"):
        fit_tokens(measured(lambda s, _: 3 * s))
    with pytest.raises(LawError, match="two student scales"):
        fit_tokens(measured(lambda s, d: 2 * s * d**0.5, budgets=(1, 3, 10), students=STUDENTS[2:3]))

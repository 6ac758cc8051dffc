import math

import pytest

from capgap.report import analyse, analysis_tables, names_of, own_laws_of, picks_of, write_report
from capgap.report.maps import best, best_coupled, cells_of
from capgap.report.tables import (
    budget_rows,
    condition_rows,
    hypothesis_rows,
    influence_rows,
    pick_rows,
    role_rows,
    score_rows,
    token_rows,
)

from .made_up import MODELS, roles_apart, run_of, whole_study
from .test_figures import picture
from .test_page import read
from .test_report import printed


@pytest.fixture(scope="module")
def several():
    return whole_study()


@pytest.fixture(scope="module")
def analysis(several):
    return analyse(several)


def test_each_budget_has_its_law(analysis):
    assert [b.name for b in analysis.budgets] == [f"{d} tokens per parameter" for d in (10, 30, 100)]
    for budget, factor in zip(analysis.budgets, (3**-0.3, 1, (100 / 30) ** 0.3), strict=True):
        assert budget.law is not None
        assert budget.law.ratio.value == pytest.approx(3.2 * factor, rel=0.1)
        assert budget.interior >= 3
    assert analysis.main is not None
    assert analysis.nearest(25) is analysis.budgets[1]
    assert analysis.nearest(1e4) is analysis.budgets[2]


def test_tokens_are_found_to_matter_and_the_law_with_them_wins(analysis):
    assert analysis.tokens is not None
    assert analysis.tokens.tokens.low < 0.3 < analysis.tokens.tokens.high
    assert analysis.tokens.p_linear > 0.01
    assert analysis.scores[0].law.endswith("with tokens")


def test_of_counts_of_tokens_each_student_has_its_own_for_a_parameter():
    """T* = 3 S (D / 30 S)^0.5 at counts of tokens: the exponent of S is 1 at equal tokens per parameter."""
    records = []
    for count in (600_000, 1_800_000, 5_400_000):
        runs = whole_study(best=lambda s, _, d=count: 3 * s * (d / s / 30) ** 0.5, budgets=(30,))
        records += [r.model_copy(update={"tokens": count, "run": f"{r.run}-{count}"}) for r in runs]
    found = analyse(records)
    assert [b.name for b in found.budgets] == ["600k tokens", "1.8M tokens", "5.4M tokens"]
    assert found.tokens.exponent.value == pytest.approx(1, abs=0.1)
    assert found.tokens.tokens.value == pytest.approx(0.5, abs=0.1)
    assert found.tokens.exponent.low < 1 < found.tokens.exponent.high
    assert found.tokens.budgets == pytest.approx((600_000 / 160_000, 5_400_000 / 20_000))


def test_a_budget_of_bounds_alone_counts_as_bounds():
    low = whole_study(best=lambda s, _: 0.2 * s, budgets=(10,))
    found = analyse([*low, *whole_study(best=lambda s, _: 3.2 * s, budgets=(30, 100))])
    assert found.tokens.optima == (8, 4)
    assert found.tokens.budgets == pytest.approx((10, 100))
    assert found.scores[0].broken[1] == 4
    across = next(test for of, test in found.tests if of == "all budgets")
    assert across.details[0] == "10 tokens per parameter: bounds only"
    assert across.p < 0.05


def test_the_hypotheses_are_tested_at_each_budget_and_across(analysis):
    names = [(of, test.name[:2]) for of, test in analysis.tests]
    for budget in analysis.budgets:
        assert {(budget.name, "H1"), (budget.name, "H2"), (budget.name, "H3")} <= set(names)
    across = next(test for of, test in analysis.tests if of == "all budgets")
    assert across.p < 0.01
    assert [detail.split(":")[0] for detail in across.details] == [b.name for b in analysis.budgets]


def test_a_condition_is_compared_with_the_papers_way(several):
    again = whole_study(best=lambda s, _: 6 * s, budgets=(30,), condition="kd-only")
    found = dict(analyse([*several, *again]).tests)
    assert found["kd-only"].p < 0.01
    assert found["kd-only"].details[0].startswith("the paper's way: T*/S = 3.")
    same = whole_study(best=lambda s, _: 3.2 * s, budgets=(30,), sigma=0.0021, condition="kd-only")
    # Each student's optimum stands beside that of the paper's way.
    made = analyse([*several, *again])
    assert [(c.condition, c.budget, c.same) for c in made.conditions] == [("kd-only", "30 tokens per parameter", True)]
    rows = condition_rows(made.conditions, names_of(several))
    assert [row["student"] for row in rows] == [names_of(several)[row.student] for row in made.conditions[0].law.optima]
    plain = {row.student: row.optimum for row in made.budgets[1].law.optima}
    for row, optimum in zip(rows, made.conditions[0].law.optima, strict=True):
        assert row["the paper's way"].endswith(f"{plain[optimum.student].teacher / optimum.student:.2f}")
        assert row["its loss"] == f"{plain[optimum.student].loss:.4f}"
        assert row["T*/S"].endswith(f"{optimum.optimum.teacher / optimum.student:.2f}")
    # The very same optima with other noise.
    assert dict(analyse([*several, *same]).tests)["kd-only"].p > 0.01


def test_roles_apart_have_their_own_law():
    (found,) = analyse(roles_apart()).roles
    assert found.name == "30 tokens per parameter"
    assert [s.student for s in found.surfaces] == [20e3, 40e3]
    assert found.law.start.value == pytest.approx(2, rel=0.1)
    assert found.law.teacher.value == pytest.approx(8, rel=0.1)
    assert found.law.gain > 0.01


def test_picks_for_the_largest_student_are_by_a_law_without_it(several, analysis):
    picks = picks_of(several, analysis)
    assert {p.student for p in picks} == {"s160k (160k)"}
    rules = {(p.budget, p.rule): p for p in picks}
    for d in (10, 30, 100):
        pick = rules[f"{d} tokens per parameter", "law"]
        assert pick.excess < 0.01
        assert pick.start == pick.teacher
        assert rules[f"{d} tokens per parameter", "law with tokens"].excess < 0.01
        assert rules[f"{d} tokens per parameter", "the largest"].teacher == "t1150k"
        assert rules[f"{d} tokens per parameter", "the nearest above"].teacher == "t227k"
        losses = [r.loss for r in several if r.student == "s160k" and r.teacher == pick.teacher]
        mine = [
            r.loss for r in several if r.student == "s160k" and r.teacher == pick.teacher and r.tokens == d * 160_000
        ]
        assert losses
        assert pick.loss == pytest.approx(sum(mine) / len(mine))
    # Were the largest student in it, its law would be another: its optimum is moved far away.
    moved = [
        r.model_copy(update={"loss": 3 + 0.05 * math.log(r.teacher_scale / 1.1e6) ** 2}) if r.student == "s160k" else r
        for r in several
    ]
    again = {(p.budget, p.rule): p for p in picks_of(moved, analyse(moved))}
    assert again["30 tokens per parameter", "law"].teacher == rules["30 tokens per parameter", "law"].teacher


def test_picks_with_roles_apart():
    records = roles_apart()
    picks = {p.rule: p for p in picks_of(records, analyse(records)) if p.apart}
    law = picks["law of roles"]
    assert law.student == "s40k (40k)"
    assert (law.start, law.teacher) == ("t77k", "t390k")  # 2 S and 8 S, from the other student alone
    assert law.excess < 0.002
    assert picks["2.5 S"].start == picks["2.5 S"].teacher
    assert picks["the largest"].excess > law.excess


def test_what_is_too_little_is_said():
    found = analyse(whole_study(budgets=(30,), seeds=1)[:12])
    assert found.tokens is None
    assert any("Laws were not compared" in note for note in found.notes)
    assert analyse([]).main is None
    assert picks_of([], analyse([])) == []


def test_a_budget_without_a_law_does_not_cost_the_others(several):
    twice = [*several, several[0].model_copy(update={"run": "again"})]
    found = analyse(twice)
    assert found.budgets[0].law is None
    assert found.budgets[1].law is not None
    assert any("is there twice" in note for note in found.notes)


def test_tables_have_a_row_for_each(several, analysis):
    assert [row["budget"] for row in budget_rows(analysis)] == [b.name for b in analysis.budgets]
    assert len(token_rows(analysis.tokens)) == 3
    assert len(score_rows(analysis.scores)) == 7
    assert len(hypothesis_rows(analysis.tests)) == len(analysis.tests)
    assert [row["hypothesis"][:2] for row in hypothesis_rows(analysis.tests)] == sorted(
        t.name[:2] for _, t in analysis.tests
    )
    assert [row["without"] for row in influence_rows(analysis.main.law)]
    assert len(pick_rows(picks_of(several, analysis))) == 15
    rows = role_rows(analyse(roles_apart()).roles)
    assert rows[0]["start P*/S"].startswith(("2.", "1.9"))
    assert "exponent of tokens" in printed(analysis_tables(analysis, {})[0])


def test_bounds_are_said_in_the_budgets_table():
    low = analyse(whole_study(best=lambda s, _: 0.2 * s, budgets=(10, 30)))
    assert budget_rows(low)[0]["ratio T*/S"].startswith("at most 1.")


def test_a_grid_of_roles_that_is_not_full_yet_is_reported(tmp_path):
    records = roles_apart()
    law = next(p for p in picks_of(records, analyse(records)) if p.rule == "law of roles")
    missing = [r for r in records if (r.student, r.start, r.teacher) != ("s40k", law.start, law.teacher)]
    pick = next(p for p in picks_of(missing, analyse(missing)) if p.rule == "law of roles")
    assert (pick.start, pick.teacher) != (law.start, law.teacher)
    apart = [r for r in records if r.start != r.teacher]
    assert {p.rule for p in picks_of(apart, analyse(apart)) if p.apart} == {"law of roles"}
    assert write_report(apart, tmp_path, title="t").page.is_file()


def test_students_whose_scale_varies_with_their_start_are_one_student():
    def vary(records):
        wiggle = {name: 1 + 0.01 * (i % 3) for i, name in enumerate(MODELS)}
        return [r.model_copy(update={"student_scale": round(r.student_scale * wiggle[r.start])}) for r in records]

    picks = picks_of(vary(whole_study()), analyse(vary(whole_study())))
    assert {p.teacher for p in picks if p.rule == "the largest"} == {"t1150k"}
    assert {p.teacher for p in picks if p.rule == "the nearest above"} == {"t227k"}
    assert len({p.loss for p in picks}) > 3
    (roles,) = analyse(vary(roles_apart())).roles
    assert len(roles.surfaces) == 2


def test_the_report_shows_the_analysis(tmp_path, several):
    records = [*several, *roles_apart(coupled=False), run_of("s20k", None, None, 30, 0, 3.5)]
    report = write_report(records, tmp_path, title="t")
    names = {path.name for path in report.figures}
    assert {"ratio-over-tokens.png", "roles.png", "law.png", "loss-against-teacher.png"} <= names
    for path in report.figures:
        picture(path)
    words = " ".join(read(report.page).text)
    for heading in ("The law with tokens", "Laws compared", "Hypotheses of the paper", "The roles apart", "Picks"):
        assert heading in words
    assert "Start and teacher apart: s20k, 30 tokens per parameter" in words


def test_the_map_of_roles_knows_the_best_pairs():
    starts, teachers, cells = cells_of([*roles_apart(("s20k",)), run_of("s20k", None, None, 30, 0, 3.5)])
    assert starts[0] == "random"
    assert teachers[0] == "none"
    assert starts[1:] == [m for m in MODELS if MODELS[m] > 25_000]
    assert cells["random", "none"] == 3.5
    assert best(cells) == ("t45k", "t132k")
    pair = best_coupled(cells)
    assert pair is not None
    assert pair[0] == pair[1]


def test_own_laws_are_those_with_tokens_if_a_budget_is_given(several):
    own = own_laws_of([*several, *roles_apart(coupled=False)], 50_000, 50_000 * 60)
    assert own.law.predict(50_000).method == "with tokens"
    assert own.law.predict(50_000).teacher == pytest.approx(3.2 * 50_000 * 2**0.3, rel=0.1)
    assert own.roles is not None
    assert "the law with tokens" in own.told
    without = own_laws_of(several, 50_000, None)
    assert "tokens per parameter" in without.told
    assert without.roles is None
    # Far from what was measured the law with tokens tells nothing, and does not decide.
    far = own_laws_of(whole_study(seeds=1, sigma=0.01), 10**10, 10**10 * 5000)
    assert far.law.predict(10**10).method != "with tokens"
    assert "is not used: for this student its interval is a factor of" in far.told
    one = own_laws_of(whole_study(budgets=(30,)), 50_000, 50_000 * 10)
    assert "yours has 10 for each" in one.told

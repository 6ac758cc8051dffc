import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from capgap.errors import LawError
from capgap.law import BudgetOptimum, Observation, constant_ratio, fit_law, interior_optimum, teacher_matters

STUDENTS = [60e3, 120e3, 240e3]
FACTORS = [0.4, 0.7, 1.1, 1.9]


def losses(bend=0.08, slope=0.0, sigma=0.003, seeds=2, seed=0, students=STUDENTS, ratio=2.5):
    rng = np.random.default_rng(seed)
    return [
        Observation(s, ratio * s * f, 4 + bend * math.log(f) ** 2 + slope * math.log(f) + rng.normal(0, sigma), k)
        for s in students
        for f in FACTORS
        for k in range(seeds)
    ]


def measured(rows, group=""):
    return [BudgetOptimum(row, group=group) for row in fit_law(rows, replicates=0).optima]


def test_the_teachers_f_test_is_that_of_statsmodels():
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    rows = losses(sigma=0.05)
    frame = pd.DataFrame([(str(o.student), math.log(o.teacher), o.loss) for o in rows], columns=["s", "x", "y"])
    whole = smf.ols("y ~ C(s) * (x + I(x**2))", frame).fit()
    table = anova_lm(smf.ols("y ~ C(s)", frame).fit(), whole)
    found = teacher_matters(rows)
    assert found.p == pytest.approx(table["Pr(>F)"].iloc[1], rel=1e-6)
    assert found.statistic == f"F(6, {int(whole.df_resid)}) = {table['F'].iloc[1]:.3g}"
    assert (
        f"partial eta squared {table['ss_diff'].iloc[1] / (table['ss_diff'].iloc[1] + whole.ssr):.3f}" in found.effect
    )


def test_without_an_effect_the_teachers_p_is_uniform():
    ps = [teacher_matters(losses(bend=0, seed=i)).p for i in range(200)]
    assert stats.kstest(ps, "uniform").pvalue > 0.01


def test_the_optimums_test_is_lind_and_mehlums():
    """The slopes at both ends with their errors, from statsmodels' fit of one student."""
    import statsmodels.formula.api as smf

    rows = losses(students=STUDENTS[:1], sigma=0.05)
    x = np.log([o.teacher for o in rows])
    frame = pd.DataFrame({"x": x, "y": [o.loss for o in rows]})
    fit = smf.ols("y ~ x + I(x**2)", frame).fit()
    ps = []
    for edge, sign in ((x.min(), -1), (x.max(), 1)):
        t = fit.t_test([[0, 1, 2 * edge]])
        ps.append(float(stats.t.sf(sign * t.tvalue.item(), fit.df_resid)))
    assert interior_optimum(rows).p == pytest.approx(max(ps), rel=1e-6)


def test_an_interior_optimum_is_found_and_a_slope_is_none():
    there = interior_optimum(losses())
    assert there.p < 1e-3
    assert there.effect.startswith("3 of 3")
    # The nearer edge is ln 1.9 from the vertex.
    assert "60k" in there.details[0]
    assert float(there.details[0].split(", ")[1].split()[0]) == pytest.approx(0.08 * math.log(1.9) ** 2, abs=0.01)
    falling = interior_optimum(losses(bend=0.0, slope=-0.1))
    assert falling.p > 0.3
    assert falling.effect.startswith("0 of 3")
    assert interior_optimum(losses(bend=-0.08)).p > 0.9


def test_no_degrees_of_freedom_is_said():
    rows = [o for o in losses(seeds=1) if o.teacher > 1.2 * o.student]
    with pytest.raises(LawError, match="each student has three runs"):
        teacher_matters(rows)


def test_one_ratio_for_all_is_not_refused_and_two_are():
    for seeds, students in ((2, STUDENTS), (1, STUDENTS), (1, STUDENTS[:2])):
        made = [losses(seed=i, seeds=seeds, students=students) for i in range(60)]
        ps = np.array([constant_ratio(measured(rows), draws=200).p for rows in made])
        assert np.mean(ps < 0.05) <= 0.12
        assert 0.06 <= np.mean(ps < 0.2) <= 0.35
    apart = measured(losses(students=STUDENTS[:2])) + measured(losses(students=[480e3], ratio=6.0, seed=1))
    found = constant_ratio(apart)
    assert found.p < 0.01
    assert found.name == "H3: T*/S is constant across scales"
    assert "factor 2.4" in found.effect


def test_groups_are_compared():
    one, other = measured(losses(), "paper"), measured(losses(ratio=3.5, seed=4), "depth")
    found = constant_ratio([*one, *other], "groups")
    assert found.p < 0.01
    assert found.details[0].startswith("paper: T*/S = 2.5")
    assert found.details[1].startswith("depth: T*/S = 3.")
    assert constant_ratio([*one, *measured(losses(seed=5), "again")], "groups").p > 0.02


def test_bounds_alone_may_refuse_one_ratio():
    """Two students at 2.5 S, one whose best teacher is at most its smallest, 1.2 S."""
    inside = measured(losses(students=STUDENTS[:2]))
    grid = [1.2, 2.0, 3.5, 6.0]

    def third(bend):
        rows = [
            Observation(240e3, 240e3 * f, 4 + bend * math.log(f / 1.2) + 0.001 * k, k) for f in grid for k in (0, 1)
        ]
        (row,) = fit_law([*losses(students=STUDENTS[:2]), *rows], replicates=0).optima[2:]
        return BudgetOptimum(row)

    assert third(0.1).optimum.side == -1
    found = constant_ratio([*inside, third(0.1)])
    assert found.p < 0.05
    assert found.details[2] == "240k: bounds only"
    assert "factor 1.0" in found.effect  # of those inside their grids
    # At least its largest, 6 S, contradicts as well; among the others alone there is nothing.
    assert constant_ratio([*inside, third(-0.1)]).p < 0.05
    assert constant_ratio(inside).p > 0.05


def test_too_little_to_compare_is_said():
    with pytest.raises(LawError, match="comparing needs two"):
        constant_ratio(measured(losses(students=STUDENTS[:1])))
    with pytest.raises(LawError, match="comparing needs two"):
        constant_ratio(measured(losses()), "groups")

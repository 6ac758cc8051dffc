import math
import random

import numpy as np
import pytest

from capgap.errors import StudyError
from capgap.recipe import check
from capgap.records import RunRecord
from capgap.study import Budget, Family, StudySpec, estimate_study, flops_of_budget, next_trials, trials_of
from capgap.study.next import MOST_SEEDS, _Design

SPEC = check(
    {
        "data": {
            "train": {"python_stdlib": True, "part": "train"},
            "held_out": {"python_stdlib": True, "part": "held-out"},
            "block": 128,
        },
        "nano": {
            "vocabulary": 512,
            "members": [{"hidden": h, "neurons": round(2.7 * h), "lr": 1e-3} for h in (28, 38, 51, 68, 95, 119, 160)],
            "pretrain": {"tokens": 4096, "tokens_per_step": 1024},
        },
        "students": [
            {"hidden": 23, "kv_heads": 1, "neurons": 64},
            {"hidden": 32, "kv_heads": 2, "neurons": 84},
            {"hidden": 46, "kv_heads": 2, "neurons": 116},
        ],
        "seeds": [0],
        "tokens": ["10x", "30x"],
        "distill": {"tokens_per_step": 1024, "schedule": "wsd", "warmup": "20k", "decay": 0.2},
    },
    StudySpec,
    "study",
)  # fmt: skip


@pytest.fixture(scope="module")
def family():
    return Family(SPEC)


def run_of(family, student, teacher, ratio, seed, best, noise):
    scale, model = family.scales[student], family.models[teacher]
    loss = 3 + 0.04 * math.log(model.scale / best) ** 2 + noise.gauss(0, 0.004)
    return RunRecord(
        run=f"{student}-{teacher}-{ratio}-{seed}", kind="distill", student=family.student_names[student],
        student_scale=scale, teacher=teacher, teacher_scale=model.scale, start=teacher, start_scale=model.scale,
        tokens=round(ratio * scale), seed=seed, loss=loss, bits_per_byte=loss / 2, flops=2e12, seconds=50.0,
        device="cpu", recipe={}, recipe_hash="ab", data_hash="cd", versions={},
    )  # fmt: skip


def study(family, best, budgets=(10, 30), seeds=1, seed=0):
    noise = random.Random(seed)
    return [
        run_of(family, s, m.name, d, k, best(family.scales[s], d), noise)
        for s in range(3)
        for d in budgets
        for m in family.larger(s)
        for k in range(seeds)
    ]


def test_the_budget_is_kept_and_the_spread_falls(family):
    records = study(family, lambda s, d: 2.5 * s * (d / 20) ** 0.3)
    small, large = next_trials(family, records, 1e12), next_trials(family, records, 2e13)
    assert 0 < small.flops <= 1e12
    assert small.flops < large.flops <= 2e13
    assert small.before == large.before
    assert large.after < small.after < small.before
    assert sum(p.flops for p in large.proposals) == pytest.approx(large.flops)


def test_it_beats_runs_at_random(family):
    """For the same FLOPs the law's error, computed for both, falls more than with runs drawn at random."""
    records = study(family, lambda s, d: 2.5 * s * (d / 20) ** 0.3)
    advice = next_trials(family, records, 1.5e13)
    rng = np.random.default_rng(0)
    ends = []
    for _ in range(10):
        design = _Design.of(family, records)
        left = advice.flops
        while options := [o for o in design.options() if design.cost(o) <= left]:
            chosen = options[rng.integers(len(options))]
            left -= design.cost(chosen)
            design.add(chosen)
        ends.append(design.spread(30))
    assert advice.after < min(ends) + 1e-9


def test_censored_optima_call_for_longer_runs(family):
    """Where the smallest teacher is best, more seeds tell nothing; more tokens move the optimum into the grid."""
    records = study(family, lambda s, _: 0.8 * s)
    advice = next_trials(family, records, 5e13)
    assert advice.proposals
    assert {p.per_parameter for p in advice.proposals[:1]} == {90}
    assert len(advice.proposals[0].teachers) >= 3


def test_more_seeds_are_proposed_where_the_optimum_is_inside(family):
    records = study(family, lambda s, _: 2.5 * s, budgets=(30,))
    advice = next_trials(family, records, 1e13)
    assert {p.per_parameter for p in advice.proposals} == {30}
    assert {p.seed for p in advice.proposals} <= set(range(1, MOST_SEEDS))
    assert 1 in {p.seed for p in advice.proposals}


def test_the_error_of_an_optimum_is_how_it_scatters(family):
    """The delta method against optima of simulated losses."""
    design = _Design.of(family, study(family, lambda s, _: 2.5 * s, budgets=(30,), seeds=3))
    best, names = 2.5 * family.scales[0], [m.name for m in family.larger(0)]
    x = np.array([math.log(family.models[n].scale / best) for n in names])
    counts = dict.fromkeys(names, 2)
    row = design._row(0, 30.0)
    variance = row @ row * (row @ row) / (row @ design._weight(0, 30.0, counts, best, True) @ row)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        losses = design._bend * x**2 + rng.normal(0, math.sqrt(design._noise / 2), len(x))
        c2, c1, _ = np.polyfit(x, losses, 2)
        found.append(-c1 / (2 * c2))
    assert math.sqrt(variance - design._scatter**2) == pytest.approx(np.std(found), rel=0.1)


def test_the_grids_can_be_pasted_into_the_study(family):
    import yaml

    advice = next_trials(family, study(family, lambda s, d: 2.5 * s * (d / 20) ** 0.3), 2e13)
    said = advice.lines()
    tree = yaml.safe_load("\n".join(said[1:]))
    grown = check(SPEC.model_dump(mode="json", exclude_defaults=True) | tree, StudySpec, "study")
    old = {t.name for t in trials_of(family)}
    new = {t.name for t in trials_of(Family(grown))} - old
    assert len(new) == sum(len(p.teachers) for p in advice.proposals)
    assert "known to a factor of" in said[0]
    # They cost what was said: longer runs go on from shorter ones, whichever grid those are of.
    done = [study(family, lambda s, _: s)[0].model_copy(update={"run": name}) for name in old]
    assert estimate_study(Family(grown), done, measure=False).flops == pytest.approx(advice.flops, rel=0.02)


def test_what_was_run_is_not_proposed_again(family):
    """Whatever the seeds that the study counts by."""
    records = [r.model_copy(update={"seed": 1}) for r in study(family, lambda s, _: 2.5 * s, budgets=(30,))]
    advice = next_trials(family, records, 1e13)
    done = {(r.student, r.teacher, r.seed) for r in records}
    asked = [(family.student_names[p.student], name, p.seed) for p in advice.proposals for name in p.teachers]
    assert asked
    assert done.isdisjoint(asked)
    assert {seed for _, _, seed in asked} <= {0, 2, 3, 4}


def test_a_study_that_counts_tokens_gets_counts_of_tokens():
    counted = SPEC.model_copy(update={"tokens": [Budget(tokens=1_228_800)]})
    mine = Family(counted)
    runs = [r.model_copy(update={"tokens": 1_228_800}) for r in study(mine, lambda s, _: 2.5 * s, budgets=(30,))]
    proposals = next_trials(mine, runs, 1e13).proposals
    assert proposals
    for proposal in proposals:
        assert proposal.tokens is not None
        assert proposal.tokens % 1024 == 0
        assert f"tokens: [{proposal.tokens}]" in proposal.grid()
    assert 1_228_800 in {p.tokens for p in proposals}


def test_a_longer_run_costs_less_where_it_takes_over_a_shorter_one(family):
    records = study(family, lambda s, _: 0.8 * s, budgets=(10,))
    design = _Design.of(family, records)
    (option,) = [o for o in design.options() if o.student == 0]
    assert option.per_parameter == 30
    there = design.cost(option)
    for cell in design._cells.values():
        cell.runs.clear()
    assert there == pytest.approx(design.cost(option) * (30 - 0.8 * 10) / 30, rel=1e-3)  # in whole steps


def test_budgets_are_flops_or_hours(family):
    records = study(family, lambda s, _: 2.5 * s)
    assert flops_of_budget("2e15", records) == 2e15
    assert flops_of_budget("2h", records) == pytest.approx(2 * 3600 * 2e12 / 50)
    for words in ("much", "-1", "nan", "inf"):
        with pytest.raises(StudyError, match="must be FLOPs"):
            flops_of_budget(words, records)
    with pytest.raises(StudyError, match="no record tells"):
        flops_of_budget("2h", [])
    with pytest.raises(StudyError, match="three teachers"):
        next_trials(family, [], 1e12)
    assert "nothing fits" in next_trials(family, records, 1.0).lines()[0]

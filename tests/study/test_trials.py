"""The trials of a study: order, names, needs and trunks."""

from collections import Counter

import pytest

from capgap.demo import demo_spec
from capgap.errors import RecipeError, StudyError
from capgap.study import Family, trials_of
from capgap.study.trials import pruning_of, training_of
from study.small import study

WSD = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k", "evaluations": 1}


def of(**more):
    return trials_of(Family(study(**more)))


def test_the_grid_holds_each_student_by_each_larger_member_after_what_it_needs():
    trials = trials_of(Family(demo_spec(full=False)))
    assert Counter(trial.kind for trial in trials) == {"pretrain": 4, "distill": 8}
    seen = set()
    for trial in trials:
        assert {*trial.needs, *([trial.trunk] if trial.trunk else [])} <= seen
        seen.add(trial.name)


def test_all_starts_and_teachers_with_none_and_random():
    trials = of(grids=[{"starts": ["all", "random"], "teachers": ["all", "none"]}])[2:]
    assert len(trials) == 9
    kinds = {(t.start, t.teacher): (t.kind, t.needs) for t in trials}
    assert kinds[None, None] == ("scratch", [])
    assert kinds["t30.2k", None] == ("scratch", ["t30.2k"])
    assert kinds[None, "t60.7k"] == ("distill", ["t60.7k"])
    assert kinds["t30.2k", "t60.7k"] == ("distill", ["t30.2k", "t60.7k"])


def test_under_wsd_each_budget_goes_on_from_the_one_before():
    trials = of(tokens=["1x", "2x", "4x"], seeds=[0, 1], distill=WSD)[2:]
    assert len(trials) == 2 * 2 * 3
    by_name = {trial.name: trial for trial in trials}
    for trial in trials:
        if trial.trunk is None:
            assert trial.tokens == 29 * 512  # 15,000 in whole steps
            continue
        before = by_name[trial.trunk]
        same = ("start", "teacher", "student", "seed", "condition")
        assert all(getattr(before, key) == getattr(trial, key) for key in same)
        assert trial.tokens == pytest.approx(2 * before.tokens, rel=0.02)
    # Short ones first, so that all teachers have something to show early.
    assert [t.tokens for t in trials[:6]] == sorted(t.tokens for t in trials[:6])


def test_a_run_goes_on_from_a_shorter_one_of_any_grid_in_any_order():
    apart = [{"tokens": ["4x"], "seeds": [0]}, {"tokens": ["1x"]}, {"tokens": ["2x"]}]
    together = {t.name: t for t in of(tokens=["1x", "2x", "4x"], distill=WSD)}
    for grids in (apart, apart[::-1]):
        assert {t.name: t for t in of(grids=grids, tokens=["1x"], distill=WSD)} == together
    # But not from another seed's, teacher's or condition's.
    other = [{"tokens": ["1x"], "seeds": [1]}, {"tokens": ["2x"]}, {"tokens": ["4x"], "condition": "c"}]
    assert not any(t.trunk for t in of(grids=other, tokens=["1x"], distill=WSD))


def test_with_a_warmup_that_is_a_share_runs_do_not_go_on_from_others():
    """They differ from the first step on."""
    assert not any(trial.trunk for trial in of(tokens=["1x", "2x"], distill={**WSD, "warmup": 0.1}))


def test_what_no_run_could_do_is_found_before_any_starts():
    with pytest.raises(RecipeError, match=r"warmup = 20,000 tokens is more than distill\.tokens = 14,848"):
        of(tokens=["1x", "2x"], distill={**WSD, "warmup": "20k"})
    with pytest.raises(RecipeError, match=r"tokens_per_step = 32 is less than data\.block = 64"):
        of(distill={"tokens_per_step": 32, "tokens": 5120})
    with pytest.raises(StudyError, match=r"grids\.0\.distill\.seed: give grids\.0\.seeds instead"):
        of(grids=[{"distill": {"seed": 3}}])


def test_two_trials_of_one_name_are_refused():
    with pytest.raises(StudyError, match=r"two different trials are called .*give a grid"):
        of(grids=[{}, {"distill": {"divergence": "reverse_kl"}}])
    with pytest.raises(StudyError, match="budgets that differ by a hundredth at least"):
        of(tokens=[1_000_448, 1_000_960])


def test_under_cosine_no_run_goes_on_from_another():
    assert not any(trial.trunk for trial in of(tokens=["1x", "2x"], distill={**WSD, "schedule": "cosine"}))


def test_conditions_change_what_they_name_and_nothing_else():
    grids = [{}, {"condition": "kd", "distill": {"kd_weight": 1.0}, "prune": {"score": "random"}}]
    family = Family(study(grids=grids))
    plain, changed = (next(t for t in trials_of(family) if t.condition == c and t.teacher) for c in ("", "kd"))
    assert changed.name == plain.name.replace("-5.12k-", "-kd-5.12k-")
    assert training_of(family, changed) == training_of(family, plain).model_copy(update={"kd_weight": 1.0})
    assert pruning_of(family, changed) == pruning_of(family, plain).model_copy(update={"score": "random"})
    with pytest.raises(RecipeError, match=r"grids\.0\.distill: kd_wieght: unknown key"):
        of(grids=[{"condition": "kd", "distill": {"kd_wieght": 1.0}}])


def test_a_trial_that_two_grids_name_is_one():
    assert len(of(grids=[{}, {}])) == len(of()) == 4


def test_grids_name_models_that_are_there_and_larger():
    with pytest.raises(StudyError, match=r"grids\.0\.teachers = 't9'.*it has t30\.2k, t60\.7k"):
        of(grids=[{"teachers": ["t9"]}])
    students = [{"scale": "15k"}, {"scale": "40k"}]
    with pytest.raises(StudyError, match=r"grids\.0\.starts = 't30\.2k': not larger than every student"):
        of(students=students, grids=[{"starts": ["t30.2k"]}])

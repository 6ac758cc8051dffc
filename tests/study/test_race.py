"""Races: who is stopped and why, from records alone."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from capgap.errors import StudyError
from capgap.study import estimate_study, trials_of
from capgap.study.forecast import Point, forecast
from capgap.study.race import judge, may_be_stopped
from study.raced import RACED, SIZES, family, inner, moving, noisy, record_of


def shown(trials, scales, upto, law=moving, without=()):
    return {
        t.name: record_of(t, scales[t.teacher], law)
        for t in trials
        if t.kind == "distill" and t.tokens <= upto and t.name not in without
    }


def setting(**more):
    made = family(**more)
    trials = [t for t in trials_of(made) if t.kind == "distill"]
    return trials, {name: model.scale for name, model in made.models.items()}, sorted({t.tokens for t in trials})


def test_a_heat_waits_for_the_one_before_and_then_stops_teachers_for_good():
    trials, scales, budgets = setting()
    first = shown(trials, scales, budgets[0])
    some = dict(list(first.items())[1:])
    waiting = judge(trials, some, ())
    assert not waiting.stopped
    assert waiting.held == {t.name for t in trials if t.tokens > budgets[0]}
    verdicts = judge(trials, first, ())
    assert verdicts.stopped
    # Who is stopped before a heat does not run the later ones either; the others wait for that heat.
    for trial in trials:
        later = [t.name for t in trials if t.teacher == trial.teacher and t.tokens > budgets[0]]
        if trial.name in verdicts.stopped:
            assert set(later) <= verdicts.stopped.keys()
    assert verdicts.held == {t.name for t in trials if t.tokens == budgets[2]} - verdicts.stopped.keys()
    assert all(name not in verdicts.stopped and name not in verdicts.held for name in first)
    for why in verdicts.stopped.values():
        assert why.startswith("after 11.8k tokens its loss at 120k is forecast ")
        assert "nats above that of t" in why or "but of 40 % of the grid's FLOPs too little is left for it" in why


def test_what_is_forecast_worse_by_less_than_the_tolerance_is_stopped_only_where_flops_are_short():
    rich = {"grids": [{"race": {"share": 1.0, "tolerance": 1.0}}]}
    trials, scales, budgets = setting(**rich)
    assert not judge(trials, shown(trials, scales, budgets[1]), ()).stopped
    trials, scales, budgets = setting(grids=[{"race": {"share": 0.3, "tolerance": 1.0}}])
    short = judge(trials, shown(trials, scales, budgets[0]), ()).stopped
    assert short
    spent = "the race may take 30 % of the grid's FLOPs, and what is left of them is better spent on others"
    assert all(
        why.endswith((spent, "but of 30 % of the grid's FLOPs too little is left for it")) for why in short.values()
    )
    trials, scales, budgets = setting(grids=[{"race": {"share": 1.0, "tolerance": 0.0}}])
    worse = judge(trials, shown(trials, scales, budgets[1]), ()).stopped
    assert worse
    assert not any("FLOPs" in why for why in worse.values())


@pytest.mark.parametrize(
    ("share", "tolerance"),
    [(1.0, 0.0), (1.0, 0.01), (0.4, 0.005), *((share, 1.0) for share in (0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3))],
)
@pytest.mark.parametrize("seed", range(4))
def test_who_goes_on_is_who_may_win_and_together_promise_most(share, tolerance, seed):
    """By the rule as the documentation has it, worked out apart."""
    trials, scales, budgets = setting(grids=[{"race": {"share": share, "tolerance": tolerance}}])
    first = shown(trials, scales, budgets[0], noisy(seed, 0.005, inner))
    records = sorted(first.values(), key=lambda record: record.teacher_scale or 0)
    points = tuple(
        Point(i, int(row["tokens"]), (0, 0 if row["lr"] else record.tokens), row["loss"])
        for i, record in enumerate(records)
        for row in record.curve
    )
    seen = forecast(tuple(float(r.teacher_scale or 0) for r in records), points, budgets[-1])
    assert seen is not None
    lowest = int(np.argmin(seen.loss_N))
    above, error = seen.above(lowest)
    shared = [0, *(int(tokens / 512 * 0.8 + 1e-9) * 512 for tokens in budgets[:2])]  # whole steps of the constant part
    for trial in trials:
        assert abs(trial.taken_over - shared[budgets.index(trial.tokens)]) <= 512
    own = [next(t.tokens - t.taken_over for t in trials if t.tokens == tokens) for tokens in budgets]
    per_token = [2.0 * (r.teacher_scale or 0) + 72_000 for r in records]
    left = share * sum(own) * sum(per_token) - own[0] * sum(per_token)
    margin = tolerance * min(r.loss for r in records)
    hopeful = [i for i in range(len(records)) if above[i] - 2 * error[i] <= margin]
    drawn = multivariate_normal(seen.loss_N, seen.covariance_NN, allow_singular=True, seed=seed).rvs(20_000)

    def promise(goes_on) -> float:
        heat = own[1] * sum(per_token[i] for i in goes_on)
        arrive = [i for i in goes_on if heat + own[2] * per_token[i] <= left]
        return float(drawn[:, arrive].min(axis=1).mean()) if arrive else np.inf

    stopped = judge(trials, first, ()).stopped
    teachers = [r.teacher for r in records]
    goes_on = {teachers.index(t.teacher) for t in trials if t.tokens == budgets[1] and t.name not in stopped}
    assert goes_on <= set(hopeful)
    assert share == 1 or len(goes_on) < len(records)  # the rule had something to say
    most = min(promise(some) for size in range(1, len(hopeful) + 1) for some in combinations(hopeful, size))
    if np.isfinite(most):
        assert promise(goes_on) <= most + 4 * error.max() / np.sqrt(20_000)
    else:
        assert goes_on == {min(hopeful)}  # the cheapest, as nobody can be paid for to the end
    if share == 1:
        assert goes_on == set(hopeful)
    for trial in trials:
        if "nats above" in (why := stopped.get(trial.name, "")):
            i = teachers.index(trial.teacher)
            assert f"{above[i]:.4f} ± {error[i]:.4f} nats above that of {teachers[lowest]}" in why


def test_where_nobody_can_be_paid_for_the_cheapest_that_may_win_goes_on_alone():
    trials, scales, budgets = setting(grids=[{"race": {"share": 0.01}}])
    verdicts = judge(trials, shown(trials, scales, budgets[0]), ())
    left = {t.teacher for t in trials if t.tokens == budgets[1]} - {
        t.teacher for t in trials if t.name in verdicts.stopped
    }
    assert len(left) == 1
    cheaper = {t.teacher for t in trials if scales[t.teacher] < scales[next(iter(left))]}
    for teacher in cheaper:  # those could not win
        why = verdicts.stopped[next(t.name for t in trials if t.teacher == teacher and t.tokens == budgets[1])]
        assert "FLOPs" not in why


def test_two_races_of_one_students_teachers_must_be_alike():
    small, large = list(family().models)[:3], list(family().models)[3:]
    grids = [{"race": {"share": 0.6}, "teachers": small}, {"race": {"share": 0.5}, "teachers": large}]
    with pytest.raises(
        StudyError, match=r"two grids race the teachers of student 0, each its own start, with different"
    ):
        setting(grids=grids)
    # Alike, they are one race.
    grids[1]["race"] = grids[0]["race"]
    trials, scales, budgets = setting(grids=grids)
    whole, _, _ = setting(grids=[{"race": {"share": 0.6}}])
    first = shown(trials, scales, budgets[0])
    assert judge(trials, first, ()).stopped == judge(whole, first, ()).stopped


def test_of_one_number_of_tokens_nothing_is_forecast_and_nobody_stopped():
    trials, scales, budgets = setting()
    first = shown(trials, scales, budgets[0])
    alone = {name: record.model_copy(update={"curve": []}) for name, record in first.items()}
    verdicts = judge(trials, alone, ())
    assert not verdicts.stopped
    assert verdicts.held == {t.name for t in trials if t.tokens == budgets[2]}


def test_a_teacher_whose_run_failed_is_no_candidate():
    trials, scales, budgets = setting()
    failed = next(t for t in trials if t.tokens == budgets[0])
    first = shown(trials, scales, budgets[0], without={failed.name})
    assert judge(trials, first, ()).held == {t.name for t in trials if t.tokens > budgets[0]}
    verdicts = judge(trials, first, {failed.name})
    assert {verdicts.stopped[t.name] for t in trials if t.teacher == failed.teacher and t != failed} == {
        "its run of 11.8k tokens failed"
    }


@pytest.mark.parametrize("budget", [1, 2])
def test_what_another_grid_has_run_is_not_stopped_and_counts(budget):
    largest, tokens = list(family().models)[-1], RACED["tokens"][budget]
    race = {"race": {"share": 0.2}}
    trials, scales, budgets = setting(grids=[race, {"teachers": [largest], "tokens": [tokens]}])
    anyway = next(t for t in trials if t.teacher == largest and t.tokens == budgets[budget])
    assert anyway.race is None
    verdicts = judge(trials, shown(trials, scales, budgets[0]), ())
    assert anyway.name not in {*verdicts.stopped, *verdicts.held}
    goes_on = [t for t in trials if t.tokens == budgets[1] and t != anyway and t.name not in verdicts.stopped]
    assert len(goes_on) >= 1
    # Its teacher is stopped where it is not asked for elsewhere.
    alone, _, _ = setting(grids=[race])
    assert anyway.name in judge(alone, shown(alone, scales, budgets[0]), ()).stopped
    # The heat of its budget is not over before it ended.
    ran = shown(trials, scales, budgets[2])
    del ran[anyway.name]
    longest = {t.name for t in trials if t.tokens == budgets[2] and t.race}
    without = {name: record for name, record in ran.items() if name not in longest}
    late = judge(trials, without, ())
    assert bool(late.held) == (budget == 1)
    assert budget == 2 or late.held == longest - late.stopped.keys()


def test_what_is_run_in_any_case_is_paid_for_first_and_what_is_longer_not_at_all():
    largest, fewer = list(family().models)[-1], []

    def stopped(share, *more):
        trials, scales, budgets = setting(grids=[{"race": {"share": share, "tolerance": 1.0}}, *more])
        first = shown(trials, scales, budgets[0])
        return {name for name in judge(trials, first, ()).stopped if largest not in name}

    for share in (0.15, 0.2, 0.25, 0.3, 0.35):
        alone = stopped(share)
        beside = stopped(share, {"teachers": [largest], "tokens": ["3x"]})
        assert alone <= beside
        fewer.append(alone < beside)
        assert stopped(share, {"teachers": [largest], "tokens": ["30x"]}) == alone
    assert sum(fewer) >= 2


def test_each_student_condition_and_start_has_a_race_of_its_own_with_all_its_seeds():
    trials, scales, budgets = setting(seeds=[0, 1], students=[{"scale": "12k"}, {"scale": "13k"}])
    mine = [t for t in trials if t.student == 0]
    first = {t.name: record_of(t, scales[t.teacher]) for t in mine if t.tokens == mine[0].tokens}
    # A heat is over when all of its seeds are.
    some = {name: record for name, record in first.items() if not name.endswith("seed1")}
    waiting = judge(trials, some, ())
    assert not waiting.stopped
    assert waiting.held == {t.name for t in trials if t.tokens not in (budgets[0], budgets[1])}
    verdicts = judge(trials, first, ())
    assert verdicts.stopped
    assert verdicts.stopped.keys() <= {t.name for t in mine}
    assert {n[:-1] for n in verdicts.stopped if n.endswith("0")} == {
        n[:-1] for n in verdicts.stopped if n.endswith("1")
    }
    assert verdicts.held > {t.name for t in trials if t not in mine and t.tokens > budgets[1]}
    start = next(iter(family().models))
    fixed, scales, _ = setting(grids=[{"race": True, "starts": [start], "teachers": ["all", "none"]}])
    assert {t.start for t in fixed} == {start}
    assert judge(fixed, shown(fixed, scales, fixed[0].tokens), ()).stopped


def test_what_one_seed_runs_anyway_is_paid_for_and_the_other_seed_is_raced():
    largest = list(family().models)[-1]
    race = {"race": {"share": 0.2}, "seeds": [0, 1]}
    trials, scales, budgets = setting(grids=[race, {"teachers": [largest], "seeds": [0]}])
    free = [t for t in trials if t.teacher == largest and t.tokens > budgets[0] and t.seed == 0]
    assert all(t.race is None for t in free)
    verdicts = judge(trials, shown(trials, scales, budgets[0]), ())
    assert {t.name for t in free}.isdisjoint({*verdicts.stopped, *verdicts.held})
    assert {t.name for t in trials if t.teacher == largest and t.seed and t.race} & verdicts.stopped.keys()


def test_trials_know_their_race_and_the_dry_run_says_what_may_be_stopped():
    grid = {"teachers": ["all", "none"], "starts": ["teacher", "random"]}
    made = family(grids=[{"race": True, **grid}])
    trials = trials_of(made)
    assert {t.kind for t in trials if t.race is None} == {"pretrain", "scratch"}
    assert {(t.race.coupled, t.start == t.teacher) for t in trials if t.race} == {(True, True), (False, False)}
    plain = {
        t.name: t for t in trials_of(family(grids=[{"teachers": ["all", "none"], "starts": ["teacher", "random"]}]))
    }
    assert plain.keys() == {t.name for t in trials}
    assert all(plain[t.name].alike(t) for t in trials)
    assert may_be_stopped(trials) == {
        t.name for t in trials if t.race and t.tokens > min(u.tokens for u in trials if u.race)
    }
    cost = estimate_study(made, measure=False)
    assert cost.raced == 2 * 2 * len(SIZES)
    assert "the most it can be; 24 of the trials may be stopped early" in "\n".join(cost.lines(1))
    assert not any("race" in line for line in estimate_study(family(grids=[{}]), measure=False).lines(1))


def test_a_trial_that_two_races_share_is_run():
    start = next(iter(family().models))
    shared = [
        t for t in trials_of(family(grids=[{"race": True}, {"race": True, "starts": [start]}])) if t.teacher == start
    ]
    assert len(shared) == 3
    assert all(t.race is None for t in shared)
    # The same race in two grids is one.
    more = [{"race": True, "tokens": ["1x", "3x"]}, {"race": True}]
    assert all(t.race for t in trials_of(family(grids=more)) if t.kind == "distill")

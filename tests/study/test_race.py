"""Races: who is stopped and why, from records alone; replayed, in a queue, and on a real small study."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap import records as files
from capgap.errors import StudyError
from capgap.records import RunRecord
from capgap.study import Family, Queue, Race, estimate_study, replay, run_study, study_status, trials_of
from capgap.study.forecast import Point, forecast
from capgap.study.race import judge, may_be_stopped
from capgap.study.trials import Trial
from shell import capgap_here
from study.small import states, study

WSD = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k", "evaluations": 3}
SIZES = (24, 32, 48, 64, 96, 128)
NANO = {
    "vocabulary": 300,
    "members": [{"hidden": hidden, "neurons": 2 * hidden, "lr": 5e-3} for hidden in SIZES],
    "pretrain": {"tokens": 5_120, "tokens_per_step": 512, "evaluations": 1},
}
RACED = {"nano": NANO, "students": [{"scale": "12k"}], "tokens": ["1x", "3x", "10x"], "distill": WSD}


def family(**more) -> Family:
    return Family(study(**{**RACED, "grids": [{"race": True}], **more}))


def moving(scale: float, tokens: float) -> float:
    """A law in which a larger teacher starts worse and ends better, up to a point."""
    x = np.log(scale / 15_000)
    return float(3 + (tokens / 12_000) ** -0.5 * (1 + 0.3 * x) + 0.03 * (x - 0.8) ** 2)


def record_of(trial: Trial, scale: int, law=moving, *, student_scale: int = 12_000) -> RunRecord:
    at = [(trial.tokens * share, 5e-3) for share in (0.25, 0.5, 0.75)] + [(trial.tokens, 0.0)]
    return RunRecord(
        run=trial.name,
        kind="distill",
        student="s12k",
        student_scale=student_scale,
        teacher=trial.teacher,
        teacher_scale=scale,
        start=trial.start,
        start_scale=scale,
        tokens=trial.tokens,
        tokens_taken_over=trial.taken_over,
        seed=trial.seed,
        loss=law(scale, trial.tokens),
        bits_per_byte=1,
        curve=[{"step": 1, "tokens": float(round(t)), "lr": lr, "loss": law(scale, round(t))} for t, lr in at],
        flops=trial.tokens * (2.0 * scale + 6.0 * student_scale),
        seconds=1,
        device="",
        recipe={"schedule": "wsd", "lr": 5e-3},
        recipe_hash="",
        data_hash="",
        versions={},
    )


def grid(scales, law, budgets=(120_000, 360_000, 1_200_000), seed=0) -> list[RunRecord]:
    """The records of a full grid, each run going on from the one of fewer tokens."""
    found = []
    for scale in scales:
        for before, tokens in zip((0, *budgets), budgets, strict=False):
            name = f"t{scale}"
            trial = Trial(name=f"{name}-{tokens}", kind="distill", start=name, teacher=name, seed=seed, tokens=tokens)
            trial = trial.model_copy(update={"taken_over": before * 8 // 10})
            found.append(record_of(trial, scale, law))
    return found


SCALES = tuple(round(16_000 * 1.65**i) for i in range(8))


def inner(scale: float, tokens: float) -> float:
    """A law whose best teacher is the third or so of a grid at any number of tokens."""
    x = np.log(scale / 15_000)
    return float(3 + (tokens / 12_000) ** -0.5 + 0.05 * (x - 1.1) ** 2)


def noisy(seed: int, noise: float, base=moving):
    rng, drawn = np.random.default_rng(seed), {}

    def law(scale, tokens):
        if (scale, tokens) not in drawn:
            drawn[scale, tokens] = rng.normal(0, noise * (tokens / 1e5) ** -0.25)
        return base(scale, tokens) + drawn[scale, tokens]

    return law


def test_on_a_moving_optimum_the_winner_is_near_the_best_for_the_share_of_the_flops():
    found = [
        one for seed in range(20) for one in replay(grid(SCALES, noisy(seed, 0.003)), Race()) if len(one.tokens) == 3
    ]
    assert np.mean([one.above <= 0.005 for one in found]) >= 0.95
    assert max(one.share for one in found) <= 0.4
    assert all(len(one.heats[0]) == 8 for one in found)
    # The best at first is not the best at the end: a ranking of the moment would have lost it.
    best = found[0].best_teacher
    assert best != f"t{min(SCALES, key=lambda scale: moving(scale, 120_000))}"


def test_the_share_is_what_was_run_of_what_there_was():
    full = grid(SCALES, moving)
    one = replay(full)[-1]
    by_name = {record.run: record for record in full}
    ran = [
        by_name[f"{teacher}-{tokens}"] for tokens, heat in zip(one.tokens, one.heats, strict=True) for teacher in heat
    ]
    # By hand: each run without the eight tenths of the one before that it goes on from.
    own = {120_000: 120_000, 360_000: 360_000 - 96_000, 1_200_000: 1_200_000 - 288_000}
    cost = {r.run: own[r.tokens] * (2.0 * (r.teacher_scale or 0) + 72_000) for r in full}
    assert one.share == pytest.approx(sum(cost[r.run] for r in ran) / sum(cost.values()))
    assert one.loss == by_name[f"{one.teacher}-1200000"].loss
    assert one.best_loss == min(r.loss for r in full if r.tokens == 1_200_000)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.1, 0.8), st.floats(-1, 4), st.floats(0.01, 0.2), st.integers(4, 9), st.sampled_from([0.25, 0.5, 0.75])
)
def test_without_noise_a_best_that_stays_the_best_is_never_stopped(fades, vertex, curvature, count, power):
    def law(scale, tokens):
        x = np.log(scale / SCALES[0])
        return float(3 + (tokens / 1e5) ** -power * (1 + fades * curvature * (x - vertex) ** 2))

    for one in replay(grid(SCALES[:count] if count < 9 else (*SCALES, 1_000_000), law), Race(share=1.0)):
        assert all(one.best_teacher in heat for heat in one.heats)
        assert one.above == 0


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 50))
def test_the_order_of_the_records_does_not_matter(random, seed):
    full = grid(SCALES, noisy(seed, 0.01))
    expected = replay(full)
    random.shuffle(full)
    assert replay(full) == expected


def test_a_grid_that_is_not_full_or_too_small_is_not_replayed():
    full = grid(SCALES, moving)
    assert [len(one.tokens) for one in replay(full)] == [2, 3]
    assert [len(one.tokens) for one in replay(full[:-1])] == [2]
    assert replay(full[:3]) == []
    assert replay([r for r in full if r.tokens == 120_000]) == []
    with pytest.raises(StudyError, match=r"t16000-120000: its record does not say its teacher's scale"):
        replay([r.model_copy(update={"teacher_scale": None}) for r in full])


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
        assert "nats above that of t" in why or "would take the race over 40 %" in why


def test_what_is_forecast_worse_by_less_than_the_tolerance_is_stopped_only_where_flops_are_short():
    rich = {"grids": [{"race": {"share": 1.0, "tolerance": 1.0}}]}
    trials, scales, budgets = setting(**rich)
    assert not judge(trials, shown(trials, scales, budgets[1]), ()).stopped
    trials, scales, budgets = setting(grids=[{"race": {"share": 0.3, "tolerance": 1.0}}])
    short = judge(trials, shown(trials, scales, budgets[0]), ()).stopped
    assert short
    assert all("the race, which may take 30 % of the grid's FLOPs, has none left for it" in w for w in short.values())
    trials, scales, budgets = setting(grids=[{"race": {"share": 1.0, "tolerance": 0.0}}])
    worse = judge(trials, shown(trials, scales, budgets[0]), ()).stopped
    assert worse
    assert not any("FLOPs" in why for why in worse.values())


@pytest.mark.parametrize(
    ("share", "tolerance"),
    [(1.0, 0.0), (1.0, 0.01), (0.4, 0.005), *((share, 1.0) for share in (0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3))],
)
@pytest.mark.parametrize("seed", range(4))
def test_who_goes_on_is_who_may_win_and_can_be_paid_for(share, tolerance, seed):
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
    order = np.argsort(seen.loss_N)
    above, error = seen.above(int(order[0]))
    shared = [0, *(int(tokens / 512 * 0.8 + 1e-9) * 512 for tokens in budgets[:2])]  # whole steps of the constant part
    for trial in trials:
        assert abs(trial.taken_over - shared[budgets.index(trial.tokens)]) <= 512
    own = [next(t.tokens - t.taken_over for t in trials if t.tokens == tokens) for tokens in budgets]
    per_token = [2.0 * (r.teacher_scale or 0) + 72_000 for r in records]
    left = share * sum(own) * sum(per_token) - own[0] * sum(per_token)
    margin = tolerance * min(r.loss for r in records)
    hopeful = [i for i in range(len(records)) if above[i] - 2 * error[i] <= margin]
    hopeful.sort(key=lambda i: (max(0.0, above[i] - margin), i))  # of those as good as the best the smallest first
    whole = {i: (own[1] + own[2]) * per_token[i] for i in hopeful}
    # One that can be paid for until the end comes first, or else the cheapest; the heat has half of what is left.
    first_of_all = next((i for i in hopeful if whole[i] <= left), min(hopeful, key=lambda i: whole[i]))
    expected = [records[first_of_all].teacher]
    heat = min(left / 2 - own[1] * per_token[first_of_all], left - whole[first_of_all])
    for i in hopeful:
        if i != first_of_all and own[1] * per_token[i] <= heat:
            heat -= own[1] * per_token[i]
            expected.append(records[i].teacher)
    stopped = judge(trials, first, ()).stopped
    goes_on = {t.teacher for t in trials if t.tokens == budgets[1] and t.name not in stopped}
    assert goes_on == set(expected)
    assert share == 1 or len(expected) < len(records)  # the rule had something to say
    for trial in trials:
        if "nats above" in (why := stopped.get(trial.name, "")):
            i = [r.teacher for r in records].index(trial.teacher)
            assert f"{above[i]:.4f} ± {error[i]:.4f} nats above that of {records[order[0]].teacher}" in why


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
        assert "has none left for it" not in why
        assert "take the race over" not in why


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


def test_a_race_that_is_changed_in_the_file_decides_anew_as_a_rebuilt_queue_does(tmp_path):
    strict = family(grids=[{"race": {"share": 0.3, "tolerance": 0.001}}])
    lax = family(grids=[{"race": {"share": 0.6, "tolerance": 0.02}}])
    scales = {name: model.scale for name, model in strict.models.items()}
    queue = Queue(tmp_path / "one")
    queue.add(trials_of(strict))
    work_off(queue, scales)
    before = states(queue)
    queue.add(trials_of(lax))
    assert work_off(queue, scales)
    found = states(queue)
    assert list(found.values()).count("pruned") < list(before.values()).count("pruned")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "records.jsonl").write_bytes((tmp_path / "one" / "records.jsonl").read_bytes())
    again = Queue(tmp_path / "two")
    again.add(trials_of(lax))
    assert states(again) == found
    assert again.unfinished() == 0


def test_the_share_holds_however_unequal_the_heats_and_teachers():
    for seed in range(30):
        for one in replay(grid(SCALES, noisy(seed, 0.01), budgets=(100_000, 300_000, 1_000_000, 3_000_000)), Race()):
            assert one.share <= 0.4 or len(one.tokens) < 3


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


@pytest.mark.parametrize("share", [0.15, 0.2, 0.25, 0.3, 0.35])
def test_what_is_run_in_any_case_is_paid_for_first_and_what_is_longer_not_at_all(share):
    race, largest = {"race": {"share": share, "tolerance": 1.0}}, list(family().models)[-1]

    def stopped(*more):
        trials, scales, budgets = setting(grids=[race, *more])
        first = shown(trials, scales, budgets[0])
        return {name for name in judge(trials, first, ()).stopped if largest not in name}

    alone = stopped()
    assert len(stopped({"teachers": [largest], "tokens": ["3x"]})) > len(alone) or len(alone) == 8
    assert stopped({"teachers": [largest], "tokens": ["30x"]}) == alone


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


def test_the_winner_is_the_best_over_the_seeds():
    """One seed's luck does not decide, and a budget counts with the seeds that it is full of."""
    lucky = {(SCALES[5], 1_200_000, 1): -0.5}

    def law(seed):
        return lambda scale, tokens: moving(scale, tokens) + lucky.get((scale, round(tokens), seed), 0.0)

    both = [r.model_copy(update={"run": f"{r.run}-{s}"}) for s in (0, 1, 2) for r in grid(SCALES, law(s), seed=s)]
    one = replay(both, Race(share=1.0, tolerance=1.0))[-1]
    assert one.seeds == (0, 1, 2)
    assert one.best_teacher == one.teacher == f"t{SCALES[5]}"
    assert one.best_loss == pytest.approx(moving(SCALES[5], 1_200_000) - 0.5 / 3)
    assert one.share == pytest.approx(1)
    # Seeds of which a teacher is missing do not count, nor does the luck in them.
    less = [r for r in both if not (r.seed == 1 and r.tokens == 1_200_000 and r.teacher == f"t{SCALES[0]}")]
    fewer = replay(less, Race())
    assert [(len(r.tokens), r.seeds) for r in fewer] == [(2, (0, 1, 2)), (3, (0, 2))]
    assert fewer[-1].best_loss == pytest.approx(min(moving(scale, 1_200_000) for scale in SCALES))


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


def work_off(queue: Queue, scales, law=moving, failing=()) -> list[str]:
    """Runs all there is, by a law; the names, in order."""
    ran = []
    while claims := queue.claim(2):
        for claim in claims:
            trial = claim.trial
            ran.append(trial.name)
            if trial.name in failing:
                queue.fail(claim, "it broke")
            else:
                queue.finish(claim, record_of(trial, scales.get(trial.teacher, 1), law))
    assert queue.unfinished() == 0
    return ran


def test_a_queue_ends_what_a_race_stops_and_a_rebuilt_one_decides_the_same(tmp_path):
    made = family(seeds=[0, 1])
    trials = trials_of(made)
    scales = {name: model.scale for name, model in made.models.items()}
    queue = Queue(tmp_path)
    queue.add(trials)
    ran = work_off(queue, scales)
    found = states(queue)
    stopped = {name for name, state in found.items() if state == "pruned"}
    assert stopped
    assert stopped.isdisjoint(ran)
    assert len(ran) + len(stopped) == len(trials)
    assert set(found.values()) == {"complete", "pruned"}
    queue.raise_failures()
    assert queue.reclaim() == []
    why = {row.user_attrs["name"]: row.user_attrs.get("stopped") for row in queue.rows()}
    assert all((why[name] is not None) == (name in stopped) for name in found)
    queue.close()
    (tmp_path / "study.db").unlink()
    again = Queue(tmp_path)
    again.add(trials)
    assert states(again) == found
    assert again.unfinished() == 0
    assert {row.user_attrs["name"]: row.user_attrs.get("stopped") for row in again.rows()} == why


def test_half_way_a_rebuilt_queue_goes_on_as_the_first_would_have(tmp_path):
    made = family()
    trials, scales = trials_of(made), {name: model.scale for name, model in made.models.items()}
    whole = Queue(tmp_path / "whole")
    whole.add(trials)
    work_off(whole, scales)
    lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "records.jsonl").write_text("".join(lines[: len(lines) - 2]))
    half = Queue(tmp_path / "half")
    half.add(trials)
    work_off(half, scales)
    assert states(half) == states(whole)


def test_without_the_race_what_was_stopped_is_run(tmp_path):
    made = family()
    trials, scales = trials_of(made), {name: model.scale for name, model in made.models.items()}
    queue = Queue(tmp_path)
    queue.add(trials)
    before = work_off(queue, scales)
    queue.add(trials)  # the same race again: nothing is opened
    assert queue.unfinished() == 0
    full = trials_of(family(grids=[{}]))
    queue.add(full)
    assert sorted(before + work_off(queue, scales)) == sorted(trial.name for trial in full)
    assert set(states(queue).values()) == {"complete"}


def test_trials_that_wait_are_stopped_once_their_grid_is_raced_and_the_reverse(tmp_path):
    made = family(grids=[{}])
    scales = {name: model.scale for name, model in made.models.items()}
    queue = Queue(tmp_path)
    queue.add(trials_of(made))
    queue.add(trials_of(family()))
    work_off(queue, scales)
    assert "pruned" in states(queue).values()
    other = Queue(tmp_path / "other")
    other.add(trials_of(family()))
    other.add(trials_of(made))
    work_off(other, scales)
    assert set(states(other).values()) == {"complete"}


def test_a_failed_run_stops_its_teacher_until_it_is_tried_again(tmp_path):
    made = family(grids=[{"race": {"share": 1.0, "tolerance": 1.0}}])  # nobody is stopped for the forecast
    trials, scales = trials_of(made), {name: model.scale for name, model in made.models.items()}
    failing = next(t for t in trials if t.kind == "distill")
    queue = Queue(tmp_path)
    queue.add(trials)
    work_off(queue, scales, failing={failing.name})
    found = states(queue)
    assert [name for name, state in found.items() if state == "fail"] == [failing.name]
    later = {t.name for t in trials if t.teacher == failing.teacher and t.kind == "distill"} - {failing.name}
    assert {name for name, state in found.items() if state == "pruned"} == later
    with pytest.raises(StudyError, match="1 trials failed"):
        queue.raise_failures()
    assert queue.reclaim() == [failing.name]
    assert work_off(queue, scales)[0] == failing.name
    assert set(states(queue).values()) == {"complete"}


def test_a_small_study_is_raced_and_then_run_in_full(tmp_path):
    some = {**RACED, "nano": {**NANO, "members": NANO["members"][:4]}, "tokens": ["0.3x", "1x"]}
    spec = study(**some, grids=[{"race": True}])
    records = run_study(spec, tmp_path, quiet=True)
    names = {trial.name for trial in trials_of(Family(spec))}
    assert {record.run for record in records} < names
    status = study_status(tmp_path)
    assert status.counts == {"complete": len(records), "stopped early": len(names) - len(records)}
    longest = max(record.tokens for record in records)
    assert any(record.tokens == longest for record in records if record.kind == "distill")
    told = capgap_here("study", "status", str(tmp_path), cwd=tmp_path).stdout
    assert "nats above that of t" in told or "over 40 %" in told
    assert "stopped early" in told
    full = run_study(study(**some), tmp_path, quiet=True)
    assert {record.run for record in full} == names
    # What the race decided on its own is what the replay of the full grid decides.
    one = replay(full)[-1]
    ran = {(record.teacher, record.tokens) for record in records if record.kind == "distill"}
    assert {(teacher, t) for t, heat in zip(one.tokens, one.heats, strict=True) for teacher in heat} == ran
    told = capgap_here("study", "race", str(tmp_path), cwd=tmp_path).stdout
    assert f"{100 * one.share:.1f} % of its FLOPs" in told


def test_the_benchmark_replays_a_file(tmp_path):
    for record in grid(SCALES, moving):
        files.append(tmp_path / "records.jsonl", record)
    script = Path(__file__).parents[2] / "benchmarks" / "race_replay.py"
    command = [sys.executable, script, tmp_path / "records.jsonl", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 of 2 within 0.5 % of the full grid's best" in done.stdout
    assert '"above"' in (tmp_path / "out.json").read_text()

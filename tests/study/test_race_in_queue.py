"""Races in a queue, and on a real small study."""

import pytest

from capgap.errors import StudyError
from capgap.study import Family, Queue, replay, run_study, study_status, trials_of
from shell import capgap_here
from study.raced import NANO, RACED, family, moving, record_of
from study.small import states, study


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
    assert "nats above that of t" in told or "too little is left for it" in told
    assert "stopped early" in told
    full = run_study(study(**some), tmp_path, quiet=True)
    assert {record.run for record in full} == names
    # What the race decided on its own is what the replay of the full grid decides.
    one = replay(full)[-1]
    ran = {(record.teacher, record.tokens) for record in records if record.kind == "distill"}
    assert {(teacher, t) for t, heat in zip(one.tokens, one.heats, strict=True) for teacher in heat} == ran
    told = capgap_here("study", "race", str(tmp_path), cwd=tmp_path).stdout
    assert f"{100 * one.share:.1f} % of its FLOPs" in told

"""A study on the standard library: its trials, and that it goes on after its processes were killed."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
from optuna.trial import TrialState

from capgap.demo import demo_spec, pick_teacher, run_demo
from capgap.errors import StudyError, TrainingError
from capgap.study import Queue, Roles, StudySpec, read_records, run_study, study_status, trials_of, worker

TOKENS = 20_000


def small(**more):
    spec = demo_spec(full=False, tokens=TOKENS)
    nano = spec.nano.model_copy(update={"members": spec.nano.members[:2]})
    return spec.model_copy(update={"nano": nano, "students": spec.students[:1], **more})


def test_the_grid_holds_each_student_by_each_larger_member_after_what_it_needs():
    trials = trials_of(demo_spec(full=False))
    kinds = Counter(trial.kind for trial in trials)
    assert kinds == {"pretrain": 4, "distill": 8}
    seen = set()
    for trial in trials:
        assert set(trial.needs) <= seen
        seen.add(trial.name)


def test_all_students_are_repaired_or_none():
    fields = demo_spec(full=False).model_dump() | {"prune": {"repair": "auto"}}
    assert StudySpec.model_validate(fields).prune.repair == "none"
    assert StudySpec.model_validate(fields | {"prune": {"repair": "all"}}).prune.repair == "all"


def test_a_claimed_trial_is_claimed_once_and_goes_back_when_its_worker_is_dead(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials_of(small()))
    [first], [second] = queue.claim(), queue.claim()
    assert first[1].name != second[1].name
    assert queue.claim() == []  # the students wait for their teachers
    assert queue.reclaim() == []  # this process lives
    queue._storage.set_trial_user_attr(first[0], "worker", {"host": os.uname().nodename, "pid": 2**22, "started": 0})
    assert queue.reclaim() == [first[1].name]
    [again] = queue.claim()
    assert again[1].name == first[1].name


def test_only_what_still_runs_is_handed_back(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials_of(small()))
    [(one, _)], [(other, trial)] = queue.claim(), queue.claim()
    queue._storage.set_trial_state_values(one, TrialState.COMPLETE, [1.0])
    queue.hand_back([one, other])
    assert [again.name for _, again in queue.claim()] == [trial.name]


def test_a_failed_trial_fails_what_needs_it_and_is_retried_next_time(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials_of(small()))
    [(number, trial)] = queue.claim()
    queue.fail(number, "it broke")
    with pytest.raises(StudyError, match="it broke"):
        queue.raise_failures()
    assert trial.name in queue.reclaim()
    queue.raise_failures()


def test_a_killed_worker_that_nobody_reaps_is_dead(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials_of(small()))
    [(number, trial)] = queue.claim()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(process.pid).create_time()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": started}
    queue._storage.set_trial_user_attr(number, "worker", owner)
    assert queue.reclaim() == []
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    [again] = queue.claim()
    process.wait()
    assert again[1].name == trial.name


def finish_the_family(queue: Queue, count: int) -> None:
    for _ in range(count):
        [(number, _)] = queue.claim(8)
        queue._storage.set_trial_state_values(number, TrialState.COMPLETE, [1.0])


def test_students_of_one_teacher_and_seed_are_claimed_together(tmp_path):
    spec = demo_spec(full=False, tokens=TOKENS).model_copy(update={"seeds": [0, 1]})
    queue = Queue(tmp_path)
    queue.add(trials_of(spec))
    finish_the_family(queue, len(spec.nano.members))
    claims = []
    while claimed := [trial for _, trial in queue.claim(2)]:
        claims.append(claimed)
    assert len(claims) == 2 * len(spec.nano.members)
    for one, other in claims:
        assert (one.teacher, one.seed) == (other.teacher, other.seed)
        assert one.student != other.student


@pytest.mark.slow
def test_students_side_by_side_come_out_as_each_does_alone(tmp_path):
    spec = small(students=demo_spec(full=False).students[:2])
    expected = {r.run: r.loss for r in run_study(spec, tmp_path / "alone", quiet=True)}
    beside = spec.model_copy(update={"side_by_side": 2})
    found = {r.run: r.loss for r in run_study(beside, tmp_path / "beside", quiet=True)}
    assert found == expected
    assert sum("-by-t105k-" in name for name in found) == 2


def test_of_students_side_by_side_the_one_that_fails_fails_alone(tmp_path, monkeypatch):
    spec = small(students=demo_spec(full=False).students[:2], side_by_side=2)
    run_study(spec.model_copy(update={"grid_students": 0}), tmp_path, quiet=True)
    whole = worker.run_trials

    def broken(spec, trials, corpus, folder):
        if any(trial.student == 1 for trial in trials):
            raise TrainingError("it broke")
        return whole(spec, trials, corpus, folder)

    monkeypatch.setattr(worker, "run_trials", broken)
    queue = Queue(tmp_path)
    queue.add(trials_of(spec))
    worker.work_through(spec, tmp_path, quiet=True)
    states = {row.user_attrs["name"]: row.state for row in queue.rows()}
    assert all((state == TrialState.FAIL) == name.startswith("s37k") for name, state in states.items())
    assert any(state == TrialState.FAIL for state in states.values())


def test_roles_name_members_of_the_family():
    with pytest.raises(StudyError, match=r"roles\.0\.teacher = 't9'.*it has t58k, t105k"):
        trials_of(small(roles=[Roles(student=0, teacher="t9")]))


def _study(folder):
    run_study(small(), folder, workers=2, quiet=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_every_trial_is_recorded_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    for seconds in (9, 14):
        parent = context.Process(target=_study, args=(tmp_path,))
        parent.start()
        time.sleep(seconds)
        family = (
            [parent.pid, *(child.pid for child in psutil.Process(parent.pid).children(recursive=True))]
            if parent.is_alive()
            else []
        )
        for pid in family:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        parent.join()
    records = run_study(small(), tmp_path, workers=2, quiet=True)
    names = {trial.name for trial in trials_of(small())}
    assert Counter(r.run for r in records) == Counter(names)
    assert all(state == "complete" for _, state, _ in study_status(tmp_path).trials)
    again = run_study(small(), tmp_path, workers=2, quiet=True)
    assert (
        [r.model_dump() for r in again]
        == [r.model_dump() for r in records]
        == [r.model_dump() for r in read_records(tmp_path)]
    )
    other = small().model_copy(update={"distill": small().distill.model_copy(update={"lr": 1.0})})
    with pytest.raises(StudyError, match="another folder"):
        run_study(other, tmp_path)


def test_the_pick_is_a_member_larger_than_the_student():
    name, why = pick_teacher(None, 30_000, {"small": 20_000, "near": 60_000, "far": 500_000})
    assert name == "near"
    assert "published law" in why


def test_the_demo_ends_with_a_report_that_names_every_run(tmp_path):
    result = run_demo(tmp_path, tokens=5_000)
    page = result.report.page.read_text()
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) >= 15
    assert all(record["student"] in page for record in records)
    assert any("from scratch" in line for line in result.findings)

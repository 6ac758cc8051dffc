"""Studies run, stopped, killed and gone on with; students side by side; trials under torchrun."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter

import psutil
import pytest

from capgap.demo import demo_spec, pick_teacher, run_demo
from capgap.errors import StudyError, TrainingError
from capgap.progress import sharing_the_screen
from capgap.study import (
    Family,
    Queue,
    StudyStopped,
    Way,
    create_study,
    read_records,
    run_study,
    study_status,
    trials_of,
    worker,
)
from capgap.study.storage import uninterrupted
from shell import capgap, capgap_here
from study.small import states, study

WSD = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k", "evaluations": 1}


def losses(records):
    return {record.run: record.loss for record in records}


def test_a_study_is_run_once_and_its_records_tell_all(tmp_path):
    spec = study(tokens=["0.3x", "1x"], distill=WSD)
    records = run_study(spec, tmp_path, quiet=True)
    assert Counter(r.run for r in records) == Counter(trial.name for trial in trials_of(Family(spec)))
    long, short = (next(r for r in records if r.teacher == "t60.7k" and t in r.run) for t in ("-14.8k-", "-4.61k-"))
    assert (short.tokens_taken_over, long.tokens_taken_over) == (0, 7 * 512)
    assert long.flops_spent == pytest.approx(long.flops * 22 / 29)
    assert long.loss < short.loss
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    again = run_study(spec, tmp_path, quiet=True)
    assert again == records == read_records(tmp_path)
    assert study_status(tmp_path).counts == {"complete": len(records)}


def test_more_trials_may_join_but_what_numbers_rest_on_may_not_change(tmp_path):
    create_study(study(), tmp_path)
    assert len(create_study(study(seeds=[0, 1]), tmp_path)) == 6
    assert study_status(tmp_path).counts == {"waiting": 6}
    with pytest.raises(StudyError, match=r"holds a study with other settings \(prune\); give another folder"):
        create_study(study(prune={"calibration_tokens": 1024}), tmp_path)
    with pytest.raises(StudyError, match="students may be added after those it has"):
        create_study(study(students=[{"scale": "20k"}, {"scale": "15k"}]), tmp_path)
    with pytest.raises(StudyError, match="its queue is in the folder itself; leave out --storage"):
        create_study(study(), tmp_path, Way(storage="postgresql://somewhere/x"))
    (tmp_path / "study.json").write_text('{"fixed": {}}')
    with pytest.raises(StudyError, match=r"study\.json: of an older version"):
        study_status(tmp_path)


def test_a_study_whose_storage_cannot_be_opened_is_not_made(tmp_path):
    with pytest.raises(StudyError, match="give postgresql://"):
        create_study(study(), tmp_path, Way(storage="sqlite:///somewhere"))
    # What was advised works.
    assert len(create_study(study(), tmp_path)) == 4


def _create(folder, barrier):
    barrier.wait()
    create_study(study(), folder)


def test_many_may_start_a_study_at_one_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    pool = [context.Process(target=_create, args=(tmp_path, barrier)) for _ in range(4)]
    for process in pool:
        process.start()
    for process in pool:
        process.join(120)
    assert [process.exitcode for process in pool] == [0] * 4
    assert study_status(tmp_path).counts == {"waiting": 4}


def test_a_request_to_stop_waits_for_the_end_of_what_must_not_be_cut():
    """Also where another thread of the process is the one that the system hands the signal to."""
    # What a shell starts in the background, and tests may be, is deaf to SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done, ended = [], threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()

    def work():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(50):
                time.sleep(0.002)
            done.append("whole")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert done == ["whole"]


def test_signs_of_life_must_come_often_enough():
    with pytest.raises(StudyError, match="grace = 20 s must be at least twice the heartbeat of 30 s"):
        Way(grace=20)


def test_runs_of_a_study_that_go_on_from_others_end_as_they_would_alone(tmp_path):
    spec = study(tokens=["0.3x", "1x"], distill=WSD)
    chained = losses(run_study(spec, tmp_path / "chained", quiet=True))
    alone = losses(run_study(study(tokens=["1x"], distill=WSD), tmp_path / "alone", quiet=True))
    assert {name: chained[name] for name in alone} == alone


def test_students_side_by_side_come_out_as_each_does_alone(tmp_path):
    two = {"students": [{"scale": "15k"}, {"scale": "20k"}], "tokens": ["0.3x", "1x"], "distill": WSD}
    expected = losses(run_study(study(**two), tmp_path / "alone", quiet=True))
    assert losses(run_study(study(**two, side_by_side=2), tmp_path / "beside", quiet=True)) == expected


def test_of_students_side_by_side_the_one_that_fails_fails_alone(tmp_path, monkeypatch):
    spec = study(students=[{"scale": "15k"}, {"scale": "20k"}], side_by_side=2, retries=0)
    whole = worker.run_trials

    def broken(family, trials, corpus, folder, *, quiet):
        if any(trial.student == 1 for trial in trials):
            raise TrainingError("it broke")
        return whole(family, trials, corpus, folder, quiet=quiet)

    monkeypatch.setattr(worker, "run_trials", broken)
    with pytest.raises(StudyError, match=r"2 trials failed; the others are done(.|\n)*it broke"):
        run_study(spec, tmp_path, quiet=True)
    found = states(Queue(tmp_path))
    assert all((state == "fail") == name.startswith("s20k") for name, state in found.items())


def test_a_failure_that_passes_is_tried_again(tmp_path, monkeypatch):
    whole, calls = worker.run_trials, []

    def broken_once(family, trials, corpus, folder, *, quiet):
        calls.append(trials[0].name)
        if len(calls) == 1:
            raise KeyError("it broke")  # whatever it is
        return whole(family, trials, corpus, folder, quiet=quiet)

    monkeypatch.setattr(worker, "run_trials", broken_once)
    assert len(run_study(study(retries=1), tmp_path, quiet=True)) == 4
    assert Counter(calls)["t60.7k"] == 2


def test_asked_to_stop_it_hands_its_trials_back(tmp_path, monkeypatch):
    def stopping(*_, quiet):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    whole = worker.run_trials
    monkeypatch.setattr(worker, "run_trials", stopping)
    with pytest.raises(StudyStopped, match="goes on from here"):
        run_study(study(), tmp_path, quiet=True)
    assert set(states(Queue(tmp_path)).values()) == {"waiting"}
    monkeypatch.setattr(worker, "run_trials", whole)
    assert len(run_study(study(), tmp_path, quiet=True)) == 4


def test_a_worker_says_how_far_its_trials_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "sharing_the_screen", lambda: sharing_the_screen(every=0.0))
    spec = study(students=[{"scale": "15k"}, {"scale": "20k"}], side_by_side=2)
    records = run_study(spec, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    pretrained = next(r for r in records if r.kind == "pretrain").run
    assert any(line.startswith(f"{pretrained}: ") and "% CE " in line for line in lines)
    assert any(line.startswith("s") and " and 1 more: " in line and " KL " in line for line in lines)
    assert sum(line.startswith("[") and line.endswith(" s") for line in lines) == len(records)
    run_study(study(students=[{"scale": "15k"}, {"scale": "20k"}, {"scale": "17k"}]), tmp_path, quiet=True)
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_trial_may_be_two_processes_under_torchrun(tmp_path):
    more = {"tokens": ["0.3x", "1x"], "distill": WSD, "grids": [{"teachers": ["t30.2k"]}]}
    expected = losses(run_study(study(**more), tmp_path / "one", quiet=True))
    found = losses(run_study(study(**more), tmp_path / "two", way=Way(processes=2), quiet=True))
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_what_fails_under_torchrun_is_told(tmp_path):
    distill = {"tokens_per_step": 512, "tokens": 5120, "lr": 1e30, "max_skipped": 0}
    spec = study(distill=distill, retries=0, grids=[{"teachers": ["t30.2k"]}])
    with pytest.raises(StudyError, match=r"torchrun ended with status 1: step .* not finite"):
        run_study(spec, tmp_path, way=Way(processes=2), quiet=True)


def test_the_commands(tmp_path):
    (tmp_path / "study.yaml").write_text(json.dumps(study().model_dump(mode="json", exclude_defaults=True)))
    folder = tmp_path / "study"
    cost = capgap_here("study", "create", "study.yaml", "--output", "study", "--dry-run", cwd=tmp_path)
    assert "trials: 4 (2 to pretrain, 2 to distill)" in cost.stdout
    assert "hours: about" in cost.stdout
    assert not folder.exists()
    made = capgap_here("study", "create", "study.yaml", "seeds=[0,1]", "--output", "study", cwd=tmp_path)
    assert "6 trials" in made.stdout
    assert "6 waiting" in capgap_here("study", "status", "study", cwd=tmp_path).stdout
    assert "6 records" in capgap("study", "run", "study", "--workers", "2", cwd=tmp_path).stdout
    assert "6 complete" in capgap_here("study", "status", "study", cwd=tmp_path).stdout
    assert "6 records" in capgap_here("study", "resume", "study", cwd=tmp_path).stdout
    assert "6 rows" in capgap_here("study", "export", "study", "--output", "out.parquet", cwd=tmp_path).stdout
    assert (tmp_path / "out.parquet").is_file()
    page = capgap_here("study", "report", "study", cwd=tmp_path).stdout.strip()
    assert page.endswith("report.html")
    assert (tmp_path / page).is_file()


def _study(folder):
    run_study(study(distill={"tokens_per_step": 512, "tokens": 50_000, "checkpoint_every": 0.1}), folder, workers=2)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_every_trial_is_recorded_once(tmp_path):
    spec = study(distill={"tokens_per_step": 512, "tokens": 50_000, "checkpoint_every": 0.1})
    context = multiprocessing.get_context("spawn")
    for seconds in (9, 14):
        parent = context.Process(target=_study, args=(tmp_path,))
        parent.start()
        time.sleep(seconds)
        if parent.is_alive():
            children = psutil.Process(parent.pid).children(recursive=True)
            for pid in (parent.pid, *(child.pid for child in children)):
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
        parent.join()
    records = run_study(spec, tmp_path, workers=2, quiet=True)
    assert Counter(r.run for r in records) == Counter(t.name for t in trials_of(Family(spec)))
    assert study_status(tmp_path).counts == {"complete": len(records)}


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
    assert demo_spec(full=False).nano is not None

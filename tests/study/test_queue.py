"""The queue: claims, hand-overs, heartbeats, retries; on SQLite, and on a real PostgreSQL where there is one."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
from optuna.trial import TrialState

from capgap.errors import StudyError
from capgap.records import RunRecord
from capgap.study import Claim, Family, Queue, StudyStopped, trials_of
from capgap.study.owner import host
from capgap.study.queue import DEATHS
from capgap.study.worker import asked_to_stop
from study.small import states, study


def trials(**more):
    return trials_of(Family(study(**more)))


def record(run: str, loss: float = 1.0) -> RunRecord:
    more = {"bits_per_byte": 1, "flops": 1, "seconds": 1, "device": "", "recipe": {}, "versions": {}}
    hashes = {"recipe_hash": "", "data_hash": ""}
    return RunRecord(
        run=run, kind="pretrain", student="s", student_scale=1, tokens=1, seed=0, loss=loss, **more, **hashes
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def queue(request, tmp_path):
    url = request.getfixturevalue("postgresql").url if request.param == "postgresql" else None
    made = Queue(tmp_path, url, retries=1, heartbeat=1, grace=2, name=f"study-{tmp_path.name}")
    made.add(trials())
    yield made
    made.close()


def owned_by(queue: Queue, claim: Claim, **owner) -> None:
    queue._rdb.set_trial_user_attr(claim.number, "worker", {**owner, "token": claim.token})


def test_a_claimed_trial_is_claimed_once_and_goes_on_elsewhere_when_its_worker_is_dead(queue):
    [first], [second] = queue.claim(), queue.claim()
    assert first.trial.name != second.trial.name
    assert queue.claim() == []  # the students wait for their teachers
    owned_by(queue, first, host=host(), pid=2**22, started=0)
    [again] = queue.claim()
    assert again.trial == first.trial
    assert again.number != first.number
    # Whoever was taken for dead, and was not, finishes nothing.
    assert not queue.finish(first, record(first.trial.name))
    assert queue.finish(again, record(first.trial.name))
    assert [r.run for r in queue.write_records()] == [first.trial.name]


def test_trials_are_added_once(queue):
    queue.add(trials())
    queue.add(trials(seeds=[0, 1]))
    assert len(queue.rows()) == 6


def test_many_at_once_claim_each_trial_once(queue, tmp_path):
    queue.add(trials(seeds=list(range(12))))
    for name in ("t60.7k", "t30.2k"):
        [claim] = queue.claim()
        assert claim.trial.name == name
        queue.finish(claim, record(name))
    found, url = [], str(queue._rdb.engine.url.render_as_string(hide_password=False))
    url = url.replace("+psycopg", "") if url.startswith("postgresql") else None

    def work():
        mine = Queue(tmp_path, url, name=f"study-{tmp_path.name}")
        while claims := mine.claim():
            found.append(claims[0].trial.name)
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(set(found)) == 24


def test_a_worker_elsewhere_that_gives_no_sign_of_life_loses_its_trial(queue):
    [lost], [kept] = queue.claim(), queue.claim()
    for claim in (lost, kept):
        owned_by(queue, claim, host="another", pid=1, started=0)
    with queue.alive([lost, kept]):
        time.sleep(4)
        assert queue.claim() == []
    with queue.alive([kept]) as heart:
        deadline = time.monotonic() + 30
        while not (again := queue.claim()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert again[0].trial == lost.trial
    assert not heart.lost
    assert not queue.finish(lost, record(lost.trial.name))
    assert queue.finish(kept, record(kept.trial.name))


def test_a_worker_is_not_interrupted_by_a_failure_of_its_own(queue):
    [claim] = queue.claim()
    with queue.alive([claim]) as heart:
        heart.release(claim.number)
        queue.fail(claim, "it broke")
        time.sleep(2.5)
    assert not heart.lost


def test_what_was_handed_back_and_claimed_by_another_is_the_others(queue):
    [before] = queue.claim()
    queue.hand_back([before])
    now = next(claim for claim in (queue.claim()[0], queue.claim()[0]) if claim.trial == before.trial)
    assert now.number == before.number
    queue.hand_back([before])  # as when the answer to the first was lost
    assert states(queue)[now.trial.name] == "running"
    assert not queue.finish(before, record(before.trial.name))
    assert queue.finish(now, record(now.trial.name))


def test_a_trial_over_which_a_worker_died_is_claimed_alone(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials(students=[{"scale": "15k"}, {"scale": "20k"}]))
    for _ in range(2):
        [claim] = queue.claim()
        queue.finish(claim, record(claim.trial.name))
    both = queue.claim(2)
    assert len(both) == 2
    for claim in both:
        owned_by(queue, claim, host=host(), pid=2**22, started=0)
    assert [len(queue.claim(2)) for _ in range(3)] == [1, 1, 2]


def test_one_name_is_one_trial(queue):
    changed = [t.model_copy(update={"tokens": 512}) for t in trials()]
    with pytest.raises(StudyError, match=r"t60\.7k is in the study already, with other settings"):
        queue.add(changed)


def test_a_name_in_a_database_is_one_folders(postgresql, tmp_path):
    Queue(tmp_path / "a", postgresql.url, name="same", identity="one").close()
    Queue(tmp_path / "a", postgresql.url, name="same", identity="one").close()
    with pytest.raises(StudyError, match=r"the database has another study called same, not that of .*b"):
        Queue(tmp_path / "b", postgresql.url, name="same", identity="two")


def test_a_worker_that_lost_its_trial_is_interrupted(queue):
    [claim] = queue.claim()
    heart = queue.alive([claim])
    queue._rdb.set_trial_state_values(claim.number, TrialState.FAIL)
    with pytest.raises(StudyStopped), asked_to_stop(), heart:
        time.sleep(30)
    assert heart.lost


def test_only_what_still_runs_is_handed_back(queue):
    [one], [other] = queue.claim(), queue.claim()
    queue.finish(one, record(one.trial.name))
    queue.hand_back([one, other])
    assert [again.trial for again in queue.claim()] == [other.trial]


def test_a_failed_trial_is_tried_again_and_then_fails_what_needs_it(queue):
    [claim] = queue.claim()
    queue.fail(claim, "it broke")
    assert states(queue)[claim.trial.name] == "waiting"
    claim = next(c for c in (queue.claim()[0], queue.claim()[0]) if c.trial == claim.trial)
    queue.fail(claim, "it broke again")
    found = states(queue)
    assert found[claim.trial.name] == "fail"
    assert [name for name, state in found.items() if state == "fail"] == [
        claim.trial.name,
        *(t.name for t in trials() if claim.trial.name in t.needs),
    ]
    with pytest.raises(StudyError, match=r"2 trials failed(.|\n)*it broke again(.|\n)*needs t60\.7k"):
        queue.raise_failures()
    assert claim.trial.name in queue.reclaim()
    assert "fail" not in states(queue).values()


def test_what_kills_every_worker_is_given_up(queue):
    for _ in range(DEATHS + 1):
        claim = queue.claim()[0]
        if claim.trial.name != "t60.7k":
            queue.finish(claim, record(claim.trial.name))
            claim = queue.claim()[0]
        assert claim.trial.name == "t60.7k"
        owned_by(queue, claim, host=host(), pid=2**22, started=0)
    while claims := queue.claim():
        assert claims[0].trial.name != "t60.7k"
        queue.finish(claims[0], record(claims[0].trial.name))
    with pytest.raises(StudyError, match=f"{DEATHS + 1} workers died over it"):
        queue.raise_failures()


def test_a_record_that_a_kill_kept_from_the_file_is_written_later(queue, tmp_path):
    [one] = queue.claim()
    queue.finish(one, record(one.trial.name))
    (tmp_path / "records.jsonl").unlink()
    [other] = queue.claim()
    queue.finish(other, record(other.trial.name, 2.0))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"run":"cut')
    whole = tmp_path / "records.jsonl"
    assert [r.run for r in queue.write_records()] == [other.trial.name, one.trial.name]
    whole.write_bytes(whole.read_bytes()[:-1])  # killed before the end of the line
    assert [r.loss for r in queue.write_records()] == [2.0, 1.0]
    assert queue.finish(one, record(one.trial.name))  # as when the answer to the first was lost
    assert len(queue.write_records()) == 2


def test_a_study_whose_queue_was_lost_goes_on_from_its_records(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials())
    [claim] = queue.claim()
    queue.finish(claim, record(claim.trial.name, 3.0))
    queue.close()
    (tmp_path / "study.db").unlink()
    queue = Queue(tmp_path)
    queue.add(trials())
    assert states(queue) == {t.name: "complete" if t.name == "t60.7k" else "waiting" for t in trials()}
    assert [r.loss for r in queue.write_records()] == [3.0]
    [other] = queue.claim()
    assert other.trial.name == "t30.2k"


def test_a_killed_worker_that_nobody_reaps_is_dead(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials())
    [claim] = queue.claim()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owned_by(queue, claim, host=host(), pid=process.pid, started=psutil.Process(process.pid).create_time())
    assert claim.trial not in [c.trial for c in queue.claim()]
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    [again] = queue.claim()
    process.wait()
    assert again.trial == claim.trial


def test_students_of_one_teacher_and_seed_are_claimed_together(tmp_path):
    queue = Queue(tmp_path)
    queue.add(trials(students=[{"scale": "15k"}, {"scale": "20k"}], seeds=[0, 1]))
    for _ in range(2):
        [claim] = queue.claim(8)
        queue.finish(claim, record(claim.trial.name))
    claims = []
    while claimed := [claim.trial for claim in queue.claim(2)]:
        claims.append(claimed)
    assert len(claims) == 4
    for one, other in claims:
        assert (one.teacher, one.seed) == (other.teacher, other.seed)
        assert one.student != other.student


def test_a_longer_run_waits_for_its_trunk_even_if_that_fails(tmp_path):
    queue = Queue(tmp_path)
    distill = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k"}
    queue.add(trials(tokens=["1x", "2x"], distill=distill, grids=[{"teachers": ["t60.7k"]}]))
    for _ in range(2):
        [claim] = queue.claim()
        queue.finish(claim, record(claim.trial.name))
    [short] = queue.claim()
    assert queue.claim() == []
    queue.fail(short, "it broke")
    [long] = queue.claim()
    assert long.trial.trunk == short.trial.name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://somewhere/x", r"give postgresql://user@host/database"),
        ("postgresql://user:secret@127.0.0.1:1/x", r"postgresql://user:\*\*\*@127\.0\.0\.1:1/x does not answer"),
    ],
)
def test_a_storage_that_is_none_is_refused_without_its_password(tmp_path, url, message):
    with pytest.raises(StudyError, match=message) as refused:
        Queue(tmp_path, url)
    assert "secret" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}

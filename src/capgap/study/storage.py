"""The study's queue of trials, kept by Optuna in an SQLite file: claimed one by one, handed back after a kill."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from capgap import records
from capgap.errors import StudyError
from capgap.records import RunRecord
from capgap.study.grid import Trial

_RECORDS = "records.jsonl"
_WAITING, _RUNNING = TrialState.WAITING, TrialState.RUNNING


class Queue:
    """Trials of one study folder, shared by all processes of this machine.

    SQLite does not lock the row that is claimed, so a file lock does.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._lock = FileLock(folder / ".lock")
        self._records = folder / _RECORDS
        with self._lock:
            self._storage = optuna.storages.RDBStorage(
                f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 120}}
            )
            self._study = optuna.create_study(storage=self._storage, study_name="capgap", load_if_exists=True)

    def add(self, trials: list[Trial]) -> None:
        """Adds the trials that are not there yet."""
        with self._lock:
            known = {row.user_attrs["name"] for row in self._all()}
            for trial in trials:
                if trial.name not in known:
                    self._study.enqueue_trial({}, user_attrs={"name": trial.name, "trial": trial.model_dump_json()})

    def claim(self, most: int = 1) -> list[tuple[int, Trial]]:
        """Claims the first trial whose needs are done, and such others as can be trained beside it.

        The trials of workers that died meanwhile wait again first.

        Args:
            most: how many trials of one teacher and seed to claim.
        Returns: each trial's number in the storage, and the trial; nothing if there is none just now.
        """
        with self._lock:
            self._hand_back_of_the_dead()
            rows = self._all()
            done = {r.user_attrs["name"] for r in rows if r.state == TrialState.COMPLETE}
            claimed: list[tuple[int, Trial]] = []
            for row in rows:
                trial = _trial(row)
                if row.state != _WAITING or not set(trial.needs) <= done:
                    continue
                if claimed and not _same_teacher(trial, claimed[0][1]):
                    continue
                # The owner first: a kill between the two leaves a trial that waits, not one that nobody runs.
                self._storage.set_trial_user_attr(row._trial_id, "worker", _me())
                if self._storage.set_trial_state_values(row._trial_id, _RUNNING):
                    claimed.append((row._trial_id, trial))
                if len(claimed) == most:
                    break
        return claimed

    def finish(self, number: int, record: RunRecord) -> None:
        """The trial is done: its record is written, once, and its held-out loss is its value."""
        with self._lock:
            if record.run not in {r.run for r in self.records()}:
                records.append(self._records, record)
            self._storage.set_trial_state_values(number, TrialState.COMPLETE, [record.loss])

    def records(self) -> list[RunRecord]:
        """The records of the finished trials, in the order in which they were finished."""
        return read_records(self._records.parent)

    def fail(self, number: int, reason: str) -> None:
        """The trial failed; those that need it, directly or not, are failed with it."""
        with self._lock:
            self._fail(number, reason)
            rows = self._all()
            failed = {_trial(row).name for row in rows if row.state == TrialState.FAIL}
            for row in rows:  # each trial stands after what it needs
                trial = _trial(row)
                if row.state == _WAITING and failed.intersection(trial.needs):
                    self._fail(row._trial_id, f"needs {', '.join(sorted(failed.intersection(trial.needs)))}")
                    failed.add(trial.name)

    def _fail(self, number: int, reason: str) -> None:
        self._storage.set_trial_user_attr(number, "error", reason)
        self._storage.set_trial_state_values(number, TrialState.FAIL)

    def hand_back(self, numbers: Iterable[int]) -> None:
        """Those of the trials that still run wait again; their checkpoints stay."""
        with self._lock:
            for number in numbers:
                if self._storage.get_trial(number).state == _RUNNING:
                    self._storage.set_trial_state_values(number, _WAITING)

    def reclaim(self) -> list[str]:
        """Hands back the trials of this machine's dead workers, and failed ones for another try; their names."""
        with self._lock:
            back = self._hand_back_of_the_dead()
            for row in self.rows():
                if row.state == TrialState.FAIL:
                    self._study.enqueue_trial({}, user_attrs={k: row.user_attrs[k] for k in ("name", "trial")})
                    back.append(row.user_attrs["name"])
            return back

    def _hand_back_of_the_dead(self) -> list[str]:
        dead = [row for row in self._all() if row.state == _RUNNING and not _alive(row.user_attrs.get("worker"))]
        for row in dead:
            self._storage.set_trial_state_values(row._trial_id, _WAITING)
        return [row.user_attrs["name"] for row in dead]

    def rows(self) -> list[FrozenTrial]:
        """The trials as Optuna keeps them; of one that was tried again, the last try."""
        return list({row.user_attrs["name"]: row for row in self._all()}.values())

    def unfinished(self) -> int:
        """How many trials wait or run."""
        return sum(row.state in (_WAITING, _RUNNING) for row in self.rows())

    def raise_failures(self) -> None:
        """Raises StudyError with every failed trial and its reason, if any failed."""
        failed = [row for row in self.rows() if row.state == TrialState.FAIL]
        if failed:
            lines = [f"{row.user_attrs['name']}: {row.user_attrs.get('error', 'unknown')}" for row in failed]
            raise StudyError(
                f"{len(failed)} trials failed; the others are done; run again to retry\n" + "\n".join(lines)
            )

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def read_records(folder: Path) -> list[RunRecord]:
    """A study's records, in the order in which its trials were finished; only reads."""
    path = folder / _RECORDS
    return records.read(path) if path.is_file() else []


def _trial(row: FrozenTrial) -> Trial:
    return Trial.model_validate_json(row.user_attrs["trial"])


def _same_teacher(one: Trial, other: Trial) -> bool:
    """Whether one pass of the teacher over one order of the text serves both trials."""
    return one.kind == "distill" and (one.kind, one.teacher, one.seed) == (other.kind, other.teacher, other.seed)


def _me() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": process.create_time()}


def _alive(worker: dict[str, Any] | None) -> bool:
    """Whether a worker lives; one of another host is taken to live, as it cannot be seen from here."""
    if worker is None:
        return False
    if worker["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(worker["pid"])
        # A killed process whose parent is gone may stay a zombie for ever, as in a container without an init.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - worker["started"]) < 1.0
    except psutil.NoSuchProcess:
        return False

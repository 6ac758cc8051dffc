"""The study's queue of trials: claimed one by one by any process of any machine, handed on when a worker dies."""

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from capgap import records
from capgap.errors import StudyError
from capgap.records import RunRecord
from capgap.study.owner import known_dead, me
from capgap.study.race import judge
from capgap.study.storage import Heart, Storage, patient, uninterrupted
from capgap.study.trials import Raced, Trial

RECORDS = "records.jsonl"
DEATHS = 20
"""Workers that may die over one trial, before it is taken to be what kills them."""
_WAITING, _RUNNING, _FAILED, _STOPPED = TrialState.WAITING, TrialState.RUNNING, TrialState.FAIL, TrialState.PRUNED


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs; `number` is that of the attempt in the storage, `token` the process's own."""

    number: int
    trial: Trial
    token: str


class Queue:
    """The trials of one study.

    Each attempt at a trial is a trial of Optuna's. An attempt that ended is never opened again: one whose worker died
    fails, and another is made. So a worker that was taken for dead can finish nothing.

    Args:
        folder: of the study, on storage that all its machines see.
        storage: a PostgreSQL URL; None for SQLite in the folder, for one machine.
        name: of the study in a database; the folder's own name by default.
        identity: that the study in the database must have, if it has one.
        retries: further attempts at a trial that failed.

    Raises: StudyError if the storage does not answer, or holds another study of this name.
    """

    def __init__(
        self,
        folder: Path,
        storage: str | None = None,
        *,
        name: str | None = None,
        identity: str | None = None,
        retries: int = 0,
        heartbeat: int = 30,
        grace: int = 120,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._records, self._retries = folder / RECORDS, retries
        called = name or (folder.resolve().name if storage else "capgap")
        self.storage = Storage(folder, storage, called, heartbeat=heartbeat, grace=grace)
        self._rdb, self._study = self.storage.rdb, self.storage.study
        if identity is not None:
            self._check_identity(identity, called, folder)

    @patient
    def _check_identity(self, identity: str, name: str, folder: Path) -> None:
        with self.storage.turn():
            there = self._study.user_attrs.get("identity")
            if there is None:
                self._study.set_user_attr("identity", identity)
            elif there != identity:
                raise StudyError(
                    f"the database has another study called {name}, not that of {folder}; give this one a name of its "
                    "own in its file, or clear the other by optuna delete-study"
                )

    @patient
    def add(self, trials: list[Trial]) -> None:
        """Adds the trials that are not there yet; those that have a record in the file are done.

        So a study goes on from its records alone, where its queue was lost or stayed on another machine. Those that a
        race stopped and that are in none now, or in another, are judged anew.
        """
        with uninterrupted(), self.storage.turn():
            rows = {_name(row): row for row in self._all()}
            known = {name: _trial(row) for name, row in rows.items()}
            found = {record.run: record for record in read_records(self._records.parent)}
            for trial in trials:
                if trial.name not in known:
                    self._enqueue({"name": trial.name, "trial": trial.model_dump_json()}, found.get(trial.name))
                elif not known[trial.name].alike(trial):
                    raise StudyError(
                        f"{trial.name} is in the study already, with other settings; give the grid that changes them a "
                        "condition of its own"
                    )
                elif known[trial.name] != trial:
                    self._change(rows[trial.name], trial)
            # What is finished keeps its trial as it was; in which race a trial of the file is now, the file says.
            raced = {trial.name: trial.race and trial.race.model_dump() for trial in trials}
            if self._study.user_attrs.get("races") != raced:
                self._study.set_user_attr("races", raced)
            self._settle_races()

    def _change(self, row: FrozenTrial, trial: Trial) -> None:
        """Other races, or another run to go on from; what is done or failed is not touched."""
        if row.state in (_WAITING, _RUNNING):
            self._rdb.set_trial_user_attr(row._trial_id, "trial", trial.model_dump_json())
        elif row.state == _STOPPED:
            self._enqueue({"name": trial.name, "trial": trial.model_dump_json()})

    def claim(self, most: int = 1) -> list[Claim]:
        """Claims the first trial whose needs are done, and such others as can be trained beside it.

        One over which a worker died is claimed alone, as it may have died for want of memory.

        Args:
            most: how many trials of one teacher and seed to claim.
        Returns: nothing, if there is none just now.
        """
        token = uuid.uuid4().hex
        try:
            return self._claim(most, token)
        except KeyboardInterrupt:  # asked to stop meanwhile: nobody would run them
            mine = [row for row in self.rows() if row.state == _RUNNING and self._is_mine(row, token)]
            self.hand_back(Claim(row._trial_id, _trial(row), token) for row in mine)
            raise

    @patient
    def _claim(self, most: int, token: str) -> list[Claim]:
        with uninterrupted(), self.storage.turn():
            held = self._settle()
            rows = self.rows()
            done = {_name(row) for row in rows if row.state == TrialState.COMPLETE}
            ended = {_name(row) for row in rows if row.state.is_finished()}
            # What an attempt to claim got that did not hear the storage's answer.
            mine = [row for row in rows if row.state == _RUNNING and self._is_mine(row, token)]
            claimed = [Claim(row._trial_id, _trial(row), token) for row in mine]
            for row in rows if not claimed else ():
                alone = bool(row.user_attrs.get("deaths"))
                if row.state != _WAITING or (alone and claimed) or _name(row) in held:
                    continue
                trial = _trial(row)
                if not set(trial.needs) <= done or not {trial.trunk} <= ended | {None}:
                    continue
                if claimed and not _same_teacher(trial, claimed[0].trial):
                    continue
                # The owner and a sign of life first: a kill in between leaves a trial that waits, not one that
                # nobody runs.
                self._rdb.set_trial_user_attr(row._trial_id, "worker", {**me(), "token": token})
                self._rdb.record_heartbeat(row._trial_id)
                if self._rdb.set_trial_state_values(row._trial_id, _RUNNING):
                    claimed.append(Claim(row._trial_id, trial, token))
                if alone or len(claimed) == most:
                    break
        return claimed

    def alive(self, claims: Sequence[Claim]) -> Heart:
        """A context that keeps the claims alive."""
        return Heart(self._rdb, [claim.number for claim in claims], self.storage.heartbeat)

    @staticmethod
    def _is_mine(row: FrozenTrial, token: str) -> bool:
        return (row.user_attrs.get("worker") or {}).get("token") == token

    @patient
    def finish(self, claim: Claim, record: RunRecord) -> bool:
        """The trial is done: its record is kept in the storage and written to the file, once.

        Returns: whether it is this attempt that counts; False if the trial was given to somebody else meanwhile.
        """
        with uninterrupted(), self.storage.turn():
            row = self._rdb.get_trial(claim.number)
            if not self._is_mine(row, claim.token):
                return False
            if row.state == _RUNNING:
                self._rdb.set_trial_user_attr(claim.number, "record", record.model_dump_json())
                self._rdb.set_trial_state_values(claim.number, TrialState.COMPLETE, [record.loss])
            elif row.state != TrialState.COMPLETE:
                return False
            if record.run not in self._written():
                records.append(self._records, record)
            self._settle_races()
            return True

    @patient
    def write_records(self) -> list[RunRecord]:
        """Writes to the file what is in the storage only, as after a kill; the records in the order of their ends."""
        with self.storage.turn():
            done = [row for row in self._all() if row.state == TrialState.COMPLETE]
            written = self._written()
            for row in sorted(done, key=lambda row: (row.datetime_complete, row.number)):
                if _name(row) not in written:
                    records.append(self._records, RunRecord.model_validate_json(row.user_attrs["record"]))
        return read_records(self._records.parent)

    @patient
    def fail(self, claim: Claim, reason: str) -> None:
        """The attempt failed. The trial is tried again if it may be, else those that need it fail with it."""
        with uninterrupted(), self.storage.turn():
            if self._is_mine(self._rdb.get_trial(claim.number), claim.token):
                self._fail(claim.number, reason)
            self._settle()

    def _fail(self, number: int, reason: str | None = None) -> None:
        try:
            if reason is not None:
                self._rdb.set_trial_user_attr(number, "error", reason)
            self._rdb.set_trial_state_values(number, _FAILED)
        except UpdateFinishedTrialError:
            return  # somebody else saw it end

    @patient
    def hand_back(self, claims: Iterable[Claim]) -> None:
        """Those of the claims that still run wait again; their checkpoints stay."""
        with uninterrupted(), self.storage.turn():
            for claim in claims:
                row = self._rdb.get_trial(claim.number)
                if row.state == _RUNNING and self._is_mine(row, claim.token):
                    self._rdb.set_trial_state_values(claim.number, _WAITING)

    @patient
    def reclaim(self) -> list[str]:
        """Has failed trials tried again, those that their workers left too; their names."""
        with self.storage.turn():
            self._settle()
            failed = [row for row in self.rows() if row.state == _FAILED]
            for row in failed:
                self._enqueue({key: row.user_attrs[key] for key in ("name", "trial")})
            return [_name(row) for row in failed]

    def _settle(self) -> set[str]:
        """Fails the attempts of dead workers, makes new ones, and fails what needs a trial that failed for good.

        Returns: names of the trials that wait for the others of their race.
        """
        if self.storage.is_settled:
            optuna.storages.fail_stale_trials(self._study)
        for row in self.rows():
            if row.state == _RUNNING and known_dead(row.user_attrs.get("worker")):
                self._fail(row._trial_id)
        for row in self.rows():
            if row.state == _FAILED and not self._is_final(row):
                self._again(row)
        rows = self.rows()
        failed = {_name(row) for row in rows if row.state == _FAILED}
        for row in rows:  # each trial stands after what it needs
            trial = _trial(row)
            if row.state == _WAITING and failed.intersection(trial.needs):
                self._rdb.set_trial_user_attr(row._trial_id, "tries", self._retries)
                self._fail(row._trial_id, f"needs {', '.join(sorted(failed.intersection(trial.needs)))}")
                failed.add(trial.name)
        return self._settle_races()

    def _settle_races(self) -> set[str]:
        """Ends what its race stops, and has wait again what it no longer stops; those that wait for others of it."""
        rows = self.rows()
        told = self._study.user_attrs.get("races", {})
        races = {name: race and Raced(**race) for name, race in told.items()}
        trials = [t.model_copy(update={"race": races.get(t.name, t.race)}) for t in map(_trial, rows)]
        if not any(trial.race for trial in trials):
            return set()
        found = {_name(row): _record(row.user_attrs["record"]) for row in rows if row.state == TrialState.COMPLETE}
        verdicts = judge(trials, found, {_name(row) for row in rows if row.state == _FAILED and self._is_final(row)})
        for row, trial in zip(rows, trials, strict=True):
            if row.state == _WAITING and trial.name in verdicts.stopped:
                self._rdb.set_trial_user_attr(row._trial_id, "stopped", verdicts.stopped[trial.name])
                self._rdb.set_trial_state_values(row._trial_id, _STOPPED)
            elif row.state == _STOPPED and trial.name not in {*verdicts.stopped, *verdicts.held}:
                self._enqueue({key: row.user_attrs[key] for key in ("name", "trial")})
        return verdicts.held

    def _is_final(self, row: FrozenTrial) -> bool:
        return "error" in row.user_attrs and row.user_attrs.get("tries", 0) >= self._retries

    def _again(self, row: FrozenTrial) -> None:
        """Another attempt at a trial that failed, or whose worker died."""
        attrs = row.user_attrs
        died = "error" not in attrs
        deaths, tries = attrs.get("deaths", 0) + died, attrs.get("tries", 0) + (not died)
        number = self._enqueue({"name": attrs["name"], "trial": attrs["trial"], "deaths": deaths, "tries": tries})
        if deaths > DEATHS:
            self._rdb.set_trial_user_attr(number, "tries", self._retries)
            self._fail(number, f"{deaths} workers died over it, as for want of memory")

    def _enqueue(self, attrs: dict[str, Any], record: RunRecord | None = None) -> int:
        template = optuna.trial.create_trial(state=_WAITING, user_attrs=attrs)
        if record is not None:
            attrs = {**attrs, "record": record.model_dump_json()}
            template = optuna.trial.create_trial(value=record.loss, user_attrs=attrs)
        return self._rdb.create_new_trial(self._study._study_id, template)

    @patient
    def rows(self) -> list[FrozenTrial]:
        """The trials as Optuna keeps them, in the order in which they were added; of each the last attempt."""
        return list({_name(row): row for row in self._all()}.values())

    def unfinished(self) -> int:
        """How many trials wait or run, or will be tried again."""
        return sum(
            row.state in (_WAITING, _RUNNING) or (row.state == _FAILED and not self._is_final(row))
            for row in self.rows()
        )

    def raise_failures(self) -> None:
        """Raises StudyError with every failed trial and its reason, if any failed."""
        failed = [row for row in self.rows() if row.state == _FAILED]
        if failed:
            lines = [f"{_name(row)}: {row.user_attrs.get('error', 'its worker died')}" for row in failed]
            what = f"{len(failed)} trials failed; the others are done; capgap study resume tries them again"
            raise StudyError("\n".join([what, *lines]))

    def close(self) -> None:
        self.storage.close()

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _written(self) -> set[str]:
        """Names of the runs in the file; a last line that a crash cut off is ended or removed first."""
        if not self._records.is_file():
            return set()
        records.mend(self._records)
        content = self._records.read_bytes()
        return {name.decode() for name in re.findall(rb'^\{"run":"([^"]*)"', content, re.MULTILINE)}


def read_records(folder: Path) -> list[RunRecord]:
    """A study's records, in the order in which its trials were finished; only reads."""
    path = folder / RECORDS
    return records.read(path) if path.is_file() else []


def _name(row: FrozenTrial) -> str:
    return row.user_attrs["name"]


def _trial(row: FrozenTrial) -> Trial:
    return Trial.model_validate_json(row.user_attrs["trial"])


@lru_cache(maxsize=4096)
def _record(text: str) -> RunRecord:
    return RunRecord.model_validate_json(text)


def _same_teacher(one: Trial, other: Trial) -> bool:
    """Whether one pass of the teacher over one order of the text serves both trials."""
    return one.kind == "distill" and all(
        getattr(one, key) == getattr(other, key) for key in ("kind", "teacher", "seed", "distill")
    )

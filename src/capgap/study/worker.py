"""Runs a study's trials in worker processes; a study that was stopped or killed goes on where it was."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess as Process
from pathlib import Path
from typing import Any

import torch

from capgap.errors import StudyError
from capgap.pipeline import Corpus
from capgap.progress import say, sharing_the_screen
from capgap.records import RunRecord
from capgap.study.family import Family
from capgap.study.folder import check_place, disown, holds_study, identity, own, read_spec
from capgap.study.queue import Claim, Queue
from capgap.study.run_trial import open_study_corpus, run_on_devices, run_trials
from capgap.study.spec import StudySpec
from capgap.study.trials import Trial, trials_of

_SECONDS_BETWEEN_LOOKS, _MOST_SECONDS_BETWEEN_LOOKS = 0.3, 3.0

STOPPED = 3
"""Exit status of a worker that was asked to stop."""


class StudyStopped(KeyboardInterrupt):
    """The study was asked to stop; its trials wait for whoever goes on."""

    def __init__(self) -> None:
        super().__init__("the study was stopped; the same command goes on from here")


@dataclass(frozen=True)
class Way:
    """How a study is run here.

    Attributes:
        storage: a PostgreSQL URL; None for SQLite in the study's folder.
        workers: processes that each claim trials, and share the cores and devices.
        processes: of one trial, under torchrun; 1 runs it in the worker.
        heartbeat, grace: seconds between signs of life, and without one until a trial is given to another worker.
    """

    storage: str | None = None
    workers: int = 1
    processes: int = 1
    heartbeat: int = 30
    grace: int = 120

    def __post_init__(self) -> None:
        if self.grace < 2 * self.heartbeat:
            raise StudyError(
                f"grace = {self.grace} s must be at least twice the heartbeat of {self.heartbeat} s, or trials that "
                "live would be taken for dead"
            )

    def queue(self, folder: Path, spec: StudySpec) -> Queue:
        """The queue of the study in a folder. Raises StudyError if it is not where this way looks for it."""
        check_place(folder, self.storage is not None)
        return Queue(
            folder,
            self.storage,
            name=spec.name,
            identity=identity(folder),
            retries=spec.retries,
            heartbeat=self.heartbeat,
            grace=self.grace,
        )


def create_study(spec: StudySpec, folder: Path, way: Way = Way()) -> list[Trial]:
    """Makes the study's folder and its queue of trials, and runs none of them; what is there stays.

    Returns: all its trials. Raises: StudyError if the folder holds another study.
    """
    trials = trials_of(Family(spec))
    is_new = not holds_study(folder)
    own(spec, folder, shared=way.storage is not None)
    try:
        queue = way.queue(folder, spec)
    except StudyError:
        if is_new:
            disown(folder)
        raise
    queue.add(trials)
    queue.close()
    return trials


def run_study(
    spec: StudySpec,
    folder: Path,
    *,
    workers: int = 1,
    way: Way | None = None,
    again: bool = False,
    quiet: bool = False,
) -> list[RunRecord]:
    """Runs every trial that is not done, in `workers` processes that share the cores.

    Other machines may run the same study at the same time, over a storage that all reach and a folder that all see.

    Args:
        way: how, instead of `workers`.
        again: also those that failed for good before.
    Returns: the records of all finished trials, also in `folder/records.jsonl`.
    Raises: StudyError if trials failed (the others are done first), or the folder holds another study.
    """
    way = way or Way(workers=workers)
    trials = create_study(spec, folder, way)
    open_study_corpus(spec, folder, quiet=quiet)
    queue = way.queue(folder, spec)
    if again:
        queue.reclaim()
        queue.add(trials)  # what was tried before may be in another race now
    queue.write_records()
    if queue.unfinished():
        if way.workers == 1:
            work_through(spec, folder, way, quiet=quiet)
        else:
            _work_in_processes(folder, way, quiet, queue)
    found = queue.write_records()
    queue.raise_failures()
    queue.close()
    return found


def _work_in_processes(folder: Path, way: Way, quiet: bool, queue: Queue) -> None:
    """Works in processes that share the cores. Raises StudyStopped, or StudyError if one of them died."""
    threads = max(1, torch.get_num_threads() // way.workers)
    context = multiprocessing.get_context("spawn")
    pool = [context.Process(target=work, args=(folder, way, number, threads, quiet)) for number in range(way.workers)]
    for process in pool:
        process.start()
    _wait(pool)
    codes = [process.exitcode for process in pool]
    if STOPPED in codes:
        raise StudyStopped
    if any(codes) and queue.unfinished():
        raise StudyError(f"{folder}: a worker died (exit codes {codes}); the same command goes on from here")


def _wait(pool: Sequence[Process]) -> None:
    """Waits for the workers; a request to stop is passed on, and they are given the time to write checkpoints."""
    try:
        with asked_to_stop():
            for process in pool:
                process.join()
    except KeyboardInterrupt:
        for process in pool:
            if process.is_alive():
                process.terminate()
        for process in pool:
            process.join(60)
            process.kill()
        raise StudyStopped from None


@contextlib.contextmanager
def asked_to_stop() -> Iterator[None]:
    """Lets SIGTERM, with which schedulers ask to stop, interrupt as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise StudyStopped

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def work(folder: Path, way: Way, number: int, threads: int, quiet: bool) -> None:
    """One worker process, the `number`th of this machine."""
    if way.workers > 1 and (devices := torch.cuda.device_count()) > 1:
        # Before CUDA is first used, so that each worker has a device of its own.
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(devices, way, number)
    torch.set_num_threads(threads)
    try:
        work_through(read_spec(folder), folder, way, quiet=quiet)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


def _visible(devices: int, way: Way, number: int) -> str:
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
    mine = range(number * way.processes, (number + 1) * way.processes)
    return ",".join(names[i % len(names)] for i in mine)


def work_through(spec: StudySpec, folder: Path, way: Way = Way(), *, quiet: bool = False) -> None:
    """Claims and runs trials until none is left. Raises StudyStopped on SIGINT or SIGTERM, after a checkpoint."""
    family, queue = Family(spec), way.queue(folder, spec)
    corpus = open_study_corpus(spec, folder, quiet=True)
    pause = _SECONDS_BETWEEN_LOOKS
    with asked_to_stop(), sharing_the_screen():
        while queue.unfinished():
            if (now := read_spec(folder)) != spec:  # trials joined meanwhile
                spec, family = now, Family(now)
            claims = queue.claim(spec.side_by_side)
            if not claims:
                time.sleep(pause := min(1.5 * pause, _MOST_SECONDS_BETWEEN_LOOKS))
                continue
            pause = _SECONDS_BETWEEN_LOOKS
            with queue.alive(claims) as heart:
                try:
                    for claim, outcome in _outcomes(family, claims, corpus, folder, way, quiet=quiet):
                        heart.release(claim.number)
                        _settle(queue, claim, outcome, quiet)
                except KeyboardInterrupt:
                    queue.hand_back(claims)
                    if not heart.lost:
                        raise StudyStopped from None
                    say("the storage took this worker for dead and gave its trials to others; it goes on with the next")
    queue.close()


def _settle(queue: Queue, claim: Claim, outcome: RunRecord | Exception, quiet: bool) -> None:
    """Tells the queue, and the user, what came of a trial."""
    if isinstance(outcome, RunRecord):
        counts = queue.finish(claim, outcome)
        told = f"{outcome.loss:.4f} nats per token, {outcome.seconds:.0f} s" if counts else "another worker had it"
    else:
        queue.fail(claim, str(outcome) or type(outcome).__name__)
        told = f"failed: {outcome}"
    if not quiet or not isinstance(outcome, RunRecord):
        rows = queue.rows()
        done = sum(row.state.is_finished() for row in rows)
        say(f"[{done}/{len(rows)}] {claim.trial.name}: {told}")


def _outcomes(
    family: Family, claims: Sequence[Claim], corpus: Corpus, folder: Path, way: Way, *, quiet: bool
) -> Iterator[tuple[Claim, RunRecord | Exception]]:
    """Each trial with its record, or with why it failed: trials that fail side by side go on alone."""
    trials = [claim.trial for claim in claims]
    try:
        if way.processes > 1:
            records = run_on_devices(trials, folder, way.processes)
        else:
            records = run_trials(family, trials, corpus, folder, quiet=quiet)
    except Exception as error:  # whatever it is, it is reported, and the other trials go on
        if len(claims) == 1:
            yield claims[0], error
        else:
            for one in claims:
                yield from _outcomes(family, [one], corpus, folder, way, quiet=quiet)
    else:
        yield from zip(claims, records, strict=True)

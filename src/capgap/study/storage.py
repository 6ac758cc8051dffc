"""Where a study's queue is kept: an SQLite file in its folder, or a PostgreSQL database that many machines share."""

import contextlib
import functools
import hashlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from capgap.errors import StudyError
from capgap.progress import say

SQLITE_FILE = "study.db"
"""In the study's folder, where it is in no database of many machines."""
PATIENCE = 600.0
"""Seconds for which a storage that does not answer, as one that restarts, is asked again."""

P = ParamSpec("P")
R = TypeVar("R")


def patient(work: Callable[P, R]) -> Callable[P, R]:
    """Does `work` again while the storage does not answer; it must do no harm when done twice."""

    @functools.wraps(work)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        def disturbed(state: RetryCallState) -> None:
            say(f"the study's storage does not answer; attempt {state.attempt_number + 1}")
            storage = getattr(args[0], "storage", None) if args else None
            if isinstance(storage, Storage):
                storage.disturbed_at = time.monotonic()

        attempts = Retrying(
            retry=retry_if_exception_type((StorageInternalError, DBAPIError)),
            wait=wait_exponential_jitter(multiplier=0.2, max=10.0),
            stop=stop_after_delay(PATIENCE),
            before_sleep=disturbed,
            reraise=True,
        )
        try:
            return attempts(work, *args, **kwargs)
        except (StorageInternalError, DBAPIError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise StudyError(f"the study's storage did not answer for {PATIENCE:.0f} s: {reason}") from None

    return again


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps requests to stop waiting until the block is done; in the main thread, as only that is asked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    # By handlers, not by a mask: the system would hand a masked signal to another thread, and Python to this one.
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if asked:
            signal.raise_signal(asked[0])


class Storage:
    """Optuna's storage of a study, and a lock that lets the processes of all machines take turns.

    Args:
        folder: of the study.
        url: `postgresql://user@host/database`; None for SQLITE_FILE in the folder, which serves one machine.
        name: of the study in the database.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without one after which it is taken to be dead.
    Raises: StudyError if the URL is of another database, its driver is missing, or it does not answer.
    """

    def __init__(self, folder: Path, url: str | None, name: str, *, heartbeat: int, grace: int):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        self.shared = url is not None
        self.heartbeat, self.grace = heartbeat, grace
        self.disturbed_at = -math.inf
        self._file_lock = FileLock(folder / ".lock")
        self._key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        options: dict[str, Any] = {"connect_args": {"timeout": 120}}
        if url is not None:
            options = {"pool_pre_ping": True, "connect_args": _NOTICE_WHAT_IS_GONE}
        place = f"sqlite:///{folder / SQLITE_FILE}" if url is None else _postgresql(url)
        try:
            self._open(place, options, name)
        except ImportError:
            raise StudyError("a study in PostgreSQL needs psycopg; install capgap[postgresql]") from None
        except (DBAPIError, StorageInternalError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise StudyError(f"the study's storage {hidden(url or place)} does not answer: {reason}") from None

    def _open(self, place: str, options: dict[str, Any], name: str) -> None:
        # Two processes that make the tables at one time would be in each other's way.
        with self._file_lock:
            self.rdb = optuna.storages.RDBStorage(
                place, engine_kwargs=options, heartbeat_interval=self.heartbeat, grace_period=self.grace
            )
            self.study = optuna.create_study(storage=self.rdb, study_name=name, load_if_exists=True)

    @property
    def is_settled(self) -> bool:
        """Whether the storage has answered for so long that whoever lives has given a sign of life."""
        return time.monotonic() - self.disturbed_at > self.grace

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A context that one process of all is in at a time."""
        if not self.shared:
            with self._file_lock:
                yield
            return
        with self.rdb.engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._key})
            yield

    def close(self) -> None:
        self.rdb.engine.dispose()


# A machine that is gone must not keep the others' turn, nor a server that is gone a machine.
_NOTICE_WHAT_IS_GONE = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    "options": "-c idle_in_transaction_session_timeout=300000 -c tcp_keepalives_idle=30 "
    "-c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
}


def _postgresql(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not rest:
        raise StudyError(f"storage = {hidden(url)!r}: give postgresql://user@host/database, or nothing for SQLite")
    return f"postgresql+psycopg://{rest}"


def hidden(url: str) -> str:
    """The URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.partition("://")[0] + "://..."


class Heart:
    """A context in which claimed trials are kept alive from a thread of its own.

    Attributes: lost: whether the storage gave one of them to somebody else meanwhile, as it had no sign of life for
        too long. This process is asked to stop by SIGTERM then, which it must handle (`worker.asked_to_stop`), so that
        nobody works on one trial twice.
    """

    def __init__(self, storage: optuna.storages.RDBStorage, ids: Sequence[int], seconds: float):
        self._storage, self._ids, self._seconds = storage, set(ids), seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = False

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def release(self, number: int) -> None:
        """One of the trials ends, by this process's own word."""
        self._ids.discard(number)

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                for number in list(self._ids):
                    failed = self._storage.get_trial(number).state == TrialState.FAIL
                    if failed and number in self._ids and not self._stop.is_set():
                        self.lost = True
                        os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored in a script's background jobs
                        return
                    self._storage.record_heartbeat(number)
            except (StorageInternalError, DBAPIError):
                continue  # whoever waits for the storage says so

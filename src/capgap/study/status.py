"""How far a study is."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from capgap.errors import StudyError
from capgap.study.folder import read_spec
from capgap.study.queue import RECORDS
from capgap.study.storage import SQLITE_FILE
from capgap.study.worker import Way


@dataclass(frozen=True)
class Status:
    """How far a study is: (name, state, loss or None) of each trial, and why of those that failed or were stopped."""

    trials: list[tuple[str, str, float | None]]
    errors: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return dict(Counter(state for _, state, _ in self.trials))


def study_status(folder: Path, storage: str | None = None) -> Status:
    """The state of each trial. Raises StudyError if the folder holds no study, or the storage no queue of it."""
    spec = read_spec(folder)
    if storage is None and not (folder / SQLITE_FILE).exists():
        raise StudyError(
            f"{folder / SQLITE_FILE}: the study's queue is not there; give its --storage if it is in a database, else "
            f"capgap study resume {folder} makes it from {RECORDS}"
        )
    queue = Way(storage=storage).queue(folder, spec)
    rows = queue.rows()
    queue.close()
    if not rows:
        raise StudyError(f"{folder}: the storage holds no trials of this study; capgap study resume {folder} adds them")
    return Status(
        [(row.user_attrs["name"], _state(row), row.values[0] if row.values else None) for row in rows],
        {
            row.user_attrs["name"]: row.user_attrs[key]
            for row in rows
            for key in ("error", "stopped")
            if key in row.user_attrs
        },
    )


def _state(row: FrozenTrial) -> str:
    return "stopped early" if row.state == TrialState.PRUNED else row.state.name.lower()

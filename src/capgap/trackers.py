"""Trackers of training behind one small interface: TensorBoard, Weights & Biases, MLflow.

Everything stays on this machine unless the user's own variables say otherwise: WANDB_MODE takes Weights & Biases
online, MLFLOW_TRACKING_URI names an MLflow server. The packages come with the extra `track`; each is imported only
when it is asked for.
"""

import importlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from capgap.errors import CapgapError, RecipeError
from capgap.files import read_json, storage_errors, write_json
from capgap.progress import say

TRACKERS = ("tensorboard", "wandb", "mlflow")

# What the packages would report to their makers about their own use; a user who sets these is heard.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


class Tracker(Protocol):
    """What training hands its rows to."""

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    names: Sequence[str], folder: Path, *, run: str, settings: Mapping[str, Any], start_step: int = 0
) -> Tracker:
    """One tracker that hands each row to all the named ones; with no names it does nothing.

    A tracker that fails while it logs is dropped with one line of warning, and training goes on. Under `torchrun`
    only the first process may call this.

    Args:
        names: of TRACKERS.
        folder: of the run; takes what the trackers write, and what a resumed run needs to add to the same curves.
        run: the run's name, as the trackers show it.
        settings: JSON-like, shown beside the curves.
        start_step: the last step that is done. From 0 the trackers begin anew. Otherwise they go on, and the rows
            of later steps, which a run that was cut off after its checkpoint logged already, do not appear twice.
    Returns: a tracker whose `log` takes rising steps; a row's own `step` is not logged again as a value.
    Raises: RecipeError if a name is not known or its package not installed, StorageError, CapgapError if a tracker
        cannot be opened.
    """
    names = list(dict.fromkeys(names))
    modules = {name: _module(name) for name in names}  # none is opened if one is missing
    several = _Several()
    for name in names:
        try:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                several.opened[name] = _KINDS[name][1](modules[name], folder, run, settings, start_step)
        except Exception as error:
            several.close()
            if isinstance(error, CapgapError):
                raise
            raise CapgapError(f"tracker {name}: cannot be opened in {folder}: {_why(error)}") from error
    return several


def _module(name: str) -> Any:
    if name not in _KINDS:
        raise RecipeError(f"tracker {name}: not known; choose from {', '.join(TRACKERS)} (pip install 'capgap[track]')")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        return importlib.import_module(_KINDS[name][0])
    except ImportError as error:
        raise RecipeError(
            f"tracker {name}: its package cannot be imported ({_why(error)}); pip install 'capgap[track]'"
        ) from error


class _Several:
    """Hands rows on to the trackers that still work."""

    def __init__(self):
        self.opened: dict[str, Tracker] = {}

    def log(self, step: int, row: Mapping[str, float]) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        for name, tracker in list(self.opened.items()):
            try:
                tracker.log(step, values)
            except Exception as error:
                del self.opened[name]
                say(f"warning: tracker {name} failed at step {step} and is dropped: {_why(error)}")

    def close(self) -> None:
        while self.opened:
            name, tracker = self.opened.popitem()
            try:
                tracker.close()
            except Exception as error:
                say(f"warning: tracker {name} could not be closed: {_why(error)}")


class _TensorBoard:
    """Event files in folder/tensorboard; TensorBoard itself hides what a resumed run logs again."""

    def __init__(self, tensorboard: Any, folder: Path, run: str, settings: Mapping[str, Any], start_step: int):
        purge = start_step + 1 if start_step else 0
        self.writer = tensorboard.SummaryWriter(folder / "tensorboard", purge_step=purge)
        if not start_step:
            text = json.dumps({"run": run, **settings}, indent=2, ensure_ascii=False, default=str)
            self.writer.add_text("settings", f"```json\n{text}\n```", 0)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Kept:
    """A file with the id of a tracker's run and the last step logged there.

    Weights & Biases and MLflow take back nothing: a row that a resumed run logs again is left out instead.
    """

    def __init__(self, file: Path, start_step: int):
        kept = read_json(file) if start_step and file.is_file() else {"id": None, "step": -1}
        self.file, self.id, self.step = file, kept["id"], kept["step"]

    def keep(self, step: int) -> None:
        self.step = step
        write_json(self.file, {"id": self.id, "step": step})


class _Wandb:
    """A run in folder/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it.

    Each resumption makes a folder of its own there, of the same run id and of later steps. Rows reach the disk once
    a second, so that a killed process loses that much.
    """

    def __init__(self, wandb: Any, folder: Path, run: str, settings: Mapping[str, Any], start_step: int):
        self.kept = _Kept(folder / "wandb-run.json", start_step)
        self.kept.id = self.kept.id or uuid.uuid4().hex[:16]
        self.kept.keep(self.kept.step)
        options: dict[str, Any] = {"console": "off"}
        if (flush := "x_transaction_log_flush_interval") in wandb.Settings.model_fields:  # not in every version
            options[flush] = 1.0
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "capgap",
            name=run,
            id=self.kept.id,
            resume="allow",
            config=dict(settings),
            allow_val_change=True,
            dir=folder,
            mode=os.environ.get("WANDB_MODE") or "offline",
            reinit="create_new",  # never a run that someone else in this process has open
            settings=wandb.Settings(**options),
        )

    def log(self, step: int, row: Mapping[str, float]) -> None:
        if step > self.kept.step:
            self.run.log(dict(row), step=step, commit=True)
            self.kept.keep(step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """A run in the SQLite file folder/mlflow/mlflow.db, or on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, mlflow: Any, folder: Path, run: str, settings: Mapping[str, Any], start_step: int):
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of each new table
        self.entities = importlib.import_module("mlflow.entities")
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            store = (folder / "mlflow").resolve()
            store.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{(store / 'mlflow.db').as_posix()}", (store / "artifacts").as_uri()
        self.client = mlflow.MlflowClient(uri)
        self.kept = _Kept(folder / "mlflow-run.json", start_step)
        if self.kept.id:
            try:
                self.client.update_run(self.kept.id, status="RUNNING")
            except mlflow.MlflowException as error:
                raise CapgapError(
                    f"{self.kept.file}: MLflow run {self.kept.id} cannot be resumed at {uri} ({_why(error)}); "
                    f"name the store that it was begun in, or remove this file to begin another"
                ) from error
        else:
            experiment = self._experiment(mlflow.MlflowException, artifacts)
            self.kept.id = self.client.create_run(experiment, run_name=run).info.run_id
            params = [self.entities.Param(key, str(value)) for key, value in _flat(settings)]
            for first in range(0, len(params), 100):  # as many as a request may hold
                self.client.log_batch(self.kept.id, params=params[first : first + 100])
            self.kept.keep(self.kept.step)

    def _experiment(self, refused: type[Exception], artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "capgap"
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=artifacts)
            except refused:  # perhaps another run was quicker
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def log(self, step: int, row: Mapping[str, float]) -> None:
        if step > self.kept.step:
            now = time.time_ns() // 1_000_000
            metrics = [self.entities.Metric(key, value, now, step) for key, value in row.items()]
            self.client.log_batch(self.kept.id, metrics=metrics)
            self.kept.keep(step)

    def close(self) -> None:
        self.client.set_terminated(self.kept.id)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _why(error: Exception) -> str:
    """An error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


_KINDS: dict[str, tuple[str, Callable[[Any, Path, str, Mapping[str, Any], int], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _MLflow),
}

"""Trackers: the real ones, read back with their own readers; no point twice after a resumption; no harm to training."""

import importlib.util
import struct
import sys
import time

import pytest

from capgap import trackers
from capgap.errors import CapgapError, RecipeError, StorageError
from capgap.trackers import TRACKERS, open_trackers

SETTINGS = {"train": {"lr": 3e-4, "betas": [0.9, 0.95]}, "note": "a trial"}
NEEDED = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    for name in (
        "WANDB_MODE",
        "WANDB_PROJECT",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in trackers.QUIET:
        monkeypatch.setenv(name, trackers.QUIET[name])


@pytest.fixture(params=TRACKERS)
def name(request):
    _need(request.param)
    return request.param


def _need(name):
    pytest.importorskip(NEEDED[name], reason=f"{name} is not installed; pip install 'capgap[track]'")


def _ce(step):
    return 5 - step / 8  # exact in float32, which TensorBoard keeps


def _log(tracker, steps):
    for step in steps:
        tracker.log(step, {"step": step, "tokens": step * 128.0, "ce": _ce(step)})


def _points(name, folder, key="ce"):
    """All points of a curve, as (step, value), in the order in which the tracker's own reader gives them."""
    return {"tensorboard": _tensorboard_points, "wandb": _wandb_points, "mlflow": _mlflow_points}[name](folder, key)


def _tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    return accumulator.Reload()


def _tensorboard_points(folder, key):
    read = _tensorboard(folder)
    assert set(read.Tags()["scalars"]) == {"tokens", "ce"}
    return [(event.step, event.value) for event in read.Scalars(key)]


def _wandb_records(folder):
    """The records of all parts of a run, oldest part first."""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        until = time.monotonic() + 30
        while not (records := list(_wandb_part(file))) or records[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < until, f"{file} has no end"
            time.sleep(0.05)  # a process of its own writes the file
        yield from records


def _wandb_part(file):
    """The records of one file: a LevelDB log of protocol buffers, which has no public reader."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), 7, b""
    while at < len(content):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield Record.FromString(whole)
            whole = b""


def _wandb_points(folder, key):
    points = []
    for record in _wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            assert "step" not in values
            points.append((record.history.step.num, float(values[key])))
    return points


def _mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("capgap")
    return client, client.search_runs([experiment.experiment_id])


def _mlflow_points(folder, key):
    client, (run,) = _mlflow(folder)
    assert set(run.data.metrics) == {"tokens", "ce"}
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def test_what_was_logged_can_be_read_back(name, tmp_path):
    tracker = open_trackers([name], tmp_path / "run", run="cut-a", settings=SETTINGS)
    _log(tracker, range(1, 6))
    tracker.close()
    assert _points(name, tmp_path / "run") == [(step, _ce(step)) for step in range(1, 6)]
    assert _points(name, tmp_path / "run", "tokens") == [(step, step * 128.0) for step in range(1, 6)]


def test_a_resumed_run_has_no_point_twice(name, tmp_path):
    cut_off = open_trackers([name], tmp_path, run="cut-a", settings=SETTINGS)
    _log(cut_off, range(1, 16))  # the last checkpoint is of step 10
    cut_off.close()
    time.sleep(1.1)  # TensorBoard tells event files apart by the second in their names
    resumed = open_trackers([name], tmp_path, run="cut-a", settings=SETTINGS, start_step=10)
    _log(resumed, range(11, 21))
    resumed.close()
    assert _points(name, tmp_path) == [(step, _ce(step)) for step in range(1, 21)]


def test_settings_are_shown(name, tmp_path):
    open_trackers([name], tmp_path, run="cut-a", settings=SETTINGS).close()
    if name == "tensorboard":
        (event,) = _tensorboard(tmp_path).Tensors("settings/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert '"run": "cut-a"' in text
        assert '"lr": 0.0003' in text
    elif name == "wandb":
        (run,) = (record.run for record in _wandb_records(tmp_path) if record.WhichOneof("record_type") == "run")
        config = {item.key: item.value_json for item in run.config.update}
        assert (run.display_name, run.project) == ("cut-a", "capgap")
        assert config["train"] == '{"lr":0.0003,"betas":[0.9,0.95]}'.replace(" ", "")
    else:
        _, (run,) = _mlflow(tmp_path)
        assert (run.info.run_name, run.info.status) == ("cut-a", "FINISHED")
        assert run.data.params == {"train.lr": "0.0003", "train.betas": "[0.9, 0.95]", "note": "a trial"}


def test_from_step_0_a_run_begins_anew(name, tmp_path):
    for steps in (range(1, 6), range(1, 4)):
        time.sleep(1.1)
        tracker = open_trackers([name], tmp_path, run="cut-a", settings=SETTINGS)
        _log(tracker, steps)
        tracker.close()
    if name == "tensorboard":
        assert _points(name, tmp_path) == [(step, _ce(step)) for step in (1, 2, 3)]
    elif name == "wandb":
        assert (
            len({record.run.run_id for record in _wandb_records(tmp_path) if record.WhichOneof("record_type") == "run"})
            == 2
        )
    else:
        assert len(_mlflow(tmp_path)[1]) == 2


def test_wandb_keeps_one_run_id_over_its_parts(tmp_path):
    _need("wandb")
    for start_step in (0, 2, 4):
        tracker = open_trackers(["wandb"], tmp_path, run="a", settings={}, start_step=start_step)
        _log(tracker, range(start_step + 1, start_step + 3))
        tracker.close()
    ids = [record.run.run_id for record in _wandb_records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert len(ids) == 3
    assert len(set(ids)) == 1


def test_wandb_mode_is_the_users(tmp_path, monkeypatch):
    _need("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = open_trackers(["wandb"], tmp_path, run="a", settings={})
    _log(tracker, [1])
    tracker.close()
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_mlflow_goes_where_its_variable_says_and_misses_no_lost_run(tmp_path, monkeypatch):
    _need("mlflow")
    server = tmp_path / "server"
    (server / "mlflow").mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{server / 'mlflow' / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    tracker = open_trackers(["mlflow"], tmp_path / "run", run="a", settings={})
    _log(tracker, [1])
    tracker.close()
    assert _mlflow_points(server, "ce") == [(1, _ce(1))]
    assert not (tmp_path / "run" / "mlflow").exists()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(CapgapError, match=r"mlflow-run\.json: MLflow run \w+ cannot be resumed at sqlite"):
        open_trackers(["mlflow"], tmp_path / "run", run="a", settings={}, start_step=1)


def test_all_named_trackers_get_each_row(tmp_path):
    names = [name for name in TRACKERS if importlib.util.find_spec(NEEDED[name])]
    if len(names) < 2:
        pytest.skip("fewer than two trackers are installed; pip install 'capgap[track]'")
    tracker = open_trackers([*names, names[0]], tmp_path, run="a", settings={})
    _log(tracker, [3, 7])
    tracker.close()
    for name in names:
        assert _points(name, tmp_path) == [(3, _ce(3)), (7, _ce(7))]


def test_no_names_do_nothing(tmp_path):
    tracker = open_trackers([], tmp_path / "run", run="a", settings={})
    _log(tracker, [1])
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_an_unknown_name_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"tracker comet: not known; choose from tensorboard, wandb, mlflow"):
        open_trackers(["comet"], tmp_path, run="a", settings={})


@pytest.mark.parametrize("missing", TRACKERS)
def test_a_missing_package_is_an_error_before_any_tracker_is_opened(missing, tmp_path, monkeypatch):
    others = [name for name in TRACKERS if name != missing and importlib.util.find_spec(NEEDED[name])]
    for module in [NEEDED[missing], trackers._KINDS[missing][0]]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf"tracker {missing}: .*pip install 'capgap\[track\]'"):
        open_trackers([*others, missing], tmp_path / "run", run="a", settings={})
    assert not (tmp_path / "run").exists()


class _Memory:
    """A tracker that keeps rows, and fails from a step on."""

    opened: list["_Memory"] = []  # noqa: RUF012

    def __init__(self, module, folder, run, settings, start_step):
        self.rows, self.closed, self.fails_at = {}, False, settings.get("fails_at", {}).get(module.__name__)
        self.opened.append(self)

    def log(self, step, row):
        if self.fails_at is not None and step >= self.fails_at:
            raise OSError("the server\nis gone")
        self.rows[step] = dict(row)

    def close(self):
        if self.fails_at is not None:
            raise OSError("still gone")
        self.closed = True


@pytest.fixture
def memories(monkeypatch):
    kinds = {"tensorboard": ("json", _Memory), "wandb": ("struct", _Memory), "mlflow": ("math", _Memory)}
    monkeypatch.setattr(trackers, "_KINDS", kinds)
    monkeypatch.setattr(_Memory, "opened", [])
    return _Memory.opened


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path, memories, capsys):
    tracker = open_trackers(["tensorboard", "wandb"], tmp_path, run="a", settings={"fails_at": {"json": 3}})
    _log(tracker, range(1, 6))
    tracker.close()
    failing, well = memories
    assert list(failing.rows) == [1, 2]
    assert list(well.rows) == [1, 2, 3, 4, 5]
    assert well.closed
    assert capsys.readouterr().err == (
        "warning: tracker tensorboard failed at step 3 and is dropped: the server is gone\n"
    )


def test_a_real_tracker_that_fails_is_dropped(tmp_path, capsys):
    _need("tensorboard")
    tracker = open_trackers(["tensorboard"], tmp_path, run="a", settings={})
    _log(tracker, [1])
    tracker.log(2, {"ce": "not a number"})  # pyright: ignore
    _log(tracker, [3])
    tracker.close()
    assert capsys.readouterr().err.count("warning: tracker tensorboard failed at step 2") == 1
    assert _points("tensorboard", tmp_path) == [(1, _ce(1))]


def test_a_failure_to_close_is_a_warning_and_the_others_are_closed(tmp_path, memories, capsys):
    tracker = open_trackers(["tensorboard", "wandb"], tmp_path, run="a", settings={"fails_at": {"struct": 99}})
    tracker.close()
    assert memories[0].closed
    assert capsys.readouterr().err == "warning: tracker wandb could not be closed: still gone\n"


def test_a_tracker_that_cannot_be_opened_is_an_error_and_the_others_are_closed(tmp_path, memories, monkeypatch):
    def refuse(*_):
        raise ValueError("no such server")

    monkeypatch.setitem(trackers._KINDS, "mlflow", ("math", refuse))
    with pytest.raises(CapgapError, match=r"tracker mlflow: cannot be opened in .*: no such server"):
        open_trackers(["tensorboard", "mlflow"], tmp_path, run="a", settings={})
    assert memories[0].closed


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    _need("tensorboard")
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="a file is in the way"):
        open_trackers(["tensorboard"], tmp_path / "run", run="a", settings={})

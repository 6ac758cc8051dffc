"""Bad input: one clear error that names what is wrong, a status that is not 0, nothing half written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shell import capgap, capgap_here

GOOD = {
    "teacher": "MODEL",
    "student": {"scale": "0.5x"},
    "data": {
        "train": {"text": "TEXT", "documents": "blank-line"},
        "held_out": {"text": "TEXT", "documents": "blank-line"},
        "block": 64,
        "separator": "<s>",
    },
    "distill": {"tokens": 2048, "tokens_per_step": 1024},
    "output": "out",
}


def put(tree: dict, key: str, value: object) -> dict:
    tree = json.loads(json.dumps(tree))
    *path, last = key.split(".")
    here = tree
    for part in path:
        here = here[part]
    here[last] = value
    return tree


RECIPES = [
    ("distill.tokns", 5, "distill.tokns: unknown key"),
    ("distill.tokens", "many", "distill.tokens: 'many' is not a count"),
    ("distill.tokens", -3, "distill.tokens"),
    ("distill.tokens", 100, "less than one step"),
    ("distill.kd_weight", 1.5, "distill.kd_weight = 1.5"),
    ("distill.lr", 0, "distill.lr = 0"),
    ("distill.tokens_per_step", 32, "tokens_per_step = 32 is less than data.block = 64"),
    ("distill.schedule", "linear", "distill.schedule = 'linear'"),
    ("prune", {"score": "vibes"}, "prune.score = 'vibes'"),
    ("student", {"scale": "1.5x"}, "student.scale"),
    ("student", {"scale": "3B"}, "cannot be cut from a model of"),
    ("student", {"scale": "0.5x", "hidden": 32}, "not both"),
    ("student", {"hidden": 33}, "not a multiple"),
    ("student", {"layers": 9}, "student.layers = 9, but the model it is cut from has only 5"),
    ("student", {"scale": "0.5x", "layers": 9}, "9 layers asked of a model that has 5"),
    ("teacher", "./nowhere", "nowhere: no such model folder"),
    ("teacher", {"family": "bert"}, "bert"),
    ("data.train", {"text": "missing-*.txt"}, "missing-*.txt"),
    ("data.train", {"text": "empty.txt"}, "empty"),
    ("data.train", {"jsonl": "broken.jsonl"}, "broken.jsonl"),
    ("data.train", {"jsonl": "good.jsonl", "field": "body"}, "body"),
    ("data.train", {"text": "a", "jsonl": "b"}, "exactly one of"),
    ("data.separator", "<eot>", "<eot>"),
]


@pytest.fixture
def place(tmp_path, test_data):
    stories = (test_data / "text/tinystories/tinystories_10k.txt").read_text()[:60_000]
    (tmp_path / "stories.txt").write_text(stories)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.jsonl").write_text('{"text": "Once upon a time."}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "Once"}\n{"text": oops}\n')
    shutil.copytree(test_data / "models/stories260k-hf", tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        file.chmod(0o644)
    (tmp_path / "model").chmod(0o755)
    return tmp_path


def run_recipe(place: Path, tree: dict) -> subprocess.CompletedProcess:
    text = yaml.safe_dump(tree).replace("MODEL", "./model").replace("TEXT", "stories.txt")
    (place / "recipe.yaml").write_text(text)
    return capgap_here("run", "recipe.yaml", cwd=place)


def check_refused(done: subprocess.CompletedProcess, place: Path, message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not list(place.rglob("*.tmp"))
    assert not (place / "out/distilled/model").exists()


@pytest.mark.parametrize(("key", "value", "message"), RECIPES, ids=[f"{k}={v}"[:40] for k, v, _ in RECIPES])
def test_recipe(place, key, value, message):
    check_refused(run_recipe(place, put(GOOD, key, value)), place, message)


def truncated(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def missing_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def nan_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "model.safetensors: damaged or cut off"),
        (no_weights, "holds no *.safetensors"),
        (no_config, "holds no config.json"),
        (missing_weight, "has no weight model.layers.2.mlp.up_proj.weight"),
        (nan_weight, "model.layers.1.mlp.up_proj.weight holds NaN"),
    ],
)
def test_model_folder(place, damage, message):
    damage(place / "model")
    check_refused(run_recipe(place, GOOD), place, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.yaml"], "none.yaml: no such recipe"),
        (["plan", "--student", "big", "--family", "llama-2"], "--student: 'big' is not a count"),
        (["plan", "--student", "3B", "--family", "lama"], "lama"),
        (["law", "fit", "none.jsonl"], "none.jsonl: no such file"),
        (["law", "fit", "good.jsonl"], "good.jsonl: no column for the student's parameters; it has text"),
        (["study", "status", "model"], "model: holds no study"),
    ],
)
def test_command(place, words, message):
    check_refused(capgap(*words, cwd=place), place, message)


def test_full_disk(place):
    """The operating system refuses in the middle of a write: the old file stays, nothing else is left."""
    from capgap.errors import StorageError
    from capgap.files import atomic_file

    target = place / "whole.bin"
    target.write_text("old")

    def half() -> None:
        with atomic_file(target) as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="disk is full"):
        half()
    assert target.read_text() == "old"
    assert not list(place.glob(".*.tmp"))


CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
)


@pytest.mark.skipif(not CAN_MOUNT, reason="needs user and mount namespaces (unshare -rm) to make a small file system")
@pytest.mark.parametrize(
    ("size", "where"), [("1m", "data/train"), ("1400k", "pruned"), ("2500k", "distilled/checkpoints")]
)
def test_really_full_disk(test_data, tmp_path, size, where):
    """A file system that fills up while text is packed, a model is saved, a checkpoint is written."""
    recipe = Path(__file__).parents[2] / "recipes/stories.yaml"
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {tmp_path}
        {sys.executable} -m capgap run {recipe} output={tmp_path}/run distill.tokens=50k prune.calibration_tokens=16k \
            evaluate.tokens=15k distill.checkpoint_every=0.2 >&2
        echo $?
        find {tmp_path} -name '.*'
    """
    environment = {**os.environ, "CAPGAP_TEST_DATA": str(test_data), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.split() == ["2"], "exit status 2, and no half-written file or folder is left"
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/run/{where}")
    assert last.endswith("the disk is full; free some space and run the same command again")

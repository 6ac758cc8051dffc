"""`capgap cache` on a real pretrained Llama and real stories; students learn from it without the teacher's weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capgap.errors import CacheError, RecipeError
from capgap.files import read_json
from capgap.pipeline import run_recipe
from capgap.recipe import Recipe, check

TREE = {
    "student": {"scale": "0.5x", "from": "start"},
    "teacher": "teacher",
    "data": {
        "train": {"text": "stories.txt", "documents": "blank-line"},
        "held_out": {"text": "held-out.txt", "documents": "blank-line"},
        "block": 128,
        "separator": "<s>",
    },
    "prune": {"calibration_tokens": 8192},
    "cache": {"shard_tokens": 6_000, "folder": "cache"},
    "distill": {"tokens": 30_000, "tokens_per_step": 1024, "lr": 3e-3, "warmup": 0.05, "evaluations": 1},
    "evaluate": {"tokens": 8_000},
    "output": "first",
}


def recipe(**more) -> Recipe:
    """The recipe with some keys, dots as __, set to other values; None removes the key."""
    tree = json.loads(json.dumps(TREE))
    for key, value in more.items():
        *path, last = key.split("__")
        here = tree
        for part in path:
            here = here[part]
        here[last] = value
    return check(tree, Recipe, "recipe.yaml")


def distilled(made: Recipe) -> dict:
    run_recipe(made, until="distil", quiet=True)
    return read_json(Path(made.output) / "distilled/record.json")


def capgap_cache(place: Path, *, stop_at_first_shard: bool = False) -> tuple[int, str, str]:
    """Exit status, standard output and error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "capgap", "cache", "recipe.yaml"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # A shell that runs the tests in the background has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while stop_at_first_shard and not (place / "cache/000000.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    if stop_at_first_shard:
        process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=300)
    return process.returncode, printed, told


@pytest.fixture(scope="module")
def place(tmp_path_factory, test_data):
    """A folder with a teacher, text and a cache, whose teacher then loses its weights; it is gone into."""
    place = tmp_path_factory.mktemp("cache")
    model = test_data / "models/stories260k-hf"
    for name in ("start", "teacher", "complete"):
        shutil.copytree(model, place / name)
    stories = (test_data / "text/tinystories/tinystories_10k.txt").read_text()
    (place / "stories.txt").write_text(stories[:90_000])
    (place / "held-out.txt").write_text(stories[-30_000:])
    (place / "recipe.yaml").write_text(json.dumps(TREE))  # JSON is YAML
    code, _, told = capgap_cache(place, stop_at_first_shard=True)
    assert (code, told.splitlines()[-1]) == (130, "stopped; the same command goes on from here")
    first = (place / "cache/000000.safetensors").stat().st_mtime_ns
    code, printed, told = capgap_cache(place)
    assert (code, printed) == (0, "cache\n"), told
    assert "bytes a token" in told
    assert (place / "cache/000000.safetensors").stat().st_mtime_ns == first
    assert not any(place.glob("first/distilled"))
    for weights in (place / "teacher").glob("*.safetensors"):
        weights.unlink()
    before = Path.cwd()
    os.chdir(place)
    yield place
    os.chdir(before)


@pytest.fixture(scope="module")
def online(place):
    return distilled(recipe(teacher="complete", cache=None, output="online"))


def test_the_manifest_says_what_was_stored(place):
    manifest = read_json(place / "cache/manifest.json")
    facts = manifest["facts"]
    assert (facts["kind"], facts["k"], facts["vocabulary"], facts["temperature"]) == ("sampled", 64, 512, 1.0)
    assert len(manifest["shards"]) == -(-facts["blocks"] // (6_000 // 128))
    assert manifest["dtypes"] == {"counts": "U8", "distinct": "U8", "entropy": "F32", "ids": "U16", "start": "I64"}
    assert 10 < manifest["bytes_per_token"] < 64 * 3 + 5
    assert read_json(place / "cache/capgap.json")["stage"] == "cache"


def test_students_train_without_the_teachers_weights_and_nearly_reach_the_online_loss(place, online):
    first = distilled(recipe())
    assert first["loss"] == pytest.approx(online["loss"], abs=0.03)
    assert first["loss"] < first["start_loss"] - 0.3
    assert first["teacher_scale"] == online["teacher_scale"] == 260_032
    assert first["flops"] < online["flops"]
    second = distilled(recipe(output="second", distill__seed=7, distill__tokens=10_000, student__scale="0.3x"))
    assert second["student_scale"] < first["student_scale"]
    assert second["recipe_hash"] != first["recipe_hash"]


def test_a_dense_cache_reaches_the_online_loss(place, online):
    dense = distilled(recipe(teacher="complete", output="dense", cache={"kind": "dense"}))
    assert dense["loss"] == pytest.approx(online["loss"], abs=2e-3)
    assert (place / "dense/cache/manifest.json").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distill__temperature": 2.0}, "distill.temperature is 1.0 in the cache, 2.0 here"),
        ({"data__block": 64}, "data.block is 128 in the cache, 64 here"),
        ({"data__train": {"text": "held-out.txt", "documents": "blank-line"}}, "hash of the packed training data"),
        ({"cache__k": 8}, "cache.k is 64 in the cache, 8 here"),
    ],
)
def test_a_cache_of_something_else_is_refused(place, changed, message):
    with pytest.raises(CacheError, match=message):
        run_recipe(recipe(output="other", **changed), until="distil", quiet=True)
    assert not (place / "other/distilled").exists()


def test_another_teacher_is_refused(place, test_data):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree("complete", "tuned", dirs_exist_ok=True)
    weights = load_file("tuned/model.safetensors")
    name = min(weights)
    save_file({**weights, name: torch.zeros_like(weights[name])}, "tuned/model.safetensors", {"format": "pt"})
    with pytest.raises(CacheError, match=r"the teacher's hash is .* in the cache"):
        run_recipe(recipe(output="other", teacher="tuned"), until="distil", quiet=True)


def test_without_weights_and_without_a_cache_there_is_nothing_to_learn_from(place):
    with pytest.raises(CacheError, match="there is no teacher cache, or it is not whole"):
        run_recipe(recipe(output="other", cache__folder="nowhere"), until="distil", quiet=True)
    assert not (place / "nowhere").exists()


def test_recipes_that_cannot_be(place):
    with pytest.raises(RecipeError, match=r"divergence = jsd needs .* cache\.kind = sampled keeps a part"):
        recipe(distill__divergence="jsd")
    recipe(distill__divergence="jsd", cache__kind="dense")
    with pytest.raises(RecipeError, match=r"cache\.k"):
        recipe(cache__k=65_536)
    with pytest.raises(RecipeError, match="the recipe has no section cache"):
        run_recipe(recipe(cache=None), until="cache", quiet=True)

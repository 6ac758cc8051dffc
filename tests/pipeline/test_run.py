"""A recipe on a real pretrained Llama and real stories, from the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from shell import capgap, capgap_here

RECIPE = Path(__file__).parents[2] / "recipes" / "stories.yaml"
SHORT = ["distill.tokens=200k", "prune.calibration_tokens=16k", "evaluate.tokens=15k"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, test_data):
    place = tmp_path_factory.mktemp("run")
    done = capgap("run", str(RECIPE), *SHORT, cwd=place, data=test_data)
    assert done.returncode == 0, done.stderr
    return place


def test_the_student_beats_the_pruned_one_and_the_same_shape_from_scratch(finished, test_data):
    from capgap.data import load_tokenizer
    from capgap.models import load_config
    from capgap.pipeline import Training, open_corpus, train_stage
    from capgap.recipe import Recipe, load

    record = json.loads((finished / "runs/stories/distilled/record.json").read_text())
    assert record["loss"] < record["start_loss"]
    assert abs(record["student_scale"] - 130_016) <= 0.01 * 130_016
    os.environ["CAPGAP_TEST_DATA"] = str(test_data)
    recipe = load(RECIPE, Recipe, SHORT)
    corpus = open_corpus(
        recipe.data,
        load_tokenizer(test_data / "models/stories260k-hf"),
        finished / "runs/stories/data",
        held_out_tokens=recipe.evaluate.tokens,
        quiet=True,
    )
    config = load_config(finished / "runs/stories/pruned")
    scratch = train_stage(
        Training("scratch", "scratch", config, recipe.distill, finished / "scratch"), corpus, quiet=True
    )
    assert scratch.data_hash == record["data_hash"]
    assert record["loss"] < scratch.loss - 0.2


def test_the_student_is_a_plain_folder(finished):
    folder = finished / "runs/stories/distilled/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert json.loads((folder / "capgap.json").read_text())["stage"] == "distill"


def test_stages_that_are_done_are_skipped(finished, test_data):
    folder = finished / "runs/stories"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = capgap("run", str(RECIPE), *SHORT, cwd=finished, data=test_data)
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before


def test_pretrain_makes_a_plain_folder_and_learns(tmp_path, test_data):
    recipe = RECIPE.with_name("pretrain-stories.yaml")
    short = ["train.tokens=60k", "evaluate.tokens=10k"]
    done = capgap("pretrain", str(recipe), *short, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs/pretrained-stories/record.json").read_text())
    assert record["loss"] < record["start_loss"] - 1
    assert record["teacher"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/pretrained-stories/model")


def test_two_processes_run_a_recipe_as_one_does(tmp_path, test_data):
    short = [*SHORT, "distill.tokens=16k"]
    alone = capgap("run", str(RECIPE), *short, "output=alone", cwd=tmp_path, data=test_data)
    assert alone.returncode == 0, alone.stderr
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = capgap("run", str(RECIPE), *short, "output=both", cwd=tmp_path, data=test_data, module=[*torchrun, "-m"])
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("nats per token") == 1
    one, two = (json.loads((tmp_path / name / "distilled/record.json").read_text()) for name in ("alone", "both"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert two["tokens"] == one["tokens"]
    assert json.loads((tmp_path / "both/teacher-score/capgap.json").read_text())["loss"] < one["loss"]


def test_sigterm_writes_a_checkpoint_exits_0_and_says_how_to_go_on(tmp_path, finished, test_data):
    words = [sys.executable, "-m", "capgap", "run", str(RECIPE), *SHORT, "output=stopped", "distill.checkpoint_every=1"]
    environment = {**os.environ, "CAPGAP_TEST_DATA": str(test_data)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not any((tmp_path / "stopped/distilled/checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    step = int(re.search(r"stopped at step (\d+) of \d+; the same command goes on from there", told)[1])
    assert (tmp_path / f"stopped/distilled/checkpoints/step-{step:09d}").is_dir()
    again = capgap("run", str(RECIPE), *SHORT, "output=stopped", cwd=tmp_path, data=test_data)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path, "stopped") == losses(finished, "runs/stories")


def losses(place: Path, *outputs: str) -> list[float]:
    return [json.loads((place / output / "distilled/record.json").read_text())["loss"] for output in outputs]


def test_students_side_by_side_come_out_as_each_does_alone(tmp_path, test_data):
    short = [*SHORT, "distill.tokens=16k", "distill.evaluations=1"]
    wide, deep = "{scale: 0.5x, name: wide}", "{layers: 3, name: deep}"
    for name, student in {"one": f"[{wide}, {deep}]", "two": wide, "three": deep}.items():
        done = capgap("run", str(RECIPE), *short, f"student={student}", f"output={name}", cwd=tmp_path, data=test_data)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("nats per token") == (2 if name == "one" else 1)
    assert losses(tmp_path, "one/students/wide", "one/students/deep") == losses(tmp_path, "two", "three")


def test_two_students_of_one_name_are_refused(tmp_path, test_data):
    words = ["student=[{scale: 0.5x}, {scale: 0.5x}]", "output=twins"]
    done = capgap("run", str(RECIPE), *words, cwd=tmp_path, data=test_data)
    assert done.returncode == 2
    assert re.search(r"student\.1: there is a student s\S+ before it; give this one another name", done.stderr)
    assert not (tmp_path / "twins").exists()


def test_a_mixture_of_teachers_online_and_cached(tmp_path, test_data):
    """The mixture of a model with its double is that model; with another one it is not, cached or not."""
    model, short = test_data / "models/stories260k-hf", [*SHORT, "distill.tokens=16k", "distill.evaluations=1"]
    double = f"[{{model: {model}, weight: 3}}, {{model: {model}}}]"
    mixed = f"[{{model: {model}, weight: 3}}, {{model: {tmp_path / 'alone/distilled/model'}}}]"
    for name, teacher in {"alone": str(model), "double": double, "mixed": mixed}.items():
        words = [*short, f"teacher={teacher}", f"output={name}"]
        done = capgap_here("run", str(RECIPE), *words, cwd=tmp_path, data=test_data)
        assert done.returncode == 0, done.stderr
    words = [*short, f"teacher={mixed}", "output=cached", "cache.kind=dense"]
    done = capgap_here("run", str(RECIPE), *words, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the teacher ") == 2
    alone, double_loss, mixed_loss, cached = losses(tmp_path, "alone", "double", "mixed", "cached")
    assert double_loss == pytest.approx(alone, abs=1e-4)
    assert abs(mixed_loss - alone) > 1e-3
    assert cached == pytest.approx(mixed_loss, abs=2e-3)
    record = json.loads((tmp_path / "mixed/distilled/record.json").read_text())
    assert record["teacher"].startswith("0.75 ")
    assert record["teacher_scale"] is None


def test_a_student_of_other_scores_and_layers(tmp_path, test_data):
    words = ["prune.score=activation", "prune.layers=influence", "student={scale: 0.5x, layers: 3}", *SHORT]
    done = capgap_here("prune", str(RECIPE), *words, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr
    lineage = json.loads((tmp_path / "runs/stories/pruned/capgap.json").read_text())
    assert lineage["inputs"]["shape"].startswith("3 layers")
    assert lineage["inputs"]["prune"]["score"] == "activation"
    assert json.loads((tmp_path / "runs/stories/scores/capgap.json").read_text())["inputs"]["score"] == "activation"

"""Pruning as a recipe asks for it: layers by their loss, calibration, shards, cuts in stages, shapes compared."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capgap.anatomy import anatomy_of
from capgap.cost import count_parameters
from capgap.models import load_config, load_model
from capgap.pipeline.pruning import chosen
from capgap.prune import solve_shape
from capgap.recipe import Prune
from shell import capgap, capgap_here
from tiny import tiny_config

RECIPE = Path(__file__).parents[2] / "recipes" / "stories.yaml"
SHORT = ["prune.calibration_tokens=2k", "evaluate.tokens=2k", "distill.tokens=4k", "prune.repair_tokens=2k"]


@pytest.fixture
def prune(tmp_path, test_data):
    def run(name: str, *words: str, module: tuple[str, ...] = ()) -> Path:
        command = ["prune", str(RECIPE), *SHORT, f"output={name}", *words]
        call = capgap_here if not module else capgap
        done = call(*command, cwd=tmp_path, data=test_data, **({"module": module} if module else {}))
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return run


@pytest.mark.parametrize("choice", ["loss", "block_loss"])
def test_layers_are_dropped_by_the_loss_without_them(choice, prune, test_data):
    made = prune("made", f"prune.layers={choice}", "student={layers: 3}", "prune.repair=none")
    assert load_config(made / "pruned").num_hidden_layers == 3
    block = 2 if choice == "block_loss" else 1
    losses = json.loads((made / f"scores/without-{block}/capgap.json").read_text())["losses"]
    assert len(losses) == 6 - block
    if choice == "loss":
        dropped = sorted(sorted(range(5), key=lambda i: losses[i])[:2])
    else:
        first = min(range(4), key=lambda i: losses[i])
        dropped = [first, first + 1]
    kept = [i for i in range(5) if i not in dropped]
    start, student = (load_model(f).model.layers for f in (test_data / "models/stories260k-hf", made / "pruned"))
    for mine, old in enumerate(kept):
        assert torch.equal(student[mine].mlp.up_proj.weight, start[old].mlp.up_proj.weight)


def scores(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "scores/scores.safetensors")


def test_layers_by_loss_when_all_of_them_stay(prune):
    assert load_config(prune("made", "prune.layers=loss") / "pruned").num_hidden_layers == 5


def test_two_processes_compare_shapes_as_one_does(tmp_path, test_data):
    words = ["shapes", str(RECIPE), *SHORT, "--count", "2", "--try", "1", "--tokens", "4k"]
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    both = capgap(*words, "output=both", cwd=tmp_path, data=test_data, module=torchrun)
    alone = capgap_here(*words, "output=alone", cwd=tmp_path, data=test_data)
    assert both.returncode == alone.returncode == 0, both.stderr
    assert both.stdout == alone.stdout


@pytest.mark.parametrize("method", ["expressiveness", "activation", "magnitude"])
def test_two_processes_with_shards_of_the_start_score_cut_and_repair_as_one_does(method, prune):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    more = (f"prune.score={method}", "prune.layers=block_loss", "student={layers: 4, hidden: 48}")
    alone, both = prune("alone", *more), prune("both", *more, "distill.parallel=fsdp", module=torchrun)
    for name, found in scores(both).items():
        torch.testing.assert_close(found, scores(alone)[name], rtol=1e-4, atol=1e-6, msg=name)
    one, two = (load_file(folder / "pruned/model.safetensors") for folder in (alone, both))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_weights_that_lie_in_cpu_memory_give_the_same_scores(prune):
    gradients = "prune.score=expressiveness"
    plain, offloaded = prune("plain", gradients), prune("offloaded", gradients, "prune.offload=true")
    for name, found in scores(offloaded).items():
        torch.testing.assert_close(found, scores(plain)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_batch_and_precision_change_the_scores_a_little_and_are_part_of_what_is_reused(prune):
    gradients = "prune.score=expressiveness"
    one = scores(prune("same", gradients))
    file = prune("same", gradients, "prune.seed=5") / "scores/scores.safetensors"
    stamp = file.stat().st_mtime_ns
    assert prune("same", gradients, "student.scale=0.4x")
    assert file.stat().st_mtime_ns == stamp
    for more in ("prune.calibration_batch=4", "prune.precision=bfloat16"):
        other = scores(prune("same", gradients, more))
        assert not torch.equal(one["neurons"], other["neurons"])
        assert float(torch.cosine_similarity(one["hidden"], other["hidden"], dim=0)) > 0.8


def test_what_is_chosen_where_nothing_is_said():
    def of(kind: str, share: float, **more: str) -> tuple[str, str]:
        anatomy = anatomy_of(tiny_config(kind))
        shape = solve_shape(anatomy, round(share * count_parameters(anatomy.config).total))
        found = chosen(Prune(**more), anatomy, shape)
        return found.score, found.repair

    assert of("llama", 0.7) == ("activation", "none")
    assert of("llama", 0.5) == ("activation", "all")
    assert of("mixtral", 0.5) == ("expressiveness", "all")
    assert of("mixtral", 0.7, score="random", repair="norms") == ("random", "norms")


def test_a_batch_larger_than_the_text_is_refused(tmp_path, test_data):
    done = capgap_here("prune", str(RECIPE), "prune.calibration_batch=1M", *SHORT[1:], cwd=tmp_path, data=test_data)
    assert done.returncode == 2
    assert "prune.calibration_batch = 1000000, but the training text has only" in done.stderr


def test_a_repair_takes_what_little_text_there_is(tmp_path, test_data):
    (tmp_path / "little.txt").write_text("Once upon a time there was a little cat that was very happy. " * 60)
    data = "data.train={text: little.txt}"
    words = ["prune", str(RECIPE), data, "data.block=16", "prune.repair=all", "evaluate.tokens=1k"]
    done = capgap_here(*words, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr


def test_a_cut_in_stages_distils_on_the_way_and_goes_on_where_it_was(tmp_path, test_data):
    stages = "student={scale: 0.3x, via: [{scale: 0.6x, tokens: 6k}]}"
    words = ["run", str(RECIPE), *SHORT, stages, "output=staged"]
    done = capgap_here(*words, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr
    first, last = (
        json.loads((tmp_path / place / "distilled/record.json").read_text()) for place in ("staged/via/1", "staged")
    )
    assert first["student_scale"] == pytest.approx(0.6 * 260_032, rel=0.01)
    assert last["student_scale"] == pytest.approx(0.3 * 260_032, rel=0.01)
    assert last["start_scale"] == 260_032
    assert last["tokens_before"] == first["tokens"] == 4096
    start = json.loads((tmp_path / "staged/pruned/capgap.json").read_text())["parents"]["start"]
    assert start.endswith("staged/via/1/distilled/model")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert capgap_here(*words, cwd=tmp_path, data=test_data).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before


def test_a_stage_that_is_smaller_than_the_next_is_refused(tmp_path, test_data):
    stages = "student={scale: 0.5x, via: [{scale: 0.4x}]}"
    done = capgap_here("run", str(RECIPE), *SHORT, stages, cwd=tmp_path, data=test_data)
    assert done.returncode == 2
    assert "cannot be cut from a model of" in done.stderr


def test_shapes_are_listed_and_the_best_tried(tmp_path, test_data):
    words = ["shapes", str(RECIPE), *SHORT, "--count", "3", "--try", "2", "--tokens", "4k"]
    done = capgap_here(*words, cwd=tmp_path, data=test_data)
    assert done.returncode == 0, done.stderr
    rows = [re.findall(r"[\w.+]+", line) for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    assert len({row[0] for row in rows}) == 3
    assert float(rows[0][-1]) <= float(rows[1][-1])
    assert all(math.isclose(float(row[4].removesuffix("k")), 130, rel_tol=0.01) for row in rows)
    best = done.stdout.splitlines()[-1].removeprefix("the best in a recipe: student: ")
    again = capgap_here("prune", str(RECIPE), *SHORT, f"student={best}", cwd=tmp_path, data=test_data)
    assert again.returncode == 0, again.stderr
    fixed = capgap_here("shapes", str(RECIPE), "student={layers: 3}", cwd=tmp_path, data=test_data)
    assert fixed.returncode == 2
    assert "by its scale" in fixed.stderr

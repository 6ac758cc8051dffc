"""Learning rates, and that a longer run goes on from a shorter one's branch as if it had run alone."""

import math

import pytest
import torch

from capgap.distill import OnlineTeacher, Run, train, train_together
from capgap.distill.schedule import Schedule
from capgap.errors import CheckpointError, RecipeError
from distill.runner import BLOCK, RandomBatches, settings
from tiny import tiny_model

WSD = {"schedule": "wsd", "warmup": 256, "decay": 0.25, "checkpoint_every": 1e9}


def rates(steps, **more):
    schedule = Schedule.of(settings(steps, **more), BLOCK)
    return [schedule.lr(step) for step in range(schedule.steps)]


def trained(folder, steps, *, teacher=True, **more):
    student = tiny_model(seed=1)
    run = Run(student, settings(steps, **WSD), folder / "checkpoints", **more)
    signal = OnlineTeacher(tiny_model(seed=2)) if teacher else None
    told = train(run, RandomBatches(), block=BLOCK, teacher=signal, quiet=True)
    return {n: p.detach().clone() for n, p in student.named_parameters()}, told


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_cosine_rises_over_its_warmup_and_falls_to_the_final_rate():
    found = rates(100, warmup=0.1, lr=1.0, final_lr=0.1)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)]
    assert found[10:] == pytest.approx(expected)


def test_wsd_is_constant_and_then_falls_linearly():
    found = rates(100, warmup=0.1, lr=1.0, schedule="wsd", decay=0.2)
    assert found[10:81] == [1.0] * 71
    assert found[81:] == pytest.approx([1 - i / 20 for i in range(1, 20)])


def test_a_warmup_in_tokens_is_the_same_however_long_the_run():
    assert (
        Schedule.of(settings(100, warmup=640), BLOCK).warmup
        == 5
        == Schedule.of(settings(7, warmup="640"), BLOCK).warmup
    )
    with pytest.raises(RecipeError, match=r"warmup = 640 tokens is more than distill\.tokens = 512"):
        Schedule.of(settings(4, warmup=640), BLOCK)
    with pytest.raises(ValueError, match="neither a share"):
        settings(4, warmup=-1)


def test_only_wsd_branches_and_only_after_the_warmup():
    assert Schedule.of(settings(100, schedule="wsd", decay=0.2, warmup=0.1), BLOCK).branches_at == 80
    assert Schedule.of(settings(100, schedule="cosine"), BLOCK).branches_at is None
    assert Schedule.of(settings(10, schedule="wsd", decay=0.5, warmup=0.6), BLOCK).branches_at is None


def test_runs_that_go_on_from_branches_end_as_if_they_had_run_alone(tmp_path):
    lengths = (8, 16, 40)
    alone = {steps: trained(tmp_path / f"alone-{steps}", steps) for steps in lengths}
    trunk = None
    for steps in lengths:
        place = tmp_path / f"chained-{steps}"
        weights, told = trained(place, steps, branch=place / "branch", trunk=trunk)
        expected, told_alone = alone[steps]
        assert equal(weights, expected)
        # The loss of the last step sums it all up; curves are logged at steps of each run's own.
        assert told.curve[-1]["ce"] == told_alone.curve[-1]["ce"]
        trunk = place / "branch"
    assert told.tokens == 40 * 128
    assert told.tokens_taken_over == 12 * 128  # three quarters of the 16 steps before
    assert told_alone.tokens_taken_over == 0


def test_a_branch_is_kept_by_a_run_that_went_on_from_there(tmp_path):
    _, first = trained(tmp_path, 8, branch=tmp_path / "branch")
    assert first.tokens_taken_over == 0
    # As after a kill between the checkpoint of that step and the branch.
    place = tmp_path / "again"
    trained(place, 16, trunk=tmp_path / "branch", branch=place / "branch")
    whole = [path.name for path in (place / "branch").iterdir()]
    assert whole == ["step-000000012"]


def test_a_branch_of_another_run_or_of_a_longer_one_is_refused(tmp_path):
    trained(tmp_path, 16, branch=tmp_path / "branch")
    with pytest.raises(CheckpointError, match="it must be the longer of the two"):
        trained(tmp_path / "shorter", 8, trunk=tmp_path / "branch")
    with pytest.raises(CheckpointError, match="another recipe, data, start or teacher"):
        trained(tmp_path / "other", 40, trunk=tmp_path / "branch", inputs={"data": "other"})


def test_students_of_unequal_tokens_side_by_side_end_as_each_does_alone(tmp_path):
    runs, alone = [], []
    for steps in (6, 12):
        alone.append(trained(tmp_path / f"alone-{steps}", steps)[0])
        runs.append(Run(tiny_model(seed=1), settings(steps, **WSD), tmp_path / f"beside-{steps}"))
    told = train_together(runs, RandomBatches(), block=BLOCK, teacher=OnlineTeacher(tiny_model(seed=2)), quiet=True)
    for run, expected in zip(runs, alone, strict=True):
        assert equal(dict(run.student.named_parameters()), expected)
    assert [t.tokens for t in told] == [6 * 128, 12 * 128]
    # The shorter one is safe while the longer goes on.
    assert [path.name for path in (tmp_path / "beside-6").iterdir()] == ["step-000000006"]

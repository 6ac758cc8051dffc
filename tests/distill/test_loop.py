"""The loop: resumes bit for bit, depends on no accumulation, on no number of processes, refuses what is not finite."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from capgap.distill import OnlineTeacher, Run, Stopped, targets, train, train_together
from capgap.errors import CheckpointError, RecipeError, TrainingError
from distill.runner import BLOCK, Interrupted, RandomBatches, distil, settings
from tiny import tiny_model


def run(folder, steps=20, **more):
    return distil(folder, settings(steps, **more))


def test_accumulation_changes_nothing(tmp_path):
    a, _ = run(tmp_path / "a")
    b, _ = run(tmp_path / "b", micro_batch_tokens=32)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_loss_falls_and_the_curve_tells(tmp_path):
    _, trained = run(tmp_path, steps=60, log_every=1)
    first, last = trained.curve[0], trained.curve[-1]
    assert last["kl"] < first["kl"]
    assert trained.tokens == 60 * 128 == last["tokens"]


def test_a_stop_request_writes_a_checkpoint_and_the_next_run_ends_bit_for_bit_the_same(tmp_path):
    whole, curve = run(tmp_path / "whole")

    class StopAt(RandomBatches):
        def rows(self, step, rank, world):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().rows(step, rank, world)

    with pytest.raises(Stopped) as stopped:
        distil(tmp_path / "cut", settings(20, checkpoint_every=1e9), batches=StopAt())
    assert (stopped.value.step, stopped.value.terminated) == (8, True)
    resumed, again = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["ce"] for row in again.curve] == [row["ce"] for row in curve.curve]


def test_damaged_checkpoint_is_passed_over_and_all_damaged_is_an_error(tmp_path, capsys):
    whole, _ = run(tmp_path, checkpoint_every=1e-6)
    newest = max(tmp_path.glob("step-*"))
    (newest / "__0_0.distcp").write_bytes(b"cut off")
    again, _ = run(tmp_path, checkpoint_every=1e-6)
    assert "damaged" in capsys.readouterr().err
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for path in tmp_path.glob("step-*"):
        (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        run(tmp_path)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path, checkpoint_every=1e-6)
    with pytest.raises(CheckpointError, match="another recipe"):
        run(tmp_path, seed=5)


@pytest.mark.parametrize("kept_bytes", [0, 3 * 16 * 64 * 4, 2**29])
def test_students_side_by_side_learn_as_if_alone_with_one_pass_of_the_teacher(tmp_path, monkeypatch, kept_bytes):
    """Whether of the teacher's logits none, those of a few chunks or all are kept for the next student."""
    monkeypatch.setattr(targets, "KEPT_BYTES", kept_bytes)
    more = {"log_every": 1, "chunk_tokens": 16}
    chosen = [
        settings(12, **more),
        settings(12, lr=3e-3, divergence="jsd", temperature=2.0, **more),
        settings(12, lr=2e-3, **more),
    ]
    alone = [distil(tmp_path / f"alone-{i}", own, student=tiny_model(seed=i)) for i, own in enumerate(chosen)]
    # One of them was stopped before, so that it is ahead of the other.
    stopping = Interrupted(4, signal.SIGTERM, tmp_path / "sent")
    with pytest.raises(Stopped):
        distil(tmp_path / "1", chosen[1], student=tiny_model(seed=1), batches=stopping)
    passes = []
    real = OnlineTeacher.targets
    monkeypatch.setattr(OnlineTeacher, "targets", lambda *args: passes.append(1) or real(*args))
    runs = [Run(tiny_model(seed=i), own, tmp_path / str(i)) for i, own in enumerate(chosen)]
    together = train_together(runs, RandomBatches(), block=BLOCK, teacher=OnlineTeacher(tiny_model(seed=2)), quiet=True)
    assert len(passes) == 12
    for run_, trained, (weights, before) in zip(runs, together, alone, strict=True):
        assert all(torch.equal(weights[n], p) for n, p in run_.student.named_parameters())
        assert [row["ce"] for row in trained.curve] == [row["ce"] for row in before.curve]


def test_students_side_by_side_skip_the_same_labels(tmp_path):
    def students(place: str) -> list[Run]:
        return [Run(tiny_model(seed=i), settings(4, lr=3e-3), tmp_path / place / str(i)) for i in (0, 1)]

    alone, together = students("alone"), students("together")
    for run_ in alone:
        train(run_, RandomBatches(), block=BLOCK, teacher=OnlineTeacher(tiny_model(seed=2)), unscored_id=3, quiet=True)
    teacher = OnlineTeacher(tiny_model(seed=2))
    train_together(together, RandomBatches(), block=BLOCK, teacher=teacher, unscored_id=3, quiet=True)
    for one, other in zip(alone, together, strict=True):
        pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_students_side_by_side_must_agree_on_the_batches(tmp_path):
    runs = [Run(tiny_model(), settings(5, seed=seed), tmp_path / str(seed), title=f"s{seed}") for seed in (0, 1)]
    with pytest.raises(RecipeError, match="s1: seed = 1, but s0 beside it has 0"):
        train_together(runs, RandomBatches(), block=BLOCK, quiet=True)


def test_labels_of_the_separator_are_not_scored(tmp_path):
    class Separated(RandomBatches):
        def rows(self, step, rank, world):
            ids = super().rows(step, rank, world)
            ids[:, 5::6] = 0
            return ids

    student, untouched = tiny_model(seed=1), tiny_model(seed=1)
    run_ = Run(student, settings(1, lr=1e-9, kd_weight=0.0), tmp_path)
    found = train(run_, Separated(), block=BLOCK, unscored_id=0, quiet=True).curve[0]["ce"]
    ids = Separated().rows(0, 0, 1)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    logits = untouched(ids[:, :-1]).logits
    assert found == pytest.approx(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    run_ = Run(
        tiny_model(seed=1),
        settings(10, evaluations=5, keep_checkpoints=1, checkpoint_every=1e-6),
        tmp_path,
        evaluate=lambda nats: SimpleNamespace(loss=next(losses)),
    )
    trained = train(run_, RandomBatches(), block=BLOCK, quiet=True)
    assert trained.start_loss == 9.0
    assert trained.score.loss == 5.0
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000000004", "step-000000010"]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, capsys):
    student = tiny_model(seed=1)

    class Poisoned(RandomBatches):
        """At step 3 the student is poisoned, so that its loss is not finite; then mended."""

        def rows(self, step, rank, world):
            with torch.no_grad():
                if step == 3:
                    self.good = student.model.norm.weight[0].item()
                    student.model.norm.weight[0] = float("nan")
                if step == 4:
                    student.model.norm.weight[0] = self.good
            return super().rows(step, rank, world)

    weights, trained = distil(tmp_path, settings(8, log_every=1), student=student, batches=Poisoned())
    assert trained.skipped == 1
    assert "step 3 is skipped, not finite: CE nan" in capsys.readouterr().err
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    assert "ce" not in trained.curve[3]
    assert "ce" in trained.curve[4]


def test_nan_without_end_stops_the_run_and_names_step_batch_and_checkpoint(tmp_path):
    teacher = tiny_model(seed=2)
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    message = r"step 2: not finite, as in the 2 steps before: .*KL nan.*the random batch 2; .*: none yet"
    with pytest.raises(TrainingError, match=message):
        distil(tmp_path, settings(9, max_skipped=2, checkpoint_every=1e9), teacher=teacher)


def test_the_teacher_does_not_learn_and_is_not_in_train_mode(tmp_path):
    teacher = tiny_model(seed=2).train()
    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    distil(tmp_path, settings(3), teacher=teacher)
    assert not teacher.training
    assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())


def test_the_curve_goes_to_the_trackers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, trained = run(tmp_path / "checkpoints", log_every=5, trackers=["tensorboard"])
    folder = tmp_path / "trackers/tensorboard"
    found = event_accumulator.EventAccumulator(str(folder)).Reload().Scalars("ce")
    assert [(event.step, event.value) for event in found] == [
        (row["step"], pytest.approx(row["ce"])) for row in trained.curve
    ]
    assert {"tokens_per_second", "memory_gib", "gradient_norm", "lr", "kl"} <= trained.curve[-1].keys()

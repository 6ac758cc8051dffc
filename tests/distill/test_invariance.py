"""Losses and steps depend on nothing that they should not: parts of a batch, chunks, the order of its rows."""

import pytest
import torch
from torch.nn import functional

from capgap.distill import Divergence, Mix, Objective, OnlineTeacher, Run, train
from distill.dense import KINDS
from distill.runner import BLOCK, RandomBatches, settings
from tiny import ids, tiny_model

SEPARATOR = 5


class Ragged(RandomBatches):
    """Half of the rows are mostly separators, which are not scored, so that parts differ in scored tokens."""

    def rows(self, step, rank, world):
        found = super().rows(step, rank, world)
        found[1::2, 4:] = SEPARATOR
        return found


class OtherOrder(Ragged):
    """The same rows, in another order at each step."""

    def rows(self, step, rank, world):
        found = super().rows(step, rank, world)
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(step))]


def trained(folder, batches=None, *, steps=3, **more):
    """The curve's rows and the trained weights.

    AdamW forgives any factor on the gradients and clipping any too large; with a large eps and no clipping steps are
    in proportion to gradients, and a wrong factor shows.
    """
    chosen = settings(steps, log_every=1, lr=0.3, eps=1.0, clip=1e9, warmup=0.0, **more)
    student = tiny_model(seed=1)
    run = Run(student, chosen, folder)
    teacher = OnlineTeacher(tiny_model(seed=2))
    found = train(run, batches or Ragged(), block=BLOCK, teacher=teacher, unscored_id=SEPARATOR, quiet=True)
    rows = [{key: row[key] for key in ("ce", "kl", "gradient_norm")} for row in found.curve]
    return rows, {name: p.detach().clone() for name, p in student.named_parameters()}


def assert_same_training(found, expected) -> None:
    """But for float32 sums in another order."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def check_accumulation(folder) -> None:
    """Parts of 8, 3 and 1 rows of 8, the last of the second shorter than the others."""
    whole = trained(folder / "whole")
    start = dict(tiny_model(seed=1).named_parameters())
    assert max(float((weight - start[name]).detach().abs().max()) for name, weight in whole[1].items()) > 0.01
    for micro in (3 * BLOCK, BLOCK):
        assert_same_training(trained(folder / str(micro), micro_batch_tokens=micro), whole)


def test_accumulation_changes_nothing(tmp_path):
    check_accumulation(tmp_path)


def test_the_order_of_rows_changes_nothing(tmp_path):
    assert_same_training(
        trained(tmp_path / "other", OtherOrder(), micro_batch_tokens=2 * BLOCK), trained(tmp_path / "as it is")
    )


def test_the_size_of_chunks_changes_nothing(tmp_path):
    whole = trained(tmp_path / "whole", divergence="jsd", temperature=2.0)
    for chunk in (1, 7):
        found = trained(tmp_path / str(chunk), divergence="jsd", temperature=2.0, chunk_tokens=chunk)
        assert_same_training(found, whole)


def check_scored_tokens(folder) -> None:
    """The first step's cross-entropy is the mean over all labels but separators, as the model's own logits give it."""
    rows, _ = trained(folder, steps=1)
    text = Ragged().rows(0, 0, 1)
    with torch.no_grad():
        logits = tiny_model(seed=1)(text[:, :-1]).logits.flatten(0, 1)
    labels = text[:, 1:].flatten()
    expected = functional.cross_entropy(logits[labels != SEPARATOR], labels[labels != SEPARATOR])
    assert rows[0]["ce"] == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_is_the_mean_over_the_scored_tokens(tmp_path):
    check_scored_tokens(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_parts_is_that_of_the_whole(kind):
    """Directly, gradient by gradient, whichever way a batch is cut."""
    student, teacher, text = tiny_model(seed=1), OnlineTeacher(tiny_model(seed=2)), ids(rows=6, length=9)
    labels = text[:, 1:].clone()
    labels[::2, 3:] = -100
    objective = Objective(student, Mix(Divergence(kind, KINDS[kind]), 0.5, 1.5))  # type: ignore[arg-type]

    def run(order):
        student.zero_grad()
        totals = torch.zeros(3)
        for part in order:
            inputs = text[part, :-1]
            sums = objective(inputs, labels[part], teacher.targets(inputs, torch.tensor(part)))
            sums.loss.backward()
            totals += torch.stack([value.detach() for value in sums])
        return totals, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    expected, expected_gradients = run([[0, 1, 2, 3, 4, 5]])
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for order in ([[3, 1, 5, 0, 4, 2]], [[0, 1, 2], [3, 4, 5]], [[5], [0, 3, 2, 1], [4]]):
        found, gradients = run(order)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)

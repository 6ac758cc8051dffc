"""Losses between layers: against plain loops; gradients for student and projection alone; in the objective."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.distill import Divergence, Mix, Objective, OnlineTeacher
from capgap.distill.hidden import HiddenLoss, layer_states
from capgap.distill.targets import DenseChunk, StoredTargets
from capgap.errors import RecipeError, ShapeError
from capgap.models import hidden_states
from distill.test_objective import FAMILIES, family
from tiny import ids

MIX = Mix(Divergence(), 0.5, 1.0, 7)


def by_loops(kind, projection, student_layers, teacher_layers) -> float:
    """float64, a token at a time."""
    n, total_layers, total = len(student_layers), len(teacher_layers), 0.0
    for i in range(1, n + 1):
        layer = round(i * total_layers / n)
        for s, t in zip(student_layers[i - 1].tolist(), teacher_layers[layer - 1].tolist(), strict=True):
            ours = np.array(s) if projection is None else projection @ np.array(s)
            theirs = np.array(t)
            if kind == "mse":
                total += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(theirs)
            else:
                total += 1 - float(ours @ theirs) / float(np.sqrt(ours @ ours) * np.sqrt(theirs @ theirs))
    return total / n


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["mse", "cosine"]),
    layers=st.tuples(st.integers(1, 7), st.integers(0, 5)),
    widths=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_value(kind, layers, widths, tokens, seed):
    """The matching too: that of the paper's formula for any pair of depths."""
    student, teacher = (
        family("llama", seed=0, width=width, layers=depth)
        for width, depth in zip(widths, (layers[0], sum(layers)), strict=True)
    )
    loss = HiddenLoss(student, teacher, kind)
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (
        [torch.randn(tokens, width, generator=generator) for _ in range(depth)]
        for width, depth in zip(widths, (layers[0], sum(layers)), strict=True)
    )
    weight = None if widths[0] == widths[1] else loss.projection.weight.detach().double().numpy()  # type: ignore[union-attr]
    expected = by_loops(kind, weight, ours, theirs)
    assert float(loss(ours, theirs).detach()) == pytest.approx(expected, rel=1e-5)
    if weight is None:
        assert list(loss.parameters()) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_layer_states_are_the_inputs_of_the_next_layers_and_last_what_the_head_reads(kind):
    model = family(kind, seed=0, layers=3)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3)
    seen = []
    for layer in layers[1:]:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        states = layer_states(model, ids())
        last = hidden_states(model, ids())
    assert len(states) == 3
    for a, b in zip(states, [*seen[:2], last], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("width", [32, 16])
def test_in_the_objective(kind, width):
    """The loss is the one without, and the weighted hidden loss of the scored tokens; others learn nothing."""
    student, teacher = family("llama", seed=1, width=width, layers=2), family("llama", seed=2, layers=4)
    text = ids(rows=3)
    labels = text[:, 1:].clone()
    labels[1:, 4:] = -100
    hidden = HiddenLoss(student, teacher, kind)
    online = OnlineTeacher(teacher, layers=True)
    targets = online.targets(text[:, :-1], torch.arange(3))
    found = Objective(student, MIX, hidden, 0.25)(text[:, :-1], labels, targets)
    without = Objective(student, MIX)(text[:, :-1], labels, targets)
    scored = labels.flatten() >= 0
    ours = [s.flatten(0, 1)[scored].detach() for s in layer_states(student, text[:, :-1])]
    theirs = [s.flatten(0, 1)[scored] for s in layer_states(teacher, text[:, :-1])]
    weight = None if width == 32 else hidden.projection.weight.detach().double().numpy()  # type: ignore[union-attr]
    expected = by_loops(kind, weight, ours, theirs)
    assert float((found.loss - without.loss).detach()) == pytest.approx(0.25 * expected, rel=1e-4)
    assert (float(found.ce), float(found.kl)) == (float(without.ce), float(without.kl))
    (found.loss - without.loss).backward()
    got = {name for name, p in student.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert got >= {name for name, _ in student.named_parameters() if "layers." in name or "norm" in name}
    assert all(bool((p.grad != 0).any()) for p in hidden.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_equal_models_have_none_and_it_falls_when_it_is_trained():
    model, text = family("llama", seed=1, layers=3), ids()
    states = [s.flatten(0, 1) for s in layer_states(model, text)]
    for kind in ("mse", "cosine"):
        assert float(HiddenLoss(model, model, kind)(states, states).detach()) == pytest.approx(0.0, abs=1e-5)
    student = family("llama", seed=2, width=16, layers=1)
    objective = Objective(student, MIX, HiddenLoss(student, model), 1.0)
    assert "hidden.projection.weight" in dict(objective.named_parameters())
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    targets = OnlineTeacher(model, layers=True).targets(text[:, :-1], torch.arange(2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(text[:, :-1], text[:, 1:], targets).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_projection_is_the_same_whatever_was_drawn_before():
    student, teacher = family("llama", seed=1, width=16), family("llama", seed=2)
    first, _, second = HiddenLoss(student, teacher), torch.rand(3), HiddenLoss(student, teacher)
    assert torch.equal(*(loss.projection.weight for loss in (first, second)))  # type: ignore[arg-type]
    states = torch.randn(5, 16)
    torch.testing.assert_close(first.projection(states).norm(dim=-1), states.norm(dim=-1))


def test_no_scored_token_gives_zero_and_gradients_of_zero():
    student, teacher = family("llama", seed=1, width=16), family("llama", seed=2)
    objective = Objective(student, MIX, HiddenLoss(student, teacher))
    targets = OnlineTeacher(teacher, layers=True).targets(ids(), torch.arange(2))
    loss = objective(ids(), torch.full((2, 12), -100), targets).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not bool(p.grad.any()) for p in objective.parameters())


def test_without_a_teacher_there_is_no_hidden_loss():
    student, teacher = family("llama", seed=1), family("llama", seed=2)
    objective = Objective(student, MIX, HiddenLoss(student, teacher))
    assert torch.equal(objective.nats(ids(), ids(seed=1)), Objective(student, MIX).nats(ids(), ids(seed=1)))


def test_refusals():
    student, teacher = family("llama", seed=1), family("llama", seed=2, layers=3)
    with pytest.raises(RecipeError, match="the student has 3 layers, the teacher 2"):
        HiddenLoss(teacher, student)
    with pytest.raises(RecipeError, match="'l1': not one of mse, cosine"):
        HiddenLoss(student, teacher, "l1")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="one teacher, not 2"):
        OnlineTeacher(teacher, student, layers=True)
    objective = Objective(student, MIX, HiddenLoss(student, teacher))
    stored = StoredTargets(DenseChunk(torch.zeros(24, 64)))
    for targets in (OnlineTeacher(teacher).targets(ids(), torch.arange(2)), stored):
        with pytest.raises(RecipeError, match="needs the teacher's layers"):
            objective(ids(), ids(seed=1), targets)
    with pytest.raises(ShapeError, match="1 and 3 layers of student and teacher; made for 2 and 3"):
        HiddenLoss(student, teacher)([torch.zeros(1, 32)], [torch.zeros(1, 32)] * 3)

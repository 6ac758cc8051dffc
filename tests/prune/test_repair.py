"""A repair gives back what can be given back, leaves alone what is whole, and lowers the loss of a real model."""

import pytest
import torch

from capgap.anatomy import anatomy_of
from capgap.data import load_tokenizer
from capgap.models import load_model, sum_cross_entropy
from capgap.prune import Keep, cut_model, repair, score, select, solve_shape
from tiny import ALL, ids, tiny_model


def whole(anatomy) -> Keep:
    shape = anatomy.shape
    neurons = torch.arange(shape.neurons)
    return Keep(
        tuple(range(shape.layers)),
        torch.arange(shape.hidden),
        (torch.arange(shape.kv_heads),) * shape.layers,
        (neurons.expand(shape.experts, -1) if shape.experts else neurons,) * shape.layers,
        (torch.arange(shape.experts),) * shape.layers if shape.experts else None,
    )


BATCHES = [ids(8, 33, seed=n) for n in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_what_was_not_cut_is_left_as_it_is(kind):
    parent = tiny_model(kind)
    anatomy = anatomy_of(parent.config)
    student = cut_model(parent, anatomy, whole(anatomy))
    repair(student, parent, anatomy, whole(anatomy), BATCHES, quiet=True)
    for (name, before), (_, after) in zip(parent.named_parameters(), student.named_parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3", "starcoder2", "falcon"])
def test_a_neuron_that_others_can_stand_in_for_is_made_up_for(kind):
    """The last eight neurons do what the first eight do: without them the rest can compute the same."""
    parent = tiny_model(kind)
    anatomy = anatomy_of(parent.config)
    keep = whole(anatomy)
    keep = Keep(keep.layers, keep.hidden, keep.kv_heads, (torch.arange(40),) * 3)
    for name, weight in parent.named_parameters():
        row, layer, axes = anatomy.table.match(name)
        if layer is None or "neuron" not in str(axes) or row.name in anatomy.table.masks["neuron"]:
            continue
        for half in weight.chunk(2) if name.endswith("gate_up_proj.weight") else [weight]:
            half = half.T if row.transposed and half.dim() == 2 else half
            half[40:] = half[:8].clone()
    wanted = parent.eval()(BATCHES[0]).logits
    student = cut_model(parent, anatomy, keep).eval()
    before = (student(BATCHES[0]).logits - wanted).norm()
    repair(student, parent, anatomy, keep, BATCHES, what="outputs", quiet=True)
    assert (student(BATCHES[0]).logits - wanted).norm() < 0.1 * before


@torch.no_grad()
def test_the_first_layer_that_writes_has_the_ridge_solution():
    """Against numpy's least squares on the stacked system, whose lower part draws towards the weights that were cut."""
    import numpy as np

    parent = tiny_model()
    anatomy = anatomy_of(parent.config)
    keep = select(score(parent, anatomy, [ids()], method="random", quiet=True), solve_shape(anatomy, 20_000))
    student = cut_model(parent, anatomy, keep).eval()
    cut = student.model.layers[0].self_attn.o_proj.weight.double().numpy().copy()
    seen = {}

    def watch(model, key):
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(lambda _m, x: seen.__setitem__(f"{key} state", x[0]))
        layer.self_attn.o_proj.register_forward_hook(
            lambda _m, x, out: seen.update({f"{key} in": x[0], f"{key} out": out})
        )

    watch(parent, "parent"), watch(student, "student")
    rows = []
    for batch in BATCHES:
        parent(batch[:, :-1]), student(batch[:, :-1])
        wanted = (seen["parent state"] + seen["parent out"])[..., keep.hidden] - seen["student state"]
        rows.append((seen["student in"].flatten(0, 1), wanted.flatten(0, 1)))
    x, y = (torch.cat(part).double().numpy() for part in zip(*rows, strict=True))
    ridge = np.sqrt(0.01 * (x * x).sum(0).mean())
    stacked = np.vstack([x, ridge * np.eye(x.shape[1])]), np.vstack([y, ridge * cut.T])
    solution = np.linalg.lstsq(*stacked, rcond=None)[0].T
    repair(student, parent, anatomy, keep, BATCHES, what="outputs", quiet=True)
    np.testing.assert_allclose(student.model.layers[0].self_attn.o_proj.weight.numpy(), solution, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("what", ["norms", "outputs", "all"])
def test_every_architecture_comes_closer_to_its_parent(kind, what):
    parent = tiny_model(kind)
    anatomy = anatomy_of(parent.config)
    target = round(0.6 * sum(p.numel() for p in parent.parameters()))
    keep = select(score(parent, anatomy, [ids()], method="magnitude", quiet=True), solve_shape(anatomy, target))
    student = cut_model(parent, anatomy, keep).eval()
    wanted = torch.cat([parent(batch).logits for batch in BATCHES])
    before = (torch.cat([student(batch).logits for batch in BATCHES]) - wanted).norm()
    repair(student, parent, anatomy, keep, BATCHES, what=what, quiet=True)
    after = (torch.cat([student(batch).logits for batch in BATCHES]) - wanted).norm()
    # Norms alone are brought nearer to the parent's one by one, which need not show at the end of random layers.
    assert after < (1.02 if what == "norms" else 1.0) * before


def test_a_real_models_loss_is_lowered_on_text_it_was_not_repaired_on(test_data):
    parent = load_model(test_data / "models" / "stories260k-hf")
    tokenizer = load_tokenizer(test_data / "models" / "stories260k-hf")
    text = (test_data / "text" / "tinystories" / "tinystories_10k.txt").read_text(encoding="utf-8")[:60_000]
    blocks = torch.tensor(tokenizer(text)["input_ids"])[: 128 * 129].view(128, 129)
    anatomy = anatomy_of(parent.config)
    scores = score(parent, anatomy, blocks[:32].split(1), quiet=True)
    keep = select(scores, solve_shape(anatomy, 130_000))
    losses = []
    for what in ("none", "norms", "outputs", "all"):
        student = cut_model(parent, anatomy, keep).eval()
        repair(student, parent, anatomy, keep, blocks[:96].split(32), what=what, quiet=True)
        with torch.no_grad():
            held_out = blocks[96:]
            losses.append(float(sum_cross_entropy(student, held_out[:, :-1], held_out[:, 1:])) / 32 / 128)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5

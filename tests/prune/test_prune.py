"""Which parts are chosen, and the shapes that are found; that the cut itself is right is proved in tests/anatomy."""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.anatomy import Shape, anatomy_of
from capgap.cost import count_parameters
from capgap.errors import ModelError, ShapeError
from capgap.plan.families import family_names, load_family
from capgap.prune import Keep, Scores, cut_model, list_shapes, losses_without, score, select, solve_shape
from capgap.prune.importance import magnitudes
from tiny import ALL, ids, tiny_config, tiny_model


def whole(model) -> Keep:
    shape = anatomy_of(model.config).shape
    return Keep(
        tuple(range(shape.layers)),
        torch.arange(shape.hidden),
        (torch.arange(shape.kv_heads),) * shape.layers,
        (torch.arange(shape.neurons).expand(*([shape.experts] if shape.experts else []), -1),) * shape.layers,
        (torch.arange(shape.experts),) * shape.layers if shape.experts else None,
    )


def test_cut_layers_equal_the_teacher_without_them():
    model = tiny_model(layers=4)
    keep = whole(model)
    keep = Keep((1, 2), keep.hidden, keep.kv_heads[:2], keep.neurons[:2])
    cut = cut_model(model, anatomy_of(model.config), keep).eval()
    hidden = model.model.embed_tokens(ids())
    rope = model.model.rotary_emb(hidden, torch.arange(12)[None])
    for i in (1, 2):
        hidden = model.model.layers[i](hidden, position_embeddings=rope, attention_mask=None)
    torch.testing.assert_close(cut(ids()).logits, model.lm_head(model.model.norm(hidden)), rtol=1e-5, atol=1e-5)


def squares(model) -> float:
    return sum(float(p.detach().double().square().sum()) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("kind", ALL)
def test_the_magnitude_of_what_is_cut_is_what_the_weights_lose(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(model.config)
    shape, found = anatomy.shape, magnitudes(model, anatomy)
    generator = torch.Generator().manual_seed(0)

    def check(lost: torch.Tensor, **kept) -> None:
        whole_model = whole(model)
        student = cut_model(model, anatomy, replace(whole_model, **kept))
        assert squares(model) - squares(student) == pytest.approx(float(lost), rel=1e-5)

    drop = torch.randint(0, 48, (3, shape.experts or 1), generator=generator)
    kept = [torch.stack([torch.tensor([n for n in range(48) if n != i]) for i in row.tolist()]) for row in drop]
    neurons = found["neurons"].square().view(3, -1, 48).gather(-1, drop[..., None])
    check(neurons.sum(), neurons=tuple(kept if shape.experts else (rows[0] for rows in kept)))
    if shape.experts:
        check(
            found["experts"].square()[:, 3].sum() + sum(gates(model, 3)),
            experts=(torch.arange(3),) * 3,
        )
    if anatomy.hidden_of(1) is None:
        check(found["kv_heads"].square()[:, 1].sum(), kv_heads=(torch.tensor([0]),) * 3)
        if not kind.startswith("gemma"):  # whose embeddings are rescaled
            check(found["hidden"].square()[24:].sum(), hidden=torch.arange(24))


def gates(model, expert: int) -> list[float]:
    routers = [p.detach() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    return [float(router[expert].square().sum()) for router in routers]


def test_activations_are_those_of_the_neurons():
    model = tiny_model()
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, x: seen.append(x[0])) for layer in model.model.layers
    ]
    batches = [ids(seed=1), ids(seed=2)]
    for batch in batches:
        model(batch[:, :-1])
    for hook in hooks:
        hook.remove()
    found = score(model, anatomy_of(model.config), batches, method="activation", quiet=True).neurons
    for layer in range(3):
        both = torch.cat([seen[layer], seen[3 + layer]])
        wanted = sum((sequence.abs().sum(0) / len(sequence)) ** 2 for sequence in both) ** 0.5
        torch.testing.assert_close(found[layer], wanted / wanted.norm())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("method", ["activation", "magnitude", "random"])
def test_every_method_scores_every_architecture_and_compares_its_layers(kind, method):
    model = tiny_model(kind)
    anatomy = anatomy_of(model.config)
    if method == "activation" and anatomy.shape.experts:
        with pytest.raises(ModelError, match="experts cannot be watched"):
            score(model, anatomy, [ids()], method=method, quiet=True)
        return
    found = score(model, anatomy, [ids()], method=method, quiet=True)
    assert found.shape == anatomy.shape
    assert found.similarity is not None
    torch.testing.assert_close(found.similarity.diagonal(), torch.ones(4))
    assert all(p.requires_grad for p in model.parameters())
    before, after = (model(ids()[:, :-1], output_hidden_states=True).hidden_states[i].flatten(0, 1) for i in (0, 1))
    alike = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    torch.testing.assert_close(found.similarity[0, 1], alike, rtol=1e-4, atol=1e-5)


def test_layers_that_change_little_are_dropped():
    similarity = torch.eye(6)
    for a, b, alike in ((0, 1, 0.5), (1, 2, 0.9), (2, 3, 0.6), (3, 4, 0.95), (4, 5, 0.4)):
        similarity[a, b] = alike
    similarity[0, 2], similarity[1, 3], similarity[2, 4], similarity[3, 5] = 0.3, 0.8, 0.7, 0.2
    scores = Scores(torch.rand(32), torch.rand(5, 2), torch.rand(5, 48), similarity=similarity)
    assert select(scores, Shape(3, 32, 2, 48), layers="influence").layers == (0, 2, 4)
    assert select(scores, Shape(3, 32, 2, 48), layers="contiguous").layers == (0, 3, 4)
    assert select(scores, Shape(5, 32, 2, 48), layers="contiguous").layers == (0, 1, 2, 3, 4)
    with pytest.raises(ShapeError, match="layers were compared"):
        select(Scores(*scores_of_three()), Shape(2, 32, 2, 48), layers="influence")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "falcon", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("block", [1, 2])
def test_the_loss_without_layers_is_that_of_a_model_cut_there(kind, block):
    model = tiny_model(kind)
    anatomy = anatomy_of(model.config)
    batches = [ids(seed=1), ids(seed=2)]
    found = losses_without(model, anatomy, batches, block=block, quiet=True)
    keep = whole(model)
    for first in range(4 - block):
        kept = [i for i in range(3) if not first <= i < first + block]
        cut = Keep(tuple(kept), keep.hidden, *((part[0],) * len(kept) for part in (keep.kv_heads, keep.neurons)))
        student = cut_model(model, anatomy, cut).eval()
        losses = [
            torch.nn.functional.cross_entropy(student(b[:, :-1]).logits.flatten(0, 1), b[:, 1:].flatten())
            for b in batches
        ]
        torch.testing.assert_close(found[first], torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_layers_are_chosen_by_losses():
    scores = Scores(torch.rand(32), torch.rand(5, 2), torch.rand(5, 48))
    shape = Shape(3, 32, 2, 48)
    losses = torch.tensor([9.0, 2.0, 5.0, 3.0, 8.0])
    assert select(scores, shape, layers="loss", losses=losses).layers == (0, 2, 4)
    assert select(scores, shape, layers="block_loss", losses=losses[:4]).layers == (0, 3, 4)
    assert select(scores, Shape(5, 30, 2, 48), layers="loss").layers == (0, 1, 2, 3, 4)
    with pytest.raises(ShapeError, match="needs the 4 losses"):
        select(scores, shape, layers="block_loss", losses=losses)


def scores_of_three() -> tuple[torch.Tensor, ...]:
    return torch.rand(32), torch.rand(3, 2), torch.rand(3, 48)


def test_of_experts_the_best_stay_and_each_keeps_its_own_best_neurons():
    scores = Scores(torch.rand(32), torch.rand(3, 2), torch.rand(3, 4, 48), torch.rand(3, 4))
    keep = select(scores, Shape(3, 32, 2, 40, 3))
    assert keep.shape == Shape(3, 32, 2, 40, 3)
    assert keep.experts is not None
    for i in range(3):
        assert int(scores.experts[i].argmin()) not in keep.experts[i].tolist()
        for expert in range(4):
            assert set(scores.neurons[i, expert].topk(40).indices.tolist()) == set(keep.neurons[i][expert].tolist())
    with pytest.raises(ShapeError, match=r"student\.experts = 5"):
        select(scores, Shape(3, 32, 2, 40, 5))


@pytest.mark.parametrize("experts", [None, 4])
def test_scores_are_saved_and_read_again(tmp_path, experts):
    rows = (3, 48) if experts is None else (3, 4, 48)
    scores = Scores(torch.rand(32), torch.rand(3, 2), torch.rand(rows), None if experts is None else torch.rand(3, 4))
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.shape == Shape(3, 32, 2, 48, experts)
    assert torch.equal(again.neurons, scores.neurons)


def test_expressiveness_is_the_mean_of_absolute_gradients_and_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    anatomy = anatomy_of(model.config)
    both = score(model, anatomy, [ids(seed=1), ids(seed=2)], quiet=True)
    one = score(model, anatomy, [ids(seed=1)], quiet=True)
    assert not torch.equal(both.hidden, one.hidden)
    torch.testing.assert_close(both.neurons.norm(dim=1), torch.ones(3))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.3, 1.0))
def test_solved_shape_is_within_one_percent_and_legal(share):
    config = tiny_config(layers=2)
    config.intermediate_size, config.hidden_size, config.num_attention_heads = 344, 128, 8
    config.num_key_value_heads = 8
    anatomy = anatomy_of(config)
    target = round(share * count_parameters(config).total)
    shape = solve_shape(anatomy, target)
    assert abs(count_parameters(anatomy.config_at(shape)).total - target) <= 0.01 * target


@pytest.mark.parametrize("name", family_names())
def test_ten_targets_of_every_member_of_every_family_are_met(name):
    family = load_family(name)
    for member in family.members:
        anatomy = anatomy_of(family.config_of(member))
        multiple = 64 if anatomy.shape.hidden >= 1024 else 1
        for share in range(30, 80, 5):
            target = round(share / 100 * count_parameters(anatomy.config).total)
            shape = solve_shape(anatomy, target, multiple=multiple)
            assert abs(count_parameters(anatomy.config_at(shape)).total - target) <= 0.01 * target, (member.name, share)


def test_minima_is_found_in_llama2_7b():
    """MiniMA's rules: three quarters of the layers; hidden size, heads and neurons cut at one rate to its 3B."""
    family = load_family("llama-2")
    anatomy = anatomy_of(family.config_of(family.members[0]))
    minima = Shape(24, 3072, 24, 8192)
    target = count_parameters(anatomy.config_at(minima, range(24))).total
    assert solve_shape(anatomy, target, layers=24, multiple=64) == minima


def test_layers_may_go_first_or_at_the_rate_of_the_widths():
    family = load_family("llama-2")
    anatomy = anatomy_of(family.config_of(family.members[0]))
    target = count_parameters(anatomy.config_at(Shape(24, 3072, 24, 8192), range(24))).total
    assert solve_shape(anatomy, target, multiple=64, prefer="even") == Shape(24, 3072, 24, 8192)
    wide, deep = (solve_shape(anatomy, target, multiple=64, prefer=way) for way in ("width", "depth"))
    assert wide.layers == 32
    assert deep == Shape(13, 4096, 32, 11008)
    for shape in (wide, deep):
        assert abs(count_parameters(anatomy.config_at(shape, range(shape.layers))).total - target) <= 0.01 * target


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0.4, 0.9),
    low=st.integers(8, 20),
    least=st.integers(1000, 2500),
    way=st.sampled_from(["width", "depth", "even"]),
)
def test_limits_are_kept(share, low, least, way):
    family = load_family("llama-3")
    anatomy = anatomy_of(family.config_of(family.members[0]))
    target = round(share * count_parameters(anatomy.config).total)
    limits = {"layers": (low, 24), "hidden": (least, 4096), "neurons": (2048, 8192)}
    shape = None
    with contextlib.suppress(ShapeError):  # where the limits leave no room
        shape = solve_shape(anatomy, target, multiple=64, prefer=way, limits=limits)
    if shape is None:
        return
    assert low <= shape.layers <= 24
    assert least <= shape.hidden <= 4096
    assert 2048 <= shape.neurons <= 8192
    assert abs(count_parameters(anatomy.config_at(shape, range(shape.layers))).total - target) <= 0.01 * target


def test_sizes_stay_multiples_within_limits():
    family = load_family("llama-3")
    anatomy = anatomy_of(family.config_of(family.members[0]))
    limits = {"neurons": (1000, 3000), "hidden": (1500, 4096)}
    shape = solve_shape(anatomy, round(0.4 * count_parameters(anatomy.config).total), multiple=64, limits=limits)
    assert shape.neurons % 64 == shape.hidden % 64 == 0
    with pytest.raises(ShapeError, match="neurons from 100 to 120"):
        solve_shape(anatomy, 10**9, multiple=64, limits={"neurons": (100, 120)})


def test_limits_without_room_are_named():
    limits = {"hidden": (30, 32), "kv_heads": (2, 2), "layers": (3, 3)}
    with pytest.raises(ShapeError, match=r"hidden from 30 to 32, kv_heads from 2 to 2, .* comes within 1 %"):
        solve_shape(anatomy_of(tiny_config()), 8_000, limits=limits)


def test_listed_shapes_have_different_numbers_of_layers_the_solved_one_first():
    anatomy = anatomy_of(tiny_config(layers=6))
    target = round(0.5 * count_parameters(anatomy.config).total)
    found = list_shapes(anatomy, target, count=4)
    assert found[0] == solve_shape(anatomy, target)
    assert len({shape.layers for shape in found}) == len(found) > 2
    assert list_shapes(anatomy, target, count=1) == found[:1]


def test_impossible_shapes_are_refused():
    anatomy = anatomy_of(tiny_config())
    with pytest.raises(ShapeError, match="cannot be cut"):
        solve_shape(anatomy, 10**9)
    with pytest.raises(ShapeError, match="not a multiple"):
        anatomy.config_at(Shape(2, 31, 2, 48))
    with pytest.raises(ShapeError, match=r"student\.neurons = 99"):
        select(Scores(torch.rand(32), torch.rand(3, 2), torch.rand(3, 48)), Shape(3, 32, 2, 99))
    with pytest.raises(ShapeError, match=r"2 experts asked of a model that has none"):
        solve_shape(anatomy, 20_000, experts=2)

"""Which parts are chosen, and the shapes that are found; that the cut itself is right is proved in tests/anatomy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.anatomy import Shape, anatomy_of
from capgap.cost import count_parameters
from capgap.errors import ShapeError
from capgap.plan.families import family_names, load_family
from capgap.prune import Keep, Scores, cut_model, expressiveness, select, solve_shape
from tiny import ids, tiny_config, tiny_model


def whole(model) -> Keep:
    shape = anatomy_of(model.config).shape
    return Keep(
        tuple(range(shape.layers)),
        torch.arange(shape.hidden),
        (torch.arange(shape.kv_heads),) * shape.layers,
        (torch.arange(shape.neurons),) * shape.layers,
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
    both = expressiveness(model, anatomy, [ids(seed=1), ids(seed=2)], quiet=True)
    one = expressiveness(model, anatomy, [ids(seed=1)], quiet=True)
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

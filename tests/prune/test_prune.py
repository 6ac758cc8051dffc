"""Cutting is proved against the teacher with masks; scores against the gradients of real masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from capgap.anatomy import Shape, anatomy_of
from capgap.cost import count_parameters
from capgap.errors import ModelError, ShapeError
from capgap.models import load_model, save_model
from capgap.prune import Keep, Scores, cut_model, expressiveness, select, solve_shape
from capgap.prune.importance import mask_gradients
from tiny import ARCHITECTURES, ids, tiny_config, tiny_model

BOTH_HEADS = [(kind, tied) for kind in ARCHITECTURES for tied in (True, False)]


def whole(model) -> Keep:
    shape = anatomy_of(model.config).shape(model.config)
    return Keep(
        tuple(range(shape.layers)),
        torch.arange(shape.hidden),
        (torch.arange(shape.kv_heads),) * shape.layers,
        (torch.arange(shape.neurons),) * shape.layers,
    )


@pytest.mark.parametrize(("kind", "tied"), BOTH_HEADS)
def test_every_parameter_matches_exactly_one_row_with_its_shape(kind, tied):
    model = tiny_model(kind, tied=tied)
    anatomy = anatomy_of(model.config)
    sizes = anatomy.sizes(model.config)
    for name, parameter in model.named_parameters():
        assert tuple(sizes[axis] for axis in anatomy.match(name)[2]) == tuple(parameter.shape), name


def test_unknown_architecture_and_parameter_are_named():
    model = tiny_model()
    with pytest.raises(ModelError, match="0 rows"):
        anatomy_of(model.config).match("model.layers.0.self_attn.sinks.weight")
    model.config.model_type = "mamba"
    with pytest.raises(ModelError, match=r"mamba.*llama"):
        anatomy_of(model.config)


@pytest.mark.parametrize(("kind", "tied"), BOTH_HEADS)
def test_no_cut_gives_the_same_logits(kind, tied):
    model = tiny_model(kind, tied=tied)
    cut = cut_model(model, anatomy_of(model.config), whole(model)).eval()
    assert torch.equal(cut(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(("kind", "tied"), BOTH_HEADS)
def test_cut_heads_and_neurons_equal_the_teacher_with_them_masked(kind, tied):
    model = tiny_model(kind, tied=tied)
    keep = whole(model)
    keep = Keep(
        keep.layers,
        keep.hidden,
        tuple(torch.tensor([i % 2]) for i in keep.layers),
        tuple(torch.arange(i, 40 + i) for i in keep.layers),
    )
    cut = cut_model(model, anatomy_of(model.config), keep).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            lost_head = 1 - i % 2
            layer.self_attn.o_proj.weight[:, lost_head * 16 : (lost_head + 1) * 16] = 0
            lost = torch.ones(48, dtype=torch.bool)
            lost[keep.neurons[i]] = False
            layer.mlp.down_proj.weight[:, lost] = 0
    torch.testing.assert_close(cut(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cut_layers_equal_the_teacher_without_them(kind):
    model = tiny_model(kind, layers=4)
    keep = whole(model)
    keep = Keep((1, 2), keep.hidden, keep.kv_heads[:2], keep.neurons[:2])
    cut = cut_model(model, anatomy_of(model.config), keep).eval()
    hidden = model.model.embed_tokens(ids())
    rope = model.model.rotary_emb(hidden, torch.arange(12)[None])
    for i in (1, 2):
        out = model.model.layers[i](hidden, position_embeddings=rope, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(cut(ids()).logits, model.lm_head(model.model.norm(hidden)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cut_model_reloads_as_a_plain_folder_with_the_counted_parameters(kind, tmp_path):
    model = tiny_model(kind)
    shape = Shape(2, 24, 1, 20)
    scores = Scores(torch.rand(32), torch.rand(3, 2), torch.rand(3, 48))
    cut = cut_model(model, anatomy_of(model.config), select(scores, shape)).eval()
    save_model(cut, tmp_path / "student", tokenizer=None, lineage={})
    again = load_model(tmp_path / "student").eval()
    assert torch.equal(again(ids()).logits, cut(ids()).logits)
    assert sum(p.numel() for p in again.parameters()) == count_parameters(again.config).total
    assert anatomy_of(again.config).shape(again.config) == shape


@pytest.mark.parametrize(("kind", "tied"), BOTH_HEADS)
def test_scores_equal_the_gradients_of_real_masks(kind, tied):
    model = tiny_model(kind, tied=tied)
    hidden_mask = torch.ones(32, requires_grad=True)
    head_masks = torch.ones(3, 2, requires_grad=True)
    neuron_masks = torch.ones(3, 48, requires_grad=True)
    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    hooks = [n.register_forward_hook(lambda _m, _i, out: out * hidden_mask) for n in (*norms, model.model.norm)]
    for i, layer in enumerate(model.model.layers):
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _m, x, i=i: (x[0] * head_masks[i].repeat_interleave(16),)
            )
        )
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _m, x, i=i: (x[0] * neuron_masks[i],)))
    text = ids(length=13)
    functional.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    found = mask_gradients(model, anatomy_of(model.config), 3, 2)
    for name, mask in (("hidden", hidden_mask), ("kv_heads", head_masks), ("neurons", neuron_masks)):
        torch.testing.assert_close(found[name], mask.grad, rtol=1e-3, atol=1e-6)


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
    shape = solve_shape(anatomy, config, target)
    assert abs(count_parameters(anatomy.config_at(config, shape)).total - target) <= 0.01 * target


def test_impossible_shapes_are_refused():
    config = tiny_config()
    anatomy = anatomy_of(config)
    with pytest.raises(ShapeError, match="cannot be cut"):
        solve_shape(anatomy, config, 10**9)
    with pytest.raises(ShapeError, match="not a multiple"):
        anatomy.config_at(config, Shape(2, 31, 2, 48))
    with pytest.raises(ShapeError, match=r"student\.neurons = 99"):
        select(Scores(torch.rand(32), torch.rand(3, 2), torch.rand(3, 48)), Shape(3, 32, 2, 99))

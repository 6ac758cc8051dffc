"""The proof of every table: the student that is cut equals its parent with the cut parts masked.

The reference shares nothing with the tables: hooks on a tiny model of the installed transformers mask what was cut,
norms are computed over what is kept, routers choose among the experts that stay, layers that went pass their input on.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.anatomy import Anatomy, Table, Weight, anatomy_of, known_model_types, length, register
from capgap.anatomy import registry as tables
from capgap.cost import count_parameters
from capgap.errors import ModelError, ShapeError
from capgap.models import load_model, save_model
from capgap.prune import Keep, cut_model
from capgap.prune.importance import mask_gradients
from tiny import ALL, OTHERS, ids, tiny_config, tiny_model

BOUND = ("gpt2", "gpt_neox", "falcon")
WITH_EXPERTS = ("mixtral", "qwen3_moe")
CUTS = ("nothing", "neurons", "heads", "hidden", "experts", "layers", "everything")


def possible(kind: str, cut: str) -> bool:
    """Where heads are bound, they are cut together with the hidden size only."""
    return not (cut == "experts" and kind not in WITH_EXPERTS) and not (cut == "heads" and kind in BOUND)


PROOFS = [(kind, tied, cut) for kind in ALL for tied in (True, False) for cut in CUTS if possible(kind, cut)]


def random_keep(anatomy: Anatomy, kind: str, cut: str) -> Keep:
    """Random parts stay of what is cut, others in each layer; everything of the rest."""
    generator, shape = torch.Generator().manual_seed(3), anatomy.shape

    def some(there: int, count: int, wanted: bool) -> Tensor:
        return torch.randperm(there, generator=generator)[: count if wanted else there].sort().values

    def is_cut(what: str) -> bool:
        return cut in (what, "everything")

    layers = (1, 2) if is_cut("layers") else (0, 1, 2)
    heads = is_cut("heads") or (kind in BOUND and is_cut("hidden"))
    fewer = 1 if shape.kv_heads == 2 else 3
    hidden = anatomy.hidden_of(fewer) or 24
    rows = 1 if shape.experts is None else shape.experts
    neurons = tuple(torch.stack([some(48, 40, is_cut("neurons")) for _ in range(rows)]) for _ in layers)
    return Keep(
        layers,
        some(32, hidden, is_cut("hidden")),
        tuple(some(shape.kv_heads, fewer, heads) for _ in layers),
        neurons if shape.experts else tuple(rows[0] for rows in neurons),
        tuple(some(shape.experts, 3, is_cut("experts")) for _ in layers) if shape.experts else None,
    )


def over_kept(norm: nn.Module, kept: Tensor, offset: float) -> Callable[[Tensor], Tensor]:
    """The norm over the kept dimensions, zero elsewhere."""

    def forward(x: Tensor) -> Tensor:
        part, weight = x[..., kept], norm.weight[kept] + offset
        if isinstance(norm, nn.LayerNorm):
            part = functional.layer_norm(part, (len(kept),), weight, norm.bias[kept], norm.eps)
        else:
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            part = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps) * weight
        return torch.zeros_like(x).index_copy(-1, kept, part)

    return forward


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def first(module: nn.Module, *names: str) -> nn.Module:
    """The module of that name within a layer."""
    return next(found for name, found in module.named_modules() if name in names)


def router_among(router: nn.Module, kept: Tensor) -> Callable[[Tensor], tuple]:
    original = router.forward

    def forward(x: Tensor) -> tuple:
        whole = router.weight
        router.weight = nn.Parameter(whole[kept])
        logits, weights, chosen = original(x)
        router.weight = whole
        return logits, weights, kept[chosen]

    return forward


def mask(model: PreTrainedModel, keep: Keep, kind: str) -> None:
    """Makes the parent compute as if what is not kept were not there."""
    hidden, offset = torch.zeros(32), 1.0 if kind.startswith("gemma") else 0.0
    hidden[keep.hidden] = 1
    group = 8 if kind in ("gpt2", "gpt_neox") else 16
    norms = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Norm") and len(m.weight) == 32]
    for name, norm in norms:
        if "q_norm" not in name:
            norm.forward = over_kept(norm, keep.hidden, offset)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _m, _x, out: out * hidden)
    for number, layer in enumerate(layers_of(model)):
        if number not in keep.layers:
            layer.forward = lambda x, *_, **__: (x,) if kind in ("falcon",) else x
            continue
        at = keep.layers.index(number)
        heads = keep.kv_heads[at]
        queries = torch.cat([torch.arange(g * group, (g + 1) * group) for g in heads.tolist()])
        kept_queries = torch.zeros(32).index_fill(0, queries, 1)
        attention = first(layer, "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.o_proj")
        attention.register_forward_pre_hook(lambda _m, x, kept=kept_queries: (x[0] * kept,))
        if kind == "olmo2":
            keys = torch.cat([torch.arange(g * 8, (g + 1) * 8) for g in heads.tolist()])
            for norm, kept in ((layer.self_attn.q_norm, queries), (layer.self_attn.k_norm, keys)):
                norm.forward = over_kept(norm, kept, 0.0)
        if keep.experts is not None:
            layer.mlp.gate.forward = router_among(layer.mlp.gate, keep.experts[at])
            with torch.no_grad():
                for expert, neurons in enumerate(keep.neurons[at]):
                    lost = torch.ones(48, dtype=torch.bool).index_fill(0, neurons, False)
                    layer.mlp.experts.down_proj[expert][:, lost] = 0
            continue
        neurons = torch.zeros(48).index_fill(0, keep.neurons[at], 1)
        ffn = first(layer, "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")
        ffn.register_forward_pre_hook(lambda _m, x, kept=neurons: (x[0] * kept,))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tied", "cut"), PROOFS)
def test_the_student_equals_its_masked_parent(kind, tied, cut):
    parent = tiny_model(kind, tied=tied)
    anatomy = anatomy_of(parent.config)
    keep = random_keep(anatomy, kind, cut)
    student = cut_model(parent, anatomy, keep).eval()
    if cut == "nothing":
        assert torch.equal(student(ids()).logits, parent(ids()).logits)
    mask(parent, keep, kind)
    logits = parent(ids()).logits
    torch.testing.assert_close(student(ids()).logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize(("kind", "tied"), [(kind, tied) for kind in ALL for tied in (True, False)])
def test_every_parameter_matches_exactly_one_row_with_its_shape(kind, tied):
    model = tiny_model(kind, tied=tied)
    anatomy = anatomy_of(model.config)
    for name, parameter in model.named_parameters():
        found = tuple(length(axis, anatomy.sizes()) for axis in anatomy.table.match(name)[2])
        assert found == tuple(parameter.shape), name


@pytest.mark.parametrize("kind", ALL)
def test_the_student_reloads_as_a_plain_folder_generates_and_has_the_counted_parameters(kind, tmp_path):
    parent = tiny_model(kind)
    anatomy = anatomy_of(parent.config)
    keep = random_keep(anatomy, kind, "everything")
    student = cut_model(parent, anatomy, keep).eval()
    save_model(student, tmp_path / "student", tokenizer=None, lineage={})
    again = load_model(tmp_path / "student").eval()
    assert torch.equal(again(ids()).logits, student(ids()).logits)
    assert again.generate(ids(1, 4), min_new_tokens=4, max_new_tokens=4, do_sample=False).shape == (1, 8)
    assert anatomy_of(again.config).shape == keep.shape
    names = [name for name, _ in again.named_parameters()]
    counted = count_parameters(again.config).total
    assert sum(p.numel() for p in again.parameters()) == counted == anatomy.parameters(keep.shape, names)


# The modules whose output is all that blocks and head read of the hidden state; of olmo2 the blocks read it as it is.
READ = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", "norm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", "norm"),
    "olmo2": ("norm",),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    "falcon": ("ln_attn", "ln_mlp", "ln_f"),
}


@pytest.mark.parametrize("kind", ALL)
def test_scores_equal_the_gradients_of_real_masks(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(model.config)
    groups, experts = anatomy.shape.kv_heads, anatomy.shape.experts
    hidden, heads = torch.ones(32, requires_grad=True), torch.ones(3, groups, requires_grad=True)
    neurons = torch.ones(*((3, 48) if experts is None else (3, experts, 48)), requires_grad=True)
    for name, module in model.named_modules():
        last = name.split(".")[-1]
        if last in READ.get(kind, ("input_layernorm", "post_attention_layernorm", "norm")):
            module.register_forward_hook(lambda _m, _i, out: out * hidden)
        if kind == "olmo2" and last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            module.register_forward_pre_hook(lambda _m, x: (x[0] * hidden,))
    for i, layer in enumerate(layers_of(model)):
        attention = first(layer, "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.o_proj")
        attention.register_forward_pre_hook(lambda _m, x, i=i: (x[0] * heads[i].repeat_interleave(32 // groups),))
        if experts is None:
            ffn = first(layer, "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")
            ffn.register_forward_pre_hook(lambda _m, x, i=i: (x[0] * neurons[i],))
        else:  # the experts' weight is no module's: it is masked where it is read
            whole = layer.mlp.experts.down_proj
            masked = nn.utils.parametrize.register_parametrization
            masked(layer.mlp.experts, "down_proj", Scaled(neurons, i))
            assert whole.requires_grad
    text = ids(length=13)
    functional.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    wanted = {"hidden": hidden.grad, "kv_heads": heads.grad, "neurons": neurons.grad}
    if experts is not None:
        wanted["experts"] = neurons.grad.sum(-1)
        for layer in layers_of(model):
            grad = layer.mlp.experts.parametrizations.down_proj.original.grad
            nn.utils.parametrize.remove_parametrizations(layer.mlp.experts, "down_proj")
            layer.mlp.experts.down_proj.grad = grad
    found = mask_gradients(model, anatomy)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


class Scaled(nn.Module):
    """Experts' output weights [E, H, N], neuron by neuron times a mask [layers, E, N]."""

    def __init__(self, masks: Tensor, layer: int):
        super().__init__()
        self.of = [masks, layer]

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.of[0][self.of[1]][:, None, :]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("falcon", "new_decoder_architecture", False), ("qwen3_moe", "mlp_only_layers", [0])],
)
def test_variants_that_a_table_does_not_hold_for_are_refused(kind, field, value):
    config = tiny_config(kind)
    setattr(config, field, value)
    with pytest.raises(ModelError, match=rf"{kind} with {field} = .* has no anatomy"):
        anatomy_of(config)


def test_bound_heads_are_cut_with_the_hidden_size_only():
    anatomy = anatomy_of(tiny_config("gpt2"))
    with pytest.raises(ShapeError, match=r"number of heads x the head size of 8, 32 here"):
        anatomy.config_at(type(anatomy.shape)(3, 24, 4, 48))


def test_an_unknown_architecture_and_parameter_are_named():
    model = tiny_model()
    with pytest.raises(ModelError, match="0 rows"):
        anatomy_of(model.config).table.match("model.layers.0.self_attn.sinks.weight")
    model.config.model_type = "mamba"
    with pytest.raises(ModelError, match=r"mamba.*llama.*docs/anatomies\.md"):
        anatomy_of(model.config)


def test_a_table_from_outside_is_used(monkeypatch):
    monkeypatch.setattr(tables, "_tables", list(tables._tables))
    register(Table(("my_llama",), (Weight("model.norm", "hidden"),), "model.layers", (), {}))
    assert "my_llama" in known_model_types()
    config = tiny_config()
    config.model_type = "my_llama"
    assert anatomy_of(config).table.model_types == ("my_llama",)


def test_every_architecture_that_there_is_a_table_for_is_proved():
    assert set(ALL) == set(known_model_types())
    assert set(OTHERS) < set(ALL)

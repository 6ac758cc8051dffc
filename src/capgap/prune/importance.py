"""Which heads, neurons, experts and hidden dimensions matter, by one of four methods, in one pass over some text."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.anatomy import EXPERT, HIDDEN, KV, NEURON, Anatomy, Axis, Dimension, Grouped, Q, Weight
from capgap.errors import DataError, ModelError
from capgap.progress import Bar
from capgap.prune.probe import Place, Probe, on_its_device, whole
from capgap.prune.scores import Scores, normalised

Method = Literal["expressiveness", "activation", "magnitude", "random"]
# Of so many tokens of a batch it is measured how alike the hidden state is before and after each layer.
_TOKENS_COMPARED = 512


def score(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    *,
    method: Method = "expressiveness",
    seed: int = 0,
    place: Place = on_its_device,
    total: int | None = None,
    quiet: bool = False,
) -> Scores:
    """Scores every hidden dimension, key-value group, neuron and expert of `model`, and compares its layers.

    Args:
        batches: ids [B, L + 1] each; labels are the ids one further.
        method: `expressiveness`, the mean over batches of |dL/dmask| at mask = 1, where a mask multiplies what is
            scored; `activation`, the L2 norm over sequences of the mean over their tokens of |activation|;
            `magnitude`, the L2 norm of all weights that go with it; `random`.
        seed: of `random`.
        place: brings the model to its device, or in shards to the devices of several processes, and says what
            device its inputs must be on. All processes are given the same batches.
        total: how many batches there are, for the progress shown.
    Returns: the scores, float32 on the CPU.
    Raises: DataError if there is no batch; ModelError for the activations of a mixture of experts.
    Source: expressiveness, and the norm over each layer: Zhang et al. 2025, arXiv:2311.07052; activation: Muralidharan
        et al. 2024, arXiv:2407.14679, section 2.2, with the absolute value within the mean.
    """
    if method == "activation" and anatomy.shape.experts is not None:
        raise ModelError(
            f"prune.score = activation: the neurons of a {model.config.model_type}'s experts cannot be watched; "
            "use expressiveness, magnitude or random"
        )
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(method == "expressiveness")
    probe = Probe(model)
    device = place(probe)
    sums: dict[str, Tensor] = {}
    count = 0
    with Bar("scoring", total, quiet=quiet) as bar, torch.set_grad_enabled(method == "expressiveness"):
        for count, ids in enumerate(batches, start=1):
            with _compared_layers(model, anatomy) as similarity:
                found = _METHODS[method](probe, anatomy, ids.to(device))
            for name, part in (found | {"similarity": similarity()}).items():
                sums[name] = sums.get(name, 0) + part
            bar.to(count)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    if count == 0:
        raise DataError("no calibration text: the scores need at least one block")
    similarity_LL = (sums.pop("similarity") / count).float().cpu()
    if method == "activation":
        sums = {name: part.sqrt() for name, part in sums.items()}
    if method == "magnitude":
        sums = magnitudes(model, anatomy)
    if method == "random":
        sums = _random(anatomy, seed)
    return Scores(**{n: normalised(part.float().cpu()) for n, part in sums.items()}, similarity=similarity_LL)


def _expressiveness(probe: Probe, anatomy: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    probe.zero_grad(set_to_none=True)
    probe(ids, loss=True).backward()
    return {name: gradient.abs() for name, gradient in mask_gradients(probe.model, anatomy).items()}


def _activations(probe: Probe, anatomy: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """Summed over sequences, the squared mean over tokens of |activation|; of a key-value group, its vector's norm."""
    table, layers = anatomy.table, anatomy.shape.layers
    modules = dict(probe.model.named_modules())
    seen: dict[str, list[Tensor]] = {}
    hooks = []

    def watch(name: str, key: str, norm: bool) -> None:
        def take(_m: nn.Module, args: tuple, out: Tensor | None = None) -> None:
            activation = (out if norm and out is not None else args[0]).detach().float()
            if key.startswith("kv_heads"):
                activation = activation.unflatten(-1, (anatomy.shape.kv_heads, -1)).norm(dim=-1)
            seen.setdefault(key, []).append(activation.abs().mean(1).square().sum(0))

        module = modules[name]
        hooks.append(module.register_forward_hook(take) if norm else module.register_forward_pre_hook(take))

    watched: tuple[tuple[Axis, str], ...] = ((HIDDEN, "hidden"), (Q, "kv_heads"), (NEURON, "neurons"))
    for axis, key in watched:
        for row in table.masks[axis]:
            norm = len(table.row(row).axes) == 1
            for layer in range(layers):
                if (name := f"{table.layers_at}.{layer}.{row}") in modules:
                    watch(name, key if axis == HIDDEN else f"{key}.{layer}", norm)
            if row in modules:
                watch(row, key, norm)
    try:
        probe(ids, loss=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = {"hidden": torch.stack(seen["hidden"]).sum(0)}
    for key in ("kv_heads", "neurons"):
        found[key] = torch.stack([torch.stack(seen[f"{key}.{layer}"]).sum(0) for layer in range(layers)])
    return found


def _nothing(probe: Probe, anatomy: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """A forward pass for what is seen of the layers."""
    probe(ids, loss=False)
    return {}


_METHODS: dict[Method, Callable[[Probe, Anatomy, Tensor], dict[str, Tensor]]] = {
    "expressiveness": _expressiveness,
    "activation": _activations,
    "magnitude": _nothing,
    "random": _nothing,
}


@contextlib.contextmanager
def _compared_layers(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Callable[[], Tensor]]:
    """Within it layers are watched; what it gives returns the mean cosine [layers + 1, layers + 1] of hidden states."""
    modules = dict(model.named_modules())
    layers = [modules[f"{anatomy.table.layers_at}.{i}"] for i in range(anatomy.shape.layers)]
    states: dict[int, Tensor] = {}

    def keep(place: int, state: Tensor) -> None:
        states[place] = functional.normalize(state.detach().flatten(0, 1)[:_TOKENS_COMPARED].float(), dim=-1)

    def before(place: int) -> Callable[..., None]:
        def take(_m: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
            keep(place, args[0] if args else kwargs["hidden_states"])

        return take

    hooks: list[Any] = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]

    def after(_m: nn.Module, _args: tuple, out: Any) -> None:
        keep(len(layers), out[0] if isinstance(out, tuple) else out)

    hooks.append(layers[-1].register_forward_hook(after))

    def similarity() -> Tensor:
        states_LTH = torch.stack([states[place] for place in range(len(layers) + 1)])
        return torch.einsum("ath,bth->ab", states_LTH, states_LTH) / states_LTH.shape[1]

    try:
        yield similarity
    finally:
        for hook in hooks:
            hook.remove()


def magnitudes(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """The L2 norm of all weights (not biases or norms) that go with each hidden dimension, key-value group, neuron
    and expert, as Scores has them."""
    shape, sizes = anatomy.shape, anatomy.sizes()
    device = model.device
    hidden = torch.zeros(shape.hidden, device=device)
    heads = torch.zeros(shape.layers, shape.kv_heads, device=device)
    by_expert = () if shape.experts is None else (shape.experts,)
    neurons = torch.zeros(shape.layers, *by_expert, shape.neurons, device=device)

    def folded(square: Tensor, axes: tuple[Dimension, ...], dim: int, axis: Axis) -> Tensor:
        """Squares summed over all dimensions but `dim` and the experts', whose parts of `axis` are laid together."""
        others = [d for d, found in enumerate(axes) if d != dim and not (axis == NEURON and found == EXPERT)]
        square = square.sum(others) if others else square
        found, at = torch.zeros(()).to(square), 0
        dimension = axes[dim]
        parts = (dimension,) if isinstance(dimension, str) else dimension.parts
        if axis != NEURON and isinstance(dimension, Grouped):
            return square.view(shape.kv_heads, -1).sum(-1)
        for part in parts:
            piece = square[..., at : at + sizes[part]]
            found = found + (piece if axis in (NEURON, HIDDEN) else piece.view(shape.kv_heads, -1).sum(-1))
            at += sizes[part]
        return found

    for name, parameter in model.named_parameters():
        _, layer, axes = anatomy.table.match(name)
        if parameter.dim() < 2:
            continue
        square = whole(parameter.detach()).to(device).float().square()
        for dim, dimension in enumerate(axes):
            parts = {dimension} if isinstance(dimension, str) else set(dimension.parts)
            if HIDDEN in parts:
                hidden += folded(square, axes, dim, HIDDEN)
            if layer is not None and NEURON in parts:
                neurons[layer] += folded(square, axes, dim, NEURON)
            if layer is not None and parts & {Q, KV}:
                heads[layer] += folded(square, axes, dim, Q)
    found = {"hidden": hidden.sqrt(), "kv_heads": heads.sqrt(), "neurons": neurons.sqrt()}
    return found if shape.experts is None else found | {"experts": neurons.sum(-1).sqrt()}


def _random(anatomy: Anatomy, seed: int) -> dict[str, Tensor]:
    shape, generator = anatomy.shape, torch.Generator().manual_seed(seed)
    by_expert = () if shape.experts is None else (shape.experts,)
    sizes: dict[str, Any] = {
        "hidden": (shape.hidden,),
        "kv_heads": (shape.layers, shape.kv_heads),
        "neurons": (shape.layers, *by_expert, shape.neurons),
    }
    sizes |= {"experts": (shape.layers, *by_expert)} if by_expert else {}
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


def mask_gradients(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """dL/dmask at mask = 1 from the gradients that `model` holds: hidden [H], kv_heads [layers, groups],
    neurons [layers, N]; with experts neurons [layers, E, N] and experts [layers, E].

    No mask is ever built: where a weight W reads dimension i, y = W (m * x) gives dL/dm_i = sum_j W_ji * dL/dW_ji.
    """
    table, present = anatomy.table, dict(model.named_parameters())
    layers, groups = anatomy.shape.layers, anatomy.shape.kv_heads

    def product(row: Weight, axis: Axis, prefix: str = "") -> Tensor | None:
        """Sum of weight x gradient over all but `axis` (and the experts); None if the model lacks the row."""
        name = prefix + row.name if row.bare else f"{prefix}{row.name}.weight"
        if name not in present:
            return None
        weight, bias = present[name], present.get(f"{prefix}{row.name}.bias")
        assert weight.grad is not None
        norm = len(row.axes) == 1
        both = (weight.detach() + (table.norm_offset if norm else 0.0)) * weight.grad
        if norm and bias is not None and bias.grad is not None:  # a norm's mask is on all of its output
            both = both + bias.detach() * bias.grad
        others = [dim for dim, found in enumerate(row.axes) if found not in (axis, EXPERT)]
        return whole(both.sum(others, dtype=torch.float32) if others else both.float())

    def in_layer(axis: Axis, layer: int) -> Tensor:
        of_layer = {row.name for row in table.layer}
        rows = [table.row(name) for name in table.masks[axis] if name in of_layer]
        found = [product(row, axis, f"{table.layers_at}.{layer}.") for row in rows]
        return torch.stack([part for part in found if part is not None]).sum(0)

    hidden = torch.stack([in_layer(HIDDEN, i) for i in range(layers)]).sum(0)
    in_trunk = {row.name for row in table.trunk}
    for name in table.masks[HIDDEN]:
        if name in in_trunk and (part := product(table.row(name), HIDDEN)) is not None:
            hidden = hidden + part
    heads = torch.stack([in_layer(Q, i).view(groups, -1).sum(1) for i in range(layers)])
    neurons = torch.stack([in_layer(NEURON, i) for i in range(layers)])
    found = {"hidden": hidden, "kv_heads": heads, "neurons": neurons}
    return found if anatomy.shape.experts is None else found | {"experts": neurons.sum(-1)}

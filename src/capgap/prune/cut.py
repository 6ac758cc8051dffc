"""Slices a model's weights down to a student's shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.anatomy import HIDDEN, KV, NEURON, Anatomy, Q, Shape
from capgap.errors import ShapeError
from capgap.models import new_model
from capgap.prune.importance import Scores


@dataclass(frozen=True)
class Keep:
    """What stays: layers, hidden dimensions, and for each kept layer its key-value heads and neurons (ascending)."""

    layers: tuple[int, ...]
    hidden: Tensor
    kv_heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def select(scores: Scores, shape: Shape, *, layers: Literal["symmetric", "even"] = "symmetric") -> Keep:
    """The best-scored parts that fill `shape`.

    Args:
        layers: which layers stay when the shape has fewer: `symmetric` drops as many at the bottom as at the top
            (the paper's way), one more at the top if odd; `even` spreads what stays, first and last included.
    Raises: ShapeError if the shape asks for more than there is.
    """
    have = Shape(scores.kv_heads.shape[0], scores.hidden.numel(), scores.kv_heads.shape[1], scores.neurons.shape[1])
    for name in ("layers", "hidden", "kv_heads", "neurons"):
        asked, there = getattr(shape, name), getattr(have, name)
        if not 1 <= asked <= there:
            raise ShapeError(f"student.{name} = {asked} cannot be cut from a model with {name} = {there}")
    if layers == "symmetric":
        first = (have.layers - shape.layers) // 2
        kept = tuple(range(first, first + shape.layers))
    else:
        kept = tuple(round(x) for x in torch.linspace(0, have.layers - 1, shape.layers).tolist())
    return Keep(
        kept,
        _best(scores.hidden, shape.hidden),
        tuple(_best(scores.kv_heads[i], shape.kv_heads) for i in kept),
        tuple(_best(scores.neurons[i], shape.neurons) for i in kept),
    )


def _best(scores: Tensor, count: int) -> Tensor:
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def cut_model(model: PreTrainedModel, anatomy: Anatomy, keep: Keep) -> PreTrainedModel:
    """A new model of the same class with what `keep` names; `model` is not changed.

    Raises: ShapeError if the installed transformers refuses the shape.
    """
    shape = Shape(len(keep.layers), len(keep.hidden), len(keep.kv_heads[0]), len(keep.neurons[0]))
    student = new_model(anatomy.config_at(model.config, shape, keep.layers), seed=0)
    sizes = anatomy.sizes(model.config)
    weights = model.state_dict()
    cut: dict[str, Tensor] = {}
    for name in student.state_dict():
        _, layer, axes = anatomy.match(name)
        source = (
            name
            if layer is None
            else name.replace(f"{anatomy.layers_at}.{layer}.", f"{anatomy.layers_at}.{keep.layers[layer]}.", 1)
        )
        tensor = weights[source]
        for dim, axis in enumerate(axes):
            if (index := _index(keep, axis, layer, sizes, shape)) is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        cut[name] = tensor
    student.load_state_dict(cut, strict=True)
    if model.generation_config is not None:
        student.generation_config = model.generation_config
    student.to(device=model.device, dtype=model.dtype)  # pyright: ignore[reportCallIssue]
    return student


def _index(keep: Keep, axis: str, layer: int | None, sizes: dict, shape: Shape) -> Tensor | None:
    if axis == HIDDEN:
        return keep.hidden
    if layer is None or axis not in (Q, KV, NEURON):
        return None
    if axis == NEURON:
        return keep.neurons[layer]
    heads: Sequence[int] = keep.kv_heads[layer].tolist()
    width = sizes[axis] // (sizes[KV] // sizes["within_head"])
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])

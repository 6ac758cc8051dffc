"""Slices a model's weights down to a student's shape."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.anatomy import EXPERT, HIDDEN, KV, NEURON, Anatomy, Dimension, Grouped, Q, Shape, Weight, length
from capgap.errors import ShapeError
from capgap.models import new_model
from capgap.prune.scores import Scores

LayerChoice = Literal["symmetric", "even", "influence", "contiguous", "loss", "block_loss"]


@dataclass(frozen=True)
class Keep:
    """What stays, each list ascending.

    Attributes:
        layers: of the model's layers.
        hidden: of the hidden dimensions.
        kv_heads: for each kept layer, its key-value heads.
        neurons: for each kept layer its neurons, [N]; with experts [E, N], a row for each of the model's experts.
        experts: for each kept layer its experts; None in a dense model.
    """

    layers: tuple[int, ...]
    hidden: Tensor
    kv_heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    experts: tuple[Tensor, ...] | None = None

    @property
    def shape(self) -> Shape:
        """The student's shape."""
        experts = None if self.experts is None else len(self.experts[0])
        neurons = self.neurons[0].shape[-1]
        return Shape(len(self.layers), len(self.hidden), len(self.kv_heads[0]), neurons, experts)


def select(scores: Scores, shape: Shape, *, layers: LayerChoice = "symmetric", losses: Tensor | None = None) -> Keep:
    """The best-scored parts that fill `shape`.

    Args:
        layers: which layers stay when the shape has fewer: `symmetric` drops as many at the bottom as at the top
            (the paper's way), one more at the top if odd; `even` spreads what stays, first and last included;
            `influence` drops the layers that change the hidden state least (Men et al. 2024, arXiv:2403.03853);
            `contiguous` drops those between the two places where it is most alike (Gromov et al. 2024,
            arXiv:2403.17887); `loss` those without which, one at a time, the loss is least; `block_loss` those in a
            row without which it is least.
        losses: for the last two, what `losses_without` gave for blocks of one layer, and of as many as are dropped.
    Raises: ShapeError if the shape asks for more than there is, or the layers were not compared.
    """
    have = scores.shape
    for name in ("layers", "hidden", "kv_heads", "neurons", "experts"):
        asked, there = getattr(shape, name), getattr(have, name)
        if asked is None and there is None:
            continue
        if asked is None or there is None or not 1 <= asked <= there:
            raise ShapeError(f"student.{name} = {asked} cannot be cut from a model with {name} = {there}")
    kept = _layers(scores, shape.layers, layers, losses)
    experts = None
    if scores.experts is not None and shape.experts is not None:
        experts = tuple(_best(scores.experts[i], shape.experts) for i in kept)
    return Keep(
        kept,
        _best(scores.hidden, shape.hidden),
        tuple(_best(scores.kv_heads[i], shape.kv_heads) for i in kept),
        tuple(_best(scores.neurons[i], shape.neurons) for i in kept),
        experts,
    )


def _layers(scores: Scores, count: int, choice: LayerChoice, losses: Tensor | None) -> tuple[int, ...]:
    have = len(scores.kv_heads)
    if count == have:
        return tuple(range(have))
    if choice == "symmetric":
        first = (have - count) // 2
        return tuple(range(first, first + count))
    if choice == "even":
        return tuple(round(x) for x in torch.linspace(0, have - 1, count).tolist())
    if choice in ("loss", "block_loss"):
        blocks = have if choice == "loss" else count + 1
        if losses is None or len(losses) != blocks:
            raise ShapeError(f"prune.layers = {choice} needs the {blocks} losses without layers; measure them")
        if choice == "loss":
            return tuple(_best(losses, count).tolist())
        first = int(losses.argmin())
        return (*range(first), *range(first + have - count, have))
    if scores.similarity is None:
        raise ShapeError(f"prune.layers = {choice} needs scores in which layers were compared; score the model anew")
    if choice == "influence":
        return tuple(_best(-scores.similarity.diagonal(1), count).tolist())
    first = int(scores.similarity.diagonal(have - count).argmax())
    return (*range(first), *range(first + have - count, have))


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores along the last dimension, ascending."""
    best = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :count]
    return torch.sort(best, dim=-1).values


def cut_model(model: PreTrainedModel, anatomy: Anatomy, keep: Keep) -> PreTrainedModel:
    """A new model of the same class with what `keep` names; `model` is not changed.

    Where an architecture multiplies its embeddings by the square root of the hidden size, embedding and last norm
    are rescaled, so that the student sees the embeddings as large as its parent does.

    Raises: ShapeError if the installed transformers refuses the shape.
    """
    student = new_model(anatomy.config_at(keep.shape, keep.layers), seed=0)
    table, cutter = anatomy.table, Cutter(anatomy, keep)
    weights = model.state_dict()
    cut: dict[str, Tensor] = {}
    for name in student.state_dict():
        row, layer, axes = table.match(name)
        source = name
        if layer is not None:
            source = name.replace(f"{table.layers_at}.{layer}.", f"{table.layers_at}.{keep.layers[layer]}.", 1)
        cut[name] = cutter.cut(weights[source], axes, layer)
        cut[name] = rescaled(cut[name], row, axes, anatomy, keep)
    student.load_state_dict(cut, strict=True)
    if model.generation_config is not None:
        student.generation_config = model.generation_config
    student.to(device=model.device, dtype=model.dtype)  # pyright: ignore[reportCallIssue]
    return student


def rescaled(weight: Tensor, row: Weight, axes: tuple[Dimension, ...], anatomy: Anatomy, keep: Keep) -> Tensor:
    """The weight that was cut; where embeddings are multiplied by the square root of the hidden size, the embedding
    (and a head tied to it) grown by what its factor shrinks, and the last norm shrunk where it is tied."""
    table, tied = anatomy.table, anatomy.config.tie_word_embeddings
    if not table.scaled_embedding:
        return weight
    grown = math.sqrt(anatomy.shape.hidden / len(keep.hidden))
    if row.name == table.final_norm and tied:
        return (weight + table.norm_offset) / grown - table.norm_offset
    if row.name == table.embedding or (tied and axes == table.row(table.embedding).axes):
        return weight * grown
    return weight


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The places of a dimension; on the CPU by numpy, which takes a quarter of torch's time."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor.index_select(dim, index.to(tensor.device))
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()
    return torch.from_numpy(np.take(bits, index.numpy(), axis=dim)).view(tensor.dtype)


class Cutter:
    """What of each dimension stays, as indices."""

    def __init__(self, anatomy: Anatomy, keep: Keep):
        self.anatomy, self.keep, self.sizes = anatomy, keep, anatomy.sizes()

    def cut(self, tensor: Tensor, axes: tuple[Dimension, ...], layer: int | None, expert: int | None = None) -> Tensor:
        """The part of a weight that stays; of all experts', or of one's."""
        if axes[0] == EXPERT and self.keep.experts is not None and layer is not None:
            # Each expert keeps neurons of its own.
            rest = axes[1:]
            experts = self.keep.experts[layer].tolist()
            return torch.stack([self._cut(tensor[i], rest, layer, expert=i) for i in experts])
        return self._cut(tensor, axes, layer, expert)

    def _cut(self, tensor: Tensor, axes: tuple[Dimension, ...], layer: int | None, expert: int | None = None) -> Tensor:
        for dim, axis in enumerate(axes):
            if (index := self.index(axis, layer, expert)) is not None:
                tensor = _taken(tensor, dim, index)
        return tensor

    def index(self, axis: Dimension, layer: int | None, expert: int | None = None) -> Tensor | None:
        """The places that stay, or None where all do."""
        if isinstance(axis, Grouped) and layer is not None:
            return self._heads(length(axis, self.sizes), layer)
        if not isinstance(axis, str):
            found, at = [], 0
            for part in axis.parts:
                whole = torch.arange(self.sizes[part])
                index = self.index(part, layer, expert)
                found.append(at + (whole if index is None else index))
                at += self.sizes[part]
            return torch.cat(found)
        if axis == HIDDEN:
            return self.keep.hidden
        if layer is None:
            return None
        if axis == NEURON:
            return self.keep.neurons[layer] if expert is None else self.keep.neurons[layer][expert]
        return self._heads(self.sizes[axis], layer) if axis in (Q, KV) else None

    def _heads(self, size: int, layer: int) -> Tensor:
        """The places of the kept key-value groups in a dimension that holds the groups one after the other."""
        width = size // self.anatomy.shape.kv_heads
        return torch.cat(
            [torch.arange(head * width, (head + 1) * width) for head in self.keep.kv_heads[layer].tolist()]
        )

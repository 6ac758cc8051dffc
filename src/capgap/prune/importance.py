"""Which heads, neurons and hidden dimensions matter: expressiveness scores.

A mask multiplies each hidden dimension (shared by all layers), each key-value group's output and each neuron.
The score is the mean over calibration batches of |dL/dmask| at mask = 1. No mask is ever built: where a weight W
reads dimension i, y = W (m * x) gives dL/dm_i = sum_j W_ji * dL/dW_ji.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from capgap.anatomy import EXPERT, HIDDEN, NEURON, Anatomy, Axis, Q, Shape, Weight
from capgap.errors import DataError
from capgap.files import atomic_file
from capgap.models import sum_cross_entropy
from capgap.progress import Bar


@dataclass(frozen=True)
class Scores:
    """Importance, larger is more important.

    Attributes:
        hidden: [H], shared by all layers.
        kv_heads: [layers, key-value heads], of a key-value head with its query heads; each layer has L2 norm 1.
        neurons: [layers, N], each layer has L2 norm 1; of each expert [layers, E, N], where there are experts.
        experts: [layers, E], each layer has L2 norm 1; None in a dense model.
    """

    hidden: Tensor
    kv_heads: Tensor
    neurons: Tensor
    experts: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the model that was scored."""
        experts = None if self.experts is None else self.experts.shape[1]
        return Shape(len(self.kv_heads), self.hidden.numel(), self.kv_heads.shape[1], self.neurons.shape[-1], experts)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        with atomic_file(path) as beside:
            save_file({name: scores for name, scores in vars(self).items() if scores is not None}, beside)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Reads what save wrote."""
        return cls(**load_file(path))


def expressiveness(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    *,
    total: int | None = None,
    quiet: bool = False,
) -> Scores:
    """Scores every hidden dimension, key-value group and neuron of `model` in one pass.

    Args:
        batches: ids [B, L + 1] each; labels are the ids one further.
        total: how many batches there are, for the progress shown.
    Returns: the scores, float32 on the CPU.
    Raises: DataError if there is no batch.
    Source: Zhang et al. 2025, arXiv:2311.07052 (expressiveness); normalised by L2 per layer as there.
    """
    kept = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    sums: dict[str, Tensor] = {}
    count = 0
    with Bar("scoring", total, quiet=quiet) as bar:
        for count, ids in enumerate(batches, start=1):
            ids = ids.to(model.device)
            model.zero_grad(set_to_none=True)
            (sum_cross_entropy(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
            for name, gradient in mask_gradients(model, anatomy).items():
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient.abs()
            bar.to(count)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kept[name])
    if count == 0:
        raise DataError("no calibration text: the scores need at least one block")
    mean = {name: (total / count).float().cpu() for name, total in sums.items()}
    return Scores(**{name: _normalised(scores) for name, scores in mean.items()})


def _normalised(scores: Tensor) -> Tensor:
    """Scores [H], or each layer's [layers, ...], divided by their L2 norm."""
    over = 0 if scores.dim() == 1 else tuple(range(1, scores.dim()))
    norm = torch.linalg.vector_norm(scores, dim=over, keepdim=True)
    return scores / norm.clamp_min(torch.finfo(torch.float32).tiny)


def mask_gradients(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """dL/dmask at mask = 1 from the gradients that `model` holds: hidden [H], kv_heads [layers, groups],
    neurons [layers, N]; with experts neurons [layers, E, N] and experts [layers, E]."""
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
        return both.sum(others) if others else both

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

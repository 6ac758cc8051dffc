"""Which heads, neurons and hidden dimensions matter: expressiveness scores.

A mask multiplies each hidden dimension (shared by all layers), each key-value group's output and each neuron.
The score is the mean over calibration batches of |dL/dmask| at mask = 1. No mask is ever built: where a weight W
reads dimension i, y = W (m * x) gives dL/dm_i = sum_j W_ji * dL/dW_ji.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.anatomy import HIDDEN, NEURON, Anatomy, Q
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
        neurons: [layers, N], each layer has L2 norm 1.
    """

    hidden: Tensor
    kv_heads: Tensor
    neurons: Tensor

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        with atomic_file(path) as beside:
            save_file({"hidden": self.hidden, "kv_heads": self.kv_heads, "neurons": self.neurons}, beside)

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
    config: Any = model.config
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    kept = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    sums: dict[str, Tensor] = {}
    count = 0
    with Bar("scoring", total, quiet=quiet) as bar:
        for count, ids in enumerate(batches, start=1):
            ids = ids.to(model.device)
            model.zero_grad(set_to_none=True)
            (sum_cross_entropy(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
            for name, gradient in mask_gradients(model, anatomy, layers, groups).items():
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient.abs()
            bar.to(count)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kept[name])
    if count == 0:
        raise DataError("no calibration text: the scores need at least one block")
    mean = {name: (total / count).float().cpu() for name, total in sums.items()}
    tiny = torch.finfo(torch.float32).tiny
    by_layer = {
        name: mean[name] / mean[name].norm(dim=1, keepdim=True).clamp_min(tiny) for name in ("kv_heads", "neurons")
    }
    return Scores(mean["hidden"] / mean["hidden"].norm().clamp_min(tiny), **by_layer)


def mask_gradients(model: PreTrainedModel, anatomy: Anatomy, layers: int, groups: int) -> dict[str, Tensor]:
    """dL/dmask at mask = 1 from the gradients that `model` holds: hidden [H], kv_heads [layers, groups],
    neurons [layers, N]."""
    modules = dict(model.named_modules())

    def product(name: str) -> Tensor:
        weight = modules[name].weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        both = weight.detach() * weight.grad
        return both.sum(0) if both.dim() == 2 else both

    def in_layers(rows: tuple[str, ...], layer: int) -> Tensor:
        return torch.stack([product(f"{anatomy.layers_at}.{layer}.{row}") for row in rows]).sum(0)

    per_layer_rows = {row.name for row in anatomy.layer}
    hidden_rows = anatomy.masks[HIDDEN]
    of_layers = tuple(row for row in hidden_rows if row in per_layer_rows)
    hidden = torch.stack([product(row) for row in hidden_rows if row not in per_layer_rows]).sum(0)
    for layer in range(layers):
        hidden = hidden + in_layers(of_layers, layer)
    heads = torch.stack([in_layers(anatomy.masks[Q], i).view(groups, -1).sum(1) for i in range(layers)])
    neurons = torch.stack([in_layers(anatomy.masks[NEURON], i) for i in range(layers)])
    return {"hidden": hidden, "kv_heads": heads, "neurons": neurons}

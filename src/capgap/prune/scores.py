"""The scores of a model's parts, as they are kept on disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from capgap.anatomy import Shape
from capgap.files import atomic_file


@dataclass(frozen=True)
class Scores:
    """Importance, larger is more important.

    Attributes:
        hidden: [H], shared by all layers, of L2 norm 1.
        kv_heads: [layers, key-value heads], of a key-value head with its query heads; each layer has L2 norm 1.
        neurons: [layers, N], each layer has L2 norm 1; of each expert [layers, E, N], where there are experts.
        experts: [layers, E], each layer has L2 norm 1; None in a dense model.
        similarity: [layers + 1, layers + 1], how alike the hidden state is before and after the layers between: the
            mean cosine over tokens; None where it was not measured.
    """

    hidden: Tensor
    kv_heads: Tensor
    neurons: Tensor
    experts: Tensor | None = None
    similarity: Tensor | None = None

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


def normalised(scores: Tensor) -> Tensor:
    """Scores [H], or each layer's [layers, ...], divided by their L2 norm."""
    over = 0 if scores.dim() == 1 else tuple(range(1, scores.dim()))
    norm = torch.linalg.vector_norm(scores, dim=over, keepdim=True)
    return scores / norm.clamp_min(torch.finfo(torch.float32).tiny)

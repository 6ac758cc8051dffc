"""Losses between the layers of student and teacher, for students cut in depth (and width)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.errors import RecipeError, ShapeError
from capgap.models import backbone, in_head_precision

Kind = Literal["mse", "cosine"]


class HiddenLoss(nn.Module):
    """How far the states after each layer of the student are from those of the layer as deep in the teacher.

    Layer i of the student's n (from 1) is matched with layer round(i * N / n) of the teacher's N; the last states are
    those after the final norm. Where the widths differ, one linear map without bias, shared by all layers and learnt
    with the student, takes its states to the teacher's width (TinyBERT, arXiv:1909.10351, equation 8; Minitron,
    arXiv:2407.14679, section 3).

    Args:
        student, teacher: configs are read, weights are not.
        kind: mse, the mean over the width of the squared difference; cosine, one less the cosine.
    Raises: RecipeError if the student is deeper than the teacher, or the kind is unknown.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, kind: Kind = "mse"):
        super().__init__()
        if kind not in get_args(Kind):
            raise RecipeError(f"hidden loss {kind!r}: not one of {', '.join(get_args(Kind))}")
        (layers, width), (teacher_layers, teacher_width) = _layers_and_width(student), _layers_and_width(teacher)
        if layers > teacher_layers:
            raise RecipeError(
                f"hidden loss: the student has {layers} layers, the teacher {teacher_layers}; it must not be deeper"
            )
        self.kind: Kind = kind
        self.matched = [round(i * teacher_layers / layers) for i in range(1, layers + 1)]
        self.projection = nn.Identity() if width == teacher_width else _projection(width, teacher_width)

    def forward(self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor]) -> Tensor:
        """The loss summed over tokens, the mean over layers: scalar float32, gradients for the student alone.

        Args:
            student_layers: states [T, H] after each layer, in order, without the embeddings.
            teacher_layers: of the same tokens.
        Raises: ShapeError if there are too few layers.
        """
        if len(student_layers) != len(self.matched) or len(teacher_layers) < self.matched[-1]:
            raise ShapeError(
                f"hidden loss: {len(student_layers)} and {len(teacher_layers)} layers of student and teacher; "
                f"made for {len(self.matched)} and {self.matched[-1]}"
            )
        losses = [
            self._of_layer(self.projection(student_TH).float(), teacher_layers[number - 1].detach().float())
            for student_TH, number in zip(student_layers, self.matched, strict=True)
        ]
        return torch.stack(losses).mean()

    def _of_layer(self, student_TH: Tensor, teacher_TH: Tensor) -> Tensor:
        if self.kind == "mse":
            return functional.mse_loss(student_TH, teacher_TH, reduction="sum") / teacher_TH.shape[-1]
        return (1 - functional.cosine_similarity(student_TH, teacher_TH, dim=-1)).sum()


def layer_states(model: PreTrainedModel, input_BL: Tensor) -> list[Tensor]:
    """The states [B, L, H] after each layer; the last are those that the head reads, after the final norm."""
    out = backbone(model)(input_ids=input_BL, use_cache=False, output_hidden_states=True)
    return [*out.hidden_states[1:-1], in_head_precision(out.last_hidden_state)]


def _layers_and_width(model: PreTrainedModel) -> tuple[int, int]:
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.hidden_size


def _projection(width: int, teacher_width: int) -> nn.Linear:
    """Keeps lengths or, to a smaller width, shortens at most; the same whatever was drawn before."""
    projection = nn.Linear(width, teacher_width, bias=False)
    nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(0))
    return projection

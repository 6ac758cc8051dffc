"""Teachers: where a batch's targets come from."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.distill.hidden import layer_states
from capgap.distill.targets import OnlineTargets, Targets
from capgap.errors import RecipeError
from capgap.models import head, hidden_states


class Teacher(Protocol):
    """Gives the targets of a batch; `capgap.distill.OnlineTeacher` runs models, a cache reads what one said."""

    def targets(self, input_BL: Tensor, block_B: Tensor) -> Targets:
        """What is to be learnt from the rows of a batch; block_B are their blocks' numbers in the packed data."""
        ...


class Body(nn.Module):
    """A model up to its head, as a module that can be sharded with its head within.

    Gives the last hidden states [B, L, H]; with `layers`, those after each layer, of which the last come last.
    """

    def __init__(self, model: PreTrainedModel, *, layers: bool = False):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_BL: Tensor) -> list[Tensor]:
        return layer_states(self.model, input_BL) if self.layers else [hidden_states(self.model, input_BL)]


class OnlineTeacher:
    """One frozen model, or a mixture of several: sum of weight * probability.

    Args:
        models: of one vocabulary.
        weights: one for each model, positive, made to sum to 1; equal ones if None.
        layers: the targets also hold the states after each layer, for a `HiddenLoss`; of one model only.
    Raises: RecipeError if the weights or `layers` do not fit the models.
    """

    def __init__(self, *models: PreTrainedModel, weights: Sequence[float] | None = None, layers: bool = False):
        given = list(weights or [1.0] * len(models))
        if len(given) != len(models) or not all(weight > 0 for weight in given):
            raise RecipeError(f"weights {given} of {len(models)} teachers: each must have one, above 0")
        if layers and len(models) != 1:
            raise RecipeError(f"a hidden loss takes one teacher, not {len(models)}: whose layers would be matched?")
        self.weights = [weight / sum(given) for weight in given]
        self.bodies = [Body(model.eval().requires_grad_(False), layers=layers) for model in models]

    @torch.no_grad()
    def targets(self, input_BL: Tensor, block_B: Tensor) -> OnlineTargets:
        states = [[layer.flatten(0, 1) for layer in body(input_BL)] for body in self.bodies]
        heads = [head(body.model) for body in self.bodies]
        layers = states[0] if self.bodies[0].layers else None
        return OnlineTargets([of_model[-1] for of_model in states], heads, self.weights, layers)

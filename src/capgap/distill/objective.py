"""The student under its loss: one forward from ids to the loss, so that DDP and FSDP see a plain module."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.distill.fused import Mix, Sums, fused_loss
from capgap.distill.hidden import HiddenLoss, layer_states
from capgap.distill.targets import OnlineTargets, Targets
from capgap.errors import RecipeError
from capgap.models import head, hidden_states


class Objective(nn.Module):
    """Wraps the student.

    Args:
        mix: how cross-entropy and divergence are weighed.
        hidden: adds hidden_weight * the loss between the layers, of a teacher that gives them
            (`OnlineTeacher(..., layers=True)`); its projection is trained, and saved in checkpoints, with the student.
    """

    def __init__(
        self, student: PreTrainedModel, mix: Mix, hidden: HiddenLoss | None = None, hidden_weight: float = 1.0
    ):
        super().__init__()
        self.student, self.mix, self.hidden, self.hidden_weight = student, mix, hidden, hidden_weight

    def forward(self, input_BL: Tensor, label_BL: Tensor, targets: Targets | None = None) -> Sums:
        """Losses summed over the tokens of label_BL that are not negative; without targets cross-entropy alone.

        Raises: RecipeError if there is a hidden loss, and the targets do not hold the teacher's layers.
        """
        layered = self.hidden is not None and targets is not None
        states = layer_states(self.student, input_BL) if layered else [hidden_states(self.student, input_BL)]
        states = [state.flatten(0, 1) for state in states]
        label_T = label_BL.flatten()
        scored_T = label_T >= 0
        if not bool(scored_T.all()):
            states, label_T = [state[scored_T] for state in states], label_T[scored_T]
            targets = None if targets is None else targets.select(scored_T)
        sums = fused_loss(states[-1], head(self.student), label_T, targets, self.mix)
        if self.hidden is None or targets is None:
            return sums
        if not isinstance(targets, OnlineTargets) or targets.layers is None:
            raise RecipeError("a hidden loss needs the teacher's layers: run the teacher online, with layers=True")
        return sums._replace(loss=sums.loss + self.hidden_weight * self.hidden(states, targets.layers))

    @torch.no_grad()
    def nats(self, input_BL: Tensor, label_BL: Tensor) -> Tensor:
        """Cross-entropy summed over the scored tokens. Goes through `forward`, as sharded weights demand."""
        return self(input_BL, label_BL).ce

"""A model as it is measured: on one device, in shards on several, or from CPU memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from capgap.models import hidden_states, sum_cross_entropy


class Probe(nn.Module):
    """A model as it is scored: ids [B, L + 1] to the mean cross-entropy in nats, or, without labels, through its body
    only. It is what is called, so that it can be the root of a model in shards."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *, loss: bool) -> Tensor:
        """The loss, a scalar; or the last hidden states [B, L, H]."""
        if not loss:
            return hidden_states(self.model, ids[:, :-1])
        return sum_cross_entropy(self.model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()


Place = Callable[[Probe], torch.device]


def on_its_device(probe: Probe) -> torch.device:
    """Leaves a model where it is; the device that its inputs must be on."""
    return probe.model.device


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together where the processes hold shards of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

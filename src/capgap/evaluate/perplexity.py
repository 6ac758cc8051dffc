"""Perplexity, nats per token and bits per byte on held-out text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from capgap.models import sum_cross_entropy
from capgap.progress import Bar


class HeldOut(Protocol):
    """What evaluation reads: `capgap.data.PackedTokens` is one."""

    @property
    def bytes(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def stream(self, block: int) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Score:
    """A model's score on a text.

    Attributes:
        loss: nats per token, document separators counted as tokens.
        bits_per_byte: of the text's UTF-8 bytes; comparable between tokenizers.
        tokens: how many tokens were predicted.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


Nats = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Input and label ids [B, L] to cross-entropy summed over tokens."""


def evaluate(
    model: PreTrainedModel, packed: HeldOut, *, block: int, batch_tokens: int = 16_384, quiet: bool = True
) -> Score:
    """Scores every token of `packed` but each shard's first, each predicted from at most `block` before it.

    Args:
        block: context length.
        batch_tokens: about how many tokens go through the model at once.
    """
    training = model.training
    model.eval()

    def nats(input_BL: torch.Tensor, label_BL: torch.Tensor) -> torch.Tensor:
        return sum_cross_entropy(model, input_BL, label_BL)

    score = evaluate_nats(nats, packed, device=model.device, block=block, batch_tokens=batch_tokens, quiet=quiet)
    model.train(training)
    return score


@torch.no_grad()
def evaluate_nats(
    nats: Nats,
    packed: HeldOut,
    *,
    device: torch.device,
    block: int,
    batch_tokens: int = 16_384,
    rank: int = 0,
    world: int = 1,
    total: Callable[..., list[float]] = lambda *values: list(values),
    quiet: bool = True,
) -> Score:
    """The same by any function that gives the nats of a batch, the batches shared out over processes.

    Args:
        nats: called equally often in every process, as models in shards need it.
        rank, world: this process takes each world-th batch.
        total: sums its arguments over the processes.
    """
    batches = [
        np.stack(rows[first : first + max(1, batch_tokens // block)]).astype(np.int64)
        for _, pieces in groupby(packed.stream(block), key=len)
        for rows in (list(pieces),)
        for first in range(0, len(rows), max(1, batch_tokens // block))
    ]
    mine, count = 0.0, 0
    with Bar("evaluating", len(batches), quiet=quiet) as bar:
        for first in range(0, len(batches), world):
            # Past the end a process repeats the last batch, uncounted.
            ids = torch.from_numpy(batches[min(first + rank, len(batches) - 1)]).to(device)
            found = float(nats(ids[:, :-1], ids[:, 1:]))
            if first + rank < len(batches):
                mine, count = mine + found, count + ids[:, 1:].numel()
            bar.to(min(first + world, len(batches)))
    loss, tokens = total(mine, count)
    return Score(loss / tokens, loss / math.log(2) / packed.bytes, round(tokens))

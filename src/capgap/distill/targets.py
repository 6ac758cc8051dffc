"""What a teacher says of a batch's tokens, handed to the objective chunk by chunk: dense logits, or a sparse part."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from capgap.models import Head

# The logit, at the temperature, of a vocabulary row that the teacher lacks: its probability is exactly 0 in float32.
ABSENT = -1e4
# Of the logits that are kept for several students.
KEPT_BYTES = 2**29


class DenseChunk(NamedTuple):
    """The teacher's logits [C, V], divided by the temperature, up to a constant of each token."""

    logits_CV: Tensor


class SparseChunk(NamedTuple):
    """The teacher's distribution at the temperature, known for K tokens of each position.

    Attributes:
        ids_CK: int64 token ids, distinct but for entries of weight 0, which name no token.
        weight_CK: their probabilities, or unbiased estimates of them that sum to 1.
        tail_C: the mass of all other tokens together, where it is known; None for a sample.
        entropy_C: of the teacher's whole distribution, in nats (of a sample), so that the KL is unbiased.
    """

    ids_CK: Tensor
    weight_CK: Tensor
    tail_C: Tensor | None
    entropy_C: Tensor | None


Chunk = DenseChunk | SparseChunk


class Targets(Protocol):
    """A teacher's word on T tokens."""

    def chunk(self, tokens: slice, temperature: float, vocabulary: int, out_CV: Tensor | None = None) -> Chunk:
        """The part of some tokens, for a student's head of `vocabulary` rows; the caller may overwrite it.

        Args:
            out_CV: float32 memory that a dense part may be made in.
        """
        ...

    def select(self, scored_T: Tensor) -> "Targets":
        """Only the tokens where scored_T is True."""
        ...


@dataclass(frozen=True)
class OnlineTargets:
    """Hidden states [T, H] of one teacher, or of several with weights, and their heads.

    Logits are made a chunk at a time. Rows of the vocabulary that only the teacher has are padding and left out;
    rows that only the student has get the probability 0.

    Attributes:
        layers: the states [T, H] after each layer of the one teacher, where they were asked for.
        kept: where several students learn the same tokens in turn, what was made for the first; else None.
    """

    hidden: Sequence[Tensor]
    heads: Sequence[Head]
    weights: Sequence[float]
    layers: Sequence[Tensor] | None = None
    kept: "Kept | None" = None

    def chunk(self, tokens: slice, temperature: float, vocabulary: int, out_CV: Tensor | None = None) -> DenseChunk:
        if self.kept is None:
            return self._made(tokens, temperature, vocabulary, out_CV)
        what = (tokens.start, tokens.stop, temperature, vocabulary)
        return DenseChunk(self.kept.table(what, lambda: self._made(tokens, temperature, vocabulary).logits_CV, out_CV))

    def _made(self, tokens: slice, temperature: float, vocabulary: int, out_CV: Tensor | None = None) -> DenseChunk:
        if len(self.heads) > 1 or len(self.heads[0].weight_VH) != vocabulary:
            out_CV = None
        logits = [
            head.logits(hidden_TH[tokens], out_CV) for hidden_TH, head in zip(self.hidden, self.heads, strict=True)
        ]
        if temperature != 1.0:
            logits = [part.div_(temperature) for part in logits]
        logits = [_aligned(part, vocabulary) for part in logits]
        if len(logits) == 1:
            return DenseChunk(logits[0])
        # A mixture of probabilities: the log of their weighted sum is its logits.
        parts = [
            torch.log_softmax(part, -1) + math.log(weight) for part, weight in zip(logits, self.weights, strict=True)
        ]
        return DenseChunk(torch.logsumexp(torch.stack(parts), dim=0))

    def select(self, scored_T: Tensor) -> "OnlineTargets":
        layers = None if self.layers is None else [layer[scored_T] for layer in self.layers]
        return OnlineTargets([h[scored_T] for h in self.hidden], self.heads, self.weights, layers, self.kept)


class Kept:
    """Tables of logits that several students read in turn; past KEPT_BYTES they are made anew for each."""

    def __init__(self):
        self._left = KEPT_BYTES
        self._tables: dict[Hashable, Tensor] = {}

    def table(self, what: Hashable, make: Callable[[], Tensor], out_CV: Tensor | None = None) -> Tensor:
        """The table, which the caller may overwrite; a copy, in out_CV if that is given, of one that is kept."""
        table = self._tables.get(what)
        if table is None:
            table = make()
            if table.nbytes > self._left:
                return table
            self._left -= table.nbytes
            self._tables[what] = table
        return table.clone() if out_CV is None else out_CV.copy_(table)


def for_several(targets: Targets | None) -> Targets | None:
    """The same targets, for students that take them in turn and agree in which tokens are scored."""
    return replace(targets, kept=Kept()) if isinstance(targets, OnlineTargets) else targets


@dataclass(frozen=True)
class StoredTargets:
    """A cache's word on a batch, dense or sparse; made at one temperature, which the objective must have too."""

    stored: Chunk

    def chunk(self, tokens: slice, temperature: float, vocabulary: int, out_CV: Tensor | None = None) -> Chunk:
        if isinstance(self.stored, DenseChunk):
            # A copy, as the caller may overwrite it, and another student may read the store after this one.
            return DenseChunk(_aligned(self.stored.logits_CV[tokens].to(torch.float32, copy=True), vocabulary))
        ids, weight, tail, entropy = (None if part is None else part[tokens] for part in self.stored)
        assert ids is not None
        assert weight is not None
        # Rows that only the teacher has are padding here too: their mass goes to the other tokens in proportion.
        own = ids < vocabulary
        ids, weight = ids * own, weight.float() * own
        mass_C = weight.sum(-1) + (0.0 if tail is None else tail)
        tail = None if tail is None else tail / mass_C
        return SparseChunk(ids, weight / mass_C[:, None], tail, entropy)

    def select(self, scored_T: Tensor) -> "StoredTargets":
        parts = (None if part is None else part[scored_T] for part in self.stored)
        return StoredTargets(type(self.stored)(*parts))  # pyright: ignore[reportArgumentType]


def _aligned(logits_CV: Tensor, vocabulary: int) -> Tensor:
    rows = logits_CV.shape[-1]
    if rows > vocabulary:
        return logits_CV[:, :vocabulary].contiguous()
    return functional.pad(logits_CV, (0, vocabulary - rows), value=ABSENT) if rows < vocabulary else logits_CV

"""How a teacher's word is laid out on disk: what is kept of each token, in which types, and how it comes back.

A shard holds flat arrays, token after token, block after block. Where the entries per token vary, `start` says at
which entry each block begins.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from capgap.distill.targets import ABSENT, DenseChunk, SparseChunk, StoredTargets

Arrays = dict[str, np.ndarray]


class Format(Protocol):
    """One kind of cache.

    Attributes:
        most_bytes: of a token, at most.
        by_entry: the arrays whose entries per token vary.
    """

    most_bytes: int
    by_entry: tuple[str, ...]

    def dice(self, block_B: Sequence[int], block: int) -> Tensor | None:
        """The random numbers for the tokens of some blocks, where there are any."""
        ...

    def encode(self, log_q_CV: Tensor, dice_CK: Tensor | None) -> Arrays:
        """What is kept of some tokens."""
        ...

    def decode(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> StoredTargets:
        """The targets of the tokens that the arrays hold. Raises ValueError if they make no sense."""
        ...


class Draws(NamedTuple):
    """Draws of each of C tokens: distinct ids, how often each was drawn, and how many ids a token has, flat."""

    ids: Tensor
    counts: Tensor
    distinct_C: Tensor


def draw(proposal_CV: Tensor, dice_CN: Tensor) -> Draws:
    """N draws from each row of a proposal, one in each N-th part of its mass.

    The mean of count / N over dice is the proposal, as for independent draws, and no weighted sum of the counts
    varies more than theirs. Drawing from a proposal other than the distribution q itself, as from q to some power,
    makes the weight of an id count / N * q / proposal.

    Args:
        proposal_CV: not negative; need not sum to 1.
        dice_CN: float64 in [0, 1), uniform.
    Source: Anshumann et al. 2025, arXiv:2503.16870 (independent draws there); Cochran, Sampling Techniques, 5.
    """
    rows, n = dice_CN.shape
    mass_CV = proposal_CV.cumsum(-1, dtype=torch.float64)
    whole_C1 = mass_CV[:, -1:]
    strata = torch.arange(n, dtype=torch.float64, device=dice_CN.device)
    # Kept just below the whole mass, so that rounding draws no id of mass 0.
    at_CN = ((dice_CN + strata) / n * whole_C1).minimum(whole_C1.nextafter(torch.zeros_like(whole_C1)))
    ids_CN = torch.searchsorted(mass_CV, at_CN, right=True)
    first_CN = torch.ones_like(ids_CN, dtype=torch.bool)
    first_CN[:, 1:] = ids_CN[:, 1:] != ids_CN[:, :-1]
    begins = first_CN.flatten().nonzero().flatten()
    counts = begins.diff(append=begins.new_tensor([rows * n]))
    return Draws(ids_CN[first_CN], counts, first_CN.sum(-1))


class Sampled:
    """k draws from the teacher's distribution, as distinct ids with counts, and its entropy."""

    by_entry: tuple[str, ...] = ("ids", "counts")

    def __init__(self, k: int, seed: int, vocabulary: int):
        self.k, self.seed, self.vocabulary = k, seed, vocabulary
        self.count_type, self.id_type = _unsigned(k), _unsigned(vocabulary - 1, at_least=2)
        entry = self.count_type.itemsize + self.id_type.itemsize
        self.most_bytes = min(k, vocabulary) * entry + self.count_type.itemsize + 4

    def dice(self, block_B: Sequence[int], block: int) -> Tensor:
        return torch.from_numpy(np.concatenate([_uniform(self.seed, number, block, self.k) for number in block_B]))

    def encode(self, log_q_CV: Tensor, dice_CK: Tensor | None) -> Arrays:
        assert dice_CK is not None
        q_CV = log_q_CV.exp()
        drawn = draw(q_CV, dice_CK.to(q_CV.device))
        return {
            "ids": _numpy(drawn.ids, self.id_type),
            "counts": _numpy(drawn.counts, self.count_type),
            "distinct": _numpy(drawn.distinct_C, self.count_type),
            "entropy": _numpy(-(q_CV * log_q_CV).sum(-1), np.dtype(np.float32)),
        }

    def decode(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> StoredTargets:
        tokens, most = len(arrays["distinct"]), int(arrays["distinct"].max())
        if (
            int(arrays["counts"].sum(dtype=np.int64)) != tokens * self.k
            or int(arrays["distinct"].sum(dtype=np.int64)) != len(arrays["ids"])
            or int(arrays["ids"].max()) >= self.vocabulary
        ):
            raise ValueError(f"its counts do not add up to {self.k} a token, or an id is not in the vocabulary")
        distinct, ids, counts, entropy = (
            torch.from_numpy(arrays[name]).to(device) for name in ("distinct", "ids", "counts", "entropy")
        )
        there_TK = torch.arange(most, device=device) < distinct.int()[:, None]
        ids_TK = torch.zeros(there_TK.shape, dtype=torch.int64, device=device)
        weight_TK = torch.zeros(there_TK.shape, device=device)
        ids_TK[there_TK] = ids.long()
        weight_TK[there_TK] = counts.float() / self.k
        return StoredTargets(SparseChunk(ids_TK, weight_TK, None, entropy))


class TopK:
    """The k most probable ids, the logarithms of their probabilities, and the mass of all others."""

    by_entry: tuple[str, ...] = ()

    def __init__(self, k: int, vocabulary: int):
        self.k, self.vocabulary = min(k, vocabulary), vocabulary
        self.id_type = _unsigned(vocabulary - 1, at_least=2)
        self.most_bytes = self.k * (self.id_type.itemsize + 2) + 4

    def dice(self, block_B: Sequence[int], block: int) -> None:
        return None

    def encode(self, log_q_CV: Tensor, dice_CK: Tensor | None) -> Arrays:
        log_q_CK, ids_CK = log_q_CV.topk(self.k, dim=-1)
        rest_CV = log_q_CV.exp().scatter_(-1, ids_CK, 0.0)
        return {
            "ids": _numpy(ids_CK, self.id_type),
            "log_q": _numpy(log_q_CK, np.dtype(np.float16)),
            "tail": _numpy(rest_CV.sum(-1), np.dtype(np.float32)),
        }

    def decode(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> StoredTargets:
        if int(arrays["ids"].max()) >= self.vocabulary or not np.isfinite(arrays["tail"]).all():
            raise ValueError("an id is not in the vocabulary, or a mass not a number")
        tail_T = torch.from_numpy(arrays["tail"]).to(device)
        q_TK = torch.from_numpy(arrays["log_q"]).to(device).float().exp_()
        q_TK *= ((1 - tail_T) / q_TK.sum(-1))[:, None]  # rounding left the sum just off
        return StoredTargets(SparseChunk(torch.from_numpy(arrays["ids"]).to(device).long(), q_TK, tail_T, None))


class Dense:
    """The logarithm of every probability, in float16; that of an id whose probability is 0 is `ABSENT`."""

    by_entry: tuple[str, ...] = ()

    def __init__(self, vocabulary: int):
        self.vocabulary, self.most_bytes = vocabulary, 2 * vocabulary

    def dice(self, block_B: Sequence[int], block: int) -> None:
        return None

    def encode(self, log_q_CV: Tensor, dice_CK: Tensor | None) -> Arrays:
        return {"log_q": _numpy(log_q_CV.clamp_min(ABSENT), np.dtype(np.float16))}

    def decode(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> StoredTargets:
        # They stay float16 here; a chunk of them is made float32 when it is used.
        return StoredTargets(DenseChunk(torch.from_numpy(arrays["log_q"]).to(device)))


def format_of(facts: Mapping[str, Any]) -> Format:
    """The format that a cache's facts name."""
    if facts["kind"] == "sampled":
        return Sampled(facts["k"], facts["seed"], facts["vocabulary"])
    return TopK(facts["k"], facts["vocabulary"]) if facts["kind"] == "topk" else Dense(facts["vocabulary"])


def _unsigned(largest: int, *, at_least: int = 1) -> np.dtype:
    size = next(size for size in (1, 2, 4) if size >= at_least and largest < 256**size)
    return np.dtype(f"<u{size}")


def _numpy(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    return tensor.cpu().numpy().astype(dtype)


def _uniform(seed: int, number: int, block: int, k: int) -> np.ndarray:
    """Uniform numbers [block, k] in [0, 1), from the raw numbers of Philox, which numpy keeps across versions."""
    key = hashlib.sha256(f"{seed}/{number}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "big")).random_raw(block * k)
    return ((raw >> 11) * 2.0**-53).reshape(block, k)

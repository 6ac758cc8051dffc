"""Batches: which blocks step n trains on, as a pure function of data, seed and n."""

import hashlib
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from capgap.data.packed import PackedTokens, blocks_in
from capgap.errors import DataError

ROUND = 1000
"""Samples in a round, within which every source gets its share; more where a share is below 1/1000."""

_LONGEST_ROUND = 10**6


class Batches:
    """The batches of a training run; nothing in them depends on how many devices there are.

    The samples are numbered from 0. In each round of samples every source gets its share by weight, the
    remainders carried over so that after any number of rounds no source is a whole sample off, in an order
    drawn anew. The k-th sample of a source is the (k mod N)-th of its N blocks in the order drawn for epoch
    k // N: each block comes once an epoch.

    Args:
        packed: the tokens.
        block: inputs of a block.
        blocks_per_step: blocks of a step on all devices together.
        seed: another seed gives another order.
    Raises: DataError if a source has not one block, or its share is below one in a million.
    """

    def __init__(self, packed: PackedTokens, *, block: int, blocks_per_step: int, seed: int):
        self.packed, self.block, self.blocks_per_step, self.seed = packed, block, blocks_per_step, seed
        self.blocks = [source.blocks(block) for source in packed.sources]
        for source, count in zip(packed.sources, self.blocks, strict=True):
            if not count:
                raise DataError(
                    f"{packed.folder}: {source.name} has {source.tokens:,} tokens, not one block of {block} "
                    "and the token after it; give more text or a shorter block"
                )
        # First block of each shard, per source, to find a block's shard by.
        self._starts = [
            np.cumsum([0, *(blocks_in(len(shard), block) for shard in source.shards)]) for source in packed.sources
        ]
        weights = [Fraction(source.weight) for source in packed.sources]
        self._shares = [weight / sum(weights) for weight in weights]
        smallest = min(self._shares)
        if smallest * _LONGEST_ROUND < 1:
            name = packed.sources[self._shares.index(smallest)].name
            raise DataError(
                f"{packed.folder}: {name} has a share of {float(smallest):.1e} by weight; the least is 1e-06"
            )
        # With a whole sample of every source in each round, carrying remainders over never takes one back.
        self._round = max(ROUND, -(-smallest.denominator // smallest.numerator))
        self._epoch_order = lru_cache(maxsize=2 * len(self.blocks))(self._draw_epoch)
        self._round_order = lru_cache(maxsize=4)(self._draw_round)

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step: int64 [blocks_per_step, block + 1]; inputs are [:, :-1], labels [:, 1:]."""
        return self.rows(step, 0, 1)

    def rows(self, step: int, rank: int, world: int) -> torch.Tensor:
        """One rank's contiguous share of `batch(step)`: int64 [rows, block + 1], split as by np.array_split.

        Put together in the order of ranks, the shares are the batch. A rank may get no row.
        """
        samples = self._samples(step, rank, world)
        tokens = np.empty((len(samples), self.block + 1), dtype=np.int64)
        for row, sample in enumerate(samples):
            tokens[row] = self._block(*self.locate(sample))
        return torch.from_numpy(tokens)

    def numbers(self, step: int, rank: int, world: int) -> torch.Tensor:
        """The blocks of `rows(step, rank, world)`, int64 [rows], numbered through all sources in their order."""
        return torch.tensor([self._number(sample) for sample in self._samples(step, rank, world)], dtype=torch.int64)

    def describe(self, step: int) -> str:
        """Where a step's batch comes from, for an error: each source's documents, counted from 1."""
        places: dict[int, list[int]] = {}
        for sample in self._samples(step, 0, 1):
            source, index = self.locate(sample)
            places.setdefault(source, []).extend(self._documents(source, index))
        return "; ".join(
            f"{self.packed.sources[source].name}: documents {', '.join(map(str, sorted(set(found))))}"
            for source, found in sorted(places.items())
        )

    def _documents(self, source: int, index: int) -> range:
        """The documents that a block has tokens of; a separator stands before each."""
        shard, offset = self._place(source, index)
        shards, separator = self.packed.sources[source].shards, self.packed.separator
        before = sum(int((whole == separator).sum()) for whole in shards[:shard])
        before += int((shards[shard][: offset + 1] == separator).sum())
        inside = int((shards[shard][offset + 1 : offset + self.block + 1] == separator).sum())
        return range(max(before, 1), before + inside + 1)

    def _samples(self, step: int, rank: int, world: int) -> range:
        each, extra = divmod(self.blocks_per_step, world)
        start = step * self.blocks_per_step + rank * each + min(rank, extra)
        return range(start, start + each + (rank < extra))

    def _number(self, sample: int) -> int:
        source, index = self.locate(sample)
        return sum(self.blocks[:source]) + index

    def numbered(self, number: int) -> np.ndarray:
        """The tokens [block + 1] of a block by its number through all sources."""
        for source, count in enumerate(self.blocks):
            if number < count:
                return self._block(source, number)
            number -= count
        raise DataError(f"{self.packed.folder}: has {sum(self.blocks)} blocks of {self.block}, asked for another")

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, block of that source) of a sample, counted over all steps from 0."""
        source, pick = 0, sample
        if len(self.blocks) > 1:
            number, position = divmod(sample, self._round)
            sources, picks = self._round_order(number)
            source, pick = int(sources[position]), int(picks[position])
        epoch, place = divmod(pick, self.blocks[source])
        return source, int(self._epoch_order(source, epoch)[place])

    def _block(self, source: int, index: int) -> np.ndarray:
        shard, offset = self._place(source, index)
        return self.packed.sources[source].shards[shard][offset : offset + self.block + 1]

    def _place(self, source: int, index: int) -> tuple[int, int]:
        """The shard a block of a source lies in, and the offset of its first token there."""
        starts = self._starts[source]
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        return shard, (index - int(starts[shard])) * self.block

    def _draw_epoch(self, source: int, epoch: int) -> np.ndarray:
        return self._permutation(self.blocks[source], "epoch", source, epoch)

    def _draw_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a round: its source, and which pick of that source it is, counted from 0."""
        before, after = self._picks(number * self._round), self._picks((number + 1) * self._round)
        sources = np.repeat(np.arange(len(before)), [b - a for a, b in zip(before, after, strict=True)])
        sources = sources[self._permutation(self._round, "round", number)]
        picks = np.empty_like(sources)
        for source, first in enumerate(before):
            mine = np.flatnonzero(sources == source)
            picks[mine] = first + np.arange(len(mine))
        return sources, picks

    def _picks(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source has, by largest remainder; they add up."""
        exact = [share * samples for share in self._shares]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(counts)), key=lambda s: (counts[s] - exact[s], s))
        for source in by_remainder[: samples - sum(counts)]:
            counts[source] += 1
        return counts

    def _permutation(self, size: int, *key: str | int) -> np.ndarray:
        """A permutation of range(size), keyed by data, seed and `key`.

        It sorts the raw numbers of the Philox generator, which numpy keeps the same across versions; for its
        own permutations it does not promise that.
        """
        text = "/".join(map(str, (self.packed.manifest_hash, self.seed, *key)))
        philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
        return np.argsort(philox.random_raw(size), kind="stable")

"""A small teacher cache made in a process of its own, to be killed: python cache_runner.py FOLDER [KIND]."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capgap.distill import CachedTeacher, OnlineTeacher
from capgap.distill.caching import write_cache
from tiny import tiny_model

BLOCK, BLOCKS, VOCABULARY = 16, 240, 64


class RandomBlocks:
    """Ids that are a pure function of the block's number; as batches, 8 blocks a step, in order, around and around."""

    def numbered(self, number: int) -> np.ndarray:
        return torch.randint(0, VOCABULARY, (BLOCK + 1,), generator=torch.Generator().manual_seed(number)).numpy()

    def numbers(self, step: int, rank: int, world: int) -> torch.Tensor:
        return (torch.arange(8 * step, 8 * step + 8) % BLOCKS)[rank * 8 // world : (rank + 1) * 8 // world]

    def rows(self, step: int, rank: int, world: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.numbered(n) for n in self.numbers(step, rank, world).tolist()]))

    def describe(self, step: int) -> str:
        return f"the random batch {step}"


def facts_of(kind: str = "sampled", k: int | None = 20, temperature: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "teacher": "a" * 64,
        "teacher_config": "b" * 64,
        "tokenizer": "c" * 64,
        "data": "d" * 64,
        "block": BLOCK,
        "blocks": BLOCKS,
        "vocabulary": VOCABULARY,
        "temperature": temperature,
        "kind": kind,
        "k": k,
        "seed": 3 if kind == "sampled" else None,
        **more,
    }


def make(folder: Path, facts: dict[str, Any], *, teacher: OnlineTeacher | None = None, shard_blocks: int = 16) -> Path:
    write_cache(
        lambda: teacher or OnlineTeacher(tiny_model(seed=2)),
        RandomBlocks(),
        folder,
        facts,
        rows=3,
        shard_tokens=shard_blocks * BLOCK,
        autocast=contextlib.nullcontext,
        device=torch.device("cpu"),
        quiet=True,
    )
    return folder


def opened(folder: Path, facts: dict[str, Any], **more: Any) -> CachedTeacher:
    return CachedTeacher.open(make(folder, facts, **more), facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]), facts_of(), shard_blocks=2)

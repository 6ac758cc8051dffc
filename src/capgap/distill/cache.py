"""A teacher cache, opened: what a teacher said of every block of packed text, read from disk in its place."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from capgap.distill.formats import format_of
from capgap.distill.targets import StoredTargets
from capgap.errors import CacheError, CapgapError
from capgap.files import hash_file, hash_of, read_json

VERSION = 1
MANIFEST = "manifest.json"
_AGAIN = "remove the file and run `capgap cache` again"
# What decides a cache's contents, and how each is called in an error.
FACTS = {
    "teacher": "the teacher's hash",
    "teacher_config": "the hash of the teacher's config.json",
    "tokenizer": "the tokenizer's hash",
    "data": "the hash of the packed training data",
    "block": "data.block",
    "blocks": "the number of blocks",
    "vocabulary": "the vocabulary's size",
    "temperature": "distill.temperature",
    "kind": "cache.kind",
    "k": "cache.k",
    "seed": "cache.seed",
}


class CachedTeacher:
    """A Teacher without a model: reads the targets of the blocks that a batch is made of.

    Attributes:
        folder: where it lies.
        facts: what it was made from and how; the keys are those of FACTS.
        bytes_per_token: on disk.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.facts, self._shards = folder, manifest["facts"], manifest["shards"]
        self._shard_blocks: int = manifest["shard_blocks"]
        self.bytes_per_token: float = manifest["bytes_per_token"]
        self._format = format_of(self.facts)
        self._open = lru_cache(maxsize=256)(self._open_shard)

    @classmethod
    def open(cls, folder: str | Path, expected: Mapping[str, Any] | None = None) -> "CachedTeacher":
        """Opens a folder; sizes of the shards are compared with the manifest, contents are not (see `verify`).

        Args:
            expected: facts that must be as given; those left out may be anything.
        Raises: CacheError if the cache is not whole, was made from something else, or a shard is missing or cut off.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_facts(folder, manifest["facts"], expected or {})
        for shard in manifest["shards"]:
            check_size(folder / shard["file"], shard["bytes"])
        return cls(folder, manifest)

    @property
    def hash(self) -> str:
        """Changes with anything that decides what students learn from this cache."""
        return hash_of([VERSION, self.facts])

    def targets(self, input_BL: Tensor, block_B: Tensor) -> StoredTargets:
        """What the teacher said of the rows' blocks.

        Raises: CacheError that names the shard if it holds what cannot be.
        """
        parts = [self._read(number) for number in block_B.tolist()]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        try:
            return self._format.decode(arrays, input_BL.device)
        except ValueError as error:
            files = sorted({self._shards[number // self._shard_blocks]["file"] for number in block_B.tolist()})
            raise CacheError(
                f"{self.folder}: {' or '.join(files)} is damaged ({error}); run `capgap cache` again to learn which"
            ) from None

    def verify(self) -> None:
        """Reads all shards. Raises CacheError that names the first whose SHA-256 is not the manifest's."""
        for shard in self._shards:
            path = self.folder / shard["file"]
            if (found := hash_file(path)) != shard["sha256"]:
                raise CacheError(
                    f"{path}: its SHA-256 begins with {found[:12]}, in the manifest with {shard['sha256'][:12]}; "
                    f"the file is damaged: {_AGAIN}"
                )

    def _read(self, number: int) -> dict[str, np.ndarray]:
        """One block's arrays."""
        if not 0 <= number < self.facts["blocks"]:
            raise CacheError(f"{self.folder}: has {self.facts['blocks']} blocks, asked for block {number}")
        shard, place = divmod(number, self._shard_blocks)
        file, start = self._open(shard)
        tokens = slice(place * self.facts["block"], (place + 1) * self.facts["block"])
        entries = tokens if start is None else slice(int(start[place]), int(start[place + 1]))
        return {
            name: file.get_slice(name)[entries if name in self._format.by_entry else tokens]
            for name in file.keys()  # noqa: SIM118 (no dictionary)
            if name != "start"
        }

    def _open_shard(self, shard: int) -> tuple[Any, np.ndarray | None]:
        path = self.folder / self._shards[shard]["file"]
        try:
            file: Any = safe_open(path, framework="numpy")
            return file, file.get_tensor("start") if self._format.by_entry else None
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: cannot be read ({error}); {_AGAIN}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole cache. Raises CacheError if it is missing, broken or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(f"{path}: no such file; there is no teacher cache, or it is not whole: run `capgap cache`")
    try:
        manifest = read_json(path)
    except CapgapError as error:
        raise CacheError(f"{error}; {_AGAIN}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise CacheError(
            f"{path}: has version {version}; this capgap reads version {VERSION}: remove the folder and cache again"
        )
    if missing := {"facts", "shards", "shard_blocks", "bytes_per_token"} - manifest.keys():
        raise CacheError(f"{path}: {', '.join(sorted(missing))} missing; {_AGAIN}")
    return manifest


def check_facts(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises CacheError that says in what a cache differs from what is expected of it."""
    differing = [
        f"{FACTS[key]} is {_short(found.get(key))} in the cache, {_short(value)} here"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differing:
        raise CacheError(
            f"{folder}: this teacher cache was made from something else: {'; '.join(differing)}; make the recipe "
            "agree with it, or give another cache.folder and run `capgap cache`"
        )


def check_size(path: Path, expected: int) -> None:
    """Raises CacheError unless `path` is a file of that many bytes."""
    if not path.is_file():
        raise CacheError(f"{path}: no such file; a shard of the teacher cache is missing: run `capgap cache` again")
    if (found := path.stat().st_size) != expected:
        raise CacheError(f"{path}: has {found:,} bytes, it should have {expected:,}; the file is damaged: {_AGAIN}")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)

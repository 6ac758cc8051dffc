"""Packed tokens: what `pack` wrote, opened as memory maps and read in blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from capgap.data.tokenizer import tokenizer_hash
from capgap.errors import CapgapError, DataError
from capgap.files import hash_file, hash_of, read_json

VERSION = 1
MANIFEST = "manifest.json"
_KEYS = {"version", "vocab_size", "dtype", "separator", "tokenizer_hash", "sources", "hash", "identity"}


class PackedSource:
    """One source's tokens: its shards in order, its weight, and how much text they came from.

    Attributes:
        name: the source in a few words.
        weight: its weight among the sources, as given.
        documents, bytes, tokens: how many documents, bytes of UTF-8 text, and tokens with separators.
        shards: one memory map a shard, [n] of uint16 or uint32.
    """

    def __init__(self, facts: dict[str, Any], shards: list[np.ndarray]):
        self.name: str = facts["name"]
        self.weight: float = facts["weight"]
        self.documents: int = facts["documents"]
        self.bytes: int = facts["bytes"]
        self.tokens: int = facts["tokens"]
        self.shards = shards

    def blocks(self, block: int) -> int:
        """How many blocks of `block` inputs there are; a shard of n tokens has (n - 1) // block."""
        return sum(blocks_in(len(shard), block) for shard in self.shards)


class PackedTokens:
    """A folder of packed tokens.

    Attributes:
        folder: where it lies.
        manifest: what its manifest.json holds.
        sources: the PackedSources, in the recipe's order.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], sources: list[PackedSource]):
        self.folder, self.manifest, self.sources = folder, manifest, sources

    @classmethod
    def open(cls, folder: str | Path) -> "PackedTokens":
        """Opens a folder, its shards memory-mapped and their sizes compared with the manifest.

        Raises: DataError that names the file which is missing, cut off, or of another version.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        dtype = np.dtype(manifest["dtype"])
        sources = []
        for facts in manifest["sources"]:
            shards = [_map(folder / shard["file"], shard["tokens"], dtype) for shard in facts["shards"]]
            sources.append(PackedSource(facts, shards))
        return cls(folder, manifest, sources)

    @property
    def manifest_hash(self) -> str:
        """SHA-256 over the tokens, the weights and the tokenizer; not over block length, paths or times."""
        return self.manifest["hash"]

    @property
    def tokenizer_hash(self) -> str:
        """`tokenizer_hash` of the tokenizer that the tokens came from."""
        return self.manifest["tokenizer_hash"]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def separator(self) -> int:
        """The id that stands before each document."""
        return self.manifest["separator"]

    @property
    def tokens(self) -> int:
        """Tokens of all sources, separators included."""
        return sum(source.tokens for source in self.sources)

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 text that the tokens came from, all sources together."""
        return sum(source.bytes for source in self.sources)

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError unless `tokenizer` gives the ids that were packed."""
        found = tokenizer_hash(tokenizer)
        if found != self.tokenizer_hash:
            raise DataError(
                f"{self.folder}: was packed with another tokenizer (hash {self.tokenizer_hash[:12]}, "
                f"{self.vocab_size} ids) than this one (hash {found[:12]}, "
                f"{vocabulary_size(tokenizer)} ids); pack the text again"
            )

    def verify(self) -> None:
        """Reads all shards. Raises DataError that names the first one whose SHA-256 is not the manifest's."""
        for facts in self.manifest["sources"]:
            for shard in facts["shards"]:
                path = self.folder / shard["file"]
                if (found := hash_file(path)) != shard["sha256"]:
                    raise DataError(
                        f"{path}: its SHA-256 begins with {found[:12]}, in the manifest with "
                        f"{shard['sha256'][:12]}; the file is damaged: remove the folder and pack again"
                    )

    def stream(self, block: int) -> Iterator[np.ndarray]:
        """All tokens for evaluation, shard by shard, in int64 pieces of at most block + 1.

        Neighbours overlap by one. The last piece of a shard may be short, so that every token but the first
        of a shard is a label once.
        """
        for source in self.sources:
            for shard in source.shards:
                for start in range(0, len(shard) - 1, block):
                    yield shard[start : start + block + 1].astype(np.int64)


def blocks_in(tokens: int, block: int) -> int:
    """How many blocks a shard of `tokens` tokens holds; neighbours share the one token between them."""
    return max(tokens - 1, 0) // block


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises DataError if it is missing, broken or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; the folder holds no packed tokens, or packing has not ended: pack again"
        )
    try:
        manifest = read_json(path)
    except CapgapError as error:
        raise DataError(f"{error}; remove the folder and pack again") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise DataError(f"{path}: has version {version}; this capgap reads version {VERSION}: pack again")
    if missing := _KEYS - manifest.keys():
        raise DataError(f"{path}: {', '.join(sorted(missing))} missing; remove the folder and pack again")
    return manifest


def content_hash(manifest: dict[str, Any]) -> str:
    """The manifest's own hash: over the tokens of each shard, the sources' shares, and the tokenizer."""
    total = sum(source["weight"] for source in manifest["sources"])
    content = [
        [round(source["weight"] / total, 12), [shard["sha256"] for shard in source["shards"]]]
        for source in manifest["sources"]
    ]
    return hash_of([VERSION, manifest["dtype"], manifest["tokenizer_hash"], content])


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_size(path: Path, tokens: int, dtype: np.dtype) -> None:
    """Raises DataError unless `path` is a file of exactly that many tokens."""
    expected = tokens * dtype.itemsize
    if not path.is_file():
        raise DataError(f"{path}: no such file; a shard of the packed tokens is missing: pack again")
    if (found := path.stat().st_size) != expected:
        raise DataError(
            f"{path}: has {found:,} bytes, the manifest says {expected:,}; the file is damaged: "
            "remove the folder and pack again"
        )


def _map(path: Path, tokens: int, dtype: np.dtype) -> np.ndarray:
    check_size(path, tokens, dtype)
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None

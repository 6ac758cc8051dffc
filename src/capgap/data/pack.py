"""Packing: documents to token shards on disk, in pieces that a killed run can go on from."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from capgap.data.packed import (
    MANIFEST,
    VERSION,
    PackedTokens,
    check_size,
    content_hash,
    read_manifest,
    vocabulary_size,
)
from capgap.data.sources import describe, documents, fingerprint
from capgap.data.tokenizer import separator_id, tokenizer_hash
from capgap.errors import CapgapError, DataError
from capgap.files import atomic_file, hash_of, read_json, remove_leftovers, storage_errors, write_json
from capgap.progress import Bar
from capgap.recipe import Source

SHARD_TOKENS = 64 * 2**20
IDENTITY = "packing.json"
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2**20
# A document that is cut to a limit may leave so many tokens of it free.
_SPARE = 4


class Encoded(NamedTuple):
    """One document as it is stored.

    Attributes:
        ids: the separator and the text's ids, [n].
        bytes: the text's length in UTF-8.
        last: it was cut to keep to the limit, so that none may follow.
    """

    ids: np.ndarray
    bytes: int
    last: bool


def pack(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    block: int,
    separator: str | None = None,
    max_tokens: int | None = None,
    where: str = "sources",
    quiet: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> PackedTokens:
    """Tokenises the sources into `folder`, or opens it if it already holds exactly that.

    Each document is the separator's id followed by the ids of its text, without special tokens of the
    tokenizer's own; special tokens that are spelled out in a text are text. A packing that was killed goes on
    after its last whole shard. One process may pack into a folder at a time.

    Args:
        block: the inputs of a block; each source must fill one. It changes nothing of what is written.
        separator: the token before each document; None takes eos, else bos.
        max_tokens: at most so many tokens in all, shared among the sources by weight. The document that
            passes the limit is cut at a character, and its bytes counted as far as it is kept.
        where: what to call the list of sources in errors, such as `recipe.yaml: data.train`.
        shard_tokens: a shard ends with the document that brings it to so many tokens.
    Raises: DataError if a source is missing, broken, empty, gives no tokens or too few for a block, or the
        vocabulary does not fit 32 bits; StorageError if the folder cannot be written.
    """
    folder = Path(folder)
    limits = _limits(sources, max_tokens)
    facts: dict[str, Any] = {
        "version": VERSION,
        "vocab_size": vocabulary_size(tokenizer),
        "dtype": _dtype(tokenizer),
        "separator": separator_id(tokenizer, separator),
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
    inputs = [fingerprint(source, f"{where}.{i}") for i, source in enumerate(sources)]
    identity = hash_of([facts, inputs, limits, shard_tokens])
    if (folder / MANIFEST).is_file() and (old := _reusable(folder, identity)) is not None:
        manifest = old
        # Weights only say how often a source is drawn from, so the shards stay as they are.
        for source, new in zip(manifest["sources"], sources, strict=True):
            source["weight"] = new.weight
            source["source"] = _spec(new)
    else:
        _prepare(folder, identity)
        manifest = {**facts, "identity": identity, "sources": []}
        for i, source in enumerate(sources):
            packing = _Packing(source, f"{where}.{i}", folder / f"source-{i}", tokenizer, facts)
            shards = packing.run(limits[i], shard_tokens, quiet=quiet)
            manifest["sources"].append(_source_facts(source, i, shards))
    manifest["hash"] = content_hash(manifest)
    _check_blocks(folder, manifest, block)
    if not (folder / MANIFEST).is_file() or read_manifest(folder) != manifest:
        write_json(folder / MANIFEST, manifest)
    return PackedTokens.open(folder)


class _Packing:
    """One source on its way into its folder of shards."""

    def __init__(self, source: Source, where: str, folder: Path, tokenizer: Any, facts: dict[str, Any]):
        self.source, self.where, self.folder, self.tokenizer = source, where, folder, tokenizer
        self.separator, self.dtype = facts["separator"], np.dtype(facts["dtype"])

    def run(self, limit: int | None, shard_tokens: int, *, quiet: bool) -> list[dict[str, Any]]:
        """The facts of all shards, those of an earlier run first."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        shards = self._finished_shards()
        skip, done = (sum(shard[key] for shard in shards) for key in ("documents", "tokens"))
        room = None if limit is None else 0 if shards and shards[-1]["last"] else limit - done
        left = itertools.islice(documents(self.source, self.where), skip, None)
        encoded = self._encode_all((document.text for document in left), room)
        with Bar(f"packing {describe(self.source)}", limit, quiet=quiet) as bar:
            while (first := next(encoded, None)) is not None:
                shard = self._write(len(shards), itertools.chain([first], encoded), shard_tokens, bar, done)
                shards.append(shard)
                done += shard["tokens"]
            bar.to(done, f"{done:,} tokens")
        count = sum(shard["documents"] for shard in shards)
        name = f"{self.where}: {describe(self.source)}"
        if not count:
            raise DataError(f"{name}: its share of max_tokens, {limit}, is too small for any text; raise it")
        if done == count:
            raise DataError(
                f"{name}: the tokenizer gives no tokens for its {count} documents; "
                "give text that the vocabulary covers, or another tokenizer"
            )
        return shards

    def _finished_shards(self) -> list[dict[str, Any]]:
        shards = []
        while True:
            path = self.folder / f"{len(shards):05d}.bin"
            try:
                shard = read_json(path.with_suffix(".json"))
                check_size(path, shard["tokens"], self.dtype)
            except CapgapError:
                return shards
            shards.append(shard)

    def _write(self, number: int, encoded: Iterable[Encoded], full: int, bar: Bar, done: int) -> dict[str, Any]:
        """Writes one shard and, once it is whole, its sidecar."""
        path = self.folder / f"{number:05d}.bin"
        shard: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0, "last": False}
        digest = hashlib.sha256()
        with atomic_file(path) as beside, beside.open("wb") as file:
            for document in encoded:
                data = document.ids.astype(self.dtype).tobytes()
                file.write(data)
                digest.update(data)
                shard["documents"] += 1
                shard["bytes"] += document.bytes
                shard["tokens"] += len(document.ids)
                shard["last"] = document.last
                bar.to(done + shard["tokens"], f"{done + shard['tokens']:,} tokens")
                if shard["tokens"] >= full:
                    break
        shard["sha256"] = digest.hexdigest()
        write_json(path.with_suffix(".json"), shard)
        return shard

    def _encode_all(self, texts: Iterator[str], room: int | None) -> Iterator[Encoded]:
        """Each text encoded, until there is no more room for tokens; the text that passes it is cut."""
        if room is not None and room < 2:
            return
        for batch in _batches(texts, _BATCH_CHARACTERS if room is None else min(_BATCH_CHARACTERS, 8 * room)):
            for text, ids in zip(batch, encode(self.tokenizer, batch), strict=True):
                last = room is not None and len(ids) + 1 > room
                if room is not None and last:
                    text, ids = self._cut(text, len(ids), room - 1)
                    if not ids:
                        return
                stored = np.array([self.separator, *ids], dtype=np.int64)
                yield Encoded(stored, len(text.encode("utf-8")), last)
                if last:
                    return
                room = None if room is None else room - len(stored)

    def _cut(self, text: str, size: int, room: int) -> tuple[str, list[int]]:
        """A beginning of `text`, which takes `size` tokens, that takes at most `room` and few fewer; and its ids."""
        fits, too_long = (0, 0), (len(text), size)  # characters, tokens
        best: tuple[str, list[int]] = ("", [])
        halve = False
        while room > 0 and too_long[0] - fits[0] > 1 and fits[1] < room - _SPARE:
            # Tokens are nearly in proportion to characters; halving in turn bounds the search where they are not.
            share = 0.5 if halve else (room - fits[1]) / max(too_long[1] - fits[1], 1)
            middle = fits[0] + min(max(int((too_long[0] - fits[0]) * share), 1), too_long[0] - fits[0] - 1)
            ids = encode(self.tokenizer, [text[:middle]])[0]
            if len(ids) <= room:
                fits, best = (middle, len(ids)), (text[:middle], ids)
            else:
                too_long = (middle, len(ids))
            halve = not halve
        return best


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text as it is packed: no special token added, none recognised inside the text."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )["input_ids"]  # type: ignore[return-value]


def _batches(texts: Iterator[str], characters: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    size = vocabulary_size(tokenizer)
    if size > 2**32:
        raise DataError(f"the tokenizer has ids up to {size - 1}; packed tokens hold ids below {2**32}")
    return "<u2" if size <= 2**16 else "<u4"


def _limits(sources: Sequence[Source], max_tokens: int | None) -> list[int | None]:
    if max_tokens is None:
        return [None for _ in sources]
    total = sum(source.weight for source in sources)
    return [int(max_tokens * (source.weight / total)) for source in sources]


def _spec(source: Source) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude_defaults=True)


def _source_facts(source: Source, index: int, shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes", "tokens")}
    files = [
        {"file": f"source-{index}/{number:05d}.bin", "tokens": shard["tokens"], "sha256": shard["sha256"]}
        for number, shard in enumerate(shards)
    ]
    facts = {"source": _spec(source), "name": describe(source), "weight": source.weight}
    return {**facts, **totals, "shards": files}


def _check_blocks(folder: Path, manifest: dict[str, Any], block: int) -> None:
    for source in manifest["sources"]:
        longest = max(shard["tokens"] for shard in source["shards"])
        if longest < block + 1:
            raise DataError(
                f"{folder}: {source['name']} gives {source['tokens']:,} tokens, less than one block of "
                f"{block} and the token after it; give more text or a block of at most {longest - 1}"
            )


def _reusable(folder: Path, identity: str) -> dict[str, Any] | None:
    """The folder's manifest if it is of this identity and its shards are all there."""
    try:
        manifest = read_manifest(folder)
        if manifest["identity"] == identity:
            PackedTokens.open(folder)
            return manifest
    except DataError:
        pass
    return None


def _prepare(folder: Path, identity: str) -> None:
    """Keeps the shards of an earlier run with the same identity, removes those of any other."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        try:
            same = read_json(folder / IDENTITY).get("identity") == identity
        except (CapgapError, AttributeError):
            same = False
        (folder / MANIFEST).unlink(missing_ok=True)
        if not same:
            (folder / IDENTITY).unlink(missing_ok=True)
            for pattern in ("source-*/*.bin", "source-*/*.json"):
                for old in folder.glob(pattern):
                    old.unlink()
    if not same:
        write_json(folder / IDENTITY, {"identity": identity})

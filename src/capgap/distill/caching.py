"""Making a teacher cache: the teacher runs once over every block, shard by shard; a killed run goes on."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from capgap.distill.cache import MANIFEST, VERSION, check_facts, check_size, read_manifest
from capgap.distill.divergences import Divergence
from capgap.distill.formats import Arrays, Format, format_of
from capgap.distill.fused import Mix
from capgap.distill.processes import first_process_says, is_first_process, rank_and_world, wait_for_all
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import CacheError, CapgapError
from capgap.files import atomic_file, read_json, remove_leftovers, storage_errors, write_json
from capgap.models import head
from capgap.progress import Bar

BEGUN = "caching.json"
# A shard, which is put together in memory, takes about this much.
_SHARD_BYTES = 256 * 2**20


class Blocks(Protocol):
    """The text, by block number: `capgap.data.Batches` is one."""

    def numbered(self, number: int) -> np.ndarray: ...


def write_cache(
    load_teacher: Callable[[], OnlineTeacher],
    blocks: Blocks,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    rows: int,
    shard_tokens: int | None = None,
    autocast: Callable[[], Any],
    device: torch.device,
    made_with: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> bool:
    """Writes what is missing of a cache; returns whether that was anything. All processes call it and share the work.

    A shard's contents depend on facts and blocks alone, so that a cache made in several runs is the one made in one
    (to the last bit where the teacher's products are).

    Args:
        load_teacher: called only where there is something to do.
        facts: as in `capgap.distill.cache.FACTS`, all of them.
        rows: blocks that go through the teacher at once.
        shard_tokens: at most so many tokens in a shard, if at least a block; None makes shards of about 256 MiB.
        made_with: for the manifest, to be read by people.
    Raises: CacheError if the folder holds another cache or other files.
    """
    layout = format_of(facts)
    most = shard_tokens or _SHARD_BYTES // layout.most_bytes
    shard_blocks = min(max(1, most // facts["block"]), facts["blocks"])
    shard_blocks, missing = first_process_says(lambda: _begin(folder, dict(facts), shard_blocks))
    rank, world = rank_and_world()
    mine = missing[rank::world]
    if mine:
        teacher = load_teacher()
        for body in teacher.bodies:
            body.to(device)
        spans = [range(s * shard_blocks, min((s + 1) * shard_blocks, facts["blocks"])) for s in mine]
        total, done = sum(map(len, spans)) * facts["block"], 0
        with Bar("caching the teacher", total, quiet=quiet) as bar:
            for shard, span in zip(mine, spans, strict=True):
                pieces: list[Arrays] = []
                for first in range(span.start, span.stop, rows):
                    part = range(first, min(first + rows, span.stop))
                    with torch.no_grad(), autocast():
                        pieces += _said(teacher, blocks, part, layout, facts, device)
                    done += len(part) * facts["block"]
                    bar.to(done, f"{done:,} tokens")
                _write_shard(folder, shard, _joined(pieces, layout, facts["block"]), len(span))
    wait_for_all()
    if is_first_process() and (missing or not (folder / MANIFEST).is_file()):
        _write_manifest(folder, dict(facts), shard_blocks, made_with or {})
    wait_for_all()
    return bool(missing)


def _begin(folder: Path, facts: dict[str, Any], shard_blocks: int) -> tuple[int, list[int]]:
    """Blocks of a shard (as an earlier run chose) and the shards to be written."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    begun = _begun(folder)
    if begun is None:
        if any(folder.iterdir()):
            raise CacheError(f"{folder}: holds files that are not of a teacher cache; give another cache.folder")
        write_json(folder / BEGUN, {"version": VERSION, "facts": facts, "shard_blocks": shard_blocks})
    else:
        check_facts(folder, begun["facts"], facts)
        shard_blocks = begun["shard_blocks"]
    return shard_blocks, [s for s in range(-(-facts["blocks"] // shard_blocks)) if not _is_whole(folder, s)]


def _begun(folder: Path) -> dict[str, Any] | None:
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if not (folder / BEGUN).is_file():
        return None
    begun = read_json(folder / BEGUN)
    if begun.get("version") != VERSION:
        raise CacheError(
            f"{folder / BEGUN}: has version {begun.get('version')}; this capgap writes version {VERSION}: "
            "remove the folder, or give another cache.folder"
        )
    return begun


def _is_whole(folder: Path, shard: int) -> bool:
    path = _path(folder, shard)
    try:
        check_size(path, read_json(path.with_suffix(".json"))["bytes"])
    except CapgapError:
        return False
    return True


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.safetensors"


def _said(
    teacher: OnlineTeacher,
    blocks: Blocks,
    part: range,
    layout: Format,
    facts: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Arrays]:
    """What the teacher says of some blocks, a chunk of tokens at a time."""
    ids = np.stack([blocks.numbered(number)[: facts["block"]] for number in part]).astype(np.int64)
    targets = teacher.targets(torch.from_numpy(ids).to(device), torch.tensor(part))
    dice_TK = layout.dice(part, facts["block"])
    size = Mix(Divergence(), 1.0, facts["temperature"]).tokens_at_once(head(teacher.bodies[0].model))
    for at in range(0, ids.size, size):
        tokens = slice(at, at + size)
        log_q_CV = torch.log_softmax(targets.chunk(tokens, facts["temperature"], facts["vocabulary"]).logits_CV, -1)
        yield layout.encode(log_q_CV, None if dice_TK is None else dice_TK[tokens])


def _joined(pieces: list[Arrays], layout: Format, block: int) -> Arrays:
    arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    if layout.by_entry:
        ends = arrays["distinct"].reshape(-1, block).sum(1, dtype=np.int64).cumsum()
        arrays["start"] = np.concatenate([np.zeros(1, np.int64), ends])
    return arrays


def _write_shard(folder: Path, shard: int, arrays: Arrays, blocks: int) -> None:
    """Writes one shard and, once it is whole, its sidecar."""
    path = _path(folder, shard)
    data = save(arrays)
    with atomic_file(path) as beside:
        beside.write_bytes(data)
    facts = {"blocks": blocks, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(path.with_suffix(".json"), facts)


def _write_manifest(folder: Path, facts: dict[str, Any], shard_blocks: int, made_with: Mapping[str, str]) -> None:
    paths = [_path(folder, shard) for shard in range(-(-facts["blocks"] // shard_blocks))]
    shards = [{"file": path.name, **read_json(path.with_suffix(".json"))} for path in paths]
    size = sum(shard["bytes"] for shard in shards)
    with safe_open(paths[0], framework="numpy") as first:
        dtypes = {name: first.get_slice(name).get_dtype() for name in sorted(first.keys())}
    manifest = {
        "version": VERSION,
        "facts": facts,
        "shard_blocks": shard_blocks,
        "bytes": size,
        "bytes_per_token": round(size / (facts["blocks"] * facts["block"]), 3),
        "dtypes": dtypes,
        "made_with": dict(made_with),
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)

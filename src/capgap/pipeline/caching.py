"""The stage that runs the teacher once, for any number of students."""

from functools import partial
from pathlib import Path

import torch

from capgap import distill
from capgap.cost import format_count
from capgap.data import Batches
from capgap.distill.caching import write_cache
from capgap.distill.sharding import bfloat16_wanted
from capgap.files import LINEAGE, write_json
from capgap.models import default_device
from capgap.pipeline.stages import Corpus, lineage_of, versions
from capgap.pipeline.teachers import Teachers
from capgap.progress import say
from capgap.recipe import Cache, Train


def cache_stage(
    teachers: Teachers, corpus: Corpus, cache: Cache, settings: Train, folder: Path, *, quiet: bool = False
) -> distill.CachedTeacher:
    """Stores what the teachers say of every block of the training text; goes on where it was killed.

    All processes call it and share the work. A whole cache is opened, and the teacher not loaded.

    Args:
        settings: the students' temperature and precision.
    Raises: CacheError if the folder holds the cache of another teacher, text or setting.
    """
    device, block = default_device(), corpus.block
    batches = Batches(corpus.train, block=block, blocks_per_step=1, seed=0)
    facts = {
        **teachers.cache_facts(corpus, settings),
        "blocks": sum(batches.blocks),
        "vocabulary": max(config.vocab_size for config in teachers.configs),
        "kind": cache.kind,
        "k": None if cache.kind == "dense" else cache.k,
        "seed": cache.seed if cache.kind == "sampled" else None,
    }
    if "teacher" not in facts:  # no weights are there to complete a cache with
        return distill.CachedTeacher.open(folder, facts)
    half = bfloat16_wanted(settings.precision, device)

    def load() -> distill.OnlineTeacher:
        teachers.check(corpus)
        return distill.OnlineTeacher(*teachers.load(), weights=teachers.weights)

    wrote = write_cache(
        load,
        batches,
        folder,
        facts,
        rows=max(1, (settings.micro_batch_tokens or 16_384) // block),
        shard_tokens=cache.shard_tokens,
        autocast=partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=half),
        device=device,
        made_with={"device": device.type, "precision": "bfloat16" if half else "float32", **versions()},
        quiet=quiet,
    )
    cached = distill.CachedTeacher.open(folder, facts)
    if wrote and distill.is_first_process():
        write_json(
            folder / LINEAGE, lineage_of("cache", facts, parents={"teachers": [str(path) for path in teachers.folders]})
        )
    tokens = facts["blocks"] * block
    say(
        f"teacher cache: {format_count(tokens)} tokens, {cached.bytes_per_token:.1f} bytes a token, "
        f"{tokens * cached.bytes_per_token / 1e6:,.1f} MB in {folder}"
    )
    return cached

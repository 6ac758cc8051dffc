"""What a teacher cache costs in quality: the held-out loss at equal tokens, against the same training with the teacher.

Students are cut out of a real Llama of 260,000 parameters, and learn from it on TinyStories: from the model itself,
from caches of several kinds, and from no teacher. Data, start and order are those of a seed, whatever the way. Needs
the test data (see CONTRIBUTING.md).

    python benchmarks/cache_quality.py --tokens 400k --seeds 5 --records studies/cache/records.jsonl
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _measure import print_table
from _stories import RECIPE, open_stories, run
from capgap.anatomy import anatomy_of
from capgap.models import load_config
from capgap.pipeline import Teachers, Training, cache_stage, prune_stage, train_stage
from capgap.pipeline.run import student_shape
from capgap.recipe import Cache

WAYS: dict[str, Cache | None] = {
    "no teacher": None,
    "online": None,
    "dense": Cache(kind="dense"),
    "top-k 64": Cache(kind="topk", k=64),
    "top-k 8": Cache(kind="topk", k=8),
    "sampled 64": Cache(kind="sampled", k=64),
    "sampled 8": Cache(kind="sampled", k=8),
}


def measure(tokens: int, seeds: int, place: Path) -> list[dict[str, Any]]:
    """One row for each way and seed: the cache, its bytes per token, and the run's record without its curve."""
    recipe, teacher, corpus = open_stories(tokens, place)
    teachers = Teachers((teacher,), names=("t260k",))
    shape = student_shape(recipe.student[0], anatomy_of(load_config(teacher)))
    pruned = prune_stage(teacher, shape, recipe.prune, corpus, place / "pruned", scores=place / "scores", quiet=True)
    bytes_per_token = {
        name: cache_stage(teachers, corpus, cache, recipe.distill, place / name, quiet=True).bytes_per_token
        for name, cache in WAYS.items()
        if cache is not None
    }
    rows = []
    for seed in range(seeds):
        settings = recipe.distill.model_copy(update={"seed": seed})
        for name, cache in WAYS.items():
            print(f"  seed {seed}: {name}", file=sys.stderr, flush=True)
            taught = Training(f"{name}, seed {seed}", "distill", pruned, settings, place / f"run {name} {seed}")
            taught = replace(taught, teachers=teachers, student_name="s130k", start_name="t260k")
            if cache is not None:
                taught = replace(taught, cache=place / name)
            if name == "no teacher":
                taught = replace(taught, kind="pretrain", teachers=None)
            record = train_stage(taught, corpus, quiet=True)
            stored = {"cache": cache and cache.model_dump(mode="json"), "bytes_per_token": bytes_per_token.get(name)}
            rows.append(
                {
                    "way": name,
                    "recipe_file": f"recipes/{RECIPE.name}",
                    **stored,
                    **record.model_dump(mode="json", exclude={"curve"}),
                }
            )
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    def losses(way: str) -> list[float]:
        return [row["loss"] for row in rows if row["way"] == way]

    table = []
    for way in WAYS:
        found = losses(way)
        above = [a - b for a, b in zip(found, losses("online"), strict=True)]
        size = next(row["bytes_per_token"] for row in rows if row["way"] == way)
        table.append(
            [
                way,
                f"{statistics.mean(found):.4f}",
                "" if way == "online" else f"{statistics.mean(above):+.4f} ({min(above):+.4f} to {max(above):+.4f})",
                "" if size is None else f"{size:,.1f}",
            ]
        )
    title = f"Held-out nats per token after {rows[0]['tokens']:,} tokens, {len(losses('online'))} seeds"
    print_table(title, ["way", "loss", "above online, seed by seed", "bytes a token"], table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes the files that were asked for."""
    run(__doc__, measure, report, argv)


if __name__ == "__main__":
    main()

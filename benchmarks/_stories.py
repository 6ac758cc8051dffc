"""What the benchmarks of quality share: the stories recipe, its data and teacher, and their command line."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from _measure import machine, write_results
from capgap.data import load_tokenizer
from capgap.models import default_device, resolve_folder
from capgap.pipeline import Corpus, open_corpus
from capgap.recipe import Recipe, load, parse_count

RECIPE = Path(__file__).parents[1] / "recipes" / "stories.yaml"


def open_stories(tokens: int, place: Path) -> tuple[Recipe, Path, Corpus]:
    """The recipe for runs of so many tokens, its teacher's folder, and its text packed below `place`."""
    recipe = load(RECIPE, Recipe, [f"distill.tokens={tokens}", "distill.evaluations=1"])
    assert isinstance(recipe.teacher, str)
    teacher = resolve_folder(recipe.teacher)
    corpus = open_corpus(
        recipe.data,
        load_tokenizer(teacher),
        place / "data",
        held_out_tokens=recipe.evaluate.tokens,
        train_tokens=tokens + 10_000,
        quiet=True,
    )
    return recipe, teacher, corpus


def run(
    doc: str | None,
    measure: Callable[[int, int, Path], list[dict[str, Any]]],
    report: Callable[[Sequence[dict[str, Any]]], None],
    argv: Sequence[str] | None,
) -> None:
    """Trains, prints a table, writes the files that were asked for.

    Args:
        measure: gives the rows, from tokens of each run, seeds and a folder to work in.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=parse_count, default=200_000, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, few tokens: whether it runs")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--records", type=Path, help="write them here too, one a line")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.seeds = 10_000, 1
    with tempfile.TemporaryDirectory(prefix="stories-") as place:
        rows = measure(args.tokens, args.seeds, Path(place))
    report(rows)
    if args.records is not None:
        args.records.parent.mkdir(parents=True, exist_ok=True)
        args.records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_results(args.json, {"machine": machine(default_device()), "threads": torch.get_num_threads(), "rows": rows})

"""What a score is worth: held-out loss right after pruning, and after equal short distillation, for each score
and each repair.

Students are cut in width out of a real Llama of 260,000 parameters, and learn from it on TinyStories; everything but
score and repair is the same. Needs the test data (see CONTRIBUTING.md).

    python benchmarks/pruning_scores.py --tokens 200k --seeds 3 --records studies/pruning/records.jsonl
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from _measure import print_table
from _stories import RECIPE, open_stories, run
from capgap.anatomy import anatomy_of
from capgap.models import load_config
from capgap.pipeline import Teachers, Training, prune_stage, train_stage
from capgap.pipeline.run import student_shape
from capgap.prune import Method, Repair

SPARSITIES = (0.3, 0.5, 0.7)


def variants() -> list[tuple[Method, Repair]]:
    """Every score, unrepaired and fully repaired; the default score with every repair."""
    found: list[tuple[Method, Repair]] = [(m, r) for m in get_args(Method) for r in ("none", "all")]
    return [*found, ("expressiveness", "norms"), ("expressiveness", "outputs")]


def measure(tokens: int, seeds: int, place: Path) -> list[dict[str, Any]]:
    """One row for each sparsity, score, repair and seed: the run's record without its curve."""
    recipe, teacher, corpus = open_stories(tokens, place)
    anatomy = anatomy_of(load_config(teacher))
    rows = []
    for sparsity in SPARSITIES:
        shape = student_shape(recipe.student[0].model_copy(update={"scale": 1 - sparsity}), anatomy)
        for (method, repair), seed in itertools.product(variants(), range(seeds)):
            run = f"{sparsity:.0%} cut, {method}, repair {repair}, seed {seed}"
            print(f"  {run}", file=sys.stderr, flush=True)
            chosen = {"score": method, "repair": repair, "seed": seed if method == "random" else 0}
            prune = recipe.prune.model_copy(update=chosen)
            name = f"{method} {prune.seed}"
            pruned = prune_stage(
                teacher,
                shape,
                prune,
                corpus,
                place / f"pruned {sparsity} {repair} {name}",
                scores=place / f"scores {name}",
                quiet=True,
            )
            training = Training(
                run,
                "distill",
                pruned,
                recipe.distill.model_copy(update={"seed": seed}),
                place / run,
                teachers=Teachers((teacher,), names=("t260k",)),
                student_name=f"s{1 - sparsity:.1f}x",
                start_name="t260k",
            )
            record = train_stage(training, corpus, quiet=True)
            found = {"sparsity": sparsity, "score": method, "repair": repair, "shape": str(shape)}
            found |= {"recipe_file": f"recipes/{RECIPE.name}"}
            rows.append(found | record.model_dump(mode="json", exclude={"curve"}))
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    def spread(row_of: dict[str, Any], key: str) -> str:
        found = [row[key] for row in rows if all(row[k] == v for k, v in row_of.items())]
        return f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"

    table = []
    for sparsity in SPARSITIES:
        for method, repair in variants():
            of = {"sparsity": sparsity, "score": method, "repair": repair}
            table.append([f"{sparsity:.0%}", method, repair, spread(of, "start_loss"), spread(of, "loss")])
    title = (
        f"Held-out nats per token, {len(rows) // len(table)} seeds: mean (lowest to highest); "
        f"{rows[0]['tokens']:,} tokens of distillation"
    )
    print_table(title, ["cut", "score", "repair", "after pruning", "after distillation"], table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes the files that were asked for."""
    run(__doc__, measure, report, argv)


if __name__ == "__main__":
    main()

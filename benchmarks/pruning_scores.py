"""What a score is worth: held-out loss right after pruning, and after equal short distillation, for each score.

Students are cut in width out of a real Llama of 260,000 parameters, and learn from it on TinyStories; everything but
the score is the same. Needs the test data (see CONTRIBUTING.md).

    python benchmarks/pruning_scores.py --tokens 200k --seeds 3 --records studies/pruning/records.jsonl
"""

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
from capgap.prune import Method

SPARSITIES = (0.3, 0.5, 0.7)


def measure(tokens: int, seeds: int, place: Path) -> list[dict[str, Any]]:
    """One row for each sparsity, score and seed: the run's record without its curve."""
    recipe, teacher, corpus = open_stories(tokens, place)
    anatomy = anatomy_of(load_config(teacher))
    rows = []
    for sparsity in SPARSITIES:
        shape = student_shape(recipe.student[0].model_copy(update={"scale": 1 - sparsity}), anatomy)
        for method in get_args(Method):
            for seed in range(seeds):
                print(f"  {sparsity:.0%} cut, {method}, seed {seed}", file=sys.stderr, flush=True)
                prune = recipe.prune.model_copy(update={"score": method, "seed": seed if method == "random" else 0})
                name = f"{method} {prune.seed}"
                folders = {"scores": place / f"scores {name}", "quiet": True}
                pruned = prune_stage(teacher, shape, prune, corpus, place / f"pruned {sparsity} {name}", **folders)
                training = Training(
                    f"{sparsity:.0%} cut, {method}, seed {seed}",
                    "distill",
                    pruned,
                    recipe.distill.model_copy(update={"seed": seed}),
                    place / f"run {sparsity} {method} {seed}",
                    teachers=Teachers((teacher,), names=("t260k",)),
                    student_name=f"s{1 - sparsity:.1f}x",
                    start_name="t260k",
                )
                record = train_stage(training, corpus, quiet=True)
                found = {"sparsity": sparsity, "score": method, "shape": str(shape)}
                found |= {"recipe_file": f"recipes/{RECIPE.name}"}
                rows.append(found | record.model_dump(mode="json", exclude={"curve"}))
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    def spread(row_of: dict[str, Any], key: str) -> str:
        found = [row[key] for row in rows if all(row[k] == v for k, v in row_of.items())]
        return f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"

    table = []
    for sparsity in SPARSITIES:
        for method in get_args(Method):
            of = {"sparsity": sparsity, "score": method}
            table.append([f"{sparsity:.0%}", method, spread(of, "start_loss"), spread(of, "loss")])
    title = (
        f"Held-out nats per token, {len(rows) // len(table)} seeds: mean (lowest to highest); "
        f"{rows[0]['tokens']:,} tokens of distillation"
    )
    print_table(title, ["cut", "score", "after pruning", "after distillation"], table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes the files that were asked for."""
    run(__doc__, measure, report, argv)


if __name__ == "__main__":
    main()

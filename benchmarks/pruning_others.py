"""Held-out loss right after pruning: capgap's way beside LLM-Pruner's, on the same model, text and budget.

LLM-Pruner (Ma et al. 2023, arXiv:2305.11627) ranks by the first-order Taylor term: of each group of weights that go
together the sum of |weight x gradient|, the gradient taken once over all calibration text. Its score is written here
anew, as it comes as a repository of its own, not as a package. It is taken in capgap's shape, and in its own, in which
the hidden size stays and heads and neurons are cut all the more. Needs the test data (see CONTRIBUTING.md).

    python benchmarks/pruning_others.py --settings --json others.json
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from _measure import machine, print_table, write_results
from _stories import open_stories
from capgap import evaluate
from capgap.anatomy import Anatomy, anatomy_of
from capgap.data import Batches
from capgap.models import default_device, load_model, sum_cross_entropy
from capgap.pipeline import prune_stage
from capgap.prune import Scores, cut_model, repair, score, select, solve_shape
from capgap.prune.importance import magnitudes

SPARSITIES = (0.3, 0.5, 0.7)


def taylor_scores(model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Tensor]) -> Scores:
    """Of each group the sum of |weight x gradient|."""
    model.zero_grad(set_to_none=True)
    for ids in batches:
        (sum_cross_entropy(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel() / len(batches)).backward()
    roots = copy.deepcopy(model)
    with torch.no_grad():
        for root, parameter in zip(roots.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            root.copy_((parameter * parameter.grad).abs().sqrt())  # their magnitude is the root of what is wanted
    return Scores(**{name: norm.square() for name, norm in magnitudes(roots, anatomy).items()})


def measure(tokens: int, place: Path) -> list[dict[str, Any]]:
    """One row for each sparsity and way."""
    recipe, start, corpus = open_stories(200_000, place)
    model = load_model(start)
    anatomy = anatomy_of(model.config)
    order = Batches(corpus.train, block=corpus.block, blocks_per_step=1, seed=0)
    taylor = taylor_scores(model, anatomy, [order.batch(n) for n in range(tokens // corpus.block)])
    whole, full = sum(p.numel() for p in model.parameters()), anatomy.shape.hidden
    rows = []

    def add(sparsity: float, way: str, student: PreTrainedModel) -> None:
        loss = evaluate.evaluate(student, corpus.held_out, block=corpus.block, quiet=True).loss
        size, shape = sum(p.numel() for p in student.parameters()), anatomy_of(student.config).shape
        rows.append({"sparsity": sparsity, "way": way, "parameters": size, "shape": str(shape), "loss": loss})

    for sparsity in SPARSITIES:
        target = round((1 - sparsity) * whole)
        even = solve_shape(anatomy, target)
        for kind in ("auto", "all", "none"):
            prune = recipe.prune.model_copy(update={"calibration_tokens": tokens, "repair": kind})
            folder = place / f"{sparsity} {kind}"
            prune_stage(start, even, prune, corpus, folder, scores=place / "scores", quiet=True)
            way = {"auto": "capgap", "all": "capgap, repaired", "none": "capgap, not repaired"}[kind]
            add(sparsity, way, AutoModelForCausalLM.from_pretrained(folder))
        add(sparsity, "LLM-Pruner's score", cut_model(model, anatomy, select(taylor, even)))
        own = solve_shape(anatomy, target, layers=even.layers, limits={"hidden": (full, full)})
        add(sparsity, "LLM-Pruner's score and shape", cut_model(model, anatomy, select(taylor, own)))
    return rows


def measure_settings(place: Path) -> list[dict[str, Any]]:
    """capgap's own loss at a cut of 50 %: by sequences of a gradient, unrepaired; by the tokens that repair it."""
    _, start, corpus = open_stories(200_000, place)
    model = load_model(start)
    anatomy = anatomy_of(model.config)
    shape = solve_shape(anatomy, sum(p.numel() for p in model.parameters()) // 2)

    def text(tokens: int, rows: int) -> list[Tensor]:
        order = Batches(corpus.train, block=corpus.block, blocks_per_step=rows, seed=0)
        return [order.batch(n) for n in range(tokens // corpus.block // rows)]

    def loss(student: PreTrainedModel) -> float:
        return evaluate.evaluate(student, corpus.held_out, block=corpus.block, quiet=True).loss

    rows, keeps = [], {}
    for batch in (32, 8, 1):
        keeps[batch] = select(score(model, anatomy, text(65_536, batch), quiet=True), shape)
        student = cut_model(model, anatomy, keeps[batch])
        rows.append({"setting": f"{batch} sequences a gradient, no repair", "loss": loss(student)})
    for tokens in (2048, 8192, 32_768):
        student = cut_model(model, anatomy, keeps[1])
        repair(student, model, anatomy, keeps[1], text(tokens, 16), quiet=True)
        rows.append({"setting": f"1 sequence a gradient, repaired on {tokens:,} tokens", "loss": loss(student)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Cuts, prints a table, writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration text")
    parser.add_argument("--settings", action="store_true", help="also capgap's own settings beside each other")
    parser.add_argument("--quick", action="store_true", help="little text: whether it runs")
    parser.add_argument("--json", type=Path, help="write all rows here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="others-") as place:
        rows = measure(2048 if args.quick else args.tokens, Path(place))
    table = [[f"{r['sparsity']:.0%}", r["way"], f"{r['parameters']:,}", r["shape"], f"{r['loss']:.3f}"] for r in rows]
    print_table("Held-out nats per token after pruning", ["cut", "way", "parameters", "shape", "loss"], table)
    found: dict[str, Any] = {"machine": machine(default_device()), "rows": rows}
    if args.settings:
        with tempfile.TemporaryDirectory(prefix="settings-") as place:
            found["settings"] = measure_settings(Path(place))
        table = [[row["setting"], f"{row['loss']:.3f}"] for row in found["settings"]]
        print_table("capgap at a cut of 50 %", ["setting", "loss"], table)
    write_results(args.json, found)


if __name__ == "__main__":
    main()

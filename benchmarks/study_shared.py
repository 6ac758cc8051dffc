"""Four students of one teacher in one study, beside the same four trials as four studies of their own.

In one study text is packed and the teacher scored once, and the teacher's forward pass serves all four; apart, each
trial does all of it itself. The teacher is pretrained (briefly: how well does not matter here) before anything is
timed, and no start of Python is counted. The losses must come out equal.

    python benchmarks/study_shared.py --rounds 3
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from _measure import interleaved, machine, print_table, ratios, write_results
from capgap.models import default_device
from capgap.recipe import check
from capgap.records import RunRecord
from capgap.study import StudySpec, run_study

STUDENTS = ("15k", "24k", "41k", "68k")
HIDDEN = {"t402k": (119, 328), "t1.14M": (208, 552)}


def spec_of(students: Sequence[str], teacher: str, tokens: int, together: int) -> StudySpec:
    stdlib = {"python_stdlib": True}
    hidden, neurons = HIDDEN[teacher]
    loop = {"tokens_per_step": 1024, "lr": 5e-3, "evaluations": 1, "checkpoint_every": 600}
    return check(
        {
            "data": {"train": {**stdlib, "part": "train"}, "held_out": {**stdlib, "part": "held-out"}, "block": 128},
            "nano": {
                "vocabulary": 512,
                "members": [{"hidden": hidden, "neurons": neurons, "lr": 2e-3}],
                "pretrain": {**loop, "tokens": 20_000},
            },
            "students": [{"scale": scale} for scale in students],
            "prune": {"calibration_tokens": 65_536, "repair": "none"},
            "distill": {**loop, "tokens": tokens},
            "evaluate": {"tokens": 40_000},
            "side_by_side": together,
            "train_tokens": 1_000_000,
        },
        StudySpec,
        "the benchmark",
    )


class Bench:
    """A teacher that is ready, and the two ways to its four students."""

    def __init__(self, place: Path, teacher: str, tokens: int):
        self.place, self.teacher, self.tokens, self.number = place, teacher, tokens, 0
        self.losses: dict[str, set[float]] = {}
        family = spec_of(STUDENTS, teacher, tokens, 1)
        nobody = family.model_copy(update={"grids": [family.grids[0].model_copy(update={"teachers": ["none"]})]})
        run_study(nobody, place / "family", quiet=True)

    def run(self, students: Sequence[str], together: int) -> None:
        self.number += 1
        folder = self.place / str(self.number)
        shutil.copytree(self.place / "family" / "runs", folder / "runs")
        shutil.copytree(self.place / "family" / "tokenizer", folder / "tokenizer")
        records: list[RunRecord] = run_study(spec_of(students, self.teacher, self.tokens, together), folder, quiet=True)
        for record in records:
            if record.kind != "pretrain":
                self.losses.setdefault(record.student, set()).add(record.loss)
        shutil.rmtree(folder)

    def together(self) -> None:
        self.run(STUDENTS, len(STUDENTS))

    def apart(self) -> None:
        for student in STUDENTS:
            self.run([student], 1)


def measure(teacher: str, tokens: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="capgap-shared-") as place:
        bench = Bench(Path(place), teacher, tokens)
        seconds, _ = interleaved(
            {"together": bench.together, "apart": bench.apart},
            rounds,
            default_device(),
            quiet_within=0.1,
            clock=time.perf_counter,
            tell=lambda text: print(f"{teacher}: {text}", file=sys.stderr, flush=True),
        )
    differ = {name: sorted(found) for name, found in bench.losses.items() if len(found) > 1}
    return {"teacher": teacher, "tokens": tokens, "seconds": seconds, "losses that differ": differ}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000, help="of each trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teachers", nargs="+", default=list(HIDDEN), choices=list(HIDDEN))
    parser.add_argument("--quick", action="store_true", help="few tokens: whether it runs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokens, rounds = (10_240, 1) if args.quick else (args.tokens, args.rounds)
    found = [measure(teacher, tokens, rounds) for teacher in args.teachers]
    rows = []
    for row in found:
        each = [f"{statistics.median(row['seconds'][way]):.1f}" for way in ("together", "apart")]
        rows.append([row["teacher"], *each, str(ratios(row["seconds"]["together"], row["seconds"]["apart"]))])
        if row["losses that differ"]:
            raise SystemExit(f"the losses differ between the two ways: {row['losses that differ']}")
    title = f"Seconds of four students ({', '.join(STUDENTS)}), {tokens:,} tokens each, one thread"
    print_table(title, ["teacher", "one study", "four studies", "one / four"], rows)
    write_results(args.json, {"machine": machine(default_device()), "students": STUDENTS, "rows": found})


if __name__ == "__main__":
    main()

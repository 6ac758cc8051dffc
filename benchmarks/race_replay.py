"""What a race would have found, and saved, on a grid that was run in full, from its records alone.

Nothing is trained: the race is shown a record only when it would have run it. For each student and each budget that all
teachers were run at: the race's teacher beside the full grid's best, losses the mean over seeds, and the share of the
grid's FLOPs.

    python benchmarks/race_replay.py studies/nano/records.jsonl --json benchmarks/results/race_replay.json
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from _measure import print_table, write_results
from capgap import records
from capgap.cost import format_count
from capgap.study import ForecastError, Race, Replayed, forecast_errors, replay

COLUMNS = ["student", "seeds", "tokens", "ran each heat", "the race's teacher", "the best", "above it", "FLOPs"]


def row(one: Replayed) -> list[str]:
    return [
        f"{one.student} {one.condition}".strip(),
        ", ".join(map(str, one.seeds)),
        format_count(one.tokens[-1]),
        " > ".join(str(len(heat)) for heat in one.heats),
        f"{one.teacher} ({one.loss:.4f})",
        f"{one.best_teacher} ({one.best_loss:.4f})",
        f"{100 * one.above:.2f} %",
        f"{100 * one.share:.1f} %",
    ]


def by_distance(errors: Sequence[ForecastError]) -> list[list[str]]:
    """A row for each number of tokens ahead, over those measured; root mean squares."""
    rows = []
    for times in sorted({round(one.times) for one in errors}):
        mine = [one for one in errors if round(one.times) == times]
        off, ratio = (
            math.sqrt(sum(getattr(one, name) ** 2 for one in mine) / len(mine)) for name in ("error", "in_errors")
        )
        rows.append([f"{times} x", str(len(mine)), f"{off:.4f}", f"{ratio:.2f}"])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Replays, prints a table, writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="?", default=Path("studies/nano/records.jsonl"))
    parser.add_argument("--share", type=float, default=Race().share, help="of a grid's FLOPs that its race may take")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    found = replay(records.read(args.records), Race(share=args.share))
    print_table(f"Races replayed on {args.records}", COLUMNS, [row(one) for one in found])
    near = sum(one.above <= 0.005 for one in found)
    print(
        f"{near} of {len(found)} within 0.5 % of the full grid's best; "
        f"at most {100 * max((one.share for one in found), default=0.0):.1f} % of a grid's FLOPs"
    )
    errors = forecast_errors(records.read(args.records))
    print_table(
        "Forecasts beside what came",
        ["tokens ahead", "forecasts", "off by, nats", "in standard errors"],
        by_distance(errors),
    )
    write_results(
        args.json,
        {
            "share": args.share,
            "races": [{**asdict(one), "above": one.above} for one in found],
            "forecasts": [asdict(one) for one in errors],
        },
    )


if __name__ == "__main__":
    main()

"""A study's results as one table, for other tools: a row for each run and, if wanted, each point of its curve."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from capgap.errors import StudyError
from capgap.files import atomic_file
from capgap.records import RunRecord

_COLUMNS = (
    "run",
    "kind",
    "condition",
    "student",
    "student_scale",
    "teacher",
    "teacher_scale",
    "start",
    "start_scale",
    "seed",
    "tokens",
    "tokens_taken_over",
    "tokens_before",
    "loss",
    "start_loss",
    "bits_per_byte",
    "flops",
    "flops_spent",
    "seconds",
    "device",
    "data_hash",
    "recipe_hash",
)


def rows_of(records: Sequence[RunRecord], *, points: bool = False) -> list[dict[str, Any]]:
    """The records as flat rows; losses are nats per token, scales parameters.

    Args:
        points: also a row for each held-out loss measured on the way, at its `tokens`; their `point` is "curve", that
            of finished runs "final".
    """
    rows = []
    for record in records:
        final = {name: getattr(record, name) for name in _COLUMNS}
        if not points:
            rows.append(final)
            continue
        for at in record.curve:
            if "loss" in at and at["tokens"] < record.tokens:
                rows.append({**final, "tokens": int(at["tokens"]), "loss": at["loss"], "point": "curve"})
        rows.append({**final, "point": "final"})
    return rows


def export_records(records: Sequence[RunRecord], path: Path, *, points: bool = False) -> int:
    """Writes the rows to a .jsonl, .csv or .parquet file, whole or not at all; how many they are.

    Raises: StudyError for another ending, and where there is nothing to write.
    """
    rows = rows_of(records, points=points)
    if not rows:
        raise StudyError(f"{path}: nothing to write, no trial is finished")
    if path.suffix not in (".jsonl", ".csv", ".parquet"):
        raise StudyError(f"{path}: the ending says the format; give .jsonl, .csv or .parquet")
    with atomic_file(path) as beside:
        if path.suffix == ".jsonl":
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), beside)
        else:
            from pyarrow import csv

            csv.write_csv(pa.Table.from_pylist(rows), beside)
    return len(rows)

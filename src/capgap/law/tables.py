"""Losses or optima from a table that somebody else made, or that a study exported: CSV, TSV, JSONL or Parquet."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

from capgap.errors import LawError
from capgap.law.lawfit import Observation
from capgap.recipe import parse_count

_NAMES = {
    "student": ("student_scale", "student_params", "student_parameters", "student", "s"),
    "teacher": ("teacher_scale", "teacher_params", "teacher_parameters", "teacher", "t"),
    "loss": ("loss", "nats"),
    "seed": ("seed",),
    "tokens": ("tokens",),
    # As `capgap study export` writes them.
    "name": ("student",),
    "condition": ("condition",),
    "kind": ("kind",),
    "start": ("start_scale",),
    "point": ("point",),
}


@dataclass(frozen=True)
class LossRow:
    """One run: its losses and scales; tokens trained on, None where not given; the student's name; its condition."""

    run: Observation
    tokens: int | None = None
    name: str = ""
    condition: str = ""


@dataclass(frozen=True)
class LossTable:
    """A table of losses."""

    rows: list[LossRow]


@dataclass(frozen=True)
class OptimaTable:
    """A table without losses: each student's optimal teacher, parameters."""

    students: list[float]
    teachers: list[float]


def read_table(path: Path) -> LossTable | OptimaTable:
    """Reads a table with a row for each run, or for each student's optimum.

    Columns, in any case and order: `student` and `teacher` (parameters, such as 28000000 or 28M), `loss` (nats per
    token; without it the rows are optima, each student once), and where there are several runs of a pair `seed`,
    `tokens`. Others are not read, but for those of `capgap study export`: runs that were not distilled, whose start is
    another model than their teacher, or that had not ended, are left out.

    Raises: LawError that names the file, and the row and column where a value is missing or is no number.
    """
    rows = _rows(path)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    columns = {name: _column(heads, choices) for name, choices in _NAMES.items()}
    for name in ("student", "teacher"):
        if columns[name] is None:
            raise LawError(
                f"{path}: no column for the {name}'s parameters; it has {', '.join(heads)}; call one {name}_scale"
            )
    kept = [(number, row) for number, row in enumerate(rows, start=1) if _is_coupled(row, columns)]
    if not kept:
        raise LawError(f"{path}: holds no rows of students that were distilled from the model they were cut from")
    students = [_scale(path, number, row, columns["student"]) for number, row in kept]
    teachers = [_scale(path, number, row, columns["teacher"]) for number, row in kept]
    if columns["loss"] is None:
        if len(set(students)) < len(students):
            raise LawError(
                f"{path}: a student is there twice, so its rows are not optima, and no column is called loss (it has "
                f"{', '.join(heads)}); call that of the losses, in nats per token, loss"
            )
        return OptimaTable(students, teachers)
    found = []
    for (number, row), student, teacher in zip(kept, students, teachers, strict=True):
        loss = _number(path, number, row, columns["loss"])
        seed = int(_number(path, number, row, columns["seed"])) if columns["seed"] else 0
        told = row.get(columns["tokens"] or "")
        tokens = None if told in (None, "") else int(_scale(path, number, row, columns["tokens"]))
        name = str(row.get(columns["name"] or "") or "") if columns["student"] != columns["name"] else ""
        condition = str(row.get(columns["condition"] or "") or "") if columns["kind"] else ""
        found.append(LossRow(Observation(student, teacher, loss, seed), tokens, name, condition))
    return LossTable(found)


def _is_coupled(row: dict[str, Any], columns: dict[str, str | None]) -> bool:
    """Whether a row is of the paper's way, and of a run that ended; all are, where a table does not say."""
    if columns["kind"] is None or columns["start"] is None:  # not an export: its other columns mean what they mean
        return True
    kind, start, point, teacher = (row.get(columns[name] or "") for name in ("kind", "start", "point", "teacher"))
    return kind == "distill" and start not in (None, "") and start == teacher and point in (None, "", "final")


def _rows(path: Path) -> list[dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise LawError(f"{path}: no such file")
    rows: list[Any] = []
    try:
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            raise LawError(f"{path}: the ending says the format; it must be .csv, .tsv, .jsonl or .parquet")
    except (ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LawError(f"{path}: cannot be read as {path.suffix[1:]} ({str(error).splitlines()[0]})") from None
    if not rows:
        raise LawError(f"{path}: holds no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise LawError(f"{path} row {number}: {str(row)[:40]!r} is no object of columns and values")
        if None in row:
            raise LawError(f"{path} row {number}: has more values than the first line has columns")
    return rows


def _column(heads: Sequence[str], choices: Sequence[str]) -> str | None:
    known = {name.strip().lower(): name for name in heads}
    return next((known[choice] for choice in choices if choice in known), None)


def _scale(path: Path, number: int, row: dict[str, Any], column: str | None) -> float:
    assert column is not None
    try:
        return float(parse_count(row[column]))
    except (ValueError, KeyError) as error:
        reason = str(error) if isinstance(error, ValueError) else "missing"
        raise LawError(f"{path} row {number}: {column}: {reason}") from None


def _number(path: Path, number: int, row: dict[str, Any], column: str | None) -> float:
    assert column is not None
    try:
        value = float(row[column])
    except (ValueError, TypeError, KeyError):
        value = math.nan
    if not math.isfinite(value):
        raise LawError(f"{path} row {number}: {column} = {row.get(column)!r} must be a finite number")
    return value

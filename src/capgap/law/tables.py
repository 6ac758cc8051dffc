"""Losses or optima from a table that somebody else made: CSV, TSV, JSONL or Parquet."""

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
}


@dataclass(frozen=True)
class LossTable:
    """A table of losses: the observations of each budget of tokens; one budget, named "", where no tokens are given."""

    budgets: dict[str, list[Observation]]


@dataclass(frozen=True)
class OptimaTable:
    """A table without losses: each student's optimal teacher, parameters."""

    students: list[float]
    teachers: list[float]


def read_table(path: Path) -> LossTable | OptimaTable:
    """Reads a table with a row for each run, or for each student's optimum.

    Columns, in any case and order: `student` and `teacher` (parameters, such as 28000000 or 28M), `loss` (nats per
    token; without it the rows are optima), and where there are several runs of a pair `seed`, `tokens`. Others are
    not read.

    Raises: LawError that names the file, and the row and column where a value is missing or is no number.
    """
    rows = _rows(path)
    if not rows:
        raise LawError(f"{path}: holds no rows")
    columns = {name: _column(rows[0], choices) for name, choices in _NAMES.items()}
    for name in ("student", "teacher"):
        if columns[name] is None:
            raise LawError(
                f"{path}: no column for the {name}'s parameters; it has {', '.join(rows[0])}; call one {name}_scale"
            )
    students = [_scale(path, number, row, columns["student"]) for number, row in enumerate(rows, start=1)]
    teachers = [_scale(path, number, row, columns["teacher"]) for number, row in enumerate(rows, start=1)]
    if columns["loss"] is None:
        return OptimaTable(students, teachers)
    budgets: dict[str, list[Observation]] = {}
    for number, (row, student, teacher) in enumerate(zip(rows, students, teachers, strict=True), start=1):
        loss = _number(path, number, row, columns["loss"])
        seed = int(_number(path, number, row, columns["seed"])) if columns["seed"] else 0
        tokens = row.get(columns["tokens"]) if columns["tokens"] else None
        name = "" if tokens in (None, "") else f"{tokens} tokens"
        budgets.setdefault(name, []).append(Observation(student, teacher, loss, seed))
    return LossTable(budgets)


def _rows(path: Path) -> list[dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise LawError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".json"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix in (".csv", ".tsv"):
            return list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    except (ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LawError(f"{path}: cannot be read as {path.suffix[1:]} ({str(error).splitlines()[0]})") from None
    raise LawError(f"{path}: the ending says the format; it must be .csv, .tsv, .jsonl or .parquet")


def _column(row: dict[str, Any], choices: Sequence[str]) -> str | None:
    known = {name.strip().lower(): name for name in row if name is not None}
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

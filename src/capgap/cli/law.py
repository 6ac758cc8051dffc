"""law fit."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from capgap.errors import LawError

if TYPE_CHECKING:
    from capgap.law import Estimate, LawFit, LineFit
    from capgap.records import RunRecord
    from capgap.report import OwnLaws

app = typer.Typer(no_args_is_help=True, help="Fits the law of capacity gap.")


Beside = Annotated[
    list[Path] | None,
    typer.Option(help="Another study's records.jsonl, compared as a condition; may be given several times."),
]


@app.command("fit")
def fit(
    table: Annotated[
        Path, typer.Argument(help="A study's records.jsonl; or a .csv, .tsv, .jsonl or .parquet of losses or optima.")
    ],
    beside: Beside = None,
) -> None:
    """Fits the law to a study's records, or to any table.

    A table has columns student and teacher (parameters, such as 28M), loss (nats per token) and, where a pair has
    several runs, seed and tokens. Without losses its rows are optima, as a paper prints them.

    Example: capgap law fit capgap-demo/records.jsonl
    """
    from capgap.law import OptimaTable, fit_optima, read_table
    from capgap.report import read_studies, records_of_table

    console = Console()
    if is_of_records(table):
        _show_records(console, table, read_studies(table, beside or ()))
        return
    if beside:
        raise LawError(f"{table}: --beside compares studies, and this is a table; give their records.jsonl")
    found = read_table(table)
    if not isinstance(found, OptimaTable):
        _show_records(console, table, records_of_table(found))
        return
    with _naming(table):
        line = fit_optima(found.students, found.teachers)
    _show_line(console, line)


def _show_records(console: Console, table: Path, records: "list[RunRecord]") -> None:
    """The law of each budget, and what all of them say together."""
    from capgap.report import analyse, analysis_tables, by_budget, law_of, names_of, second_lines

    budgets = by_budget(records) or {"": records}
    failed = []
    for name, rows in budgets.items():
        try:
            with _naming(table):
                fitted = law_of(rows)
        except LawError as error:
            if len(budgets) == 1:
                raise
            console.print(f"At {name} no law: {error}", markup=False)
            failed.append(name)
            continue
        _show(console, name if len(budgets) > 1 else "", rows, fitted)
    analysis = analyse(records)
    for found in analysis_tables(analysis, names_of(records)):
        console.print(found)
    for line in (*analysis.notes, *second_lines(records)):
        console.print(line, markup=False)
    if len(failed) == len(budgets):
        raise LawError(f"{table}: no law could be fitted at any of {len(budgets)} budgets; above it says why")


def is_of_records(path: Path) -> bool:
    """Whether a file is of a study's records, judged by its first line, and whatever claims to be one."""
    if path.is_dir():
        return True
    if path.name == "records.jsonl" or not path.is_file() or path.suffix != ".jsonl":
        return path.suffix == ".jsonl"
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return True  # reading the records says what is wrong
    return isinstance(first, dict) and "recipe" in first


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has errors of the law name the file."""
    try:
        yield
    except LawError as error:
        raise LawError(f"{path}: {error}") from None


def own_laws(records: Path, student: int, tokens: int | None) -> "OwnLaws":
    """The laws of a study's records for a plan. Raises LawError that names the file."""
    from capgap.records import read
    from capgap.report import own_laws_of

    with _naming(records):
        return own_laws_of(read(records), student, tokens)


def _show(console: Console, budget: str, rows: "list[RunRecord]", fitted: "LawFit") -> None:
    from capgap.report import closing_table

    if budget:
        console.print(f"[bold]At {budget}[/bold]")
    console.print(closing_table(rows, fitted))
    for beside in fitted.beside_published():
        console.print(f"{beside.quantity}: {beside.here} here, {beside.published} published; {beside.reading}")
    for note in fitted.notes:
        console.print(note)


def _show_line(console: Console, line: "LineFit") -> None:
    from capgap.law import PUBLISHED

    level = f"{line.level:.0%} t interval"
    console.print(f"through {line.optima} optima, by least squares ({level}s in brackets)")
    console.print(f"slope a: {_words(line.slope)}; published {PUBLISHED.slope}")
    millions = [None if v is None else v / 1e6 for v in (line.intercept.value, line.intercept.low, line.intercept.high)]
    shown = f"{millions[0]:.3f}" + (f" ({millions[1]:.3f} to {millions[2]:.3f})" if millions[1] is not None else "")
    console.print(f"intercept b, millions: {shown}; published {PUBLISHED.intercept / 1e6:.3f}")
    if line.r_squared is not None:
        console.print(f"R²: {line.r_squared:.4f}; published {PUBLISHED.r_squared}")
    console.print(f"ratio T*/S: {_words(line.ratio)}; published about 2.5")
    tested = "" if line.p_linear is None else f"; p = {line.p_linear:.3g} that it is 1"
    console.print(f"exponent of S: {_words(line.exponent)}{tested}")


def _words(estimate: "Estimate") -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

"""What comes to a study's records from elsewhere: other studies as conditions, and tables of losses."""

from collections.abc import Sequence
from pathlib import Path

from capgap import records as files
from capgap.errors import LawError
from capgap.law import LossTable
from capgap.records import RunRecord
from capgap.report.rows import UNKNOWN


def read_studies(records: Path, others: Sequence[Path] = ()) -> list[RunRecord]:
    """The records of a study, and those of others as conditions that have the names of their folders.

    Args:
        records, others: folders of studies, or their records.jsonl.
    Raises: LawError if two of them have one name; DataError as `records.read`.
    """
    paths = [path / "records.jsonl" if path.is_dir() else path for path in (records, *others)]
    names = [path.absolute().parent.name for path in paths]
    for name, path in zip(names[1:], paths[1:], strict=True):
        if names.count(name) > 1:
            raise LawError(f"{path}: two studies are called {name}; give each a folder of its own name")
    found = files.read(paths[0])
    for name, path in zip(names[1:], paths[1:], strict=True):
        found += as_condition(files.read(path), name)
    return found


def as_condition(records: Sequence[RunRecord], name: str) -> list[RunRecord]:
    """A study's runs under the condition `name`, their own conditions after it; its models' pretraining is left out."""
    return [
        r.model_copy(update={"run": f"{name}/{r.run}", "condition": f"{name}, {r.condition}" if r.condition else name})
        for r in records
        if r.kind != "pretrain"
    ]


def records_of_table(table: LossTable) -> list[RunRecord]:
    """A table's rows as records of the paper's way, for the analysis alone: what a table does not say is left open."""
    found = []
    for number, row in enumerate(table.rows):
        teacher = str(round(row.run.teacher))
        found.append(
            RunRecord(
                run=f"row {number + 1}",
                kind="distill",
                student=row.name or str(round(row.run.student)),
                student_scale=round(row.run.student),
                teacher=teacher,
                teacher_scale=round(row.run.teacher),
                start=teacher,
                start_scale=round(row.run.teacher),
                tokens=row.tokens or UNKNOWN,
                condition=row.condition,
                seed=row.run.seed,
                loss=row.run.loss,
                bits_per_byte=0.0,
                flops=0.0,
                seconds=0.0,
                device="",
                recipe={},
                recipe_hash="",
                data_hash="",
                versions={},
            )
        )
    return found

"""Tables of losses and of optima, and what is said of those that are wrong."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from capgap.errors import LawError
from capgap.law import LossTable, Observation, OptimaTable, read_table

ROWS = "S,T,loss,seed\n28M,70M,3.1,0\n28M,160M,3.0,1\n"


def test_losses_from_every_format(tmp_path):
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "a.tsv").write_text(ROWS.replace(",", "\t"))
    (tmp_path / "a.jsonl").write_text(
        '{"student_scale": 28000000, "teacher_scale": 7e7, "loss": 3.1, "seed": 0, "student": "small"}\n'
        '{"student_scale": 28000000, "teacher_scale": 1.6e8, "loss": 3.0, "seed": 1, "student": "small"}\n'
    )
    columns = {"Student": [28_000_000] * 2, "Teacher": [70_000_000, 160_000_000], "Loss": [3.1, 3.0], "Seed": [0, 1]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    wanted = LossTable({"": [Observation(28e6, 70e6, 3.1, 0), Observation(28e6, 160e6, 3.0, 1)]})
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        assert read_table(tmp_path / name) == wanted, name


def test_budgets_are_kept_apart_and_optima_have_no_loss(tmp_path):
    (tmp_path / "a.csv").write_text("student,teacher,loss,tokens\n28M,70M,3.1,1B\n28M,70M,3.0,2B\n")
    found = read_table(tmp_path / "a.csv")
    assert isinstance(found, LossTable)
    assert list(found.budgets) == ["1B tokens", "2B tokens"]
    (tmp_path / "b.csv").write_text("student,teacher\n28M,58.446M\n100M,238.302M\n")
    assert read_table(tmp_path / "b.csv") == OptimaTable([28e6, 100e6], [58.446e6, 238.302e6])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "student,loss\n1M,3\n", "no column for the teacher's parameters; it has student, loss"),
        ("a.csv", "student,teacher,loss\n1M,2M,3\n1M,many,3\n", "row 2: teacher: 'many' is not a count"),
        ("a.csv", "student,teacher,loss\n1M,2M,\n", "row 1: loss = '' must be a finite number"),
        ("a.csv", "student,teacher,loss\n", "holds no rows"),
        ("a.jsonl", '{"student": 1', "cannot be read as jsonl"),
        ("a.parquet", "text", "cannot be read as parquet"),
        ("a.xls", "text", "must be .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(LawError, match=message):
        read_table(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(LawError, match=r"none\.csv: no such file"):
        read_table(tmp_path / "none.csv")

"""Tables of losses and of optima, and what is said of those that are wrong."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from capgap.errors import LawError
from capgap.law import LossRow, LossTable, Observation, OptimaTable, read_table

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
    wanted = [Observation(28e6, 70e6, 3.1, 0), Observation(28e6, 160e6, 3.0, 1)]
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        found = read_table(tmp_path / name)
        assert isinstance(found, LossTable), name
        assert [row.run for row in found.rows] == wanted, name
        assert {row.name for row in found.rows} == ({"small"} if name == "a.jsonl" else {""}), name
        assert all(row.tokens is None for row in found.rows)


def test_tokens_are_counts_and_optima_have_no_loss(tmp_path):
    (tmp_path / "a.csv").write_text("student,teacher,loss,tokens\n28M,70M,3.1,1B\n28M,70M,3.0,1000000000\n")
    found = read_table(tmp_path / "a.csv")
    assert isinstance(found, LossTable)
    assert [row.tokens for row in found.rows] == [10**9, 10**9]
    (tmp_path / "b.csv").write_text("student,teacher\n28M,58.446M\n100M,238.302M\n")
    assert read_table(tmp_path / "b.csv") == OptimaTable([28e6, 100e6], [58.446e6, 238.302e6])


def test_of_an_export_the_runs_of_the_papers_way_count(tmp_path):
    heads = "kind,student,student_scale,teacher,teacher_scale,start,start_scale,loss,tokens,condition,point"
    rows = [
        "pretrain,t70M,70000000,,,,,3.0,100,,final",
        "distill,small,28000000,t70M,70000000,t70M,70000000,3.1,100,,final",
        "distill,small,28000000,t70M,70000000,t70M,70000000,3.3,50,,curve",
        "distill,small,28000000,t70M,70000000,t50M,50000000,3.2,100,,final",
        "distill,small,28000000,t70M,70000000,,,3.4,100,,final",
        "distill,small,28000000,t70M,70000000,t70M,70000000,3.5,100,kd-only,final",
    ]
    (tmp_path / "a.csv").write_text("\n".join([heads, *rows]) + "\n")
    found = read_table(tmp_path / "a.csv")
    assert found == LossTable(
        [
            LossRow(Observation(28e6, 70e6, 3.1), 100, "small"),
            LossRow(Observation(28e6, 70e6, 3.5), 100, "small", "kd-only"),
        ]
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "student,loss\n1M,3\n", "no column for the teacher's parameters; it has student, loss"),
        ("a.csv", "student,teacher,loss\n1M,2M,3\n1M,many,3\n", "row 2: teacher: 'many' is not a count"),
        ("a.csv", "student,teacher,loss\n1M,2M,\n", "row 1: loss = '' must be a finite number"),
        ("a.csv", "student,teacher,loss\n", "holds no rows"),
        ("a.csv", "student,teacher,ppl\n1M,2M,3\n1M,3M,4\n", "no column is called loss.*student, teacher, ppl"),
        ("a.csv", "student,teacher,loss\n1M,2M,3,4\n", "row 1: has more values than the first line has columns"),
        ("a.csv", "student,teacher,loss,tokens\n1M,2M,3,many\n", "row 1: tokens: 'many' is not a count"),
        ("a.jsonl", '{"student": 1', "cannot be read as jsonl"),
        ("a.jsonl", "[1, 2]", r"row 1: '\[1, 2\]' is no object"),
        ("a.jsonl", '{"student": 1e6, "teacher": 2e6}\n{"student": 1e6, "teacher": 3e6, "loss": 3}', "row 1: loss"),
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

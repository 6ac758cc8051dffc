"""One table of a study's results, in each format."""

import json

import pytest
from pyarrow import csv, parquet

from capgap.errors import StudyError
from capgap.study import export_records
from study.test_queue import record

CURVE = [{"step": 1.0, "tokens": 10.0, "loss": 3.0}, {"step": 2.0, "tokens": 20.0, "ce": 2.5}]


def records():
    update = {"tokens": 40, "tokens_taken_over": 10, "flops": 80.0, "curve": CURVE}
    return [record("a").model_copy(update=update), record("b", 2.0)]


def test_each_format_holds_the_same_rows(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert export_records(records(), tmp_path / name) == 2
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["run"], row["loss"], row["flops_spent"]) for row in rows] == [("a", 1.0, 60.0), ("b", 2.0, 1.0)]
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows
    table = csv.read_csv(tmp_path / "a.csv")
    assert table.column("run").to_pylist() == ["a", "b"]


def test_points_are_the_held_out_losses_on_the_way(tmp_path):
    assert export_records(records(), tmp_path / "a.jsonl", points=True) == 3
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(r["run"], r["tokens"], r["loss"], r["point"]) for r in rows] == [
        ("a", 10, 3.0, "curve"),
        ("a", 40, 1.0, "final"),
        ("b", 1, 2.0, "final"),
    ]


def test_nothing_to_write_and_unknown_formats_are_refused(tmp_path):
    with pytest.raises(StudyError, match=r"a\.jsonl: nothing to write"):
        export_records([], tmp_path / "a.jsonl")
    with pytest.raises(StudyError, match=r"a\.xls: the ending says the format"):
        export_records(records(), tmp_path / "a.xls")
    assert not list(tmp_path.iterdir())

"""Counts, overrides, records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap import records
from capgap.errors import DataError, RecipeError
from capgap.recipe import Recipe, load, parse_count, parse_scale


@given(st.integers(1, 10**13))
def test_a_whole_number_is_its_own_count(number):
    assert parse_count(number) == parse_count(str(number)) == number


@pytest.mark.parametrize(
    ("text", "count"), [("3B", 3 * 10**9), ("126M", 126 * 10**6), ("4k", 4000), ("1.5e3", 1500), ("0.5M", 500_000)]
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-3", "3 B B", "0", "1.5", True, None, "1e400"])
def test_not_a_count(text):
    with pytest.raises((ValueError, OverflowError)):
        parse_count(text)


def test_scale():
    assert parse_scale("0.4x") == 0.4
    assert parse_scale("3B") == 3_000_000_000


def test_overrides_reach_into_lists_and_dollar_signs_stay(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "teacher: a/b\nstudent: {scale: 0.5x}\ndata: {train: [{text: '$x.txt'}], held_out: {text: b}}\n"
        "distill: {tokens: 8M}\noutput: o\n"
    )
    recipe = load(path, Recipe, ["data.train.0.weight=0.25", "distill.seed=9"])
    assert (recipe.data.train[0].weight, recipe.data.train[0].text, recipe.distill.seed) == (0.25, "$x.txt", 9)
    with pytest.raises(RecipeError, match="index from 0 to 0"):
        load(path, Recipe, ["data.train.3.weight=1"])


def record(name: str) -> records.RunRecord:
    return records.RunRecord(
        run=name,
        kind="pretrain",
        student="t",
        student_scale=5,
        tokens=1,
        seed=0,
        loss=1.0,
        bits_per_byte=1.0,
        flops=1.0,
        seconds=1.0,
        device="cpu",
        recipe={},
        recipe_hash="",
        data_hash="",
        versions={},
    )


def test_a_line_cut_by_a_crash_is_left_out_and_does_not_harm_the_next(tmp_path):
    path = tmp_path / "r.jsonl"
    records.append(path, record("a"))
    with path.open("ab") as file:
        file.write('{"run": "é'.encode()[:-1])
    assert [r.run for r in records.read(path)] == ["a"]
    records.append(path, record("b"))
    assert [r.run for r in records.read(path)] == ["a", "b"]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(record("a").model_dump_json() + "\n{}\n")
    with pytest.raises(DataError, match=r"r\.jsonl line 2"):
        records.read(path)

from pathlib import Path

import pytest

from capgap import records as files
from capgap.errors import DataError, LawError
from capgap.report import analyse, as_condition, read_studies

from .made_up import whole_study


def written(folder: Path, records) -> Path:
    for record in records:
        files.append(folder / "records.jsonl", record)
    return folder / "records.jsonl"


def test_other_studies_are_conditions_named_by_their_folders(tmp_path):
    mine, other = whole_study(budgets=(30,)), whole_study(best=lambda s, _: 6 * s, budgets=(30,))
    first, second = written(tmp_path / "nano", mine), written(tmp_path / "books", other)
    found = read_studies(first, [second])
    assert found[: len(mine)] == mine
    assert {r.condition for r in found[len(mine) :]} == {"books"}
    assert len({r.run for r in found}) == len(found)
    # The folders say the same as their files.
    assert read_studies(tmp_path / "nano", [tmp_path / "books"]) == found
    analysis = analyse(found)
    assert [c.condition for c in analysis.conditions] == ["books"]
    assert dict(analysis.tests)["books"].p < 0.01
    # The study's own law is what it is without them.
    alone = analyse(mine)
    assert [b.law.ratio.value for b in analysis.budgets] == [b.law.ratio.value for b in alone.budgets]


def test_conditions_of_another_study_keep_their_names_and_its_models_stay_out():
    runs = whole_study(budgets=(30,), condition="kd-only")[:3]
    model = runs[0].model_copy(update={"kind": "pretrain", "condition": ""})
    found = as_condition([*runs, model], "books")
    assert [r.condition for r in found] == ["books, kd-only"] * 3
    assert [r.run for r in found] == [f"books/{r.run}" for r in runs]


def test_two_studies_of_one_name_or_none_are_refused(tmp_path):
    one = written(tmp_path / "a" / "nano", whole_study(budgets=(30,))[:1])
    with pytest.raises(LawError, match=r"two studies are called nano; give each a folder of its own name"):
        read_studies(one, [one])
    with pytest.raises(DataError, match=r"missing: no such file of run records"):
        read_studies(tmp_path / "missing")

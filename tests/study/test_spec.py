"""What a study's file may say, and what it is told where it is wrong."""

import pytest

from capgap.errors import RecipeError
from capgap.study import Budget, StudySpec
from study.small import study


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"nano": None}, "give either nano, a family to pretrain, or teachers"),
        ({"teachers": ["a", "b"]}, "give either nano, a family to pretrain, or teachers"),
        ({"nano": None, "teachers": ["a"]}, "data.tokenizer is missing"),
        ({"tokens": ["tenx"]}, "tokens.0.*not a budget|'tenx' is not a budget"),
        ({"tokens": ["infx"]}, r"tokens\.0"),
        ({"tokens": [None]}, r"tokens\.0.*|a budget is tokens \(3M\) or tokens per parameter"),
        ({"grids": [{"students": [3]}]}, r"grids\.0\.students = 3: there are 1, counted from 0"),
        ({"grids": []}, "grids"),
        ({"roles": []}, "roles: unknown key"),
    ],
)
def test_what_is_wrong_is_named(more, message):
    with pytest.raises(RecipeError, match=message):
        study(**more)


def test_members_have_whole_heads():
    members = [{"hidden": 92, "neurons": 64, "lr": 5e-3}]
    nano = {"members": members, "pretrain": {"tokens": 512, "tokens_per_step": 512}}
    with pytest.raises(RecipeError, match=r"members\.0\.hidden = 92 must be a multiple of its 5 heads"):
        study(nano=nano)
    members[0]["hidden"] = 40
    with pytest.raises(RecipeError, match=r"members\.0\.hidden = 40 must be a multiple of head_dim = 16"):
        study(nano={**nano, "architecture": "gpt_neox"})


def test_budgets_are_tokens_or_tokens_per_parameter_in_whole_steps():
    spec = study(tokens=["30x", "1M", 2048])
    assert spec.tokens == [Budget(per_parameter=30), Budget(tokens=1_000_000), Budget(tokens=2048)]
    assert spec.tokens[0].of(14_544, 1024) == 426 * 1024
    assert spec.tokens[1].of(1, 1024) == 977 * 1024
    assert Budget(tokens=10).of(1, 512) == 512


def test_tokens_of_the_study_take_the_place_of_those_of_distill():
    spec = study(tokens=["1x"], distill={"tokens_per_step": 512})
    assert spec.budgets(spec.grids[0]) == [Budget(per_parameter=1)]
    assert study().budgets(spec.grids[0]) == [Budget(tokens=5_120)]


def test_all_students_are_repaired_or_none():
    assert study(prune={"repair": "auto"}).prune.repair == "none"
    assert study(prune={"repair": "all"}).prune.repair == "all"


def test_what_is_written_is_read_back():
    spec = study(tokens=["10x", "3k"], students=[{"scale": "0.5x"}, {"hidden": 16, "name": "a"}], side_by_side=3)
    assert StudySpec.model_validate(spec.model_dump(mode="json", exclude_defaults=True)) == spec

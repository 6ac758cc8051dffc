"""Who the models of a study are, and that students of one scale have one shape whatever they are cut from."""

import pytest

from capgap.anatomy import anatomy_of
from capgap.cost import count_parameters
from capgap.errors import ShapeError, StudyError
from capgap.models import new_model
from capgap.study import Family, trials_of
from study.small import study


def test_members_are_named_by_their_scale_ascending():
    family = Family(study())
    assert list(family.models) == ["t30.2k", "t60.7k"]
    assert [m.scale for m in family.models.values()] == [30_240, 60_720]


def test_a_scale_is_one_shape_in_every_start():
    family = Family(study(students=[{"scale": "15k"}, {"scale": "0.5x"}]))
    assert family.scales == [15_000, 15_120]
    for index in (0, 1):
        shapes = {family.shape(index, model) for model in family.models.values()}
        assert len(shapes) == 1
        scale = count_parameters(family.config(index)).total
        assert abs(scale / family.scales[index] - 1) <= 0.01


def test_where_one_shape_is_not_possible_the_scale_stays():
    # The larger model has fewer neurons than the student has when cut from the smaller one.
    members = [{"hidden": 32, "neurons": 200, "lr": 1e-3}, {"hidden": 96, "neurons": 40, "lr": 1e-3}]
    nano = study().nano.model_dump() | {"members": members}
    family = Family(study(nano=nano, students=[{"scale": "30k", "limits": {"neurons": [41, 200]}}]))
    wide = list(family.models.values())[1]
    with pytest.raises(ShapeError, match="no legal shape"):
        family.shape(0, wide)
    family = Family(study(nano=nano, students=[{"scale": "30k"}]))
    shapes = [family.shape(0, model) for model in family.models.values()]
    assert shapes[0] != shapes[1]
    for shape, model in zip(shapes, family.models.values(), strict=True):
        found = count_parameters(anatomy_of(model.config).config_at(shape, range(shape.layers))).total
        assert abs(found / 30_000 - 1) <= 0.01


def test_where_the_smallest_cannot_be_cut_the_next_can():
    family = Family(study(students=[{"scale": "20k", "limits": {"hidden": [33, 48]}}]))
    assert [model.name for model in family.larger(0)] == ["t60.7k"]


def test_models_that_tie_their_tables_and_models_that_do_not_give_students_of_one_scale(tmp_path):
    members = Family(study()).models
    tied, untied = members["t30.2k"].config, members["t60.7k"].config
    untied.tie_word_embeddings = False
    for name, config in (("tied", tied), ("untied", untied)):
        new_model(config, seed=0).save_pretrained(tmp_path / name)
    data = study().model_dump(mode="json", exclude_defaults=True)["data"] | {"tokenizer": "none"}
    family = Family(study(nano=None, data=data, teachers=[str(tmp_path / n) for n in ("tied", "untied")]))
    for start in family.models.values():
        assert abs(count_parameters(family.config(0, start)).total / 15_000 - 1) <= 0.01


def test_an_explicit_shape_is_cut_only_from_what_holds_it():
    family = Family(study(students=[{"hidden": 40, "kv_heads": 2, "neurons": 64}]))
    assert [model.name for model in family.larger(0)] == ["t60.7k"]
    with pytest.raises(ShapeError, match=r"students\.0, cut from t30\.2k: .*hidden = 40"):
        family.shape(0, family.models["t30.2k"])


def test_a_student_larger_than_every_model_is_refused():
    with pytest.raises(ShapeError, match=r"students\.0: no model of the study is large enough.*t60\.7k"):
        Family(study(students=[{"scale": "1M"}])).larger(0)


def test_two_of_one_name_are_refused():
    with pytest.raises(StudyError, match=r"students\.0: another student is called s15k"):
        _ = Family(study(students=[{"scale": "15k"}, {"scale": "15k"}])).student_names
    nano = study().nano.model_dump()
    nano["members"] = [nano["members"][0]] * 2
    with pytest.raises(StudyError, match=r"two of the study's models are called t30\.2k"):
        Family(study(nano=nano))


def test_pretrained_models_are_known_by_their_folders(tmp_path):
    made = Family(study())
    for name, model in (("small", made.models["t30.2k"]), ("large", made.models["t60.7k"])):
        new_model(model.config, seed=0).save_pretrained(tmp_path / name)
    tree = study().model_dump(mode="json", exclude_defaults=True)
    data = tree["data"] | {"tokenizer": str(tmp_path / "small")}
    teachers = [str(tmp_path / "small"), str(tmp_path / "large")]
    family = Family(study(nano=None, data=data, teachers=teachers, students=[{"scale": "0.5x"}]))
    assert list(family.models) == ["small", "large"]
    assert family.models["large"].folder(tmp_path / "study") == tmp_path / "large"
    assert [trial.needs for trial in trials_of(family)] == [[], []]


def test_a_neox_family_is_cut_too():
    nano = study().nano.model_dump() | {"architecture": "gpt_neox"}
    family = Family(study(nano=nano, students=[{"hidden": 16, "kv_heads": 1, "neurons": 32}]))
    assert family.config(0).model_type == "gpt_neox"
    assert {m.config.model_type for m in family.models.values()} == {"gpt_neox"}

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap.errors import StorageError
from capgap.law import fit_law
from capgap.report.figures import (
    curve_of,
    law_figure,
    law_words,
    loss_against_teacher,
    roles_figure,
    run_label,
    training_curves,
)
from capgap.report.rows import observations_of, role_bars
from capgap.report.style import colours, nice_scales, spread

from .made_up import others, record, study


def picture(path):
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert 400 <= width <= 3000
    assert 250 <= height <= 3000
    assert 0.005 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.6, "blank, or all ink"
    return pixels


def test_losses_of_every_student_with_and_without_a_law(tmp_path):
    observations = observations_of(study())
    law = fit_law(observations, replicates=100)
    picture(loss_against_teacher(observations, tmp_path / "a.png", law=law, names={58_000: "s58k"}))
    picture(loss_against_teacher(observations[:2], tmp_path / "b.png"))


def test_censored_optima_are_drawn_open(tmp_path):
    observations = observations_of(study(students=("s58k",), teachers=("t230k", "t420k", "t800k")))
    law = fit_law(observations, replicates=0)
    assert law.status == "none"
    picture(loss_against_teacher(observations, tmp_path / "a.png", law=law))
    picture(law_figure(law, tmp_path / "b.png"))
    assert law_words(law) == "no law: no optimum inside its grid"


def test_the_law_drawn_twice_is_the_same_file(tmp_path):
    law = fit_law(observations_of(study()), replicates=200)
    one, two = law_figure(law, tmp_path / "a.png"), law_figure(law, tmp_path / "b.png")
    picture(one)
    assert one.read_bytes() == two.read_bytes()


def test_the_law_in_words():
    assert law_words(fit_law(observations_of(study()), replicates=50)).startswith("T* = 2.23 S + 33k\n95%")
    one = fit_law(observations_of(study(students=("s58k",))), replicates=0)
    assert law_words(one) == "T* = 2.82 S"


def test_training_curves_show_rows_with_loss_only(tmp_path):
    path = training_curves([*study(seeds=1), *others()], tmp_path / "a.png")
    assert path is not None
    picture(path)
    assert len(curve_of(record("s58k", "t90k"))) == 21
    assert training_curves([record("s58k", "t90k", curve=[])], tmp_path / "b.png") is None
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("run", "label"),
    [
        (record("s58k", "t90k"), "t90k"),
        (record("s58k", "t230k", start="t90k"), "t90k → t230k"),
        (record("s58k", "t230k", start=None), "random → t230k"),
        (record("s58k", None, start=None, kind="scratch"), "scratch"),
    ],
)
def test_a_run_is_called_by_its_teacher(run, label):
    assert run_label(run) == label


def test_roles(tmp_path):
    bars = role_bars([*study(students=("s58k",)), *others()], None)
    picture(roles_figure(bars, tmp_path / "a.png", title="ways"))
    picture(roles_figure(bars[:1], tmp_path / "b.png", title="one way"))


def test_figures_leave_no_global_state_behind(tmp_path):
    before = dict(matplotlib.rcParams)
    law_figure(fit_law(observations_of(study()), replicates=0), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    law = fit_law(observations_of(study()), replicates=0)
    with pytest.raises(StorageError, match="in the way"):
        law_figure(law, tmp_path / "file" / "a.png")


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.5))
def test_labels_keep_their_distance_and_order(wanted, gap):
    placed = spread(wanted, gap, 0.0, 1.0)
    assert len(placed) == len(wanted)
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in placed)
    order = np.argsort(wanted, kind="stable")
    room = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(np.diff(np.array(placed)[order]) >= room - 1e-9)


def test_labels_far_apart_stay_where_they_belong():
    assert spread([0.9, 0.1, 0.5], 0.1, 0, 1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])


@pytest.mark.parametrize(("low", "high"), [(4e4, 2e6), (1e5, 1.2e5), (1e6, 7e10), (99, 101)])
def test_ticks_are_few_and_inside(low, high):
    ticks = nice_scales(low, high)
    assert 2 <= len(ticks) <= 5
    assert all(0.95 * low <= t <= 1.05 * high for t in ticks)


def test_colours_differ():
    assert len(set(colours(8))) == 8
    assert len(colours(1)) == 1

import math

import pytest

from capgap.law import fit_law
from capgap.report.rows import (
    fittable,
    law_rows,
    measured,
    names_of,
    observations_of,
    optimum_rows,
    provenance_rows,
    role_bars,
    run_rows,
)

from .made_up import STUDENTS, TEACHERS, others, record, study


def test_only_coupled_distilled_runs_are_observations():
    records = [*study(seeds=1), *others(), record("s58k", None, start=None, kind="pretrain")]
    observations = observations_of(records)
    assert len(observations) == len(study(seeds=1))
    first = observations[0]
    assert (first.student, first.teacher, first.seed) == (58_000, 90_000, 0)
    assert first.loss == records[0].loss


def test_students_with_too_few_teachers_are_told_apart():
    enough, short = fittable(observations_of(study(teachers=("t90k", "t150k", "t230k", "t420k"))))
    assert short == [260_000]
    assert {o.student for o in enough} == {58_000, 120_000}


def test_names_of_one_scale_are_joined():
    twin = record("s58k", "t90k").model_copy(update={"student": "deep"})
    assert names_of([record("s58k", "t90k"), twin]) == {58_000: "s58k / deep"}


def test_role_bars_go_from_worst_to_best_and_keep_seeds_together():
    law = fit_law(observations_of(study()))
    bars = role_bars([*study(students=("s58k",)), *others()], law)
    assert [bar.mean for bar in bars] == sorted((bar.mean for bar in bars), reverse=True)
    tags = {bar.label: bar.tag for bar in bars}
    assert tags["from scratch"] == "no teacher"
    assert tags["cut from and taught by t150k"] == "this law's pick, published law's pick"
    assert tags["cut from and taught by t1.5M"] == "largest teacher"
    assert tags["cut from t90k, taught by t800k"] == "roles apart"
    assert len(bars) == 5
    assert bars[0].losses == (3.62, 3.63)
    assert bars[0].mean == pytest.approx(3.625)


def test_role_bars_without_law_or_coupled_runs():
    assert [bar.kind for bar in role_bars(others(), None)] == ["scratch", "apart", "apart"]
    tags = [bar.tag for bar in role_bars(study(students=("s58k",)), None)]
    assert set(tags) == {"published law's pick", "largest teacher"}
    random_start = role_bars([record("s58k", "t90k", start=None)], None)
    assert random_start[0].label == "random start, taught by t90k"


def test_tables_hold_every_student_and_run():
    records = [*study(), *others()]
    law = fit_law(observations_of(records))
    rows = optimum_rows(law, names_of(records))
    assert [row["student"] for row in rows] == list(STUDENTS)
    assert all(row["status"] == "inside the grid" for row in rows)
    assert {row["run"] for row in run_rows(records)} == {r.run for r in records}
    assert {row["kind"] for row in run_rows(records)} == {"distill", "scratch", "roles apart"}
    assert "2.498" in law_rows(law)[0]["published"]
    said = {row["what"]: row["value"] for row in provenance_rows(records, law)}
    assert said["seeds"] == "0, 1"
    assert said["version of torch"] == "2.9"
    assert said["data hash"] == "cd" * 32
    assert "2000 replicates" in said["bootstrap"]


def test_a_censored_optimum_is_a_bound():
    records = study(students=("s58k",), teachers=("t230k", "t420k", "t800k", "t1.5M"))
    (row,) = optimum_rows(fit_law(observations_of(records)), names_of(records))
    assert row["optimal teacher"] == "at most 230k"
    assert row["status"] == "censored at the low edge"
    assert row["95% interval"] == "none"


def test_what_was_measured_is_said_from_the_records():
    law = fit_law(observations_of(study(seeds=1)))
    lines = " ".join(measured([*study(seeds=1), *others()], law))
    assert "14 distilled runs: 3 student scales (58k to 260k), teachers of 90k to 1.5M, 1 seed" in lines
    assert "one run with one seed" in lines
    assert "Not measured: tasks" in lines
    assert "smaller than any in the published pilot study" in lines
    assert "do not enter the law" in lines
    mixed = [record("s58k", "t90k"), record("s58k", "t150k", data_hash="ef" * 32, tokens=5)]
    lines = " ".join(measured(mixed, None))
    assert "differ in data" in lines
    assert "differ in tokens" in lines
    assert "Measured:" not in " ".join(measured(others(), None))


def test_the_made_up_study_has_the_teachers_it_says():
    assert {r.teacher for r in study()} == set(TEACHERS)


def test_a_student_whose_scale_varies_a_little_is_one():
    rows = [
        r.model_copy(update={"student_scale": 58_000 + (1_000 if r.teacher == "t90k" else 0)})
        for r in study(students=("s58k",))
    ]
    ((scale, error),) = {(o.student, o.student_error) for o in observations_of(rows)}
    assert (scale, error) == pytest.approx((math.sqrt(58_000 * 59_000), math.log(59 / 58) / math.sqrt(2)))
    assert fit_law(observations_of(rows), replicates=0).status == "proportional"
    assert names_of(rows)[scale] == "s58k"
    far = [r.model_copy(update={"student_scale": 70_000}) if r.teacher == "t90k" else r for r in rows]
    assert {o.student for o in observations_of(far)} == {58_000, 70_000}

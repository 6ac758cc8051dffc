import pytest
from rich.console import Console

from capgap.errors import LawError
from capgap.law import fit_law
from capgap.report import closing_table, observations_of, write_report

from .made_up import others, record, study
from .test_figures import picture
from .test_page import read


def printed(table):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    return console.export_text()


def test_a_study_becomes_a_page_and_figures(tmp_path):
    records = [*study(), *others()]
    report = write_report(records, tmp_path, title="A made-up study", statements=["On made-up losses."])
    assert {path.name for path in report.figures} == {
        "loss-against-teacher.png", "law.png", "training-curves.png", "roles-58000.png",
    }  # fmt: skip
    for path in report.figures:
        picture(path)
    assert report.law is not None
    assert report.law.status == "linear"
    assert [row["student"] for row in report.table_rows] == ["s58k", "s120k", "s260k"]
    page = read(report.page)
    words = " ".join(page.text)
    assert "A made-up study" in words
    assert "On made-up losses." in words
    assert all(r.run in words for r in records)
    assert "published value inside our interval" in words
    assert "cd" * 32 in words
    assert not [address for address in page.fetched if "//" in address]
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *(p.name for p in report.figures)}


def test_a_censored_optimum_is_said(tmp_path):
    records = study(students=("s58k",), teachers=("t230k", "t420k", "t800k", "t1.5M"))
    report = write_report(records, tmp_path, title="t")
    assert report.law is not None
    assert report.law.status == "none"
    words = " ".join(read(report.page).text)
    assert "censored at the low edge" in words
    assert "Student 58k: censored at the grid's low edge (230k)" in words
    assert "at most 230k" in printed(closing_table(records, report.law))


def test_without_a_law_the_report_says_why(tmp_path):
    report = write_report(study(teachers=("t420k", "t800k")), tmp_path / "few", title="t")
    assert report.law is None
    assert report.table_rows == ()
    words = " ".join(read(report.page).text)
    assert "No law was fitted: no student was distilled from at least three teachers" in words
    assert "student of 58k parameters has fewer than three teachers" in words
    twice = [*study(seeds=1), study(seeds=1)[0].model_copy(update={"run": "again"})]
    words = " ".join(read(write_report(twice, tmp_path / "twice", title="t").page).text)
    assert "No law was fitted: student 58k under teacher 90k with seed 0 is there twice" in words
    only = write_report(others(), tmp_path / "others", title="t")
    assert [p.name for p in only.figures] == ["training-curves.png", "roles-58000.png"]


def test_students_with_too_few_teachers_do_not_cost_the_law(tmp_path):
    report = write_report(study(teachers=("t90k", "t150k", "t230k", "t420k")), tmp_path, title="t")
    assert report.law is not None
    assert len(report.law.optima) == 2
    assert "student of 260k parameters has fewer than three" in " ".join(read(report.page).text)


def test_a_law_that_is_given_is_used_and_the_comparison_is_shown(tmp_path):
    law = fit_law(observations_of(study()), replicates=20)
    report = write_report(study(), tmp_path, title="t", law=law, comparison=others())
    assert report.law is law
    assert "roles-58000.png" in {path.name for path in report.figures}
    words = " ".join(read(report.page).text)
    assert all(r.run in words for r in others())
    assert "20 replicates" in words


def test_no_records_at_all_are_an_error(tmp_path):
    with pytest.raises(LawError, match="at least one run record"):
        write_report([], tmp_path, title="t")


def test_the_closing_table_with_and_without_a_law():
    records = study()
    text = printed(closing_table(records, fit_law(observations_of(records), replicates=50)))
    assert "s120k" in text
    assert "T* = 2.23 S" in text
    odd = record("s58k", "t90k", run="run [bold]1[/bold]")
    text = printed(closing_table([odd], None))
    assert "run [bold]1[/bold]" in text
    assert "No law was fitted" in text
    assert printed(closing_table([], None)) is not None

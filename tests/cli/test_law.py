"""`capgap law fit` on a table typed from the paper's constants, and on losses."""

import numpy as np

from capgap.study import export_records
from report.made_up import from_random_weights, others, study, teachers
from shell import capgap_here


def test_a_table_of_the_papers_constants_returns_them(tmp_path):
    students = [28, 64, 160, 400, 560, 1100]
    rows = [f"{s}M,{round(2.498 * s - 11.498, 3)}M" for s in students]
    (tmp_path / "paper.csv").write_text("\n".join(["student,teacher", *rows]) + "\n")
    shown = capgap_here("law", "fit", "paper.csv", cwd=tmp_path).stdout
    assert "slope a: 2.498 (2.498 to 2.498); published 2.498" in shown
    assert "intercept b, millions: -11.498" in shown
    assert "R²: 1.0000" in shown


def test_losses_about_the_papers_optima_return_its_constants(tmp_path):
    lines = ["student,teacher,loss"]
    for s in (28, 64, 160, 400, 560, 1100):
        best = 2.498 * s - 11.498
        for ratio in np.geomspace(0.4, 2.5, 9):
            lines.append(f"{s}M,{round(best * ratio, 3)}M,{3 + 0.05 * np.log(ratio) ** 2}")
    (tmp_path / "losses.csv").write_text("\n".join(lines) + "\n")
    shown = capgap_here("law", "fit", "losses.csv", cwd=tmp_path).stdout
    assert "slope a: 2.498" in shown
    assert "intercept b, millions: -11.5" in shown


def test_a_studys_export_says_what_its_records_say(tmp_path):
    records = study(seeds=1)
    (tmp_path / "records.jsonl").write_text(lines(records))
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        export_records(records, tmp_path / name, points=True)
    shown = [
        capgap_here("law", "fit", name, cwd=tmp_path).stdout
        for name in ("records.jsonl", "a.csv", "a.jsonl", "a.parquet")
    ]
    assert "T* = " in shown[0]
    assert len(set(shown)) == 1


def test_where_no_budget_has_a_law_it_says_so_and_fails(tmp_path):
    rows = [f"1M,{t}M,3,0,{d}" for d in ("10M", "30M") for t in (2, 3, 4) for _ in range(2)]
    (tmp_path / "twice.csv").write_text("\n".join(["student,teacher,loss,seed,tokens", *rows]) + "\n")
    done = capgap_here("law", "fit", "twice.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "is there twice" in " ".join(done.stdout.split())
    assert "twice.csv: no law could be fitted at any of 2 budgets" in done.stderr


def test_another_study_may_stand_beside(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text(lines(study(seeds=1)))
    shown = capgap_here("law", "fit", "one", "--beside", "other/records.jsonl", cwd=tmp_path).stdout
    assert "conditions beside the paper's way" in shown
    assert "other" in shown
    (tmp_path / "a.csv").write_text("student,teacher\n28M,70M\n")
    done = capgap_here("law", "fit", "a.csv", "--beside", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "--beside compares studies" in done.stderr


def test_what_is_wrong_names_the_file(tmp_path):
    (tmp_path / "one.csv").write_text("student,teacher\n28M,70M\n")
    done = capgap_here("law", "fit", "one.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "one.csv: 1 student scale is given; a line needs at least two" in done.stderr


def lines(records):
    return "".join(r.model_dump_json() + "\n" for r in records)


def test_the_second_law_is_refit_where_there_are_runs_from_random_weights(tmp_path):
    (tmp_path / "records.jsonl").write_text(lines([*study(seeds=1), *teachers(), *from_random_weights()]))
    (tmp_path / "few.jsonl").write_text(lines([*study(seeds=1), *others()]))
    (tmp_path / "none.jsonl").write_text(lines(study(seeds=1)))
    full, few, none = (
        " ".join(capgap_here("law", "fit", f"{name}.jsonl", cwd=tmp_path).stdout.split())
        for name in ("records", "few", "none")
    )
    assert "refit to 6 runs without a teacher and 18 under one" in full
    assert "gamma" in full
    assert "the second law is not refit" in few
    assert "second law" not in none

"""`capgap plan`: what it says of the second law, published and refit to records."""

from report.made_up import from_random_weights, others, study, teachers
from shell import capgap_here


def shown(*words, cwd):
    done = capgap_here("plan", "--student", "3B", "--family", "llama-2", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def write(path, records):
    path.write_text("".join(r.model_dump_json() + "\n" for r in records))


def test_both_laws_are_shown_with_a_budget(tmp_path):
    said = shown("--tokens", "126B", cwd=tmp_path)
    assert "published second law: 13b, under which a student from random weights" in said
    assert "the laws differ: capacity gap picks 7b and decides here, published second law 13b" in said
    assert "second law: needs the tokens that you will distil on" in shown(cwd=tmp_path)


def test_ones_own_records_give_a_second_law(tmp_path):
    write(tmp_path / "full.jsonl", [*study(seeds=1), *teachers(), *from_random_weights()])
    write(tmp_path / "few.jsonl", [*study(seeds=1), *others()])
    write(tmp_path / "none.jsonl", study(seeds=1))
    full, few, none = (
        shown("--tokens", "126B", "--records", f"{name}.jsonl", cwd=tmp_path) for name in ("full", "few", "none")
    )
    assert "your own second law: " in full
    assert "refit to 6 runs without a teacher and 18 under one" in full
    assert "extrapolated: the student's 3B parameters; its 126B tokens; the size of 7b, 13b, 70b" in full
    assert "few.jsonl: the second law is not refit: of runs from random weights there are 2 without" in few
    assert "not refit" not in none
    for said in (few, none):
        assert "your own second law" not in said
        assert "published second law" in said
    without = shown("--records", "full.jsonl", cwd=tmp_path)
    assert "your own second law" not in without

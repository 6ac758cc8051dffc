"""Plans: the teacher picked, its cost, and what is said against it."""

import io
import re

import pytest
from rich.console import Console

from capgap.cost import count_parameters, flops_per_token
from capgap.errors import RecipeError, ShapeError
from capgap.law import LawFit, Observation, fit_law
from capgap.plan import load_family, make_plan, resolve
from capgap.recipe import FamilyPick

B = 10**9


def own_law(ratio: float, students: tuple[float, ...] = (1 * B, 3 * B)) -> LawFit:
    """A law whose optimum lies at `ratio` times the student: losses on a parabola in ln T, little noise."""
    rows = []
    for student in students:
        for i in range(-3, 4):
            loss = 2.0 + 0.1 * (0.4 * i) ** 2 + 1e-5 * (-1) ** i
            rows.append(Observation(student, student * ratio * 2.718281828 ** (0.4 * i), loss))
    return fit_law(rows, replicates=200)


def keys(plan) -> list[str]:
    return [verdict.key for verdict in plan.verdicts]


def test_minima():
    plan = make_plan(3_040_000_000, "llama-2", tokens=126 * B)
    assert plan.teacher is not None
    assert plan.teacher.member.hub == "meta-llama/Llama-2-7b-hf"
    assert 0.54 < plan.teacher.sparsity < 0.57
    assert plan.start is plan.teacher.member
    assert plan.near_start is plan.below is None
    assert plan.above is not None
    assert plan.above.member.name == "13b"
    assert keys(plan) == []


def test_its_work_is_that_of_the_formula():
    plan = make_plan(3_040_000_000, "llama-2", tokens=126 * B)
    assert plan.cost is not None
    teacher = load_family("llama-2").member("7b")
    forward = flops_per_token(load_family("llama-2").config_of(teacher), 4096).forward
    # Six a parameter and token for the student, and attention and the input table beside.
    assert plan.cost.flops_per_token - forward == pytest.approx(6 * plan.student, rel=0.2)
    assert plan.cost.flops(126 * B) == pytest.approx(126e9 * plan.cost.flops_per_token)
    assert plan.cost.gpu_hours(126 * B) == pytest.approx(plan.cost.flops(126 * B) / (0.4 * 989e12 * 3600))
    assert plan.cost.student.total == pytest.approx(plan.student, rel=0.01)
    assert plan.cost.memory.teacher_weights == 2 * teacher.parameters
    assert plan.cost.memory.optimizer == 8 * plan.cost.student.total


def test_lines_say_teacher_start_cost_and_assumption():
    text = "\n".join(make_plan(3_040_000_000, "llama-2", tokens=126 * B).lines())
    assert "student: 3.04B parameters" in text
    assert "published law: a teacher of 7.58B, 2.49 times the student (interval 6.89B to 8.28B)" in text
    assert "teacher: meta-llama/Llama-2-7b-hf, 6.74B, 2.22 times the student, 54.9% to be cut" in text
    assert "start: meta-llama/Llama-2-7b-hf, the teacher itself, as in the paper" in text
    assert "cost of 126B tokens: 4.30e21 FLOPs" in text
    assert "assuming 40% of 989e12 bfloat16 FLOPs a second" in text
    assert "too much for one H100" in text
    assert "caution" not in text


def test_without_a_budget_the_cost_is_that_of_a_billion_tokens():
    text = "\n".join(make_plan(600 * 10**6, "qwen3").lines())
    assert "cost of 1B tokens (no budget given): 8.21e18 FLOPs" in text
    assert "fits one H100" in text


def test_a_nearer_start_is_named_beside_the_teacher():
    plan = make_plan(3 * B, "qwen3")
    assert plan.teacher is not None
    assert plan.teacher.member.name == "8b"
    assert plan.near_start is not None
    assert plan.near_start is plan.below
    assert plan.near_start.member.name == "4b"
    text = "\n".join(plan.lines())
    assert "or Qwen/Qwen3-4B-Base" in text
    assert "the paper did not test it; both share the tokenizer" in text
    assert "padding" not in text


def test_padded_vocabularies_are_told():
    text = "\n".join(make_plan(2 * B, "pythia").lines())
    assert "2.8b has 50304 rows of vocabulary, 6.9b 50432" in text
    assert "one sequence of 2048 tokens" in text


def test_the_pick_is_nearest_in_the_logarithm_and_larger_than_the_student():
    # The law asks for 10.0B: 13B is nearer than 7B in the logarithm (1.30 against 1.48).
    plan = make_plan(4 * B, "llama-2")
    assert plan.teacher is not None
    assert plan.teacher.member.name == "13b"
    assert [c.member.name for c in plan.candidates] == ["7b", "13b", "70b"]
    # A member as large as the student is no teacher.
    exact = load_family("llama-2").member("7b").parameters
    assert [c.member.name for c in make_plan(exact, "llama-2").candidates] == ["13b", "70b"]
    assert [c.member.name for c in make_plan(exact - 1, "llama-2").candidates] == ["7b", "13b", "70b"]


def test_members_inside_the_interval():
    plan = make_plan(30 * B, "llama-3")
    assert [c.inside for c in plan.candidates] == [True, False]
    assert "inside the interval: 70b" in "\n".join(plan.lines())


def test_a_member_note_is_shown():
    assert "its base model was not published" in "\n".join(make_plan(13 * B, "qwen3").lines())


@pytest.mark.parametrize(
    ("student", "family", "tokens", "expected", "message"),
    [
        (80 * B, "llama-2", None, "no-teacher", r"no member of llama-2 is larger than the student \(80B\)"),
        (40 * B, "llama-2", None, "family-too-small", r"ends at 70b \(69B\), below the 99.9B"),
        (5 * 10**6, "qwen3", None, "family-too-large", r"begins at 0.6b \(596M\), 47.7 times the 12.5M"),
        (6 * B, "llama-3", None, "gap", r"no member near the 15B .* 8b \(8.03B\), is 0.54 times that"),
        (5 * 10**6, "qwen3", None, "deep-cut", "99% of 0.6b would be cut; above 80% .* cut in steps"),
        (600 * 10**6, "qwen3", None, "same-size", r"0.6b \(596M\) already has about the student's size"),
        (1300 * 10**6, "pythia", None, "same-size", r"1.4b \(1.41B\) already"),
        (3 * B, "llama-2", B, "few-tokens", "1B tokens are 0.33 a student parameter, fewer than 5"),
        (
            5 * 10**6,
            "gpt2",
            None,
            "vocabulary",
            "tables would take .* of the student's 5M parameters in gpt2",
        ),
    ],
)
def test_when_not_to_distil(student, family, tokens, expected, message):
    plan = make_plan(student, family, tokens=tokens)
    verdict = next(v for v in plan.verdicts if v.key == expected)
    assert re.search(message, verdict.text)
    assert f"caution: {verdict.text}" in plan.lines()


@pytest.mark.parametrize(
    ("student", "tokens", "absent"),
    [
        (3 * B, 15 * B, "few-tokens"),
        (3 * B, None, "few-tokens"),
        (3 * B, None, "deep-cut"),
        (3 * B, None, "same-size"),
        (3 * B, None, "vocabulary"),
    ],
)
def test_nothing_is_said_that_does_not_hold(student, tokens, absent):
    assert absent not in keys(make_plan(student, "llama-2", tokens=tokens))


def test_a_student_that_narrowing_cannot_reach():
    plan = make_plan(10**6, "gpt2")
    assert plan.cost is not None
    assert plan.cost.student.total > 10**6
    assert any("so layers must go too" in v.text for v in plan.verdicts)


@pytest.mark.parametrize("family", ["gpt2", "llama-2", "llama-3", "pythia", "qwen3"])
@pytest.mark.parametrize("student", [1, 10**6, 9 * 10**6, 10**8, 3 * B, 10**13])
def test_every_scale_gets_a_plan_or_a_reason(family, student):
    plan = make_plan(student, family, tokens=10**9)
    assert (plan.teacher is None) == ("no-teacher" in keys(plan)) == (plan.cost is None)
    assert all(plan.lines())


def test_a_law_of_ones_own_decides_and_the_published_one_stands_beside():
    plan = make_plan(3 * B, "llama-2", law=own_law(4.4))
    assert [ask.law for ask in plan.asks] == ["your own law", "published law"]
    assert plan.teacher is not None
    assert plan.teacher.member.name == "13b"
    assert plan.near_start is not None
    text = "\n".join(plan.lines())
    assert "picks 13b where the published one picks 7b; yours decides here" in text
    same = "\n".join(make_plan(3 * B, "llama-2", law=own_law(2.3)).lines())
    assert "and both pick 7b" in same
    assert "the two laws" in "\n".join(make_plan(80 * B, "llama-2", law=own_law(2.3)).lines())


def test_a_law_without_an_interval():
    law = fit_law([Observation(B, t * B, (t - 2.5) ** 2) for t in (2.0, 2.5, 3.0)], replicates=0)
    plan = make_plan(B, "llama-2", law=law)
    assert all(c.inside is None for c in plan.candidates)
    text = "\n".join(plan.lines())
    assert "(no interval)" in text
    assert "inside the interval: not known, the law has no interval" in text


def test_the_context_is_bounded_by_the_family():
    plan = make_plan(50 * 10**6, "gpt2", context=4096)
    assert plan.cost is not None
    assert plan.cost.context == 1024
    short = make_plan(50 * 10**6, "gpt2", context=128)
    assert short.cost is not None
    assert short.cost.memory.activations == pytest.approx(plan.cost.memory.activations / 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, "llama-2"), RecipeError, "student = 0 must be a positive count"),
        ((B, "llama-9"), RecipeError, "known are gpt2, llama-2"),
        ((B, "llama-2", {"tokens": 0}), RecipeError, "tokens = 0"),
        ((B, "llama-2", {"context": 0}), ShapeError, "context = 0"),
    ],
)
def test_impossible_plans_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make_plan(arguments[0], arguments[1], **(arguments[2] if len(arguments) > 2 else {}))


def test_the_rendering_holds_table_and_lines():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(make_plan(3 * B, "qwen3"))
    text = console.export_text()
    assert "qwen3: teachers of a 3B student" in text
    assert "8b" in text
    assert "teacher: Qwen/Qwen3-8B-Base" in text


def test_resolve():
    assert resolve("some/folder", None) == "some/folder"
    assert resolve(FamilyPick(family="llama-2"), 3 * B) == "meta-llama/Llama-2-7b-hf"
    assert resolve(FamilyPick(family="llama-2"), 3 * B, law=own_law(4.4)) == "meta-llama/Llama-2-13b-hf"
    assert resolve(FamilyPick(family="qwen3", pick="0.6B"), None) == "Qwen/Qwen3-0.6B-Base"


@pytest.mark.parametrize(
    ("pick", "student", "message"),
    [
        (FamilyPick(family="llama-9"), B, "'llama-9' is not known; known are"),
        (FamilyPick(family="llama-2", pick="34b"), B, "has no member '34b'; its members are 7b, 13b, 70b"),
        (FamilyPick(family="llama-2"), None, "the law needs the student's parameters"),
        (FamilyPick(family="llama-2"), 80 * B, "no member is larger than the student's 80000000000"),
    ],
)
def test_what_cannot_be_resolved_is_refused(pick, student, message):
    with pytest.raises(RecipeError, match=message):
        resolve(pick, student)


def test_estimates_do_not_change_the_family():
    family = load_family("llama-2")
    before = family.config_of(family.member("7b")).to_dict()
    make_plan(3 * B, family)
    assert family.config_of(family.member("7b")).to_dict() == before
    assert count_parameters(family.config_of(family.member("7b"))).total == family.member("7b").parameters

"""The second law in a plan, beside a plain re-derivation from the members' counts."""

import dataclasses
import math

import pytest

from capgap.cost import count_parameters
from capgap.law import PUBLISHED_SECOND, Alone, Measured, SecondLaw, Taught, fit_second_law
from capgap.plan import Family, load_family, make_plan, narrowed

B = 10**9


def alone_by_hand(n: float, d: float) -> float:
    return 1.220 + (3355 / n**0.408 + 18186 / d**0.431) ** 0.452


def taught_by_hand(teacher: float, n: float, d: float) -> float:
    bend = (1 + (teacher / (alone_by_hand(n, d) * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
    return teacher + teacher**-2.549 * bend * (2243 / n**0.321 + 24181 / d**0.637) ** 0.764


def llama_non_embedding(hidden: int, neurons: int, layers: int, heads: int, kv_heads: int) -> int:
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads
    return layers * (attention + 3 * hidden * neurons + 2 * hidden) + hidden


LLAMA_2 = {
    "7b": llama_non_embedding(4096, 11008, 32, 32, 32),
    "13b": llama_non_embedding(5120, 13824, 40, 40, 40),
    "70b": llama_non_embedding(8192, 28672, 80, 64, 8),
}


def lines_of(plan) -> str:
    return "\n".join(plan.lines())


def a_refit() -> SecondLaw:
    """A law refit to small runs that follow the published one, embeddings included."""
    alone = [Alone(n, d, alone_by_hand(n, d)) for n in (1e5, 4e5, 1e6) for d in (1e7, 1e8)]
    taught = [Taught(a.n, a.d, taught_by_hand(t, a.n, a.d), t) for a in alone for t in (3.0, 3.5, 4.0)]
    return fit_second_law(alone, taught, embeddings=True).law


def test_losses_are_those_of_the_formula_for_one_count_of_the_student():
    plan = make_plan(3 * B, "llama-2", tokens=126 * B)
    (ask,) = plan.second
    family = load_family("llama-2")
    shape = count_parameters(narrowed(family.config_of(family.member("7b")), 3 * B))
    assert ask.parameters == shape.non_embedding == pytest.approx(3e9 - 2 * 32000 * 2700, rel=0.01)
    assert ask.alone == pytest.approx(alone_by_hand(ask.parameters, 126e9), rel=1e-9)
    assert [p.member.name for p in ask.members] == list(LLAMA_2)
    for p in ask.members:
        assert p.parameters == LLAMA_2[p.member.name]
        assert p.teacher_loss == pytest.approx(alone_by_hand(p.parameters, 2e12), rel=1e-9)
        assert p.loss == pytest.approx(taught_by_hand(p.teacher_loss, ask.parameters, 126e9), rel=1e-9)
    assert ask.pick.loss == min(p.loss for p in ask.members)
    assert ask.gain == pytest.approx(ask.alone - ask.pick.loss)


def test_where_the_laws_differ_both_picks_are_shown():
    plan = make_plan(3 * B, "llama-2", tokens=126 * B)
    assert plan.teacher is not None
    assert (plan.teacher.member.name, plan.second[0].pick.member.name) == ("7b", "13b")
    text = lines_of(plan)
    assert "published second law: 13b, under which a student from random weights is predicted to reach 2.0648" in text
    assert "2.1065 without a teacher (under each: 7b 2.0676, 13b 2.0648, 70b 2.0665)" in text
    assert (
        "the laws differ: capacity gap picks 7b and decides here, published second law 13b "
        "(2.0676 and 2.0648 nats per token, as the latter predicts)"
    ) in text
    assert "arXiv:2502.08606; English C4 with a tokenizer of its own; not of students cut from a model" in text
    assert "students of 143M to 7.75B, own losses of teachers to 12.6B, and 512B tokens" in text
    assert "it counts 2.83B of the student's parameters, embeddings left out" in text


def test_where_they_agree_nothing_is_said_of_it():
    plan = make_plan(3 * B, "qwen3", tokens=126 * B)
    assert plan.teacher is not None
    assert plan.teacher.member is plan.second[0].pick.member
    assert "the laws differ" not in lines_of(plan)


def test_short_runs_ask_for_a_larger_teacher():
    picks = [make_plan(400 * 10**6, "pythia", tokens=d).second[0].pick for d in (8 * B, 200 * B)]
    assert [p.member.name for p in picks] == ["12b", "1.4b"]


@pytest.mark.parametrize(
    ("student", "family", "tokens", "expected"),
    [
        (3 * B, "llama-2", 126 * B, ["the size of 13b, 70b", "the 2T tokens of the teachers"]),
        (B, "pythia", 20 * B, []),
        (B, "pythia", 600 * B, ["its 600B tokens"]),
        (60 * 10**6, "pythia", 20 * B, ["the student's 21.4M parameters"]),
        (2 * B, "llama-3", 20 * B, ["the size of 70b, 405b", "the 9T and 15T tokens of the teachers"]),
    ],
)
def test_what_is_extrapolated_is_said(student, family, tokens, expected):
    plan = make_plan(student, family, tokens=tokens)
    assert plan.second[0].extrapolated == expected
    if expected:
        assert f"  note: extrapolated: {'; '.join(expected)}" in plan.lines()


@pytest.mark.parametrize(("tokens", "helps"), [(126 * B, True), (10_000 * B, False)])
def test_long_runs_gain_nothing_from_a_teacher(tokens, helps):
    plan = make_plan(3 * B, "llama-2", tokens=tokens)
    (ask,) = plan.second
    least = min(taught_by_hand(alone_by_hand(n, 2e12), ask.parameters, tokens) for n in LLAMA_2.values())
    assert (least < alone_by_hand(ask.parameters, tokens)) == helps
    said = [v.text for v in plan.verdicts if v.key == "no-gain"]
    assert len(said) == (not helps)
    if not helps:
        assert f"at 10T tokens no teacher here helps a student from random weights ({least:.4f}" in said[0]
        assert f"caution: {said[0]}" in plan.lines()


def test_without_tokens_or_a_teacher_it_is_not_asked():
    assert make_plan(3 * B, "llama-2").second == ()
    assert "second law: needs the tokens that you will distil on" in lines_of(make_plan(3 * B, "llama-2"))
    nobody = make_plan(80 * B, "llama-2", tokens=B)
    assert nobody.second == ()
    assert "second law" not in lines_of(nobody)


def test_members_whose_tokens_are_not_known_are_left_out():
    plan = make_plan(50 * 10**6, "gpt2", tokens=B)
    assert plan.second == ()
    assert "second law: not asked, the tokens that gpt2's members were trained on are not known" in lines_of(plan)
    tree = load_family("llama-2").model_dump()
    del tree["members"][0]["trained_on"]
    partly = make_plan(3 * B, Family.model_validate(tree), tokens=126 * B)
    assert [p.member.name for p in partly.second[0].members] == ["13b", "70b"]
    text = lines_of(partly)
    assert "(under each: 13b 2.0648, 70b 2.0665, 7b not known)" in text
    assert "the laws differ: capacity gap picks 7b and decides here, published second law 13b\n" in text


def test_a_second_law_of_ones_own_counts_all_parameters_and_comes_first():
    own = a_refit()
    plan = make_plan(3 * B, "llama-2", tokens=126 * B, second=own)
    mine, published = plan.second
    assert (mine.name, published.name) == ("your own second law", "published second law")
    assert published == make_plan(3 * B, "llama-2", tokens=126 * B).second[0]
    assert mine.parameters == 3 * B
    assert [p.parameters for p in mine.members] == [m.parameters for m in plan.family.members]
    s = own.supervised
    by_hand = s.E + (s.A / 3e9**s.alpha + s.B / 126e9**s.beta) ** s.gamma
    assert mine.alone == pytest.approx(by_hand)
    text = lines_of(plan)
    assert "your own second law: " in text
    assert "refit to 6 runs without a teacher and 18 under one; form: Busbridge" in text
    assert "fitted to students of 100k to 1M, own losses of teachers to 1M, and 100M tokens" in text
    assert "it counts all of the student's parameters" in text
    assert (
        "extrapolated: the student's 3B parameters; its 126B tokens; the size of 7b, 13b, 70b; "
        "the 2T tokens of the teachers"
    ) in text
    assert text.index("your own second law") < text.index("published second law")


@pytest.mark.parametrize(
    ("fitted", "name"),
    [
        (Measured((1e5, 1e6), 1e6, (1e7, 1e8), embeddings=True), "published second law"),
        (Measured((1e5, 1e11), 1e11, (1e7, 1e14), embeddings=True), "your own second law"),
    ],
)
def test_the_caution_is_by_ones_own_law_only_where_that_is_not_extrapolated(fitted, name):
    own = dataclasses.replace(PUBLISHED_SECOND, fitted=fitted)
    plan = make_plan(3 * B, "llama-2", tokens=10_000 * B, second=own)
    assert (plan.second[0].extrapolated == []) == (name == "your own second law")
    (text,) = [v.text for v in plan.verdicts if v.key == "no-gain"]
    assert text.startswith(f"{name}: at 10T tokens no teacher here helps")


def test_it_never_decides():
    for tokens in (B, 126 * B, 10_000 * B):
        plan = make_plan(3 * B, "llama-2", tokens=tokens, second=a_refit())
        assert plan.teacher is not None
        assert plan.teacher.member.name == "7b"


@pytest.mark.parametrize("student", [1, 9 * 10**6, 5 * B])
@pytest.mark.parametrize("family", ["llama-3", "pythia"])
def test_losses_of_every_scale_are_finite(student, family):
    for ask in make_plan(student, family, tokens=10**9).second:
        assert math.isfinite(ask.alone)
        assert all(math.isfinite(p.loss) and p.loss > PUBLISHED_SECOND.supervised.E for p in ask.members)

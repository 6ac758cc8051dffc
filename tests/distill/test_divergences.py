"""The divergences against loops over single probabilities; their gradients against autograd and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.distill import Divergence
from capgap.distill.targets import ABSENT
from capgap.errors import RecipeError, ShapeError
from distill.dense import KINDS, dense_divergence
from reference import divergences as reference

DIVERGENCES = [Divergence(kind, mix) for kind, mix in KINDS.items()]  # type: ignore[arg-type]

# Logits of size L are rounded to L * 2^-24 of themselves, and log-probabilities with them, to about 1e-5 for L = 100;
# a divergence weighs these errors by probabilities that sum to one or two, for each token.
ROUNDING = 2e-5


def logits(seed: int, tokens: int, vocabulary: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocabulary, generator=generator) * scale).clamp(-50, 50)


@st.composite
def pairs(draw, largest: float = 50.0):
    """Student and teacher logits; two scales, so that one may be flat and the other sharp."""
    tokens, vocabulary, seed = draw(st.integers(1, 5)), draw(st.integers(2, 30)), draw(st.integers(0, 10**6))
    scales = [draw(st.sampled_from([s for s in (0.01, 1.0, 5.0, 50.0) if s <= largest])) for _ in range(2)]
    return tuple(logits(2 * seed + i, tokens, vocabulary, scale) for i, scale in enumerate(scales))


divergences = st.builds(
    lambda kind, mix: Divergence(kind, None if KINDS[kind] is None else mix),
    st.sampled_from(list(KINDS)),
    st.floats(0.01, 0.99),
)
temperatures = st.sampled_from([0.5, 1.0, 3.0])


def dense(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_p, log_q = (torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    return dense_divergence(divergence.kind, divergence.mix, log_p, log_q)


def value_and_gradient(divergence, student, teacher, temperature=1.0):
    student = student.clone().requires_grad_()
    value = divergence(student, teacher, temperature=temperature)
    value.backward()
    return float(value.detach()), student.grad


@settings(max_examples=80, deadline=None)
@given(pair=pairs(), divergence=divergences, temperature=temperatures)
def test_value_and_gradient(pair, divergence, temperature):
    student, teacher = pair
    value, gradient = value_and_gradient(divergence, student, teacher, temperature)
    expected = reference.divergence(
        divergence.kind, student.numpy(), teacher.numpy(), mix=divergence.mix, temperature=temperature
    )
    rounding = ROUNDING / temperature
    assert value == pytest.approx(float(expected.sum()), rel=1e-5, abs=rounding * len(student))
    assert value >= -rounding * len(student)
    exact = student.double().requires_grad_()
    by_autograd = dense(divergence, exact, teacher, temperature)
    assert float(by_autograd.detach()) == pytest.approx(float(expected.sum()), rel=1e-9, abs=1e-9)
    by_autograd.backward()
    assert exact.grad is not None
    scale = 1 + float(exact.grad.abs().max())
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=rounding / temperature * scale)


@settings(max_examples=30, deadline=None)
@given(pair=pairs(largest=5.0), divergence=divergences, temperature=temperatures, seed=st.integers(0, 99))
def test_gradient_by_finite_differences(pair, divergence, temperature, seed):
    """Along a random direction, central differences of the float64 loops; the total variation only off its kinks."""
    student, teacher = pair
    _, gradient = value_and_gradient(divergence, student, teacher, temperature)
    direction = logits(seed, *student.shape, 1.0).double().numpy()
    step = 1e-5

    def moved(sign: int) -> float:
        at = student.double().numpy() + sign * step * direction
        values = reference.divergence(divergence.kind, at, teacher.numpy(), mix=divergence.mix, temperature=temperature)
        return float(values.sum())

    if divergence.kind == "total_variation":
        p, q = (torch.softmax(x.double() / temperature, -1) for x in (student, teacher))
        if float((p - q).abs().min()) < 1e-3:
            return
    slope = (moved(1) - moved(-1)) / (2 * step)
    assert float((gradient.double().numpy() * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(pair=pairs(), divergence=divergences, temperature=temperatures, shift=st.floats(-20, 20))
def test_zero_with_zero_gradient_for_equal_distributions(pair, divergence, temperature, shift):
    """Equal but for a constant, which the softmax does not see."""
    student, _ = pair
    value, gradient = value_and_gradient(divergence, student, student.clone(), temperature)
    assert value == pytest.approx(0.0, abs=1e-6 * len(student))
    assert float(gradient.abs().max()) <= 1e-5 / temperature
    shifted = float(divergence(student, student + shift, temperature=temperature))
    assert shifted == pytest.approx(0.0, abs=ROUNDING / temperature * len(student))


@settings(max_examples=30, deadline=None)
@given(pair=pairs())
def test_jsd_is_symmetric_at_one_half_and_bounded(pair):
    student, teacher = pair
    jsd = Divergence("jsd", 0.5)
    there, back = float(jsd(student, teacher)), float(jsd(teacher, student))
    assert there == pytest.approx(back, rel=1e-5, abs=ROUNDING * len(student))
    assert there <= len(student) * np.log(2) * (1 + 1e-5)
    assert float(Divergence("total_variation")(student, teacher)) <= len(student) * (1 + 1e-5)


@settings(max_examples=20, deadline=None)
@given(pair=pairs(largest=5.0))
@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_skewed_kl_comes_to_the_kl_as_alpha_goes_to_zero(way, pair):
    whole, gradient = value_and_gradient(Divergence(f"{way}_kl"), *pair)
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in pair)
    ratio = float((log_p - log_q).abs().exp().max())
    for alpha in (1e-3, 1e-5, 1e-7):
        value, skewed_gradient = value_and_gradient(Divergence(f"skew_{way}_kl", alpha), *pair)
        # They differ by the mean of log(1 - alpha + alpha * r) with r = q / p or p / q, no more than alpha * r.
        off = 1.01 * alpha * (1 + ratio)
        assert abs(value - whole) <= len(log_p) * (off + ROUNDING)
        torch.testing.assert_close(skewed_gradient, gradient, rtol=1e-4, atol=4 * off + ROUNDING)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.kind)
def test_rows_that_the_teacher_lacks(divergence, temperature):
    """Their probability is 0: not a number that is not finite, and the same as of a teacher without them."""
    student, teacher = logits(0, 4, 12, 2.0), logits(1, 4, 12, 2.0)
    teacher[:, 9:] = ABSENT
    value, gradient = value_and_gradient(divergence, student, teacher, temperature)
    assert np.isfinite(value)
    assert bool(torch.isfinite(gradient).all())
    expected = reference.divergence(
        divergence.kind, student.numpy(), teacher.numpy(), mix=divergence.mix, temperature=temperature
    )
    assert value == pytest.approx(float(expected.sum()), rel=1e-5)
    exact = student.double().requires_grad_()
    dense(divergence, exact, teacher, temperature).backward()
    assert exact.grad is not None
    torch.testing.assert_close(
        gradient.double(), exact.grad, rtol=1e-4, atol=1e-6 * (1 + float(exact.grad.abs().max()))
    )
    if divergence.kind == "forward_kl":  # of the rows that it has, the teacher's entropy and cross-entropy alone
        p, q = torch.log_softmax(student / temperature, -1)[:, :9], torch.log_softmax(teacher[:, :9] / temperature, -1)
        assert value == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-5)
    if divergence.kind != "reverse_kl":  # the student is driven out of these rows
        assert bool((gradient[:, 9:] > 0).all())


def test_the_teacher_gets_no_gradient_and_the_scale_of_the_loss_is_kept():
    student, teacher = logits(0, 3, 8, 1.0).requires_grad_(), logits(1, 3, 8, 1.0).requires_grad_()
    (3 * Divergence("jsd")(student, teacher)).backward()
    assert teacher.grad is None
    _, once = value_and_gradient(Divergence("jsd"), student.detach(), teacher.detach())
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 3 * once)


def test_refusals():
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(2, 4\)"):
        Divergence()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(RecipeError, match="not one of forward_kl"):
        Divergence("hellinger")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="has no mix"):
        Divergence("reverse_kl", 0.5)
    for mix in (0.0, 1.0):
        with pytest.raises(RecipeError, match="between 0 and 1"):
            Divergence("jsd", mix)

"""The objective on real models equals cross-entropy and divergence of the logits that the models themselves give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from capgap.distill import Divergence, Mix, Objective, OnlineTeacher
from capgap.errors import ModelError, RecipeError
from capgap.models import check_head, head
from distill.dense import KINDS, dense_loss, dense_teacher
from tiny import ids, telling, tiny_model

# Each does something of its own between hidden states and logits, or has its own names for the parts.
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 0.25},
    "gpt_neox": {},
    "gpt2": {},
    "gptj": {"rotary_dim": 8},
    "phi": {},
}


def family(kind: str, *, seed: int, vocab: int = 64, width: int = 32, layers: int = 2) -> PreTrainedModel:
    """A tiny random model with weights large enough for logits that are not all alike, and its head's bias not zero."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **FAMILIES[kind],
    )
    return telling(config, seed=seed)


def own_logits(model: PreTrainedModel, input_BL: Tensor) -> Tensor:
    return model(input_ids=input_BL).logits.flatten(0, 1)


def fused(student, teacher, inputs, labels, mix):
    targets = OnlineTeacher(teacher).targets(inputs, torch.arange(len(inputs)))
    return Objective(student, mix)(inputs, labels, targets)


def masked_labels(text: Tensor, every: int) -> Tensor:
    """The next ids; every n-th is not scored."""
    labels = text[:, 1:].clone()
    labels.view(-1)[::every] = -100
    return labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_own_logits(student, teacher, text, labels, mix) -> None:
    """Loss, parts and the gradient of every weight; both forward passes are float32 and alike up to the head."""
    inputs = text[:, :-1]
    with torch.no_grad():
        log_q = dense_teacher([own_logits(teacher, inputs)], [1.0], mix.temperature, head(student).weight_VH.shape[0])
    student.zero_grad()
    expected = dense_loss(own_logits(student, inputs), labels.flatten(), log_q, mix)
    expected[0].backward()
    by_autograd = gradients(student)
    student.zero_grad()
    found = fused(student, teacher, inputs, labels, mix)
    found.loss.backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    # Of one token, the queries' gradients are zero but for rounding: the scale is that of all gradients.
    scale = max(float(gradient.abs().max()) for gradient in by_autograd.values())
    fused_gradients = gradients(student)
    assert fused_gradients.keys() == by_autograd.keys()
    for name, gradient in by_autograd.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    kd_weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    chunk=st.integers(1, 40),
    tied=st.booleans(),
    length=st.integers(2, 14),
    every=st.sampled_from([2, 5, 1000]),
)
def test_equals_the_models_own_logits(kind, kd_weight, temperature, chunk, tied, length, every):
    student, teacher = tiny_model(tied=tied, seed=1), tiny_model(tied=tied, seed=2)
    text = ids(length=length)
    mix = Mix(Divergence(kind, KINDS[kind]), kd_weight, temperature, chunk)
    assert_equals_own_logits(student, teacher, text, masked_labels(text, every), mix)


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_the_models_own_logits_in_other_families(kind):
    """As student of a llama, and as its teacher."""
    other, llama, text = family(kind, seed=1), family("llama", seed=2), ids()
    for student, teacher in ((other, llama), (llama, other)):
        llama.requires_grad_(student is llama)
        mix = Mix(Divergence("jsd", 0.3), 0.6, 1.5, 7)
        assert_equals_own_logits(student, teacher, text, masked_labels(text, 4), mix)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_head_is_known_and_whoever_changes_logits_after_it_is_refused(kind, monkeypatch):
    model = family(kind, seed=0)
    check_head(model)
    own = type(model).forward
    for change in (lambda x: x * 1.05, lambda x: torch.tanh(x / 3) * 3, lambda x: x + torch.arange(x.shape[-1]) / 64):

        def changed(self, *args, change=change, **more):
            out = own(self, *args, **more)
            out.logits = change(out.logits)
            return out

        monkeypatch.setattr(type(model), "forward", changed)
        with pytest.raises(ModelError, match="does something to its logits"):
            check_head(model)
        monkeypatch.undo()


@pytest.mark.parametrize("student_rows", [60, 64, 72])
def test_vocabularies_padded_to_other_sizes(student_rows):
    """Text has ids below 58; the teacher has 64 rows."""
    student, teacher = family("llama", seed=1, vocab=student_rows), family("llama", seed=2)
    text = ids(vocab=58)
    assert_equals_own_logits(student, teacher, text, text[:, 1:].contiguous(), Mix(Divergence(), 0.5, 2.0, 7))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_equal_models_is_zero_with_its_gradient(kind, temperature):
    text, model = ids(), tiny_model()
    found = fused(model, tiny_model(), text[:, :-1], text[:, 1:], Mix(Divergence(kind), 1.0, temperature, 5))
    found.loss.backward()
    assert float(found.kl) == pytest.approx(0.0, abs=1e-4)
    assert float(found.loss.detach()) == pytest.approx(0.0, abs=1e-3)
    # Rounding gives p and q apart by 1e-7 of them a sign, which is all that the total variation's gradient sees; here
    # the two forward passes are the same to the bit.
    assert max(float(gradient.abs().max()) for gradient in gradients(model).values()) < 1e-3


def test_negative_labels_are_not_scored():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    mix = Mix(Divergence(), 0.5, 1.0, 4)
    text = ids(rows=1)
    labels = text[:, 1:].clone()
    labels[:, 6:] = -100
    masked = fused(student, teacher, text[:, :-1], labels, mix)
    short = fused(student, teacher, text[:, :6], text[:, 1:7], mix)
    for a, b in zip(masked, short, strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_speaks_without_dropout_whatever_mode_it_came_in():
    check_teacher_is_still(family("gpt2", seed=2))


def check_teacher_is_still(teacher: PreTrainedModel) -> None:
    """Of a model with dropout: the same word twice, and the one that it has in eval mode."""
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in teacher.modules())
    text, block = ids(), torch.arange(2)
    mode = type(teacher).eval  # not the instance's own, which a planted fault may have replaced
    with torch.no_grad():
        expected = own_logits(mode(teacher), text)
    online = OnlineTeacher(teacher.train())
    for _ in range(2):
        logits = online.targets(text, block).chunk(slice(None), 1.0, 64).logits_CV
        torch.testing.assert_close(logits, expected)


def test_a_mixture_of_teachers_is_the_mixture_of_their_probabilities():
    teachers = [family("llama", seed=2), family("gpt2", seed=3)]
    text = ids()
    chunk = OnlineTeacher(*teachers, weights=[1.0, 3.0]).targets(text, torch.arange(2)).chunk(slice(3, 9), 2.0, 64)
    with torch.no_grad():
        parts = [torch.softmax(own_logits(teacher, text)[3:9] / 2.0, -1) for teacher in teachers]
    torch.testing.assert_close(torch.softmax(chunk.logits_CV, -1), 0.25 * parts[0] + 0.75 * parts[1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [2.0, -1.0]])
def test_weights_that_make_no_mixture_are_refused(weights):
    teachers = [family("llama", seed=seed) for seed in (2, 3)]
    with pytest.raises(RecipeError, match="of 2 teachers: each must have one, above 0"):
        OnlineTeacher(*teachers, weights=weights)


def test_nats_is_the_cross_entropy_of_the_scored_tokens():
    student, text = tiny_model(seed=1), ids()
    labels = masked_labels(text, 3)
    expected = nn.functional.cross_entropy(own_logits(student, text[:, :-1]), labels.flatten(), reduction="sum")
    nats = Objective(student, Mix(Divergence(), 0.5, 1.0)).nats(text[:, :-1], labels)
    torch.testing.assert_close(nats, expected.detach())
    assert not nats.requires_grad

"""Costs against models that are really built, against torch's own counter, and against published counts."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from capgap.cost import (
    count_parameters,
    distill_flops_per_token,
    flops_per_token,
    format_bytes,
    format_count,
    format_flops,
    training_memory,
)
from capgap.errors import ModelError, ShapeError
from capgap.recipe import parse_count

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")


ENDS = tuple(f"{name}.weight" for name in ("embed_tokens", "embed_in", "embed_out", "wte", "wpe", "lm_head"))


def tiny(
    kind: str, *, layers=2, kv=2, group=2, head_dim=8, neurons=40, vocab=67, tied=False, **more
) -> PreTrainedConfig:
    heads = kv * group
    common = {"vocab_size": vocab, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        return AutoConfig.for_model(
            kind,
            n_embd=heads * head_dim,
            n_layer=layers,
            n_head=heads,
            n_inner=neurons,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            **common,
            **more,
        )
    if kind in ("llama", "mistral", "qwen3"):
        more = {"head_dim": head_dim, **more}
    if kind != "gpt_neox":
        more = {"num_key_value_heads": kv, **more}
    return AutoConfig.for_model(
        kind,
        hidden_size=heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        **common,
        **more,
    )


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    layers=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from((4, 8)),
    neurons=st.integers(3, 50),
    vocab=st.integers(5, 90),
    tied=st.booleans(),
)
def test_parameters_are_those_of_the_real_model(kind, vocab, **sizes):
    config = tiny(kind, vocab=vocab, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    weights = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
    total = sum(p.numel() for _, p in weights.values())
    embedding = sum(p.numel() for name, p in weights.values() if name.endswith(ENDS))
    head = vocab * config.hidden_size
    matmul = head + sum(p.numel() for name, p in weights.values() if p.ndim == 2 and not name.endswith(ENDS))

    counted = count_parameters(config)

    assert counted.total == total
    assert counted.embedding == embedding
    assert counted.non_embedding == total - embedding
    assert counted.matmul == matmul


def test_tying_the_head_saves_one_table_and_no_work():
    untied, tied = (count_parameters(tiny("llama", tied=t)) for t in (False, True))
    assert untied.total - tied.total == 67 * 32
    assert untied.non_embedding == tied.non_embedding
    assert untied.matmul == tied.matmul


# Non-embedding counts of Pythia as its authors print them (arXiv:2304.01373, table 1).
@pytest.mark.parametrize(
    ("shape", "total", "non_embedding"),
    [
        ((50304, 512, 6, 8), 70_426_624, 18_915_328),
        ((50304, 768, 12, 12), 162_322_944, 85_056_000),
        ((50304, 1024, 24, 16), 405_334_016, 302_311_424),
        ((50304, 2048, 16, 8), 1_011_781_632, 805_736_448),
        ((50304, 2048, 24, 16), 1_414_647_808, 1_208_602_624),
        ((50304, 2560, 32, 32), 2_775_208_960, 2_517_652_480),
        ((50432, 4096, 32, 32), 6_857_302_016, 6_444_163_072),
        ((50688, 5120, 36, 40), 11_846_072_320, 11_327_027_200),
    ],
)
def test_published_counts_of_pythia(shape, total, non_embedding):
    vocab, hidden, layers, heads = shape
    counted = count_parameters(
        AutoConfig.for_model(
            "gpt_neox",
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            tie_word_embeddings=False,
        )
    )
    assert (counted.total, counted.non_embedding) == (total, non_embedding)


def test_a_70b_model_is_counted_at_once_and_leaves_the_random_state_alone():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    state = torch.get_rng_state()
    start = time.perf_counter()
    assert count_parameters(config).total == 68_976_648_192
    assert time.perf_counter() - start < 20
    assert torch.equal(state, torch.get_rng_state())
    start = time.perf_counter()
    count_parameters(config)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    ("kind", "neurons"), [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")]
)
def test_of_a_mixture_as_many_experts_are_paid_for_as_a_token_is_given(kind, neurons):
    sizes = {
        "hidden_size": 16,
        neurons: 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 32,
        "num_experts_per_tok": 2,
        "num_experts" if kind == "qwen3_moe" else "num_local_experts": 6,
        "tie_word_embeddings": False,
    }
    counted = count_parameters(AutoConfig.for_model(kind, **sizes))
    attention, expert, router, table = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24, 6 * 16, 32 * 16
    norms = 5 * 16 + (2 * 2 * 8 if kind == "qwen3_moe" else 0)
    assert counted.total == 2 * (attention + 6 * expert + router) + 2 * table + norms
    assert counted.matmul == 2 * (attention + 2 * expert + router) + table


def test_weights_of_which_it_is_not_known_how_often_they_are_used_are_refused():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32)
    with pytest.raises(ModelError, match=r"mamba.*neither a table, a linear layer nor a mixture's experts"):
        count_parameters(config)


def test_a_configuration_without_a_language_model_is_refused():
    with pytest.raises(ModelError, match=r"clip.*no causal language model"):
        count_parameters(AutoConfig.for_model("clip"))


def test_a_configuration_that_contradicts_itself_is_refused():
    config = tiny("llama")
    config.num_attention_heads = 3
    with pytest.raises(ModelError, match=r"'llama'.*hidden size \(32\) is not a multiple"):
        count_parameters(config)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_torch_counts(kind, tied):
    length = 48
    config = tiny(kind, kv=2, head_dim=16, neurons=96, tied=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
        both = counter.get_total_flops()

    # The counter sees the whole square of attention; a causal token sees half of it.
    full = 4 * 2 * (4 * 16) * length
    causal = full * (length + 1) / 2 / length
    ours = flops_per_token(config, length)
    assert ours.forward - causal + full == pytest.approx(forward / length, rel=1e-3)
    assert 3 * (ours.forward - causal + full) == pytest.approx(both / length, rel=1e-3)
    assert ours.training == 3 * ours.forward


def test_attention_flops_are_a_sum_over_positions():
    config = tiny("mistral", sliding_window=5)
    for context in (1, 4, 5, 6, 17):
        pairs = sum(min(i + 1, 5) for i in range(context))
        expected = 2 * count_parameters(config).matmul + 2 * 4 * 32 * pairs / context
        assert flops_per_token(config, context).forward == pytest.approx(expected)


def test_distillation_is_student_training_and_teacher_forward():
    student, teacher = tiny("llama"), tiny("llama", layers=3, neurons=80)
    assert distill_flops_per_token(student, teacher, 16) == pytest.approx(
        3 * flops_per_token(student, 16).forward + flops_per_token(teacher, 16).forward
    )
    with pytest.raises(ShapeError, match="context = 0"):
        flops_per_token(student, 0)


def kept_bytes(config: PreTrainedConfig, rows: int, length: int, autocast: bool) -> int:
    """Bytes the decoder keeps for its backward pass: each storage once, no parameters, no casts of them."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weight_sizes = {size for p in model.parameters() for size in (tuple(p.shape), tuple(p.shape)[::-1])}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters and not (tensor.ndim == 2 and tuple(tensor.shape) in weight_sizes):
            kept[address] = tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 4, "neurons": 176},
        {"layers": 2, "kv": 1, "group": 4, "neurons": 48},
    ],
)
def test_activations_are_those_autograd_keeps(kind, precision, sizes):
    config = tiny(kind, head_dim=16, **sizes)
    measured = kept_bytes(config, 3, 40, precision == "bfloat16")
    memory = training_memory(config, tokens_per_micro_batch=120, context=40, precision=precision)
    assert memory.activations == pytest.approx(measured, rel=0.15)


def test_memory_of_a_known_model_adds_up():
    teacher, student = tiny("llama", layers=3, neurons=80, vocab=96), tiny("llama", vocab=96)
    s, t = count_parameters(student), count_parameters(teacher)
    batch = {"tokens_per_micro_batch": 64, "context": 32, "chunk_tokens": 16}
    memory = training_memory(student, teacher_config=teacher, **batch)
    assert memory.weights == 4 * s.total + 2 * s.matmul
    assert (memory.gradients, memory.optimizer) == (4 * s.total, 8 * s.total)
    assert memory.head == 4 * 4 * 16 * 96
    assert memory.teacher_weights == 2 * t.total
    assert memory.total == sum(vars(memory).values())
    alone = training_memory(student, precision="float32", **batch)
    assert alone.weights == 4 * s.total
    assert (alone.teacher_weights, alone.teacher_activations, alone.head) == (0, 0, 2 * 4 * 16 * 96)


def test_checkpointing_keeps_the_residual_stream_and_one_layer():
    deep, deeper = tiny("llama", layers=12, neurons=160), tiny("llama", layers=13, neurons=160)
    batch = {"tokens_per_micro_batch": 64, "context": 32}
    kept = training_memory(deep, activation_checkpointing=True, **batch).activations
    more = training_memory(deeper, activation_checkpointing=True, **batch).activations
    assert more - kept == 64 * 4 * 32
    assert kept < training_memory(deep, **batch).activations / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_micro_batch": 48, "context": 32}, "48 must be a multiple of context = 32"),
        ({"tokens_per_micro_batch": 16, "context": 32}, "16 must be a multiple of context = 32"),
        ({"tokens_per_micro_batch": 32, "context": 0}, "context = 0"),
        ({"tokens_per_micro_batch": 32, "context": 32, "chunk_tokens": 0}, "chunk_tokens = 0"),
    ],
)
def test_token_counts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ShapeError, match=message):
        training_memory(tiny("llama"), **arguments)


def test_unknown_precision_and_architecture_are_refused():
    with pytest.raises(ModelError, match="'auto' must be one of float32, bfloat16"):
        training_memory(tiny("llama"), tokens_per_micro_batch=8, context=8, precision="auto")  # type: ignore[arg-type]
    phi = AutoConfig.for_model(
        "phi", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    with pytest.raises(ModelError, match=r"'phi'.*known are llama"):
        training_memory(phi, tokens_per_micro_batch=8, context=8)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (3_040_000_000, "3.04B"),
        (58_400, "58.4k"),
        (512, "512"),
        (999_999, "1M"),
        (3_000_000_000, "3B"),
        (126_000_000, "126M"),
        (0, "0"),
        (1.5e12, "1.5T"),
    ],
)
def test_counts_as_people_read_them(count, text):
    assert format_count(count) == text


@given(st.integers(1, 10**13))
def test_a_formatted_count_reads_back(count):
    assert parse_count(format_count(count)) == pytest.approx(count, rel=5.01e-3)


def test_bytes_and_flops_as_people_read_them():
    assert format_bytes(12.6 * 2**30) == "12.6 GiB"
    assert format_bytes(1023 * 2**20) == "1023 MiB"
    assert format_bytes(80) == "80 B"
    assert format_flops(2.268e21) == "2.27e21 FLOPs"
    assert format_flops(12) == "12 FLOPs"

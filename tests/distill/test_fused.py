"""The fused loss against whole logits in float64: its value and every gradient, whatever the teacher's word is."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from capgap.distill import Divergence, Mix, fused_loss
from capgap.distill.targets import DenseChunk, OnlineTargets, SparseChunk, StoredTargets
from capgap.errors import RecipeError
from capgap.models import Head
from distill.dense import KINDS, dense_logits, dense_loss, dense_teacher
from reference import divergences as reference

# The fused loss works in float32, the reference in float64 on the same numbers. Logits here are below 30, so they
# are off by at most 30 * 2^-24 = 2e-6, and so are log-probabilities, the ratios of probabilities and, relatively, the
# gradients; a sum over up to 30 tokens and 40 rows of the vocabulary keeps that below 1e-5 of its largest terms.
# Where terms cancel, the tolerance is that of the terms: never less than that of one token's gradient, which is 1;
# for the loss, never less than that of one nat a token, which the square of the temperature enlarges.
RELATIVE = 1e-5


@dataclass
class Case:
    """A student's head on some tokens."""

    hidden_TH: Tensor
    head: Head
    label_T: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.hidden_TH), len(self.head.weight_VH)


def make_head(generator: torch.Generator, rows: int, width: int, bias: bool, scale: float, cap: float | None) -> Head:
    weight = torch.randn(rows, width, generator=generator)
    return Head(weight, torch.randn(rows, generator=generator) if bias else None, scale, cap)


def make_case(seed, tokens=7, rows=13, width=5, bias=True, scale=1.0, cap=None) -> Case:
    generator = torch.Generator().manual_seed(seed)
    head = make_head(generator, rows, width, bias, scale, cap)
    return Case(
        torch.randn(tokens, width, generator=generator), head, torch.randint(0, rows, (tokens,), generator=generator)
    )


def make_teacher(seed, tokens, rows, weights=(1.0,), bias=True, scale=1.0, cap=None) -> OnlineTargets:
    """One teacher for each weight, of several widths."""
    generator = torch.Generator().manual_seed(seed + 1000)
    heads = [make_head(generator, rows, 4 + i, bias, scale, cap) for i in range(len(weights))]
    hidden = [torch.randn(tokens, 4 + i, generator=generator) for i in range(len(weights))]
    return OnlineTargets(hidden, heads, [w / sum(weights) for w in weights])


cases = st.builds(
    make_case,
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 30),
    rows=st.integers(2, 40),
    width=st.integers(1, 9),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, 2.0]),
    cap=st.sampled_from([None, 3.0, 30.0]),
)
mixes = st.builds(
    Mix,
    st.sampled_from([Divergence(kind, mix) for kind, mix in KINDS.items()]),  # type: ignore[arg-type]
    kd_weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0, 8.0]),
    chunk_tokens=st.sampled_from([None, 1, 3, 10, 1000]),
)


def run_fused(case: Case, targets, mix: Mix, factor: float = 1.0):
    """The sums, and the gradients of the loss by hidden states, weight and bias."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in (case.hidden_TH, *case.head[:2])]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    sums = fused_loss(hidden, case.head._replace(weight_VH=weight, bias_V=bias), case.label_T, targets, mix)
    (factor * sums.loss).backward()
    return tuple(x.detach() for x in sums), [leaf.grad for leaf in leaves if leaf is not None]


def run_dense(case: Case, log_q_TV: Tensor, mix: Mix):
    leaves = [None if x is None else x.double().requires_grad_() for x in (case.hidden_TH, *case.head[:2])]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    logits = dense_logits(hidden, case.head._replace(weight_VH=weight, bias_V=bias))
    sums = dense_loss(logits, case.label_T, log_q_TV, mix)
    sums[0].backward()
    return tuple(x.detach() for x in sums), [leaf.grad for leaf in leaves if leaf is not None]


def assert_equal(found, expected, tokens: int, temperature: float = 1.0) -> None:
    for a, b in zip(found[0], expected[0], strict=True):
        assert float(a) == pytest.approx(float(b), rel=RELATIVE, abs=RELATIVE * tokens * max(1.0, temperature**2))
    for a, b in zip(found[1], expected[1], strict=True):
        scale = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a.double(), b.double(), rtol=RELATIVE, atol=RELATIVE * scale)


def scored(case: Case, targets, every: int):
    """Leaves out every n-th token, as the objective does with labels of -100; the labels of the whole beside it."""
    label_T = case.label_T.clone()
    label_T[::every] = -100
    keep = label_T >= 0
    return Case(case.hidden_TH[keep], case.head, label_T[keep]), targets.select(keep), replace(case, label_T=label_T)


@settings(max_examples=100, deadline=None)
@given(
    case=cases,
    mix=mixes,
    weights=st.sampled_from([(1.0,), (1.0, 1.0), (0.2, 0.5, 2.0)]),
    more_rows=st.sampled_from([0, 0, 5, -1, -3]),
    cap=st.sampled_from([None, 4.0]),
    every=st.sampled_from([1000, 2, 3]),
)
def test_one_or_several_teachers(case, mix, weights, more_rows, cap, every):
    """`more_rows`: of the teacher's vocabulary, which is padded more or less than the student's."""
    tokens, rows = case.shape
    targets = make_teacher(7, tokens, max(2, rows + more_rows), weights, cap=cap, scale=0.8)
    log_q = dense_teacher(
        [dense_logits(h, head) for h, head in zip(targets.hidden, targets.heads, strict=True)],
        list(targets.weights),
        mix.temperature,
        rows,
    )
    part, kept, whole = scored(case, targets, every)
    found = run_fused(part, kept, mix)
    expected = run_dense(whole, log_q, mix)
    unscored = whole.label_T < 0
    assert not bool(expected[1][0][unscored].any())
    expected[1][0] = expected[1][0][~unscored]
    assert_equal(found, expected, tokens, mix.temperature)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_chunk_gives_the_same(kind):
    torch._dynamo.reset()  # past eight variants a function is compiled no more
    case, targets = make_case(1, tokens=24, rows=40, width=8), make_teacher(2, 24, 40)
    for temperature in (1.0, 2.0):
        mix = Mix(Divergence(kind, KINDS[kind]), 0.5, temperature, 8)  # type: ignore[arg-type]
        found = run_fused(case, targets, replace(mix, compiled=True))
        assert_equal(found, run_fused(case, targets, mix), 24, temperature)


@settings(max_examples=20, deadline=None)
@given(case=cases, mix=mixes, factor=st.sampled_from([1.0, -0.125]))
def test_without_a_teacher(case, mix, factor):
    """Cross-entropy alone, whatever the weight of the divergence."""
    alone = replace(mix, kd_weight=0.0)
    (loss, ce, kl), gradients = run_fused(case, None, mix, factor)
    expected, by_autograd = run_dense(case, torch.zeros(case.shape, dtype=torch.float64), alone)
    assert float(loss) == pytest.approx(float(expected[1]), rel=RELATIVE, abs=RELATIVE)
    assert float(kl) == 0.0
    assert float(ce) == pytest.approx(
        reference.cross_entropy(dense_logits(case.hidden_TH, case.head).numpy(), case.label_T.numpy()),
        rel=RELATIVE,
        abs=RELATIVE,  # a label that is all but certain has a loss near zero
    )
    assert_equal(([], gradients), ([], [factor * g for g in by_autograd]), case.shape[0])


@settings(max_examples=40, deadline=None)
@given(case=cases, mix=mixes, more_rows=st.sampled_from([0, 4, -1]), half=st.booleans())
def test_stored_logits(case, mix, more_rows, half):
    """Also of another padding, also in float16, as a cache may keep them; the store is not written to."""
    tokens, rows = case.shape
    teacher = make_teacher(3, tokens, max(2, rows + more_rows))
    stored = teacher.chunk(slice(None), mix.temperature, max(2, rows + more_rows)).logits_CV.contiguous()
    stored = stored.half() if half else stored
    before = stored.clone()
    targets = StoredTargets(DenseChunk(stored))
    log_q = dense_teacher([stored.double()], [1.0], 1.0, rows)
    assert_equal(run_fused(case, targets, mix), run_dense(case, log_q, mix), tokens, mix.temperature)
    targets.chunk(slice(None), mix.temperature, rows).logits_CV.zero_()  # as whoever asks for a chunk may
    assert torch.equal(stored, before)


def top_k(log_q_TV: Tensor, k: int, padding: int = 0) -> SparseChunk:
    """The K most probable tokens and the mass of the others; `padding` entries of weight 0 name token 0 again."""
    q = log_q_TV.exp()
    weight, ids = q.topk(k, -1)
    tail = (1 - weight.sum(-1)).clamp_min(0) if k < q.shape[1] else torch.zeros(len(q), dtype=q.dtype)
    empty = torch.zeros(len(q), padding)
    return SparseChunk(
        torch.cat([ids, empty.long()], 1), torch.cat([weight, empty.double()], 1).float(), tail.float(), None
    )


def dense_top_k(logits_TV: Tensor, chunk: SparseChunk, temperature: float) -> Tensor:
    """KL of K + 1 outcomes, by autograd."""
    log_p = torch.log_softmax(logits_TV / temperature, -1)
    assert chunk.tail_C is not None
    terms = []
    for row, ids, weights, tail in zip(log_p, chunk.ids_CK, chunk.weight_CK.double(), chunk.tail_C, strict=True):
        known = {int(i): w for i, w in zip(ids, weights, strict=True) if w > 0}
        terms += [w * (w.log() - row[i]) for i, w in known.items()]
        others = [i for i in range(len(row)) if i not in known]
        if float(tail) > 0:
            terms.append(tail.double() * (tail.double().log() - torch.logsumexp(row[others], 0)))
    return torch.stack(terms).sum()


sparse_mixes = mixes.map(lambda mix: replace(mix, divergence=Divergence()))


@settings(max_examples=40, deadline=None)
@given(case=cases, mix=sparse_mixes, share=st.floats(0, 1), padding=st.integers(0, 2), sharp=st.sampled_from([1, 6]))
def test_top_k_and_tail(case, mix, share, padding, sharp):
    """Also where the student is so sure that next to nothing is left for the tail."""
    tokens, rows = case.shape
    case = replace(case, hidden_TH=case.hidden_TH * sharp)
    teacher = make_teacher(5, tokens, rows).chunk(slice(None), mix.temperature, rows)
    chunk = top_k(torch.log_softmax(teacher.logits_CV.double(), -1), 1 + int(share * (rows - 2)), padding)
    (loss, ce, kl), gradients = run_fused(case, StoredTargets(chunk), mix)

    leaves = [None if x is None else x.double().requires_grad_() for x in (case.hidden_TH, *case.head[:2])]
    logits = dense_logits(leaves[0], case.head._replace(weight_VH=leaves[1], bias_V=leaves[2]))  # type: ignore[arg-type]
    exact_kl = dense_top_k(logits, chunk, mix.temperature)
    exact_ce = torch.nn.functional.cross_entropy(logits, case.label_T, reduction="sum")
    exact = (1 - mix.kd_weight) * exact_ce + mix.kd_weight * mix.temperature**2 * exact_kl
    exact.backward()
    # Six times as large logits are six times as wrong.
    for a, b in ((loss, exact), (ce, exact_ce), (kl, exact_kl)):
        limit = sharp * RELATIVE * tokens * max(1.0, mix.temperature**2)
        assert float(a) == pytest.approx(float(b.detach()), rel=sharp * RELATIVE, abs=limit)
    by_loops = reference.top_k_kl(
        logits.detach().numpy(),
        chunk.ids_CK.numpy(),
        chunk.weight_CK.double().numpy(),
        chunk.tail_C.double().numpy(),  # type: ignore[union-attr]
        temperature=mix.temperature,
    )
    assert float(exact_kl.detach()) == pytest.approx(by_loops, rel=1e-9, abs=1e-9)
    for a, b in zip(gradients, [leaf.grad for leaf in leaves if leaf is not None], strict=True):
        scale = sharp * max(1.0, float(b.abs().max()))  # type: ignore[union-attr]
        torch.testing.assert_close(a.double(), b, rtol=sharp * RELATIVE, atol=RELATIVE * scale)  # type: ignore[union-attr]


@settings(max_examples=20, deadline=None)
@given(case=cases, mix=sparse_mixes, sampled=st.booleans())
def test_all_tokens_kept_is_the_dense_loss(case, mix, sampled):
    tokens, rows = case.shape
    teacher = make_teacher(5, tokens, rows)
    log_q = torch.log_softmax(teacher.chunk(slice(None), mix.temperature, rows).logits_CV.double(), -1)
    chunk = top_k(log_q, rows)
    if sampled:
        chunk = chunk._replace(tail_C=None, entropy_C=-(log_q.exp() * log_q).sum(-1).float())
    assert_equal(run_fused(case, StoredTargets(chunk), mix), run_dense(case, log_q, mix), tokens, mix.temperature)


def test_a_tail_that_the_student_all_but_rules_out():
    """Where float32 has no more room for the mass of the tail: 1 - sum of the K would be 0."""
    head = Head(torch.tensor([[60.0], [0.0], [-1.0]]), None)
    case = Case(torch.ones(1, 1), head, torch.tensor([0]))
    chunk = SparseChunk(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]), None)
    (_, _, kl), gradients = run_fused(case, StoredTargets(chunk), Mix(Divergence(), 1.0, 1.0))
    expected = reference.top_k_kl([[60.0, 0.0, -1.0]], [[0]], [[0.5]], [0.5])
    assert float(kl) == pytest.approx(expected, rel=1e-6)
    among_the_tail = 0.5 * torch.softmax(torch.tensor([0.0, -1.0]), -1)
    torch.testing.assert_close(gradients[1][:, 0], torch.tensor([0.5, *(-among_the_tail).tolist()]))


@pytest.mark.parametrize("tail", [True, False])
def test_stored_tokens_that_the_student_lacks_are_left_out(tail):
    """Padding rows of the teacher's vocabulary: the mass that they had goes to the others in proportion."""
    case = make_case(1, tokens=3, rows=6)
    ids = torch.tensor([[0, 7, 2], [6, 1, 5], [3, 4, 0]])
    weight = torch.tensor([[0.5, 0.1, 0.2], [0.2, 0.3, 0.1], [0.4, 0.3, 0.2]])
    rest = 1 - weight.sum(-1)
    entropy = torch.full((3,), 0.3)
    chunk = SparseChunk(ids, weight if tail else weight / weight.sum(-1, keepdim=True), rest, None)
    own = torch.where(ids < 6, chunk.weight_CK, 0.0)
    mass = own.sum(-1) + (rest if tail else 0.0)
    cut = SparseChunk(ids % 6, own / mass[:, None], rest / mass, None)
    cut = cut._replace(ids_CK=torch.where(ids < 6, ids, 0))
    if not tail:
        chunk, cut = (c._replace(tail_C=None, entropy_C=entropy) for c in (chunk, cut))
    mix = Mix(Divergence(), 0.7, 1.0)
    found, expected = (run_fused(case, StoredTargets(c), mix) for c in (chunk, cut))
    assert_equal(found, expected, 3)
    by_loops = (
        reference.top_k_kl(dense_logits(case.hidden_TH, case.head), cut.ids_CK, cut.weight_CK.double(), rest / mass)
        if tail
        else reference.sampled_kl(dense_logits(case.hidden_TH, case.head), cut.ids_CK, cut.weight_CK, entropy)
    )
    assert float(found[0][2]) == pytest.approx(by_loops, rel=1e-5)


def sample(log_q_TV: Tensor, draws: int, seed: int) -> SparseChunk:
    """Draws from each row with replacement; a drawn token's weight is its count's share, as a cache keeps it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(log_q_TV.exp(), draws, replacement=True, generator=generator)
    count = torch.zeros_like(log_q_TV).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=log_q_TV.dtype))
    weight, ids = (count / draws).topk(min(draws, log_q_TV.shape[1]), -1)
    return SparseChunk(ids, weight.float(), None, -(log_q_TV.exp() * log_q_TV).sum(-1).float())


@settings(max_examples=20, deadline=None)
@given(case=cases, mix=sparse_mixes, draws=st.integers(1, 12), seed=st.integers(0, 999))
def test_sampled_kl(case, mix, draws, seed):
    tokens, rows = case.shape
    log_q = torch.log_softmax(make_teacher(5, tokens, rows).chunk(slice(None), mix.temperature, rows).logits_CV, -1)
    chunk = sample(log_q.double(), draws, seed)
    assert chunk.entropy_C is not None
    (_, _, kl), _ = run_fused(case, StoredTargets(chunk), mix)
    expected = reference.sampled_kl(
        dense_logits(case.hidden_TH, case.head).numpy(),
        chunk.ids_CK.numpy(),
        chunk.weight_CK.numpy(),
        chunk.entropy_C.numpy(),
        temperature=mix.temperature,
    )
    assert float(kl) == pytest.approx(expected, rel=RELATIVE, abs=RELATIVE * tokens * 10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_sampled_gradient_is_unbiased_and_the_check_sees_a_bias(temperature):
    """Over 4,000 samples of each of three tokens, in standard errors of the mean; a top-k without its tail is far off.

    The largest of 15 normal deviates exceeds 5 once in 100,000 runs; and the seeds are fixed.
    """
    copies, draws = 4000, 4
    case, mix = make_case(2, tokens=3, rows=13), Mix(Divergence(), 1.0, temperature)
    log_q = torch.log_softmax(make_teacher(2, 3, 13).chunk(slice(None), temperature, 13).logits_CV.double(), -1)
    (_, _, kl), (exact, *_) = run_dense(case, log_q, mix)
    many = Case(case.hidden_TH.repeat(copies, 1), case.head, case.label_T.repeat(copies))
    chunk = sample(log_q.repeat(copies, 1), draws, seed=0)

    def deviates(chunk: SparseChunk) -> Tensor:
        _, (gradient, *_) = run_fused(many, StoredTargets(chunk), mix)
        each = gradient.double().view(copies, 3, -1)
        return (each.mean(0) - exact).abs() / (each.std(0) / math.sqrt(copies) + 1e-9)

    assert float(deviates(chunk).max()) < 5
    (_, _, sampled_kl), _ = run_fused(many, StoredTargets(chunk), mix)
    assert float(sampled_kl) / copies == pytest.approx(float(kl), rel=0.02)
    best = top_k(log_q, draws)
    truncated = best.weight_CK / best.weight_CK.sum(-1, keepdim=True)
    biased = chunk._replace(
        ids_CK=torch.cat([best.ids_CK.repeat(copies, 1), chunk.ids_CK], 1),
        weight_CK=torch.cat([0.1 * truncated.repeat(copies, 1), 0.9 * chunk.weight_CK], 1),
    )
    assert float(deviates(biased).max()) > 5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_kl"])
def test_a_sparse_teacher_serves_the_forward_kl_only(kind):
    case = make_case(0)
    chunk = SparseChunk(case.label_T[:, None], torch.ones(7, 1), torch.zeros(7), None)
    with pytest.raises(RecipeError, match=f"{kind}: a sparse teacher cache serves forward_kl only"):
        run_fused(case, StoredTargets(chunk), Mix(Divergence(kind), 0.5, 1.0))


def test_no_scored_token_gives_nothing_and_gradients_of_zero():
    """Which FSDP needs of a process that has no rows left."""
    case = make_case(0, tokens=0)
    sums, gradients = run_fused(case, make_teacher(0, 0, 13), Mix(Divergence(), 0.5, 2.0))
    assert [float(s) for s in sums] == [0.0, 0.0, 0.0]
    assert [g.shape for g in gradients] == [(0, 5), (13, 5), (13,)]
    assert not any(bool(g.any()) for g in gradients)


def test_without_gradients_the_sums_are_the_same():
    case, targets, mix = make_case(0), make_teacher(0, 7, 13), Mix(Divergence("jsd"), 0.5, 2.0, 3)
    with torch.no_grad():
        sums = fused_loss(case.hidden_TH, case.head, case.label_T, targets, mix)
    assert torch.equal(torch.stack(sums), torch.stack(run_fused(case, targets, mix)[0]))
    assert not sums.loss.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    case, targets, mix = make_case(0, bias=False), make_teacher(0, 7, 13), Mix(Divergence(), 0.5, 1.0)
    hidden, weight = case.hidden_TH.clone(), case.head.weight_VH.clone()
    learns, still = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    learns.requires_grad_()
    fused_loss(hidden, case.head._replace(weight_VH=weight), case.label_T, targets, mix).loss.backward()
    assert still.grad is None
    whole = run_fused(case, targets, mix)[1]
    assert torch.equal(learns.grad, whole[1 if frozen == "hidden" else 0])  # type: ignore[arg-type]


def test_bfloat16_hidden_states_are_as_good_as_bfloat16_is():
    """The products are in bfloat16 (8 bits), softmax and sums in float32: each logit is off by about 2^-8 of it."""
    case, targets, mix = make_case(0, tokens=30), make_teacher(0, 30, 13), Mix(Divergence(), 0.5, 1.0, 8)
    coarse = replace(case, hidden_TH=case.hidden_TH.bfloat16())
    found, gradients = run_fused(coarse, targets, mix)
    log_q = dense_teacher([dense_logits(targets.hidden[0], targets.heads[0])], [1.0], 1.0, 13)
    expected, exact = run_dense(replace(case, hidden_TH=coarse.hidden_TH.float()), log_q, mix)
    assert [s.dtype for s in found] == [torch.float32] * 3
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert float(a) == pytest.approx(float(b), rel=0.02)
    for a, b in zip(gradients, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.02 * float(b.abs().max()))


def test_without_gradients_only_the_logits_are_multiplied():
    """Held-out text is scored by the same function; its gradients, twice as dear again, are nobody's."""
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (30,))
    mix = Mix(Divergence(), 0.5, 1.0, 7)
    with_gradients = fused_loss(hidden, Head(weight), labels, None, mix)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        without = fused_loss(hidden, Head(weight), labels, None, mix)
    assert torch.equal(without.ce, with_gradients.ce)
    assert counter.get_total_flops() <= 2 * hidden.numel() * len(weight)

"""The teacher cache: what comes back is what the teacher said, whole or unbiased, from files that nothing halves."""

import bisect
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from capgap.distill import CachedTeacher, Divergence, Mix, Objective, OnlineTeacher, Run, train
from capgap.distill.formats import Dense, Sampled, TopK, draw
from capgap.errors import CacheError
from capgap.recipe import Train
from distill.cache_runner import BLOCK, BLOCKS, VOCABULARY, RandomBlocks, facts_of, make, opened
from tiny import tiny_model

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")


def some_log_q(rows=40, vocabulary=VOCABULARY, spread=3.0, seed=0):
    logits = spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(logits, -1)


def in_full(chunk, vocabulary=VOCABULARY):
    """The weights [T, V] of a sparse chunk."""
    return torch.zeros(len(chunk.ids_CK), vocabulary).scatter_add_(1, chunk.ids_CK, chunk.weight_CK)


def test_one_draw_is_what_a_plain_loop_draws():
    rng = random.Random(5)
    q = [0.0, 0.3, 0.0, 0.45, 0.05, 0.2, 0.0]
    dice = [rng.random() for _ in range(9)]
    ends = np.cumsum(q).tolist()
    expected = [bisect.bisect_right(ends, (i + u) / 9) for i, u in enumerate(dice)]
    drawn = draw(torch.tensor([q], dtype=torch.float64), torch.tensor([dice], dtype=torch.float64))
    assert drawn.ids.repeat_interleave(drawn.counts).tolist() == expected
    assert drawn.distinct_C.tolist() == [len(set(expected))]


def test_ids_of_mass_zero_are_never_drawn_even_at_the_ends():
    q = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    for edge in (0.0, 1 - 2**-53):
        assert set(draw(q, torch.full((1, 8), edge, dtype=torch.float64)).ids.tolist()) <= {1, 2}


def test_the_sample_is_unbiased_and_varies_no_more_than_independent_draws():
    draws, k = 3000, 16
    q = some_log_q(1).exp()
    layout = Sampled(k, 0, VOCABULARY)
    dice = torch.cat([layout.dice([number], 1) for number in range(draws)])
    arrays = layout.encode(q.log().expand(draws, -1), dice)
    weight = in_full(layout.decode(arrays, CPU).stored)
    independent = q[0] * (1 - q[0]) / k
    assert bool(((weight.mean(0) - q[0]).abs() <= 5 * (independent / draws).sqrt() + 1e-9).all())
    assert float(weight.var(0).sum()) < 0.8 * float(independent.sum())
    torch.testing.assert_close(weight.sum(1), torch.ones(draws))


def test_the_gradient_and_the_kl_of_a_sample_are_unbiased():
    student, teacher = tiny_model(seed=1), OnlineTeacher(tiny_model(seed=2))
    ids = torch.from_numpy(RandomBlocks().numbered(0))[None]
    inputs, labels, number = ids[:, :-1], ids[:, 1:], torch.zeros(1).long()

    def found(targets):
        student.zero_grad()
        sums = Objective(student, Mix(Divergence(), 1.0, 1.0))(inputs, labels, targets)
        sums.loss.backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()]), float(sums.kl)

    exact, kl = found(teacher.targets(inputs, number))
    layout = Sampled(16, 0, VOCABULARY)
    log_q = torch.log_softmax(teacher.targets(inputs, number).chunk(slice(None), 1.0, VOCABULARY).logits_CV, -1)
    each = [found(layout.decode(layout.encode(log_q, layout.dice([i], BLOCK)), CPU)) for i in range(300)]
    mean = torch.stack([gradient for gradient, _ in each]).mean(0)
    # The mean of 300 is about 17 times nearer than one of them.
    assert float((mean - exact).norm()) < 0.1 * float((each[0][0] - exact).norm())
    values = torch.tensor([value for _, value in each])
    assert abs(float(values.mean()) - kl) < 5 * float(values.std()) / 300**0.5


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("layout", [Dense(VOCABULARY), TopK(VOCABULARY, VOCABULARY)])
def test_float16_loses_at_most_a_2048th_of_the_entropy(layout, spread):
    log_q = some_log_q(spread=spread)
    targets = layout.decode(layout.encode(log_q, None), CPU)
    chunk = targets.chunk(slice(None), 1.0, VOCABULARY)
    q = torch.softmax(chunk.logits_CV, -1) if isinstance(layout, Dense) else in_full(chunk)
    off, entropy = (q - log_q.exp()).abs().sum(-1), -(log_q.exp() * log_q).sum(-1)
    # Twice: once by rounding, once at most by the norming after it.
    assert bool((off <= 2 * entropy / 2048 + 1e-6).all())
    assert float(off.mean()) < 1e-3


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest():
    log_q = some_log_q()
    chunk = TopK(5, VOCABULARY).decode(TopK(5, VOCABULARY).encode(log_q, None), CPU).stored
    expected, ids = log_q.exp().sort(-1, descending=True)
    assert torch.equal(chunk.ids_CK, ids[:, :5])
    torch.testing.assert_close(chunk.tail_C, expected[:, 5:].sum(-1))
    torch.testing.assert_close(chunk.weight_CK.sum(-1) + chunk.tail_C, torch.ones(40))


def test_small_types():
    assert Sampled(255, 0, 65_536).most_bytes == 255 * 3 + 5
    assert Sampled(256, 0, 65_537).most_bytes == 256 * 6 + 6
    assert Sampled(64, 0, 10).most_bytes == 10 * 3 + 5
    assert TopK(64, 32_000).most_bytes == 64 * 4 + 4
    assert Dense(512).most_bytes == 1024


def trained(folder, teacher, *, temperature=1.0, steps=20, **more):
    chosen = Train(tokens=128 * steps, tokens_per_step=128, lr=3e-3, temperature=temperature, log_every=1, **more)
    run = Run(tiny_model(seed=1), chosen, folder)
    result = train(run, RandomBlocks(), block=BLOCK, teacher=teacher, quiet=True)
    return np.array([[row["ce"], row["kl"]] for row in result.curve])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_a_whole_distribution_from_disk_trains_as_the_teacher_does(tmp_path, kind, temperature):
    facts = facts_of(kind, None if kind == "dense" else VOCABULARY, temperature)
    cached = trained(tmp_path / "a", opened(tmp_path / "cache", facts), temperature=temperature)
    online = trained(tmp_path / "b", OnlineTeacher(tiny_model(seed=2)), temperature=temperature)
    np.testing.assert_allclose(cached, online, rtol=1e-3, atol=1e-3)


def test_a_dense_cache_serves_every_divergence(tmp_path):
    cache = opened(tmp_path / "cache", facts_of("dense", None))
    cached = trained(tmp_path / "a", cache, divergence="reverse_kl", steps=10)
    online = trained(tmp_path / "b", OnlineTeacher(tiny_model(seed=2)), divergence="reverse_kl", steps=10)
    np.testing.assert_allclose(cached, online, rtol=2e-3, atol=2e-3)


def test_a_student_with_more_rows_than_the_cache(tmp_path):
    cache = opened(tmp_path / "cache", facts_of("dense", None))
    chunk = cache.targets(torch.zeros(2, BLOCK).long(), torch.tensor([7, 0])).chunk(slice(0, 20), 1.0, VOCABULARY + 3)
    assert chunk.logits_CV.shape == (20, VOCABULARY + 3)
    assert float(chunk.logits_CV.exp()[:, VOCABULARY:].sum()) == 0.0


def test_any_blocks_in_any_order_are_those_of_the_teacher(tmp_path):
    cache = opened(tmp_path / "cache", facts_of("topk", 7), shard_blocks=7)
    order = torch.tensor([239, 0, 6, 7, 100, 6])
    inputs = torch.from_numpy(np.stack([RandomBlocks().numbered(n) for n in order.tolist()]))[:, :-1]
    online = OnlineTeacher(tiny_model(seed=2)).targets(inputs, order).chunk(slice(None), 1.0, VOCABULARY)
    found = cache.targets(inputs, order).chunk(slice(None), 1.0, VOCABULARY)
    q = torch.softmax(online.logits_CV, -1).gather(1, found.ids_CK)
    torch.testing.assert_close(found.weight_CK, q, atol=1e-3, rtol=2e-3)
    with pytest.raises(CacheError, match="has 240 blocks, asked for block 240"):
        cache.targets(inputs[:1], torch.tensor([BLOCKS]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_the_cache_is_the_same_bit_for_bit(tmp_path):
    make(tmp_path / "whole", facts_of(), shard_blocks=2)
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(HERE / "cache_runner.py"), str(killed)], env=ENVIRONMENT)
    wanted = random.Random(time.time_ns()).randint(1, 60)
    while len(list(killed.glob("*.safetensors"))) < wanted:
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    with pytest.raises(CacheError, match="it is not whole: run `capgap cache`"):
        CachedTeacher.open(killed)
    before = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.json")}
    make(killed, facts_of(), shard_blocks=7)  # the first run's layout is kept
    assert contents(killed) == contents(tmp_path / "whole")
    assert all((killed / name).stat().st_mtime_ns == changed for name, changed in before.items())


def test_two_processes_share_the_shards(tmp_path):
    make(tmp_path / "one", facts_of(), shard_blocks=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--standalone", str(HERE / "cache_runner.py")]
    done = subprocess.run([*command, str(tmp_path / "two")], env=ENVIRONMENT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_whole_cache_loads_no_teacher(tmp_path):
    before = contents(make(tmp_path, facts_of()))
    make(tmp_path, facts_of(), teacher=lambda: 1 / 0)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make(tmp_path_factory.mktemp("cache"), facts_of())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teacher", "e" * 64, "the teacher's hash is aaaaaaaaaaaa in the cache, eeeeeeeeeeee here"),
        ("teacher_config", "e" * 64, "the hash of the teacher's config.json is bbbb"),
        ("tokenizer", "e" * 64, "the tokenizer's hash is cccccccccccc in the cache"),
        ("data", "e" * 64, "the hash of the packed training data is dddd"),
        ("block", 32, "data.block is 16 in the cache, 32 here"),
        ("temperature", 2.0, "distill.temperature is 1.0 in the cache, 2.0 here"),
        ("kind", "topk", "cache.kind is sampled in the cache, topk here"),
        ("k", 50, "cache.k is 20 in the cache, 50 here"),
        ("seed", 0, "cache.seed is 3 in the cache, 0 here"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_not_overwritten(cache, key, value, message):
    before = contents(cache)
    expected = {**facts_of(), key: value}
    for attempt in (lambda: CachedTeacher.open(cache, expected), lambda: make(cache, expected)):
        with pytest.raises(CacheError) as refused:
            attempt()
        assert message in str(refused.value)
        assert str(cache) in str(refused.value)
        assert "give another cache.folder" in str(refused.value)
    assert contents(cache) == before


def test_a_cut_or_missing_shard_is_named_and_made_again(tmp_path):
    before = contents(make(tmp_path, facts_of()))
    shard = tmp_path / "000003.safetensors"
    shard.write_bytes(before[shard.name][:-1])
    with pytest.raises(CacheError, match=r"000003\.safetensors: has .* bytes, it should have"):
        CachedTeacher.open(tmp_path)
    shard.unlink()
    with pytest.raises(CacheError, match=r"000003\.safetensors: no such file"):
        CachedTeacher.open(tmp_path)
    make(tmp_path, facts_of())
    assert contents(tmp_path) == before


def test_a_changed_byte_is_found(tmp_path):
    make(tmp_path, facts_of())
    shard = tmp_path / "000003.safetensors"
    data = bytearray(shard.read_bytes())
    counts = load_file(shard)["counts"].tobytes()
    data[data.index(counts) + 5] ^= 1
    shard.write_bytes(data)
    cache = CachedTeacher.open(tmp_path)
    with pytest.raises(CacheError, match=r"000003\.safetensors: its SHA-256 begins with"):
        cache.verify()
    with pytest.raises(CacheError, match=r"000003\.safetensors is damaged \(its counts do not add up to 20 a token"):
        cache.targets(torch.zeros(1, BLOCK).long(), torch.tensor([48]))


def test_manifests_that_cannot_be_read(tmp_path):
    make(tmp_path, facts_of())
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:50])
    with pytest.raises(CacheError, match=r"manifest\.json.*not valid JSON"):
        CachedTeacher.open(tmp_path)
    manifest.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(CacheError, match=r"has version 99; this capgap reads version 1"):
        CachedTeacher.open(tmp_path)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CacheError, match="holds files that are not of a teacher cache"):
        make(tmp_path, facts_of())
    assert contents(tmp_path) == {"model.safetensors": b"precious"}

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.data import Batches, PackedSource, PackedTokens, pack
from capgap.errors import DataError
from capgap.recipe import Source


def _packed(shards: list[list[int]], weights: list[float] | None = None, name: str = "any") -> PackedTokens:
    """Packed tokens in memory, from each source's shard lengths; tokens are counted through."""
    sources, first = [], 0
    for number, lengths in enumerate(shards):
        arrays = []
        for n in lengths:
            arrays.append(np.arange(first, first + n, dtype=np.uint32))
            first += n
        weight = weights[number] if weights else 1.0
        facts = {"name": f"source {number}", "weight": weight, "tokens": sum(lengths)}
        sources.append(PackedSource({**facts, "documents": 1, "bytes": 1}, arrays))
    return PackedTokens(None, {"hash": name}, sources)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    block=st.integers(1, 12),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_each_block_comes_once_an_epoch_and_each_token_is_a_label_once(lengths, block, rows, seed):
    shards = [range(sum(lengths[:s]), sum(lengths[: s + 1])) for s in range(len(lengths))]
    expected = [s[i * block : i * block + block + 1] for s in shards for i in range((len(s) - 1) // block)]
    packed = _packed([lengths])
    if not expected:
        with pytest.raises(DataError, match="not one block"):
            Batches(packed, block=block, blocks_per_step=rows, seed=seed)
        return
    batches = Batches(packed, block=block, blocks_per_step=rows, seed=seed)
    n = len(expected)
    seen = torch.cat([batches.batch(step) for step in range(-(-2 * n // rows))]).tolist()
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == [list(e) for e in expected]
    labels = [token for row in seen[:n] for token in row[1:]]
    assert len(labels) == len(set(labels))


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.002, 100), min_size=1, max_size=4),
    rows=st.integers(1, 9),
    steps=st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    seed=st.integers(0, 9),
    world=st.integers(1, 12),
)
def test_a_batch_is_a_pure_function_and_ranks_share_it(weights, rows, steps, seed, world):
    packed = _packed([[50 + 7 * s, 33] for s in range(len(weights))], weights)
    first = Batches(packed, block=5, blocks_per_step=rows, seed=seed)
    expected = {step: first.batch(step) for step in steps}
    again = Batches(packed, block=5, blocks_per_step=rows, seed=seed)
    for step in reversed(steps):
        shares = [again.rows(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(shares), expected[step])
        assert [len(s) for s in shares] == [len(p) for p in np.array_split(np.arange(rows), world)]
    assert expected[steps[0]].shape == (rows, 6)
    assert expected[steps[0]].dtype == torch.int64


def test_the_order_does_not_depend_on_how_many_blocks_a_step_has():
    packed = _packed([[400], [300]], [1.0, 2.0])
    one, six = (Batches(packed, block=4, blocks_per_step=n, seed=3) for n in (1, 6))
    ones = torch.cat([one.batch(step) for step in range(60)])
    assert torch.equal(ones, torch.cat([six.batch(step) for step in range(10)]))


@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(0.0005, 10), min_size=2, max_size=5), seed=st.integers(0, 5))
def test_shares_of_weighted_sources_are_exact_over_rounds(weights, seed):
    packed = _packed([[40]] * len(weights), weights)
    batches = Batches(packed, block=3, blocks_per_step=8, seed=seed)
    total, size = sum(weights), batches._round
    counts = Counter()
    for number in range(min(5, 20_000 // size)):
        counts.update(batches.locate(i)[0] for i in range(number * size, (number + 1) * size))
        n = (number + 1) * size
        for source, weight in enumerate(weights):
            assert abs(counts[source] - n * weight / total) < 1 + 1e-6


def test_every_source_goes_through_its_own_blocks_once_an_epoch():
    packed = _packed([[64], [97]], [1.0, 3.0])
    batches = Batches(packed, block=3, blocks_per_step=1, seed=1)
    picks: dict[int, list[int]] = {0: [], 1: []}
    for sample in range(3000):
        source, block = batches.locate(sample)
        picks[source].append(block)
    assert (len(picks[0]), len(picks[1])) == (750, 2250)
    for source, n in ((0, 21), (1, 32)):
        for epoch in range(len(picks[source]) // n):
            assert sorted(picks[source][epoch * n : (epoch + 1) * n]) == list(range(n))


def test_sources_are_mixed_within_a_round():
    batches = Batches(_packed([[5000], [5000]]), block=3, blocks_per_step=1, seed=0)
    first = [batches.locate(i)[0] for i in range(1000)]
    assert sum(first) == 500
    assert 200 < sum(first[:500]) < 300
    assert first != [batches.locate(i)[0] for i in range(1000, 2000)]


def test_seed_epoch_and_data_give_orders_of_their_own():
    packed = _packed([[4001]])

    def order(packed=packed, seed=0, start=0):
        batches = Batches(packed, block=4, blocks_per_step=1000, seed=seed)
        return batches.batch(start)[:, 0].tolist()

    orders = [order(), order(seed=1), order(start=1), order(_packed([[4001]], name="another"))]
    assert len({tuple(o) for o in orders}) == 4
    # No order is nearly another, or nearly sorted.
    for a in (*orders, sorted(orders[0])):
        for b in orders:
            assert a is b or sum(x == y for x, y in zip(a, b, strict=True)) < 20


def test_the_order_of_a_known_key_stays_the_same_for_ever():
    """A run that is resumed under another version of numpy, or of capgap, must go on in the same order."""
    batches = Batches(_packed([[33]], name="pinned"), block=4, blocks_per_step=8, seed=0)
    assert batches.batch(0)[:, 0].tolist() == [28, 16, 4, 20, 0, 24, 12, 8]
    batches = Batches(_packed([[33], [33]], name="pinned"), block=4, blocks_per_step=8, seed=0)
    assert batches.batch(200)[:, 0].tolist() == [16, 24, 4, 20, 4, 41, 20, 37]


def test_a_source_without_a_block_or_without_a_share_is_named():
    with pytest.raises(DataError, match="source 1 has 5 tokens, not one block of 8 and the token after it"):
        Batches(_packed([[50], [5]]), block=8, blocks_per_step=1, seed=0)
    with pytest.raises(DataError, match=r"source 0 has a share of 1\.0e-07 by weight; the least is 1e-06"):
        Batches(_packed([[50], [50]], [1e-7, 1.0]), block=8, blocks_per_step=1, seed=0)


def test_batches_of_a_packed_folder_are_its_blocks(tokenizer, stdlib_texts, tmp_path):
    rows = [json.dumps({"text": text[:2000]}) + "\n" for text in stdlib_texts]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    source = Source(jsonl=f"{tmp_path}/a.jsonl")
    packed = pack([source], tokenizer, tmp_path / "p", block=32, quiet=True, shard_tokens=5000)
    count = packed.sources[0].blocks(32)
    batches = Batches(packed, block=32, blocks_per_step=count, seed=0)
    stream = [piece.tolist() for piece in packed.stream(32) if len(piece) == 33]
    assert sorted(batches.batch(0).tolist()) == sorted(stream)

"""Races replayed on the records of full grids."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap import records as files
from capgap.errors import StudyError
from capgap.study import Race, replay
from study.raced import SCALES, grid, moving, noisy


def test_on_a_moving_optimum_the_winner_is_near_the_best_for_the_share_of_the_flops():
    found = [
        one for seed in range(20) for one in replay(grid(SCALES, noisy(seed, 0.003)), Race()) if len(one.tokens) == 3
    ]
    assert np.mean([one.above <= 0.005 for one in found]) >= 0.95
    assert max(one.share for one in found) <= 0.4
    assert all(len(one.heats[0]) == 8 for one in found)
    # The best at first is not the best at the end: a ranking of the moment would have lost it.
    best = found[0].best_teacher
    assert best != f"t{min(SCALES, key=lambda scale: moving(scale, 120_000))}"


def test_the_share_is_what_was_run_of_what_there_was():
    full = grid(SCALES, moving)
    one = replay(full)[-1]
    by_name = {record.run: record for record in full}
    ran = [
        by_name[f"{teacher}-{tokens}"] for tokens, heat in zip(one.tokens, one.heats, strict=True) for teacher in heat
    ]
    # By hand: each run without the eight tenths of the one before that it goes on from.
    own = {120_000: 120_000, 360_000: 360_000 - 96_000, 1_200_000: 1_200_000 - 288_000}
    cost = {r.run: own[r.tokens] * (2.0 * (r.teacher_scale or 0) + 72_000) for r in full}
    assert one.share == pytest.approx(sum(cost[r.run] for r in ran) / sum(cost.values()))
    assert one.loss == by_name[f"{one.teacher}-1200000"].loss
    assert one.best_loss == min(r.loss for r in full if r.tokens == 1_200_000)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.1, 0.8), st.floats(-1, 4), st.floats(0.01, 0.2), st.integers(4, 9), st.sampled_from([0.25, 0.5, 0.75])
)
def test_without_noise_a_best_that_stays_the_best_is_never_stopped(fades, vertex, curvature, count, power):
    def law(scale, tokens):
        x = np.log(scale / SCALES[0])
        return float(3 + (tokens / 1e5) ** -power * (1 + fades * curvature * (x - vertex) ** 2))

    for one in replay(grid(SCALES[:count] if count < 9 else (*SCALES, 1_000_000), law), Race(share=1.0)):
        assert all(one.best_teacher in heat for heat in one.heats)
        assert one.above == 0


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 50))
def test_the_order_of_the_records_does_not_matter(random, seed):
    full = grid(SCALES, noisy(seed, 0.01))
    expected = replay(full)
    random.shuffle(full)
    assert replay(full) == expected


def test_a_grid_that_is_not_full_or_too_small_is_not_replayed():
    full = grid(SCALES, moving)
    assert [len(one.tokens) for one in replay(full)] == [2, 3]
    assert [len(one.tokens) for one in replay(full[:-1])] == [2]
    assert replay(full[:3]) == []
    assert replay([r for r in full if r.tokens == 120_000]) == []
    with pytest.raises(StudyError, match=r"t16000-120000: its record does not say its teacher's scale"):
        replay([r.model_copy(update={"teacher_scale": None}) for r in full])


def test_the_share_holds_however_unequal_the_heats_and_teachers():
    for seed in range(30):
        for one in replay(grid(SCALES, noisy(seed, 0.01), budgets=(100_000, 300_000, 1_000_000, 3_000_000)), Race()):
            assert one.share <= 0.4 or len(one.tokens) < 3


def test_the_winner_is_the_best_over_the_seeds():
    """One seed's luck does not decide, and a budget counts with the seeds that it is full of."""
    lucky = {(SCALES[5], 1_200_000, 1): -0.5}

    def law(seed):
        return lambda scale, tokens: moving(scale, tokens) + lucky.get((scale, round(tokens), seed), 0.0)

    both = [r.model_copy(update={"run": f"{r.run}-{s}"}) for s in (0, 1, 2) for r in grid(SCALES, law(s), seed=s)]
    one = replay(both, Race(share=1.0, tolerance=1.0))[-1]
    assert one.seeds == (0, 1, 2)
    assert one.best_teacher == one.teacher == f"t{SCALES[5]}"
    assert one.best_loss == pytest.approx(moving(SCALES[5], 1_200_000) - 0.5 / 3)
    assert one.share == pytest.approx(1)
    # Seeds of which a teacher is missing do not count, nor does the luck in them.
    less = [r for r in both if not (r.seed == 1 and r.tokens == 1_200_000 and r.teacher == f"t{SCALES[0]}")]
    fewer = replay(less, Race())
    assert [(len(r.tokens), r.seeds) for r in fewer] == [(2, (0, 1, 2)), (3, (0, 2))]
    assert fewer[-1].best_loss == pytest.approx(min(moving(scale, 1_200_000) for scale in SCALES))


def test_the_benchmark_replays_a_file(tmp_path):
    for record in grid(SCALES, moving):
        files.append(tmp_path / "records.jsonl", record)
    script = Path(__file__).parents[2] / "benchmarks" / "race_replay.py"
    command = [sys.executable, script, tmp_path / "records.jsonl", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 of 2 within 0.5 % of the full grid's best" in done.stdout
    assert '"above"' in (tmp_path / "out.json").read_text()

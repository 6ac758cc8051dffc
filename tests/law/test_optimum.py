import math

import numpy as np
import pytest

from capgap.errors import LawError
from capgap.law import find_optimum
from reference.law import parabola_minimum

GRID = [100e3, 180e3, 320e3, 600e3, 1.1e6]


def bowl(teachers, best, depth=3.0, bend=0.1):
    return [depth + bend * math.log(t / best) ** 2 for t in teachers]


@pytest.mark.parametrize("best", [200e3, 333_333.0, 500e3])
def test_a_known_vertex_is_found(best):
    found = find_optimum(GRID, bowl(GRID, best))
    assert found.censored is None
    assert found.teacher == pytest.approx(best, rel=1e-9)
    assert found.loss == pytest.approx(3.0, abs=1e-12)
    assert found.curvature == pytest.approx(0.2, rel=1e-9)
    assert found.grid == tuple(GRID)
    assert np.allclose(found.residuals, 0, atol=1e-12)
    assert np.allclose(found.curve(GRID), bowl(GRID, best))


def test_noisy_losses_agree_with_exact_rational_least_squares():
    rng = np.random.default_rng(1)
    teachers = GRID * 2
    losses = list(np.array(bowl(teachers, 300e3)) + rng.normal(0, 0.01, 10))
    curvature, teacher, loss = parabola_minimum(teachers, losses)
    found = find_optimum(teachers, losses)
    assert (found.curvature, found.teacher) == pytest.approx((curvature, teacher), rel=1e-7)
    assert found.loss == pytest.approx(loss, abs=1e-9)
    assert sum(found.residuals) == pytest.approx(0, abs=1e-12)


def test_large_scales_lose_no_digits():
    teachers = [2.0e12, 2.1e12, 2.2e12, 2.3e12]
    assert find_optimum(teachers, bowl(teachers, 2.15e12, 11.0)).teacher == pytest.approx(2.15e12, rel=1e-9)


@pytest.mark.parametrize(("best", "edge"), [(50e3, "low"), (5e6, "high")])
def test_a_vertex_outside_the_grid_is_censored(best, edge):
    found = find_optimum(GRID, bowl(GRID, best))
    assert found.censored == edge
    assert found.teacher == (GRID[0] if edge == "low" else GRID[-1])
    assert found.loss == pytest.approx(min(bowl(GRID, best)))


@pytest.mark.parametrize(("losses", "edge"), [([1.0, 2.0, 1.5], "low"), ([1.5, 2.0, 1.0], "high")])
def test_a_curve_that_opens_downwards_is_censored_at_the_lower_edge(losses, edge):
    found = find_optimum(GRID[:3], losses)
    assert found.curvature < 0
    assert found.censored == edge


def test_the_lowest_loss_at_the_edge_is_censored_even_if_the_vertex_is_inside():
    losses = [2.99, 3.1, 3.0, 3.1, 3.6]
    found = find_optimum(GRID, losses)
    vertex = parabola_minimum(GRID, losses)[1]
    assert GRID[0] < vertex < GRID[-1]
    assert (found.censored, found.teacher, found.loss) == ("low", GRID[0], 2.99)


def test_where_only_the_parabola_points_beyond_the_grid_the_next_teacher_bounds():
    """The lowest loss is inside, clearly: to say that the optimum is at most the edge would be false."""
    grid = list(np.geomspace(130e3, 4.8e6, 8))
    losses = [3.60, 3.40, 3.50, 3.58, 3.63, 3.66, 3.68, 3.69]
    assert not grid[0] <= parabola_minimum(grid, losses)[1] <= grid[-1]
    found = find_optimum(grid, losses)
    assert (found.censored, found.teacher, found.loss) == ("low", pytest.approx(grid[2]), 3.50)
    assert not found.at_edge
    mirrored = find_optimum(grid, losses[::-1])
    assert (mirrored.censored, mirrored.teacher) == ("high", pytest.approx(grid[-3]))
    assert find_optimum(GRID, bowl(GRID, 50e3)).at_edge


def test_the_edge_is_judged_by_seed_means_not_by_one_lucky_seed():
    losses = bowl(GRID, 320e3)
    found = find_optimum([*GRID, GRID[0]], [*losses[:1], *losses[1:], losses[0] - 0.05])
    assert found.censored is None


@pytest.mark.parametrize(
    ("teachers", "losses", "message"),
    [
        ([1e5, 2e5, 2e5], [1, 2, 3], r"student s58k: 2 teacher scales measured \(100k, 200k\).*at least 3"),
        ([], [], r"student s58k: 0 teacher scales measured \(none\)"),
        ([1e5, 2e5], [1, 2, 3], "student s58k: 2 teacher scales but 3 losses"),
        ([1e5, 2e5, 3e5], [1, math.nan, 3], "loss under teacher 200k is nan"),
        ([1e5, -2e5, 3e5], [1, 2, 3], "student s58k: a teacher's scale"),
    ],
)
def test_what_cannot_be_fitted_is_said(teachers, losses, message):
    with pytest.raises(LawError, match=message):
        find_optimum(teachers, losses, student="student s58k")


def turn_by_hand(grid, means):
    """The turn by trying every place, each half fitted by pooling neighbours."""

    def pooled(values):
        blocks = []
        for v in values:
            blocks.append([v, 1])
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (a, n), (b, m) = blocks[-2], blocks[-1]
                blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
        return [a for a, n in blocks for _ in range(n)]

    errors = []
    for k in range(len(means)):
        fall = pooled(means[: k + 1][::-1])[::-1]
        rise = pooled(means[k:])
        parts = [(a - b) ** 2 for a, b in zip(means[:k], fall, strict=False)]
        parts += [(a - b) ** 2 for a, b in zip(means[k + 1 :], rise[1:], strict=False)]
        errors.append(sum(parts) + max((means[k] - fall[-1]) ** 2, (means[k] - rise[0]) ** 2))
    best = [k for k, e in enumerate(errors) if e <= min(errors) * (1 + 1e-9) + 1e-15]
    return grid[max(best[0] - 1, 0)], grid[min(best[-1] + 1, len(grid) - 1)]


@pytest.mark.parametrize("seed", range(20))
def test_the_turn_is_where_falling_and_rising_fit_best(seed):
    rng = np.random.default_rng(seed)
    grid = np.geomspace(20e3, 1e6, 8)
    means = 3 + 0.05 * (np.log(grid / 150e3)) ** 2 + rng.normal(0, 0.03, 8)
    assert find_optimum(grid, means).turn == pytest.approx(turn_by_hand(list(grid), list(means)))


def test_a_parabola_that_misses_the_turn_is_told():
    grid = np.geomspace(20e3, 2e6, 9)
    losses = np.array([3.3, 3.0, 3.01, 3.02, 3.03, 3.04, 3.05, 3.06, 3.30])
    found = find_optimum(grid, losses)
    assert found.censored is None
    assert found.turn == pytest.approx((grid[0], grid[2]))
    assert not found.agrees
    assert find_optimum(grid, 3 + np.log(grid / 200e3) ** 2).agrees

"""What each teacher's student will lose at more tokens, beside the other teachers', from what was measured so far."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""With which power of the tokens a difference may fade; 0 is their logarithm."""
RATIOS = (0.1, 1.0, 10.0, 100.0)
"""How far apart teachers may be for reasons that are not their scale: variance over that of the last points."""
PARABOLA_NEEDS = 4
MOVES, OWN_MOVES = 0.35, 0.5
"""How far off the movement of differences between teachers is, from where they were measured last, as a share of it for
each e-fold of tokens: all of them together, and the variance of each one's own part over that. The model's own errors
shrink with every seed, these do not. Fitted by maximum likelihood to the nano study's grids, on which differences are
then off by 1.2, 1.2 and 1.5 times the standard error at 3, 10 and 30 times the tokens (`benchmarks/race_replay.py`)."""


@dataclass(frozen=True)
class Point:
    """A held-out loss on the way.

    Attributes:
        runner: which teacher, counted from 0.
        tokens: trained on until then.
        part: points of one part and of equal tokens compare: the seed, and 0 for the constant learning rate, else the
            run's tokens.
        loss: nats per token.
    """

    runner: int
    tokens: int
    part: tuple[int, int]
    loss: float


@dataclass(frozen=True, eq=False)
class Forecast:
    """Final losses, up to a term that all runners share.

    Attributes:
        loss_N: nats per token, for each runner; only differences mean something.
        covariance_NN: of their errors, nats squared, those of the final losses' own noise included.
    """

    loss_N: Floats
    covariance_NN: Floats

    def above(self, other: int) -> tuple[Floats, Floats]:
        """How far each runner will be above `other`, and the standard error of that: [N] nats each."""
        c = self.covariance_NN
        variance_N = c.diagonal() + c[other, other] - 2 * c[other]
        return self.loss_N - self.loss_N[other], np.sqrt(np.maximum(variance_N, 0.0))


@lru_cache(maxsize=1024)  # workers ask again at every look for a trial
def forecast(scales: tuple[float, ...], points: tuple[Point, ...], tokens: int) -> Forecast | None:
    """The losses of all runners at `tokens`, from points at fewer.

    A linear mixed model. Points of one part and of equal tokens share a free term, so that only differences between
    teachers count. These differ by a parabola in x = ln(scale) (a straight line for fewer than four scales) and by an
    effect of each teacher's own, shrunk as far as the points say; both move on a line in h(tokens) = -tokens^-k, or
    ln(tokens) for k = 0. The variance of a point falls as 1 / tokens up to the last, but not beyond. The power k and
    the ratio of the effects' variance to the points' are not known: the forecast is the mean over POWERS and RATIOS,
    weighted by their restricted likelihood, and its covariance has what they disagree by in it. To that comes how far
    off movements were found to be, MOVES and OWN_MOVES, for what no model knows of itself.

    Args:
        scales: parameters of each runner's teacher.
    Returns: None where the points cannot tell: of one number of tokens, of one scale, or no more than free terms.
    Source: Henderson 1975, Biometrics 31, the mixed model equations; Patterson and Thompson 1971, Biometrika 58,
        restricted likelihood.
    """
    if len({p.tokens for p in points}) < 2 or len(set(scales)) < 2:
        return None
    x_N = np.log(np.asarray(scales))
    x_N = (x_N - x_N.mean()) / x_N.std()
    degree = 2 if len(set(scales)) >= PARABOLA_NEEDS else 1
    poly_NK = np.stack([x_N**k for k in range(1, degree + 1)], axis=1)
    fits = list(_fits(poly_NK, points, tokens))
    if not fits:
        return None
    weights = np.exp([fit.likelihood - max(f.likelihood for f in fits) for fit in fits])
    weights /= weights.sum()
    mean_N = np.sum([w * fit.loss_N for w, fit in zip(weights, fits, strict=True)], axis=0)
    spread = [fit.covariance_NN + np.outer(fit.loss_N - mean_N, fit.loss_N - mean_N) for fit in fits]
    covariance_NN = np.sum([w * c for w, c in zip(weights, spread, strict=True)], axis=0)
    moved_N = np.sum([w * fit.moved_N for w, fit in zip(weights, fits, strict=True)], axis=0)
    moved_N -= moved_N.mean()
    off = MOVES * np.log(tokens / max(p.tokens for p in points))
    together_NN, own_NN = np.outer(moved_N, moved_N), np.mean(moved_N**2) * np.eye(len(moved_N))
    return Forecast(mean_N, covariance_NN + off**2 * (together_NN + OWN_MOVES * own_NN))


@dataclass(frozen=True, eq=False)
class _Fit(Forecast):
    """Under one power and ratio.

    Attributes:
        moved_N: of the losses, what lies between the last tokens measured and those forecast; nats.
        likelihood: the logarithm of the restricted one, up to a constant.
    """

    moved_N: Floats
    likelihood: float


def _fits(poly_NK: Floats, points: Sequence[Point], tokens: int) -> Iterator[_Fit]:
    runner_P = np.array([p.runner for p in points])
    tokens_P = np.array([p.tokens for p in points], dtype=np.float64)
    loss_P = np.array([p.loss for p in points])
    last = tokens_P.max()
    compared = sorted({(p.part, p.tokens) for p in points})
    shared_PG = np.array([[(p.part, p.tokens) == group for group in compared] for p in points], dtype=np.float64)
    own_NN = np.eye(len(poly_NK))
    root_P = np.sqrt(tokens_P / last)
    degrees = len(points) - shared_PG.shape[1] - 2 * poly_NK.shape[1]
    if degrees <= 0:
        return
    for power in POWERS:
        # On a scale on which the first points are at -1 and the last at 0: then the likelihoods of different powers
        # are over the same unknowns, the differences at both ends of what was measured.
        h_P = _progress(tokens_P, tokens_P.min(), last, power)
        ahead = float(_progress(np.array([float(tokens)]), tokens_P.min(), last, power)[0])
        fixed_PF = np.hstack([shared_PG, poly_NK[runner_P], poly_NK[runner_P] * h_P[:, None]])
        effects_PE = np.hstack([own_NN[runner_P], own_NN[runner_P] * h_P[:, None]])
        before_NC = np.zeros((len(own_NN), len(compared)))
        there_NC = np.hstack([before_NC, poly_NK, poly_NK * ahead, own_NN, own_NN * ahead])
        moved_NC = np.hstack([before_NC, 0 * poly_NK, poly_NK * ahead, 0 * own_NN, own_NN * ahead])
        a_PC, b_P = np.hstack([fixed_PF, effects_PE]) * root_P[:, None], loss_P * root_P
        for ratio in RATIOS:
            shrink_C = np.repeat([1e-10, 1 / ratio], [fixed_PF.shape[1], effects_PE.shape[1]])
            root_CC = np.linalg.cholesky(a_PC.T @ a_PC + np.diag(shrink_C))
            right_C = a_PC.T @ b_P
            half_C = np.linalg.solve(root_CC, right_C)
            variance = max(float(b_P @ b_P - half_C @ half_C) / degrees, 1e-14)
            half_CN = np.linalg.solve(root_CC, there_NC.T)
            logs = degrees * np.log(variance) + 2 * np.log(root_CC.diagonal()).sum()
            yield _Fit(
                half_CN.T @ half_C,
                variance * (half_CN.T @ half_CN + own_NN),
                moved_NC @ np.linalg.solve(root_CC.T, half_C),
                float(-0.5 * (logs + effects_PE.shape[1] * np.log(ratio))),
            )


def _progress(tokens_P: Floats, first: float, last: float, power: float) -> Floats:
    """h(tokens), moved and stretched so that it is -1 at `first` and 0 at `last`; [P]."""

    def h(share_P: Floats) -> Floats:
        return np.log(share_P) if power == 0 else 1 - share_P**-power

    return h(tokens_P / last) / -h(np.array([first / last]))

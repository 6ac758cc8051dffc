"""Which teachers to run further for the FLOPs that are left, from what is forecast of each and how surely."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats.qmc import Sobol

from capgap.study.forecast import Forecast

Floats = NDArray[np.float64]
MOST = 10
"""Teachers of which all sets are looked at: the best forecasts."""
DRAWS = 2**12
"""Of the final losses."""


@lru_cache(maxsize=1024)  # workers ask again at every look for a trial
def best_set(
    seen: Forecast, runners: tuple[int, ...], now: tuple[float, ...], whole: tuple[float, ...], left: float
) -> tuple[int, ...]:
    """The teachers for the next heat: those whose winner is expected to lose least.

    A set brings the best final loss of its teachers that could still be paid for to the end after a heat of them all;
    expected over the forecast's errors and their covariance. So while forecasts are unsure several teachers are worth
    more than one costly favourite, and teachers that may each be good where the other is not more than two alike. The
    next heat is taken to tell the truth, which it does in part. Of sets expected alike that of which more can
    arrive, then that of fewer FLOPs.

    Args:
        seen: the forecast of all runners.
        runners: those that may win, counted as in `seen`; of more than MOST the best forecasts are looked at.
        now: FLOPs of each of them in the next heat.
        whole: and to the end, the next heat included.
        left: FLOPs that there are for all of it.
    Returns: of `runners`; none where no set leaves enough for one of its teachers to arrive.
    """
    place_R = np.array(sorted(range(len(runners)), key=lambda i: (seen.loss_N[runners[i]], i))[:MOST], dtype=int)
    loss_DR = _drawn(seen)[:, [runners[i] for i in place_R]]
    now_R, whole_R = np.array(now)[place_R], np.array(whole)[place_R]
    best: tuple[float, int, float, tuple[int, ...]] | None = None
    for bits in range(1, 1 << len(place_R)):
        in_set_R = (bits >> np.arange(len(place_R))) & 1 == 1
        cost = float(now_R[in_set_R].sum())
        arrive_R = in_set_R & (whole_R - now_R + cost <= left)
        if arrive_R.any():
            expected = float(loss_DR[:, arrive_R].min(axis=1).mean())
            found = expected, -int(arrive_R.sum()), cost, tuple(sorted(runners[i] for i in place_R[in_set_R]))
            best = min(best or found, found)
    return best[-1] if best else ()


def _drawn(seen: Forecast) -> Floats:
    """Final losses that the forecast allows, evenly drawn and always the same ones, [DRAWS, N]."""
    variance_N, axis_NN = np.linalg.eigh(seen.covariance_NN)
    # Sobol's points lie on a grid from 0; half a step further none is at a bound.
    points_DN = Sobol(len(variance_N), scramble=False).random(DRAWS) + 0.5 / DRAWS
    return seen.loss_N + (norm.ppf(points_DN) * np.sqrt(np.maximum(variance_N, 0.0))) @ axis_NN.T

"""What the scores of normal images say of a new one: p-values and bounds that hold whatever their distribution.

Among n + 1 scores that could as well have come in any other order, the newest is as often the i-th highest as any.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

FALSE_ALARMS = 0.01  # share of good images that may be rejected, unless asked for otherwise
REVIEWED, MOST_REVIEWED = 5, 0.1  # times as many good images are to be reviewed as are rejected, up to this share

SLACK = 1e-9  # of ranks: 100 · (1 − 0.01) is a bit more than 99 in floating point


def p_values(scores: ArrayLike, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each score [...] the share of normal images, itself counted as one, that score as high: [...].

    normal: [n]. Of a new normal image it is below α at most in a share α of cases.
    """
    ascending = np.sort(normal)
    as_high = len(ascending) - np.searchsorted(ascending, np.asarray(scores, np.float64), side="left")
    return np.asarray((1 + as_high) / (len(ascending) + 1))


def upper_bound(normal: NDArray[np.float64], share: float) -> tuple[float, float]:
    """Return the score above which at most this share of new normal images lie, and the share that it is for.

    normal: [n], n at least 1; the bound is their quantile ⌈(n + 1)(1 − α)⌉/n. With fewer than 1/α − 1 of them nothing
    promises α: then it is the highest of them, for a share of 1/(n + 1).
    """
    count = len(normal)
    rank = max(math.ceil((count + 1) * (1 - share) - SLACK), 1)
    if rank > count:
        return float(np.max(normal)), 1 / (count + 1)
    return float(np.sort(normal)[rank - 1]), share


def verdict_bounds(normal: NDArray[np.float64], share: float) -> tuple[float, float, float]:
    """Return up to which score to accept, above which to reject, and the share of normal images that these reject.

    normal: [n] scores of normal images; share: that may be rejected.
    """
    reject, promised = upper_bound(normal, share)
    accept, _ = upper_bound(normal, max(promised, min(REVIEWED * promised, MOST_REVIEWED)))
    return accept, reject, promised


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def images_needed(share: float) -> int:
    """Return how many normal images it takes to promise this share."""
    return math.ceil(1 / share - SLACK) - 1

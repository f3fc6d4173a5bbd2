"""What thinning costs banks, and whether the false alarms that they promise come: a section of `accuracy`."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from zsad.engine.methods.bank import Memory
from zsad.engine.methods.bank_build import Making, remembered
from zsad.engine.scores.conformal import upper_bound
from zsad.engine.scores.image_scores import image_scores
from zsad.kernels.mutual_scoring import square_grid

SIZES = {"100 %": 1.0, "10 %": 0.1, "1 %": 0.01}  # of the bank's images' patches, per tap and degree
ALARMS = (0.05, 0.1, 0.2)  # shares of normal images that may be above the bound

Floats = NDArray[np.float64]


def bank_rows(
    tokens: NDArray[np.float32], normal: NDArray[np.intp], rest: NDArray[np.intp], degrees: tuple[int, ...], side: int
) -> Mapping[str, tuple[Floats, Floats, Floats]]:
    """Score images by banks of each size.

    tokens: [N, L, P, C]; normal: images that banks are made from; rest: those that are scored. Returns by size scores
    [rest] and maps [rest, P], and the scores [normal] of the bank's own images, each without itself.
    """
    grid, found = square_grid(tokens.shape[2]), {}
    for name, share in SIZES.items():
        making = Making(size=max(1, round(share * len(normal) * tokens.shape[2])))
        kept, own = remembered(tokens[normal], degrees, making, "cpu")
        memory = Memory([features.units() for features in kept.values()], degrees, making.neighbours, "cpu")
        maps = np.stack([memory.distances(tokens[image]) for image in rest.tolist()])
        scores, known = (image_scores(patches, grid, "top_fraction", side) for patches in (maps, own))
        found[name] = scores, maps, known
    return found


def alarms(scores: Floats, known: Floats) -> dict[str, list[float]]:
    """Return for each share of ALARMS what is promised, and how many normal images [n] are above the bound."""
    ranks = {share: np.ceil((len(known) + 1) * (1 - share) - 1e-9) for share in ALARMS}
    return {
        f"{share:g}": [
            round(float(1 - min(rank, len(known)) / (len(known) + 1)), 5),
            round(float(np.mean(scores > upper_bound(known, share)[0])), 5),
        ]
        for share, rank in ranks.items()
    }

"""What thinning costs banks, and whether the false alarms that they promise come: a section of `accuracy`.

Sizes: a bank of half of a set's normal images scores the other half and the defective ones. Alarms: of a set's normal
images a few make a bank and a few others are judged by it, drawn anew many times; so that this ends, one tap and degree
and the patches of every third row and column do, since what is promised depends on none of that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.methods.bank import Memory
from zsad.engine.methods.bank_build import Making, remembered
from zsad.engine.scores.conformal import upper_bound
from zsad.engine.scores.image_scores import image_scores
from zsad.kernels.mutual_scoring import square_grid

from .accuracy_batches import SMALL_DEGREES, SMALL_TAPS, TAPS, Floats, ImageSet, Reader, Scored, metrics_of

SIZES: Mapping[str, float] = {"100 %": 1.0, "10 %": 0.1, "1 %": 0.01}  # of the patches of a bank's images
DRAWN_SIZES = ("100 %", "10 %")
ALARMS = (0.1, 0.05)  # shares of normal images that may be rejected
SPLITS, DRAWN = 200, 20  # images that make a bank, and as many that it judges
NORMAL_95 = 1.96  # deviations
FACTS = {"splits": SPLITS, "drawn": DRAWN}


def banks(images: ImageSet, reader: Reader) -> dict[str, Any]:
    tokens = images.tokens[:, [TAPS.index(tap) for tap in SMALL_TAPS]]
    normal = np.random.default_rng(0).permutation(np.flatnonzero(~images.anomalous))
    known = normal[: len(normal) // 2]
    rest = np.setdiff1d(np.arange(len(tokens)), known)
    sizes = {}
    for name, share in SIZES.items():
        size, scores, maps = scored_by_bank(tokens[known], tokens[rest], share, reader.image_size)
        sizes[name] = {"patches": size, **metrics_of(images, Scored(scores, maps, scores), rest.tolist())}
    alarms = {name: false_alarms(every_third(tokens[normal, 1:]), SIZES[name]) for name in DRAWN_SIZES}
    return {"bank_images": len(known), "sizes": sizes, "alarms": alarms}


def scored_by_bank(
    known: NDArray[np.float32], new: NDArray[np.float32], share: float, image_size: int
) -> tuple[int, Floats, Floats]:
    """Score images by a bank that keeps a share of the known ones' patches; tokens: [n, L, P, C] each.

    Returns how many patches that is for each tap and degree, scores [new] and maps [new, P].
    """
    making = making_of(known, share)
    memory = Memory(kept_of(known, SMALL_DEGREES, making)[0], SMALL_DEGREES, making.neighbours, "cpu")
    maps = np.stack([memory.distances(image) for image in new])
    return making.size, image_scores(maps, square_grid(maps.shape[1]), "top_fraction", image_size), maps


def making_of(tokens: NDArray[np.float32], share: float) -> Making:
    return Making(size=max(1, round(share * tokens.shape[0] * tokens.shape[2])))


def kept_of(
    tokens: NDArray[np.float32], degrees: Sequence[int], making: Making
) -> tuple[list[NDArray[np.float32]], Floats]:
    """Return the features that a bank keeps, by taps and degrees, and its images' distances [n, P] to all others."""
    kept, own = remembered(tokens, range(tokens.shape[1]), degrees, making, "cpu")
    return [features.units() for features in kept.values()], own.maps.astype(np.float64)


def every_third(tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the patches of every third row and column of the grid; tokens: [n, L, P, C]."""
    grid = square_grid(tokens.shape[2])
    rows = np.arange(tokens.shape[2]).reshape(grid)[::3, ::3].ravel()
    return np.ascontiguousarray(tokens[:, :, rows])


def false_alarms(tokens: NDArray[np.float32], share: float) -> dict[str, dict[str, float]]:
    """Return by shares asked for which share of normal images is promised, and which is rejected, with its interval.

    tokens: [n, 1, P, C] of normal images. An image's score is its highest patch's.
    """
    rng, count = np.random.default_rng(1), min(DRAWN, len(tokens) // 2)
    rejected = dict.fromkeys(ALARMS, 0)
    for _ in range(SPLITS):
        known, new = np.split(tokens[rng.permutation(len(tokens))[: 2 * count]], 2)
        making = making_of(known, share)
        features, own = kept_of(known, (1,), making)
        memory = Memory(features, (1,), making.neighbours, "cpu")
        scores = np.array([memory.distances(image).max() for image in new])
        for asked in ALARMS:
            rejected[asked] += int(np.sum(scores > upper_bound(own.max(axis=1), asked)[0]))
    return {f"{asked:g}": rates(number, count, asked) for asked, number in rejected.items()}


def rates(rejected: int, count: int, asked: float) -> dict[str, float]:
    """Return what banks of so many images promise, and the share of as many others, of each split, that they reject.

    Images of one split are judged by one bound, so that they count for half as many that are judged independently.
    """
    rank = min(math.ceil((count + 1) * (1 - asked) - 1e-9), count)
    promised, measured = 1 - rank / (count + 1), rejected / (SPLITS * count)
    off = NORMAL_95 * math.sqrt(2 * measured * (1 - measured) / (SPLITS * count))
    found = {"promised": promised, "rejected": measured, "low": max(measured - off, 0), "high": measured + off}
    return {key: round(value, 5) for key, value in found.items()}

"""From scores and maps to verdicts and defect regions.

A batch does not tell how many of its images are defective: distributions of clean and of contaminated ones overlap. So
there are two bounds, and what lies between is for people to look at.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

# What lies farther from the median is moved there, in robust deviations: one gross defect must not hide all others.
OUTLYING = 3.5

# What is rejected lies far above those below the split, which tells many defects, or far above all, which tells few. A
# clean batch of evenly spread scores is cut in half: the mean of its lower half lies 0.8 deviations below the middle,
# and 4 of that half's own deviations of 0.6 lead to 1.6 above it, beyond which are 5 % of a normal distribution.
LOWER_DEVIATIONS, LOWER_UNCERTAINTY = 4.0, 20.0  # the second divided by the number of scores: few are less certain
LEAST_DEVIATIONS, MOST_DEVIATIONS = 1.0, 2.5  # robust ones of all: not nearer to the median, and no need to be farther

# Where the share of defects is expected, its odds may be wrong by this factor in either direction.
ODDS_MARGIN = 2.0

# What the patches of accepted images stay below, up to this percentile, is no defect.
ACCEPTED_PERCENTILE = 99.9

Verdict = Literal["reject", "review", "accept"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # in the order in which they are told


@dataclass(frozen=True)
class Bounds:
    """Which scores of images, in [0, 1], are accepted and which rejected; those between the two are to be reviewed."""

    accept: float  # up to it
    reject: float  # above it; not below `accept`
    rule: str  # what they follow from, in words
    region: float | None = None  # map value above which pixels are a defect; None: follows from the accepted images

    def __str__(self) -> str:
        between = f", review between, accept up to {self.accept:.3f}" if self.accept < self.reject else ""
        return f"reject above {self.reject:.3f}{between} ({self.rule})"

    def verdict(self, score: float) -> Verdict:
        if score > self.reject:
            return "reject"
        return "review" if score > self.accept else "accept"


@dataclass(frozen=True)
class Region:
    """A connected defect region in pixels of the original image."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float  # largest map value inside


def distribution_bounds(values: ArrayLike) -> tuple[float, float]:
    """Choose the bounds up to which to accept and above which to reject, from the values [N] of a batch alone.

    values: on a scale on which those of normal images spread evenly, such as the logarithm of distances or the log-odds
    of probabilities; moved or stretched, they give bounds that are so too. Accepted is up to the split into two classes
    that leaves the least variance within them (Otsu), rejected what lies far above the class below, or above all.
    """
    v = np.asarray(values, np.float64)
    median, deviation = median_and_deviation(v)
    if deviation > 0:
        v = v.clip(median - OUTLYING * deviation, median + OUTLYING * deviation)
    accept = otsu(v)
    lower = v[v <= accept]
    reject = lower.mean() + (LOWER_DEVIATIONS + LOWER_UNCERTAINTY / v.size) * lower.std()
    if deviation > 0:
        reject = reject.clip(median + LEAST_DEVIATIONS * deviation, median + MOST_DEVIATIONS * deviation)
    return accept, max(accept, float(reject))


def expected_bounds(scores: ArrayLike, share: float) -> tuple[float, float]:
    """Choose the bounds of accepted and of rejected scores by about which share of the images is defective.

    scores: [N]; share: in (0, 1). Above the bounds lie as many scores as shares of twice and of half its odds are.
    """
    s = np.sort(np.asarray(scores, np.float64))
    odds = share / (1 - share)
    found = []
    for factor in (ODDS_MARGIN, 1 / ODDS_MARGIN):
        above = round(s.size * factor * odds / (1 + factor * odds))
        last = max(s.size - 1 - above, 0)  # of those up to the bound, which lies in the middle of a gap
        found.append(float(s[last] + s[min(last + 1, s.size - 1)]) / 2)
    accept, reject = found
    return accept, reject


def batch_bounds(scores: ArrayLike, distances: tuple[float, float] | None) -> tuple[float, float]:
    """Apply `distribution_bounds` to the scores [N] in [0, 1] of a batch; returns bounds of scores.

    distances: those that became the scores 0 and 1; None: scores are probabilities.
    """
    s = np.asarray(scores, np.float64)
    if s.min() == s.max():
        return float(s.max()), float(s.max())
    if distances is None:
        s = s.clip(1e-6, 1 - 1e-6)  # about where records round them
        bounds = 1 / (1 + np.exp(-np.array(distribution_bounds(np.log(s / (1 - s))))))
    else:
        low, high = distances
        values = log_distances(s, distances)
        bounds = (np.exp(np.minimum(distribution_bounds(values), np.log(high) + 1)) - low) / (high - low)
    accept, reject = bounds.clip(0, 1).tolist()
    return accept, reject


def log_distances(scores: NDArray[np.float64], distances: tuple[float, float]) -> NDArray[np.float64]:
    """Return the logarithms [N] of the distances that became these scores; distances: those that became 0 and 1."""
    low, high = distances
    return np.log(np.maximum(low + scores * (high - low), 1e-6 * high))  # copies may have a distance of 0


def median_and_deviation(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the median, and the deviation that half of the values lie within, as that of a normal distribution."""
    median = np.median(values)
    return float(median), float(1.4826 * np.median(np.abs(values - median)))


def otsu(values: NDArray[np.float64]) -> float:
    """Return the middle of the gap at which values [N] fall into the two classes of least variance (Otsu)."""
    s = np.sort(values)
    below = np.arange(1, s.size)  # [N - 1] members of the lower class
    sums = np.cumsum(s)[:-1]
    between = below * (s.size - below) * ((s.sum() - sums) / (s.size - below) - sums / below) ** 2
    last = int(between.argmax())
    return float((s[last] + s[last + 1]) / 2)


def find_regions(scores: NDArray[np.float32], threshold: float, least_area: int) -> list[Region]:
    """Return the 8-connected regions of a map [h, w] above the threshold, highest peak first."""
    return [region for _, region in labelled_regions(scores, threshold, least_area)[1]]


def region_mask(scores: NDArray[np.float32], threshold: float, least_area: int) -> NDArray[np.bool_]:
    """Return where a map [h, w] has the regions that `find_regions` finds."""
    labels, found = labelled_regions(scores, threshold, least_area)
    table = np.zeros(labels.max() + 1, np.bool_)
    table[[label for label, _ in found]] = True
    mask: NDArray[np.bool_] = table[labels]
    return mask


def labelled_regions(
    scores: NDArray[np.float32], threshold: float, least_area: int
) -> tuple[NDArray[np.int32], list[tuple[int, Region]]]:
    """Return the regions that `find_regions` finds with their numbers, and each pixel's number [h, w]."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats((scores > threshold).astype(np.uint8), connectivity=8)
    peaks = np.zeros(count, np.float32)
    np.maximum.at(peaks, labels.ravel().astype(np.intp), scores.ravel())
    regions = [
        (label, Region(x, y, width, height, area, peak=round(float(peaks[label]), 6)))
        for label, (x, y, width, height, area) in enumerate(boxes.tolist())
        if label > 0 and area >= least_area  # label 0 is everything outside
    ]
    return labels.astype(np.int32, copy=False), sorted(regions, key=lambda found: -found[1].peak)

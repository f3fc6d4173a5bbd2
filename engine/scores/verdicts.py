"""From scores and maps to verdicts and defect regions."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

# A normal image scores above the median plus this many deviations about once in a thousand.
TAIL_DEVIATIONS = 3.0


# What the patches of images judged normal stay below, up to this percentile, is no defect.
NORMAL_PERCENTILE = 99.9


Verdict = Literal["accept", "review", "reject"]


@dataclass(frozen=True)
class Bounds:
    """Which scores of images, in [0, 1], are accepted and which rejected; those between the two are to be reviewed."""

    accept: float  # up to it
    reject: float  # above it; not below `accept`
    rule: str  # what they follow from, in words
    region: float | None = None  # map value above which pixels are a defect; None: follows from the accepted images

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


def auto_threshold(scores: ArrayLike) -> float:
    """Choose a threshold for image scores [N] by a robust tail rule, for a batch whose majority is normal.

    Normal scores are taken as symmetric about the median; their deviation comes from the lower half alone, which
    anomalies do not reach: median + 3 · 1.4826 · median(median − s | s ≤ median).
    """
    s = np.asarray(scores, np.float64)
    median = np.median(s)
    deviation = 1.4826 * np.median(median - s[s <= median])
    return float(min(max(median + TAIL_DEVIATIONS * deviation, 0.0), 1.0))


def region_threshold(patch_scores: NDArray[np.float64], anomalous: NDArray[np.bool_]) -> float:
    """Choose the map value above which an anomalous image's pixels count as defect.

    patch_scores: [N, P] in [0, 1]; anomalous: [N] verdicts. It is the 99.9th percentile of the patches of the images
    judged normal; where none is, of all patches.
    """
    normal = patch_scores[~anomalous] if not anomalous.all() else patch_scores
    return float(np.percentile(normal, NORMAL_PERCENTILE))


def find_regions(scores: NDArray[np.float32], threshold: float, least_area: int) -> list[Region]:
    """Return the 8-connected regions of a map [h, w] above the threshold, highest peak first."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats((scores > threshold).astype(np.uint8), connectivity=8)
    peaks = np.zeros(count, np.float32)
    np.maximum.at(peaks, labels.ravel().astype(np.intp), scores.ravel())
    regions = [
        Region(x, y, width, height, area, peak=round(float(peaks[label]), 6))
        for label, (x, y, width, height, area) in enumerate(boxes.tolist())
        if label > 0 and area >= least_area  # label 0 is everything outside
    ]
    return sorted(regions, key=lambda region: -region.peak)

"""Metrics that forgive little: AUPIMO, recall where normal images have next to no false alarm, and SegF1.

Both see images one by one, so that any number of them can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.scores.verdicts import region_mask

# The authors' tolerance: a false-positive rate of at most a hundredth of a percent of normal images' pixels.
RATES = (1e-5, 1e-4)
# What the two are called, with what bounds them.
AUPIMO, SEGMENTATION_F1 = "aupimo_1e-5_1e-4", "segf1_regions"


class Aupimo:
    """Area under the per-image overlap (Bertoldo et al., AUPIMO, BMVC 2024).

    The false-positive rate is that of normal images alone: the mean of the images' rates. For each of the rates from
    RATES the lowest threshold counts that keeps it, and of an anomalous image the share of its anomalous pixels at or
    above that: its mean over the logarithms of the rates is exact, without steps.
    """

    def __init__(self, normal_images: int, rates: tuple[float, float] = RATES) -> None:
        """normal_images: how many will be added, at most: so many of their highest scores are kept as may count."""
        self._lowest, self._highest = rates
        self._budget = self._highest * normal_images
        self._images = self._pixels = 0
        self._scores, self._rates = np.empty(0, np.float32), np.empty(0)  # [K] descending, each 1 / pixels of its image
        self._cut = -math.inf  # scores up to it lie below all thresholds that count

    def add_normal(self, map_: NDArray[Any]) -> None:
        """Add the map [H, W] of a normal image."""
        self._images += 1
        self._pixels += map_.size
        # Of one image no more may count than of all.
        most = min(map_.size, math.floor(self._budget * map_.size) + 1)
        highest = np.partition(map_, map_.size - most, axis=None)[map_.size - most :]
        highest = highest[highest > self._cut]
        scores = np.concatenate([self._scores, highest])
        rates = np.concatenate([self._rates, np.full(highest.size, 1 / map_.size)])
        order = np.argsort(-scores, kind="stable")
        kept = int(np.searchsorted(np.cumsum(rates[order]), self._budget, side="right")) + 1
        if kept <= scores.size:
            self._cut = float(scores[order[kept - 1]])
        self._scores, self._rates = scores[order[:kept]], rates[order[:kept]]

    @property
    def finest_rate(self) -> float:
        """The lowest false-positive rate above 0 that the normal images, which have been added, resolve."""
        return 1 / self._pixels if self._pixels else math.inf

    def of_image(self, mask: NDArray[np.bool_], map_: NDArray[Any]) -> float:
        """Return the value in [0, 1] of an anomalous image, once all normal ones are added; NaN without these."""
        if not self._images:
            return math.nan
        found = map_[mask]
        reached = np.append(0, np.cumsum(self._rates) / self._images)  # [K + 1]
        # The rate at which each anomalous pixel is found.
        rates = reached[np.searchsorted(-self._scores, -found, side="right")]
        if self._cut > -math.inf:  # lower scores of normal images are not known
            rates = np.where(found > self._cut, rates, 1.0)
        area = np.log(self._highest / np.clip(rates, self._lowest, self._highest))
        return float(np.mean(area)) / math.log(self._highest / self._lowest)


@dataclass(frozen=True)
class DrawnRegions:
    """The defect regions that a run has told of a category's images."""

    bound: float  # above it a map's value is a defect
    least_areas: Mapping[PurePosixPath, int]  # pixels of the smallest region, by image; none: it has no region

    def mask(self, image: PurePosixPath, map_: NDArray[Any]) -> NDArray[np.bool_]:
        """Where an image with the map [H, W] has its regions."""
        area = self.least_areas.get(image)
        return np.zeros(map_.shape, np.bool_) if area is None else region_mask(map_, self.bound, area)


class SegmentationF1:
    """F1 of the pixels of all images together, as MVTec AD 2 has it of thresholded maps: SegF1."""

    def __init__(self) -> None:
        self._hits = self._both = 0

    def add(self, mask: NDArray[np.bool_], found: NDArray[np.bool_]) -> None:
        """Add an image, normal or anomalous: where it has defects, and where they were said to be [H, W]."""
        self._hits += int(np.count_nonzero(found & mask))
        self._both += int(np.count_nonzero(found)) + int(np.count_nonzero(mask))

    @property
    def value(self) -> float:
        """In [0, 1]; NaN where no pixel is a defect or said to be one."""
        return 2 * self._hits / self._both if self._both else math.nan

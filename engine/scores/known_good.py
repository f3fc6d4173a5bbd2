"""What known-good images say of scores: bounds of many images', and what a few images' are relative to.

scores [k] of known-good images, each as if it were one more of the images → bounds that promise something
raw scores [k] and maps [k, P] of known-good images, scored by each other → what is half of the way from 0 to 1

An image is compared with all others and with all known-good images. So is a known-good image, with itself left out:
which of the two a good image is makes no difference to its score, and the share of good images that score higher than
most known-good ones is known (scores/conformal.py), however many of the others have a defect.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .conformal import FALSE_ALARMS, MOST_REVIEWED, images_needed, percent, verdict_bounds
from .image_scores import FEW_IMAGES, min_max
from .verdicts import Bounds

HALF_UNLIKE = math.sqrt(0.5)  # half of the distance between unit vectors at right angles
ALIKE = 0.05  # patches of copies lie closer


@dataclass(frozen=True)
class Calibration:
    """What known-good images come to when they are scored by each other: half of the way from 0 to 1."""

    raw_score: float  # the highest of an image
    lowest: float  # of patches of the maps
    highest: float
    images: int  # that were scored; none where they do not say, since there is one alone, or copies of one

    @classmethod
    def measured(cls, raw_scores: NDArray[np.float64], maps: NDArray[np.float32]) -> "Calibration | None":
        """Return the calibration by raw scores [k] and maps [k, P] of known-good images; None where they are copies."""
        if maps.max() <= ALIKE:
            return None
        return cls(float(raw_scores.max()), float(maps.min()), float(maps.max()), len(maps))

    @classmethod
    def unlike(cls, raw_score: float) -> "Calibration":
        """Return what is in force where known-good images do not say: half of what has nothing in common with them.

        raw_score: of an image whose patches are all at the distance HALF_UNLIKE.
        """
        return cls(raw_score, 0.0, HALF_UNLIKE, 0)

    def kept(self) -> NDArray[np.float64]:
        """Return it as numbers [4], of which `Calibration.of` makes it anew."""
        return np.array(astuple(self), np.float64)

    @classmethod
    def of(cls, kept: Sequence[Mapping[str, ArrayLike]]) -> "Calibration | None":
        """Return what the last group of a category has kept of it under its name; None where there is none."""
        if not kept or "calibration" not in kept[-1]:
            return None
        raw_score, lowest, highest, images = np.asarray(kept[-1]["calibration"]).tolist()
        return cls(raw_score, lowest, highest, int(images))

    @property
    def map_range(self) -> tuple[float, float]:
        """What is 0 and what is 1 in maps."""
        return self.lowest, 2 * self.highest - self.lowest

    def scores(self, raw_scores: ArrayLike) -> NDArray[np.float64]:
        """Return scores [n] in [0, 1]."""
        return min_max(raw_scores, (0.0, 2 * self.raw_score))

    def bounds(self) -> Bounds | None:
        if not self.images:
            return None
        # So few good images do not say what hardly any good one comes to.
        return Bounds(0.5, 1.0, f"the most unusual of {self.images} known-good images", region=0.5)

    def note(self) -> str:
        """Return what scores and maps are relative to, in words."""
        known = "1 has nothing in common with the known-good image or its copies"
        if self.images:
            known = "0.5 is what the most unusual known-good image comes to when compared with the others"
        return (
            f"scores and maps are not relative to each other, since fewer than {FEW_IMAGES} images are too few: {known}"
        )


def measured_count(references: int, false_alarms: float) -> int:
    """Return how many references are scored as images are: no more than a bound takes, none where they are too few."""
    return (
        0
        if references < images_needed(MOST_REVIEWED)
        else min(references, images_needed(min(false_alarms, FALSE_ALARMS)))
    )


def known_bounds(scores: Sequence[NDArray[np.float64]], false_alarms: float) -> Bounds:
    """Return the bounds that known-good images give.

    scores: [m] each, as many as `measured_count` says, beside each group of images; the highest bounds hold for all.
    false_alarms: the share of good images that may be rejected.
    """
    accept, reject, promised = np.max([verdict_bounds(of_group, false_alarms) for of_group in scores], axis=0).tolist()
    rule = f"at most {percent(promised)} of good images are rejected, if they are like the known-good ones"
    if promised > false_alarms:
        rule += f"; {percent(false_alarms)} takes {images_needed(false_alarms)} of these"
    return Bounds(accept, reject, rule)


def calibration_counts(references: int) -> tuple[int, int]:
    """Return how many references are scored by each other and by how many more, so that this costs little."""
    measured = min(references, FEW_IMAGES)
    return measured, references - measured

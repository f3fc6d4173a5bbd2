"""What of an image shows the object: masks of parts that lie in the foreground of a dichotomous segmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zsad.engine.config import Table
from zsad.engine.images.decode import bilinear

from .bitmasks import BitMask, overlap, pack, union

Rule = Literal["sam", "dichotomous", "whole"]  # united masks, the dichotomous foreground as it is, the whole image


class ForegroundSettings(Table):
    """What counts as foreground."""

    # Highest value of the dichotomous segmentation below which an image has no foreground.
    min_peak: float = Field(0.8, ge=0, le=1, description="in [0, 1]")
    min_foreground: float = Field(0.001, ge=0, le=1, description="in [0, 1]")  # below it the whole image is taken
    coverage: float = Field(0.8, ge=0, le=1, description="in [0, 1]")  # share of a mask in the foreground to be kept


@dataclass(frozen=True, eq=False)
class Foreground:
    """Which pixels show the object, and how that was found."""

    pixels: NDArray[np.bool_]  # [H, W]
    rule: Rule
    kept: NDArray[np.bool_]  # [M], of the masks


def dichotomous(values: NDArray[np.float32], size: tuple[int, int], min_peak: float) -> NDArray[np.bool_]:
    """Return the foreground [H, W] that a network's values [S, S] in [0, 1] say an image of this size has.

    Enlarged, then scaled to [0, 1], at least one half. Nothing is foreground where the highest value is below
    `min_peak`, of which the scaling would make an object, or where all are the same.
    """
    enlarged = bilinear(values, size)
    lowest, highest = enlarged.min(), enlarged.max()
    if not (highest >= min_peak and highest > lowest):
        return np.zeros(size, bool)
    enlarged -= lowest
    enlarged /= highest - lowest
    return np.asarray(enlarged >= 0.5)


def is_too_small(dichotomous: NDArray[np.bool_], min_foreground: float) -> bool:
    """Whether a foreground [H, W] is that of a texture or a close-up: masks then change nothing."""
    return bool(np.count_nonzero(dichotomous) < min_foreground * dichotomous.size)


def combined(dichotomous: NDArray[np.bool_], masks: Sequence[BitMask], settings: ForegroundSettings) -> Foreground:
    """Return the union of the masks that the dichotomous foreground [H, W] covers for the most part.

    If it covers none, it is taken as it is; if it is too small, the whole image. Empty masks are never kept.
    """
    kept = np.zeros(len(masks), bool)
    if is_too_small(dichotomous, settings.min_foreground):
        return Foreground(np.ones(dichotomous.shape, bool), "whole", kept)
    bits = pack(dichotomous)
    for index, mask in enumerate(masks):
        kept[index] = mask.area > 0 and overlap(mask, bits) / mask.area >= settings.coverage
    if not kept.any():
        return Foreground(dichotomous, "dichotomous", kept)
    united = union((mask for mask, covered in zip(masks, kept, strict=True) if covered), dichotomous.shape)
    return Foreground(united, "sam", kept)

"""Variance Vigilance Vanguard (Baugh et al., VAND challenge 2023): tiles of an image's objects against words.

foreground → components → tiles → CLIP: probability of the abnormal class, one per tile; CLIPSeg: logits of the
localising prompts [K, S, S] → their harmonic mean, times the tile's probability → mean over the tiles at every pixel
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from .bitmasks import Box
from .foreground import ForegroundSettings
from .text_guided import TextSettings
from .tiles import TileSettings

LOWEST = -80.0  # of logits: their exponential stays finite in single precision, and so does a sum of many
STRIP = 1 << 20  # pixels of a map that are enlarged at once


class Settings(TextSettings, ForegroundSettings, TileSettings):
    """What the report leaves open; the defaults are the reading that is tested."""

    # What finds the object: IS-Net and SAM, IS-Net alone, nothing (the whole image), or its colour.
    foreground: Literal["sam", "dichotomous", "whole", "colour"] = "sam"
    tau: float = Field(0.01, gt=0, description="above 0")  # what mean cosines are divided by
    deduplicate: bool = Field(False, description="true or false")  # localising prompts that are there twice count once
    mask_outside: bool = Field(False, description="true or false")  # maps are 0 outside the foreground, in tiles too
    share: float = Field(0.25, gt=0, le=1, description="above 0 and at most 1")  # of the components that score an image
    top: Literal["ceil", "floor"] = "ceil"  # how that share is rounded to a count; it is at least one


def counted_prompts(prompts: Sequence[str], deduplicate: bool) -> tuple[list[str], NDArray[np.float32]]:
    """Return each of some prompts once, and how often it counts [K], so that no network runs over it twice."""
    counts = Counter(prompts)
    return list(counts), np.array([1 if deduplicate else count for count in counts.values()], np.float32)


def harmonic_mean(logits: NDArray[Any], counts: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return the harmonic mean [...] of the probabilities of logits [K, ...]; counts: of each of the K, [K].

    The reciprocal of a sigmoid is 1 + exp(-logit): K / Σ (1 + exp(-logit)), in single precision.
    """
    if counts is None:
        counts = np.ones(len(logits), np.float32)
    total = np.zeros(logits.shape[1:], np.float32)
    for logit, count in zip(logits, counts, strict=True):  # one at a time: as much memory as one of them
        inverse = np.exp(-np.maximum(logit, np.float32(LOWEST), dtype=np.float32))
        inverse += 1
        inverse *= count
        total += inverse
    means: NDArray[np.float32] = np.float32(counts.sum()) / total
    return means


def resized(values: NDArray[np.float32], size: tuple[int, int], rows: slice = slice(None)) -> NDArray[np.float32]:
    """Return some rows of a map [h, w] resized to [H, W].

    Bilinear with half-pixel centres, the edges repeated; nothing is averaged where it becomes smaller.
    """
    height, width = size
    source = len(values)
    positions = (np.arange(height)[rows] + 0.5) * (source / height) - 0.5
    positions = np.clip(positions, 0, source - 1)
    above = positions.astype(np.intp)
    below = np.minimum(above + 1, source - 1)
    fraction = (positions - above).astype(np.float32)[:, None]
    strip = values[above] + fraction * (values[below] - values[above])  # [rows, w]
    wide: NDArray[np.float32] = cv2.resize(strip, (width, len(strip)), interpolation=cv2.INTER_LINEAR)
    return wide.reshape(len(strip), width)


class TileMean:
    """The mean at every pixel over the tiles that cover it, made tile by tile: six bytes per pixel of the image."""

    def __init__(self, size: tuple[int, int], tiles: int) -> None:
        """size: height and width of the image. tiles: how many there are at most."""
        self._total = np.zeros(size, np.float32)
        self._count = np.zeros(size, np.uint16 if tiles <= np.iinfo(np.uint16).max else np.uint32)

    def add(self, box: Box, values: NDArray[np.float32], times: int = 1) -> None:
        """Add the map [h, w] of a tile, resized to it; times: how many tiles have this box."""
        height, width = self._total.shape
        y0, y1, x0, x1 = max(box.y0, 0), min(box.y1, height), max(box.x0, 0), min(box.x1, width)
        rows = max(1, STRIP // box.width)  # at once: a tile may be as large as the image
        for y in range(y0, y1, rows):
            here = slice(y, min(y + rows, y1)), slice(x0, x1)
            strip = resized(values, (box.height, box.width), slice(y - box.y0, here[0].stop - box.y0))
            self._total[here] += times * strip[:, x0 - box.x0 : x1 - box.x0]
            self._count[here] += times

    def finish(self) -> NDArray[np.float32]:
        """Return the means [H, W], 0 where there is no tile; nothing can be added any more."""
        np.maximum(self._count, 1, out=self._count)
        np.divide(self._total, self._count, out=self._total)
        return self._total


def component_scores(tile_scores: ArrayLike, components: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return the mean score [count] of the tiles of each component; tile_scores: [T], components: [T], indices."""
    indices = np.asarray(components, np.intp)
    means: NDArray[np.float64] = np.bincount(indices, np.asarray(tile_scores, np.float64), count).astype(np.float64)
    return means / np.bincount(indices, minlength=count)


def image_score(scores: NDArray[np.float64], settings: Settings) -> float:
    """Return the mean of the highest share of component scores [C]."""
    wanted = round(settings.share * len(scores), 9)  # 0.07 of 100 is 7, not a little more
    count = max(1, math.ceil(wanted) if settings.top == "ceil" else math.floor(wanted))
    return float(np.sort(scores)[-count:].mean())

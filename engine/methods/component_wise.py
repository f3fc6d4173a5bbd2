"""Looks at each component of an image's foreground by itself, with any method that judges every image by itself.

image → foreground [H, W] → components → tiles → method: a score and a map for each tile → map [H, W]: the mean over the
tiles that cover a pixel; score: the mean of the highest scores of components
(Baugh et al., VAND challenge 2023)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zsad.engine.config import Config, TileSettings
from zsad.engine.images.decode import Recipe, bilinear
from zsad.engine.images.loader import Batch, Inputs, batches_of

from .bitmasks import Box
from .foreground import Foreground, Foregrounds
from .method import Group, JudgesEach, Method, Scored
from .tiles import Tile, components, cut, tiles, with_parts

STRIP = 1 << 20  # pixels of a map that are enlarged at once


class ComponentWise(JudgesEach):
    """See `Method`; what the method behind it takes for images are tiles."""

    inputs: Sequence[Recipe] = ()  # it works on decoded images
    rescores = False

    def __init__(
        self, method: Method, foregrounds: Foregrounds, inputs: Inputs, batch_size: int, config: Config
    ) -> None:
        """method: one that judges every image by itself and sees all of it, as configurations are checked for.

        inputs: make network inputs of tiles, of batch_size at most at once.
        """
        assert not method.compares
        assert not method.rescores
        assert all(recipe.resize == "squash" for recipe in method.inputs)
        self._method, self._foregrounds, self._inputs, self._batch_size = method, foregrounds, inputs, batch_size
        self._settings = config.stages.tiles
        self.takes_references, self.map_range = method.takes_references, method.map_range

    def record(self) -> dict[str, Any]:
        return self._method.record()

    def needed(self, images: int, references: int) -> int:
        return self._method.needed(images, references)  # how many tiles they have is not known yet

    def start(self, group: Group) -> None:
        parts = list(self._reference_tiles(group.references))
        batches = batches_of(len(parts), parts.__getitem__, self._inputs, self._batch_size)
        self._method.start(replace(group, references=batches, reference_count=len(parts)))

    def take(self, batch: Batch) -> Iterator[Scored]:
        for index, image in zip(batch.indices, batch.images, strict=True):
            yield self._scored(index, image)

    def _scored(self, index: int, image: NDArray[np.uint8]) -> Scored:
        """Score an image [H, W, 3] by its tiles."""
        foreground, placed = self._placed(image)
        times: dict[Box, int] = {}  # two components may have the same tile, which the networks see once
        for tile in placed:
            times[tile.box] = times.get(tile.box, 0) + 1
        boxes = list(times)
        scores: dict[Box, float] = {}
        mean = TileMean(image.shape[:2], len(placed))
        parts = [cut(image, box) for box in boxes]
        for batch in batches_of(len(parts), parts.__getitem__, self._inputs, self._batch_size):
            for scored in self._method.take(batch):
                box = boxes[scored.index]
                scores[box] = scored.raw_score
                mean.add(box, scored.map, times[box])
        pixels = mean.finish()
        if self._settings.mask_background:
            pixels[~foreground.pixels] = 0
        count = 1 + placed[-1].component
        each = component_scores([scores[tile.box] for tile in placed], [tile.component for tile in placed], count)
        stages = foreground.stages([(box, scores[box]) for box in boxes])
        return Scored(index, image_score(each, self._settings), pixels, stages=stages)

    def _placed(self, image: NDArray[np.uint8]) -> tuple[Foreground, list[Tile]]:
        """Return the foreground of an image [H, W, 3], and the tiles of its components."""
        foreground = self._foregrounds.find(image)
        labels, found = components(foreground.pixels, self._settings.min_component)
        found = with_parts(labels, found, foreground.parts)
        return foreground, list(tiles(found, image.shape[:2], self._settings))

    def _reference_tiles(self, references: Iterable[Batch]) -> Iterator[NDArray[np.uint8]]:
        """Yield the tiles [h, w, 3] of known-good images."""
        for batch in references:
            for image in batch.images:
                _, placed = self._placed(image)
                yield from (cut(image, box).copy() for box in dict.fromkeys(tile.box for tile in placed))


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
            strip = bilinear(values, (box.height, box.width), slice(y - box.y0, here[0].stop - box.y0))
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


def image_score(scores: NDArray[np.float64], settings: TileSettings) -> float:
    """Return the mean of the highest share of component scores [C]."""
    wanted = round(settings.top_share * len(scores), 9)  # 0.07 of 100 is 7, not a little more
    count = max(1, math.ceil(wanted) if settings.top_rounding == "ceil" else math.floor(wanted))
    return float(np.sort(scores)[-count:].mean())

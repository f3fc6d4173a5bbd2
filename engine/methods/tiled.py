"""Cuts whole images into tiles that any method takes for images, so that small defects of large images are seen.

image → tiles in its own resolution (tile_grid.py) → method: a map for each tile → map of the image, stitched; score:
the highest value of that map

A method that compares images gets tiles once a group is complete: those of one place of all images as a group of its
own (aligned), or all of them as one (pooled). Until then their pixels are in a temporary file.
"""

import logging
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zsad.engine.config import Config, ConfigError, Tiling
from zsad.engine.images.decode import Recipe
from zsad.engine.images.loader import Batch, Inputs, batches_of
from zsad.engine.scores.image_scores import FEW_IMAGES
from zsad.engine.scores.known_good import Calibration
from zsad.engine.scores.verdicts import Bounds
from zsad.kernels.files import printable
from zsad.kernels.machine import stopwatch

from .method import Group, JudgesEach, Method, Place, Progress, Scored
from .musc import MuSc
from .tile_grid import TileGrid, tile_grid
from .tiles import cut

log = logging.getLogger("zsad")


class TileStore:
    """Tiles [h, w, 3] of images in a temporary file; raises OSError on a full disk."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="zsad-")  # noqa: SIM115 - see `close`
        self._shapes, self._offsets, self._end = array("q"), array("q"), 0

    def close(self) -> None:
        self._file.close()

    def add(self, tile: NDArray[np.uint8]) -> None:
        self._file.seek(self._end)
        self._file.write(np.ascontiguousarray(tile).data)
        self._offsets.append(self._end)
        self._shapes.extend(tile.shape[:2])
        self._end += tile.size

    def read(self, number: int) -> NDArray[np.uint8]:
        height, width = self._shapes[2 * number : 2 * number + 2]
        self._file.seek(self._offsets[number])
        return np.frombuffer(self._file.read(3 * height * width), np.uint8).reshape(height, width, 3)


@dataclass
class Tiled:
    """An image whose tiles are in a store."""

    index: int  # of the image
    grid: TileGrid
    first: int  # number of its first tile in the store
    map: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # as far as it is stitched
    peak: float = -np.inf  # of a tile's map
    facts: ArrayLike | None = None  # of the tile with the highest peak

    def add(self, tile: int, scored: Scored) -> None:
        """Take what a method says of a tile."""
        if not self.map.size:
            self.map = np.zeros(self.grid.size, np.float32)
        self.grid.add(self.map, tile, scored.map)
        peak = float(scored.map.max())
        if peak > self.peak:
            self.peak, self.facts = peak, scored.facts

    def scored(self) -> Scored:
        return Scored(self.index, float(self.map.max()), self.map, self.facts)


Population = list[tuple[Tiled, int]]  # tiles that are compared with each other: of which image, and which of its


class _Cut:
    """The images of a group, or those they are compared with, in tiles."""

    def __init__(self) -> None:
        self.store, self.images = TileStore(), list[Tiled]()
        self.tiles = 0

    def close(self) -> None:
        self.store.close()

    def add(self, index: int, image: NDArray[np.uint8], grid: TileGrid) -> None:
        self.images.append(Tiled(index, grid, self.tiles))
        for box in grid.boxes():
            self.store.add(cut(image, box))
        self.tiles += len(grid)

    def populations(self, aligned: bool) -> list[Population]:
        """Return which tiles, of which images, are compared with each other."""
        if aligned:
            return [[(image, tile) for image in self.images] for tile in range(len(self.images[0].grid))]
        return [[(image, tile) for image in self.images for tile in range(len(image.grid))]]


def check_inputs(method: Method) -> None:
    """Raise ConfigError where a method does not see all of an image."""
    if any(recipe.resize != "squash" for recipe in method.inputs):
        raise ConfigError("--tile, --tiles: tiles are to be seen whole; leave out resize in the method's table")


class TiledEach(JudgesEach):
    """See `Method`; the one behind it judges every image by itself."""

    inputs: Sequence[Recipe] = ()  # it works on decoded images
    rescores = False

    def __init__(self, method: Method, inputs: Inputs, batch_size: int, config: Config) -> None:
        """inputs: make network inputs of tiles, of batch_size at most at once."""
        assert method.map_range is not None
        self._method, self._inputs, self._batch_size, self._tiling = method, inputs, batch_size, config.tiling
        self.takes_references, self.map_range, self.cells = method.takes_references, method.map_range, method.cells

    def record(self) -> dict[str, Any]:
        return self._method.record()

    def needed(self, images: int, references: int) -> int:
        return self._method.needed(images, references)

    def start(self, group: Group) -> None:
        with closing(_Cut()) as known:
            _cut_references(known, group.references, self._tiling, self._method.cells)
            (tiles,) = known.populations(aligned=False)
            references = _batches(known, tiles, self._inputs, self._batch_size)
            self._method.start(replace(group, references=references, reference_count=len(tiles)))

    def take(self, batch: Batch) -> Iterator[Scored]:
        for index, image in zip(batch.indices, batch.images, strict=True):
            tiled = Tiled(index, grid_of(image, self._tiling, self._method.cells), 0)
            parts = partial(_part, image, tiled.grid)
            for tiles in batches_of(len(tiled.grid), parts, self._inputs, self._batch_size):
                for scored in self._method.take(tiles):
                    tiled.add(scored.index, scored)
            found, (low, high) = tiled.scored(), self.map_range
            yield replace(found, facts=None, score=(found.raw_score - low) / (high - low))


def _part(image: NDArray[np.uint8], grid: TileGrid, tile: int) -> NDArray[np.uint8]:
    return cut(image, grid.box(tile))


class TiledTogether:
    """See `Method`; the one behind it compares images with each other."""

    inputs: Sequence[Recipe] = ()  # it works on decoded images
    compares = True
    takes_references = True

    def __init__(self, method: MuSc, place: Place, inputs: Inputs, batch_size: int, config: Config) -> None:
        """inputs: make network inputs of tiles, of batch_size at most at once."""
        self._method, self._inputs, self._batch_size, self._tiling = method, inputs, batch_size, config.tiling
        self._timings, self._group = place.timings, Group(0, "")
        self._cut, self._known = _Cut(), _Cut()
        self._scored = 0  # images of the category
        self._calibration: Calibration | None = None

    @property
    def cells(self) -> int:
        return self._method.cells

    @property
    def map_range(self) -> tuple[float, float] | None:
        return None if self._calibration is None else self._calibration.map_range

    @property
    def rescores(self) -> bool:
        return self._calibration is None

    def record(self) -> dict[str, Any]:
        return self._method.record()

    def needed(self, images: int, references: int) -> int:
        return self._method.needed(images, references)

    def start(self, group: Group) -> None:
        self._group = group
        self._cut.close()
        self._cut = _Cut()
        if group.number == 0:
            self._calibration = None
            self._known.close()
            self._known = _Cut()
            self._scored = 0
            _cut_references(self._known, group.references, self._tiling, self._method.cells)

    def take(self, batch: Batch) -> Iterable[Scored]:
        for index, image in zip(batch.indices, batch.images, strict=True):
            self._cut.add(index, image, grid_of(image, self._tiling, self._method.cells))
        return ()

    def finish(self, progress: Progress) -> Iterator[Scored]:
        images, known = self._cut.images, self._known.images
        self._scored += len(images)
        last = self._group.number == self._group.groups - 1
        aligned = self._group.aligned
        places = {len(image.grid) if self._tiling.tiles else image.grid for image in (*images, *known)}
        if aligned and len(places) > 1:
            aligned = False
            log.warning(
                "%s: all tiles are compared with each other, since not all images, known-good ones too, have one size",
                printable(self._group.name),
            )
        populations = self._cut.populations(aligned)
        references = self._known.populations(aligned) if known else [[] for _ in populations]
        if not aligned:  # a few of these say what all of them are like
            (tiles,) = references
            references = [[tiles[place] for place in np.random.default_rng(0).permutation(len(tiles))]]
        calibrations = []
        for number, (members, others) in enumerate(zip(populations, references, strict=True)):
            place = f" (tile {number + 1} of {len(populations)})" if len(populations) > 1 else ""
            self._compare(members, others, last, partial(_said, progress, place))
            calibrations += [found] if (found := self._method.calibration) is not None else []
        self._cut.close()
        if last:
            self._calibration = together(calibrations)
            self._known.close()
        yield from (image.scored() for image in images)

    def _compare(self, members: Population, others: Population, last: bool, progress: Progress) -> None:
        """Let the method compare tiles; last: whether all images of the category have come."""
        group = replace(
            self._group,
            images=len(members),
            references=_batches(self._known, others, self._inputs, self._batch_size),
            reference_count=len(others),
            number=0,
            groups=1,
            whole=self._scored if last else FEW_IMAGES,
        )
        with stopwatch(self._timings, "networks"):
            self._method.start(group)
            for batch in _batches(self._cut, members, self._inputs, self._batch_size):
                list(self._method.take(batch))
                progress("networks", batch.indices[-1] + 1, len(members))
        for scored in self._method.finish(progress):
            image, tile = members[scored.index]
            image.add(tile, scored)

    def kept(self) -> Mapping[str, NDArray[Any]]:
        raise AssertionError("groups of images in tiles are not gone on from")

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        if self._calibration is None:
            return self._method.image_scores(scored)
        return self._calibration.scores([image.raw_score for image in scored])

    def bounds(self) -> Bounds | None:
        return None if self._calibration is None else self._calibration.bounds()

    def note(self) -> str | None:
        return None if self._calibration is None else self._calibration.note()

    def remarks(self, bounds: Bounds, scores: NDArray[np.float64]) -> Sequence[str]:
        raise AssertionError("asked of methods that judge every image by itself")


def together(calibrations: Sequence[Calibration]) -> Calibration | None:
    """Return what is half of the way for whole images, by what it is for tiles; None where there is nothing to go by.

    Tiles that are copies of one say nothing where others do.
    """
    said = [one for one in calibrations if one.images] or calibrations
    if not said:
        return None
    highest = max(one.highest for one in said)  # of a map, which is an image's score
    return Calibration(highest, min(one.lowest for one in said), highest, min(one.images for one in said))


def grid_of(image: NDArray[np.uint8], tiling: Tiling, cells: int | None) -> TileGrid:
    """Lay tiles over an image [H, W, 3]; cells: see `tile_grid`."""
    height, width, _ = image.shape
    return tile_grid((height, width), tiling, cells)


def _cut_references(known: _Cut, references: Iterable[Batch], tiling: Tiling, cells: int | None) -> None:
    for batch in references:
        for index, image in zip(batch.indices, batch.images, strict=True):
            known.add(index, image, grid_of(image, tiling, cells))


def _batches(cut: _Cut, tiles: Population, inputs: Inputs, batch_size: int) -> Iterator[Batch]:
    """Yield tiles of images, numbered as they come, as methods take images."""
    return batches_of(len(tiles), lambda number: cut.store.read(_number(*tiles[number])), inputs, batch_size)


def _number(image: Tiled, tile: int) -> int:
    return image.first + tile


def _said(progress: Progress, place: str, stage: str, done: int, total: int) -> None:
    progress(stage + place, done, total)

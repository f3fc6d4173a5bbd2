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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zsad.engine.config import ConfigError, Tiling
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

if TYPE_CHECKING:
    from .bank import BankMethod

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


@dataclass(frozen=True)
class Cutter:
    """Cuts images into tiles and makes of these what networks take."""

    tiling: Tiling
    cells: int | None  # see `tile_grid`
    inputs: Inputs
    batch_size: int  # tiles at once, at most

    def grid(self, image: NDArray[np.uint8]) -> TileGrid:
        """Lay tiles over an image [H, W, 3]."""
        height, width, _ = image.shape
        return tile_grid((height, width), self.tiling, self.cells)

    def batches(self, image: NDArray[np.uint8]) -> Iterator[Batch]:
        """Yield the tiles of an image [H, W, 3], by their numbers, as methods take images."""
        grid = self.grid(image)
        return batches_of(len(grid), lambda tile: cut(image, grid.box(tile)), self.inputs, self.batch_size)


def tiled(method: Method, place: Place, cutter: Cutter) -> "TiledEach | TiledTogether":
    """Return a method that takes whole images, where the one behind it takes tiles for such.

    Raises ConfigError where that one does not see all of an image.
    """
    if any(recipe.resize != "squash" for recipe in method.inputs):
        raise ConfigError("--tile, --tiles: tiles are to be seen whole; leave out resize in the method's table")
    if isinstance(method, MuSc):
        return TiledTogether(method, place, cutter)
    from .bank import BankMethod

    return TiledBank(method, cutter) if isinstance(method, BankMethod) else TiledEach(method, cutter)


class TiledEach(JudgesEach):
    """See `Method`; the one behind it judges every image by itself."""

    inputs: Sequence[Recipe] = ()  # it works on decoded images
    rescores = False

    def __init__(self, method: Method, cutter: Cutter) -> None:
        assert method.map_range is not None
        self._method, self._cutter = method, cutter
        self.takes_references, self.map_range, self.cells = method.takes_references, method.map_range, method.cells

    def record(self) -> dict[str, Any]:
        return self._method.record()

    def needed(self, images: int, references: int) -> int:
        return self._method.needed(images, references)

    def start(self, group: Group) -> None:
        with closing(_Cut()) as known:
            _cut_references(known, group.references, self._cutter)
            (tiles,) = known.populations(aligned=False)
            references = _batches(known, tiles, self._cutter)
            self._method.start(replace(group, references=references, reference_count=len(tiles)))

    def take(self, batch: Batch) -> Iterator[Scored]:
        for index, image in zip(batch.indices, batch.images, strict=True):
            tiled = Tiled(index, self._cutter.grid(image), 0)
            for tiles in self._cutter.batches(image):
                for scored in self._method.take(tiles):
                    tiled.add(scored.index, scored)
            yield self._judged(tiled.scored())

    def _judged(self, found: Scored) -> Scored:
        """Return what there is to say of an image whose map was put together."""
        low, high = self.map_range
        return replace(found, facts=None, score=(found.raw_score - low) / (high - low))


class TiledBank(TiledEach):
    """See `Method`; the bank behind it gives distances for tiles, and judges what is put together of these."""

    def __init__(self, bank: "BankMethod", cutter: Cutter) -> None:
        super().__init__(bank, cutter)
        self._bank = bank

    def of(self, bank: "BankMethod") -> "TiledBank":
        """Return the same with another bank, of tiles that are cut alike."""
        return TiledBank(bank, self._cutter)

    def _judged(self, found: Scored) -> Scored:
        return self._bank.judged(found.index, found.raw_score, found.map)

    def bounds(self) -> Bounds | None:
        return self._bank.bounds()

    def remarks(self, bounds: Bounds, scores: NDArray[np.float64]) -> Sequence[str]:
        return self._bank.remarks(bounds, scores)

    def count_above(self, score: float) -> tuple[int, int]:
        return self._bank.count_above(score)


class TiledTogether:
    """See `Method`; the one behind it compares images with each other."""

    inputs: Sequence[Recipe] = ()  # it works on decoded images
    compares = True
    takes_references = True

    def __init__(self, method: MuSc, place: Place, cutter: Cutter) -> None:
        self._method, self._cutter = method, cutter
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
        if group.first:
            self._calibration = Calibration.of(group.earlier)
            self._known.close()
            self._known = _Cut()
            self._scored = sum(int(kept["scored"]) for kept in group.earlier)
            _cut_references(self._known, group.references, self._cutter)

    def take(self, batch: Batch) -> Iterable[Scored]:
        for index, image in zip(batch.indices, batch.images, strict=True):
            self._cut.add(index, image, self._cutter.grid(image))
        return ()

    def finish(self, progress: Progress) -> Iterator[Scored]:
        images, known = self._cut.images, self._known.images
        self._scored += len(images)
        last = self._group.number == self._group.groups - 1
        aligned = self._group.aligned
        places = {len(image.grid) if self._cutter.tiling.tiles else image.grid for image in (*images, *known)}
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
            references=_batches(self._known, others, self._cutter),
            reference_count=len(others),
            number=0,
            groups=1,
            whole=self._scored if last else FEW_IMAGES,
            earlier=(),
        )
        with stopwatch(self._timings, "networks"):
            self._method.start(group)
            for batch in _batches(self._cut, members, self._cutter):
                list(self._method.take(batch))
                progress("networks", batch.indices[-1] + 1, len(members))
        for scored in self._method.finish(progress):
            image, tile = members[scored.index]
            image.add(tile, scored)

    def kept(self) -> Mapping[str, NDArray[Any]]:
        kept = {"scored": np.array(len(self._cut.images))}
        return kept if self._calibration is None else kept | {"calibration": self._calibration.kept()}

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


def _cut_references(known: _Cut, references: Iterable[Batch], cutter: Cutter) -> None:
    for batch in references:
        for index, image in zip(batch.indices, batch.images, strict=True):
            known.add(index, image, cutter.grid(image))


def _batches(cut: _Cut, tiles: Population, cutter: Cutter) -> Iterator[Batch]:
    """Yield tiles of images, numbered as they come, as methods take images."""

    def read(number: int) -> NDArray[np.uint8]:
        return cut.store.read(_number(*tiles[number]))

    return batches_of(len(tiles), read, cutter.inputs, cutter.batch_size)


def _number(image: Tiled, tile: int) -> int:
    return image.first + tile


def _said(progress: Progress, place: str, stage: str, done: int, total: int) -> None:
    progress(stage + place, done, total)

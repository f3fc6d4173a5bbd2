"""A whole image in overlapping tiles, and what a method says of them put together again without seams.

image [H, W] → a lattice of cells, the patches of all tiles → tiles that begin where cells do → maps [g, g] of tiles,
weighted so that the weights of all tiles over a cell sum to 1 → map [rows, columns] of the image
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Tiling
from zsad.engine.images.decode import bilinear

from .bitmasks import Box

EXACT = 1e-6  # pixels or cells, by which counts of them may be off
OVERLAP = 8  # of a tile's side this part, where nothing says how far tiles overlap


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of an image."""

    cell: float  # pixels
    cells: int  # that cover the image, the last one maybe beyond it
    of_tile: int  # cells
    starts: tuple[int, ...]  # of the tiles, in cells, rising

    @cached_property
    def side(self) -> int:
        """The side of each tile in pixels."""
        return math.ceil(self.of_tile * self.cell - EXACT)

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """What each cell of each tile counts [tiles, of_tile]: all that lie over a cell sum to 1.

        They rise and fall as squares of sines do where tiles overlap, from and to nothing at their ends.
        """
        weights = np.ones((len(self.starts), self.of_tile))
        for tile, (start, following) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            shared = start + self.of_tile - following  # cells
            rising = np.sin((np.arange(shared) + 0.5) / max(shared, 1) * math.pi / 2) ** 2
            weights[tile + 1, :shared] *= rising
            weights[tile, self.of_tile - shared :] *= rising[::-1]
        total = np.zeros(max(self.cells, self.of_tile))
        for start, own in zip(self.starts, weights, strict=True):
            total[start : start + self.of_tile] += own
        for start, own in zip(self.starts, weights, strict=True):
            own /= total[start : start + self.of_tile]
        return weights.astype(np.float32)

    def begin(self, tile: int) -> int:
        """Return the pixel where a tile begins."""
        return math.floor(self.starts[tile] * self.cell + EXACT)


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one image."""

    rows: Axis
    columns: Axis

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the image's map."""
        return self.rows.cells, self.columns.cells

    def covered(self, size: tuple[int, int]) -> tuple[float, float]:
        """Return how many rows and columns of the map an image of this size covers."""
        height, width = size
        return min(height / self.rows.cell, self.rows.cells), min(width / self.columns.cell, self.columns.cells)

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def box(self, tile: int) -> Box:
        """Return the pixels of a tile, by its number in raster order; beyond the image it is to be mirrored there."""
        row, column = divmod(tile, len(self.columns.starts))
        x, y = self.columns.begin(column), self.rows.begin(row)
        return Box(x, y, x + self.columns.side, y + self.rows.side)

    def boxes(self) -> Iterator[Box]:
        return map(self.box, range(len(self)))

    def add(self, stitched: NDArray[np.float32], tile: int, values: NDArray[np.float32]) -> None:
        """Add a tile's map [h, w] to that of the image, of `size`, which is complete once all tiles have been added."""
        row, column = divmod(tile, len(self.columns.starts))
        y, x = self.rows.starts[row], self.columns.starts[column]
        here = stitched[y : y + self.rows.of_tile, x : x + self.columns.of_tile]  # less at the image's ends
        wanted = self.rows.of_tile, self.columns.of_tile
        cells = values if values.shape == wanted else bilinear(values, wanted)
        height, width = here.shape
        here += cells[:height, :width] * self.rows.weights[row, :height, None] * self.columns.weights[column, :width]


def stitched(size: tuple[int, int], tiling: Tiling, maps: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the map of an image of a height and width, of those [T, g, g] of its tiles."""
    grid = tile_grid(size, tiling, maps.shape[1])
    whole = np.zeros(grid.size, np.float32)
    for tile, values in enumerate(maps.astype(np.float32)):
        grid.add(whole, tile, values)
    return whole


@dataclass(frozen=True)
class TilePlan:
    """What there is to cut in a category whose images are compared with each other."""

    sizes: Mapping[tuple[int, int], int]  # how many readable images have a height and width
    tiling: Tiling

    @property
    def aligned(self) -> bool:
        """Whether tiles are compared with those of the same place alone."""
        batches = self.tiling.tile_batches
        return len(self.sizes) <= 1 if batches == "auto" else batches == "aligned"

    def tiles(self, images: int, cells: int | None) -> int:
        """Return how many tiles so many images have at most; cells: see `tile_grid`."""
        return self._of_largest(images, len, cells)

    def together(self, images: int, cells: int | None) -> int:
        """Return how many tiles of so many images are scored together at most."""
        return images if self.aligned else self.tiles(images, cells)

    def stored(self, images: int, cells: int | None) -> int:
        """Return the bytes that the tiles of so many images take at most."""
        return self._of_largest(images, lambda grid: 3 * len(grid) * grid.rows.side * grid.columns.side, cells)

    def _of_largest(self, images: int, count: Callable[[TileGrid], int], cells: int | None) -> int:
        """Return the sum of what is counted over so many images at most."""
        counts = {size: count(tile_grid(size, self.tiling, cells)) for size in self.sizes}
        total = sum(counts[size] * many for size, many in self.sizes.items())
        return min(images * max(counts.values(), default=1), total)

    def sides(self) -> Counter[int]:
        """Return how many images have tiles whose shorter side has so many pixels, at the images' scale."""
        found: Counter[int] = Counter()
        for size, many in self.sizes.items():
            if self.tiling.tile is not None:
                found[self.tiling.tile] += many
            else:
                grid = tile_grid(size, self.tiling, None)
                found[min(grid.rows.side, grid.columns.side)] += many
        return found


@lru_cache(maxsize=64)
def tile_grid(size: tuple[int, int], tiling: Tiling, cells: int | None) -> TileGrid:
    """Lay tiles over an image of a height and width; cells: along a tile's side in its map, None: as many as pixels.

    An image smaller than a tile has one, which is mirrored beyond it.
    """
    if tiling.tiles is not None:
        columns, rows = tiling.tiles
        height, width = size
        return TileGrid(
            _axis(height, *_counted(height, rows, tiling.overlap), cells),
            _axis(width, *_counted(width, columns, tiling.overlap), cells),
        )
    assert tiling.tile is not None
    side = tiling.tile / tiling.scale
    overlap = side / OVERLAP if tiling.overlap is None else tiling.overlap / tiling.scale
    return TileGrid(*(_axis(extent, side, overlap, None, cells) for extent in size))


def _counted(extent: int, count: int, overlap: int | None) -> tuple[float, float, int]:
    """Return the side and overlap of so many tiles in pixels, and how many fit into the extent at all."""
    count = min(count, extent)
    if overlap is None:
        side = extent / (count - (count - 1) / OVERLAP)
        return side, side / OVERLAP, count
    side = min((extent + (count - 1) * overlap) / count, extent)
    return side, overlap, count


def _axis(extent: int, side: float, overlap: float, count: int | None, cells: int | None) -> Axis:
    """Spread tiles evenly over an extent, as many as it takes unless their count is given."""
    side = max(side, 1.0)
    of_tile = max(1, round(side)) if cells is None else cells
    cell = side / of_tile
    needed = max(1, math.ceil(extent / cell - EXACT))
    if count is None:
        shared = min(round(overlap / cell), of_tile - 1)
        count = max(1, math.ceil((needed - shared) / (of_tile - shared)))
    if count == 1:
        return Axis(cell, needed, of_tile, (0,))
    way = max(needed - of_tile, 0)
    return Axis(cell, needed, of_tile, tuple(round(tile * way / (count - 1)) for tile in range(count)))

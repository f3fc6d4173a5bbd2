"""Tiles of whole images: where they lie, and maps put together from theirs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsad.engine.config import Tiling
from zsad.engine.methods.tile_grid import TileGrid, TilePlan, tile_grid
from zsad.engine.scores.maps import upsample

sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))
tilings = st.one_of(
    st.builds(
        lambda tile, part, scale: Tiling(tile=tile, overlap=int(part * tile), scale=scale),
        st.integers(32, 150),
        st.floats(0, 0.5),
        st.sampled_from([0.5, 1.0, 1.7]),
    ),
    st.builds(
        lambda tiles, overlap: Tiling(tiles=tiles, overlap=overlap),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.none() | st.integers(0, 40),
    ),
)


def stitched(grid: TileGrid, values: np.ndarray) -> np.ndarray:
    """Cut a map of an image into those of tiles, which is continued beyond the image, and put it together again."""
    whole = np.pad(values, [(0, grid.rows.of_tile), (0, grid.columns.of_tile)], mode="edge")
    found = np.zeros(grid.size, np.float32)
    for tile in range(len(grid)):
        row, column = divmod(tile, len(grid.columns.starts))
        y, x = grid.rows.starts[row], grid.columns.starts[column]
        grid.add(found, tile, whole[y : y + grid.rows.of_tile, x : x + grid.columns.of_tile])
    return found


@settings(max_examples=25)
@given(sizes, tilings, st.none() | st.integers(1, 37))
def test_tiles_cover_an_image_and_put_it_together_again(
    size: tuple[int, int], tiling: Tiling, cells: int | None
) -> None:
    grid = tile_grid(size, tiling, cells)
    assert all(covered <= count < covered + 1.001 for covered, count in zip(grid.covered(size), grid.size, strict=True))
    seen = np.zeros(size, bool)
    for box in grid.boxes():
        assert box.x0 >= 0
        assert box.y0 >= 0
        seen[box.y0 : box.y1, box.x0 : box.x1] = True
    assert seen.all()
    values = np.random.default_rng(0).random(grid.size, np.float32)
    np.testing.assert_allclose(stitched(grid, values), values, atol=1e-5)


@pytest.mark.parametrize(
    ("tiling", "count", "side"),
    [
        (Tiling(tile=518), 4 * 5, 518),  # 64 pixels are five patches of 14
        (Tiling(tile=518, overlap=0), 4 * 4, 518),
        (Tiling(tile=518, scale=0.5), 2 * 3, 1036),
        (Tiling(tiles=(4, 3)), 4 * 3, 619),
        (Tiling(tile=5000), 1, 5000),
    ],
)
def test_how_many_tiles_and_how_large(tiling: Tiling, count: int, side: int) -> None:
    grid = tile_grid((1700, 2072), tiling, 37)
    assert len(grid) == count
    assert {(box.height, box.width) for box in grid.boxes()} == {(grid.rows.side, grid.columns.side)}
    assert grid.rows.side == side


def test_tiles_that_differ_meet_without_a_step() -> None:
    grid = tile_grid((150, 150), Tiling(tile=100), 100)
    assert len(grid) == 4
    found = np.zeros(grid.size, np.float32)
    for tile, level in enumerate((1.0, 1.04, 1.02, 0.98)):
        grid.add(found, tile, np.full((100, 100), level, np.float32))
    assert max(np.abs(np.diff(found, axis=axis)).max() for axis in (0, 1)) < 0.01


def test_a_patch_is_drawn_where_it_lies() -> None:
    grid = tile_grid((100, 130), Tiling(tile=70), 5)
    assert grid.size == (8, 10)
    values = np.zeros(grid.size, np.float32)
    values[3, 6] = 1
    pixels = upsample(values, (100, 130), grid.covered((100, 130)))
    weights = pixels / pixels.sum()
    assert (weights.sum(axis=1) @ np.arange(100) + 0.5, weights.sum(axis=0) @ np.arange(130) + 0.5) == pytest.approx(
        (3.5 * 14, 6.5 * 14)
    )


def test_what_is_scored_together() -> None:
    mixed = {(100, 130): 3, (40, 40): 2}
    plan = TilePlan(mixed, Tiling(tile=70))
    assert not plan.aligned
    assert [plan.together(images, 5) for images in (1, 3, 5)] == [6, 18, 20]
    assert TilePlan({(100, 130): 3}, Tiling(tile=70)).together(3, 5) == 3
    assert TilePlan({(100, 130): 3}, Tiling(tile=70, tile_batches="pooled")).together(3, 5) == 18
    assert plan.stored(1, 5) == 6 * 70 * 70 * 3
    assert plan.stored(5, 5) == 20 * 70 * 70 * 3
    assert TilePlan(mixed, Tiling(tile=70)).sides() == {70: 5}
    assert TilePlan(mixed, Tiling(tiles=(2, 1), overlap=0)).sides() == {65: 3, 20: 2}

"""Components of a foreground and the tiles over them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zsad.engine.config import TileSettings
from zsad.engine.methods.bitmasks import Box, pack
from zsad.engine.methods.tiles import Component, Tile, components, cut, is_elongated, tiles, with_parts

DEFAULTS = TileSettings()


def test_golden_components_and_tiles(scene: dict[str, NDArray[Any]]) -> None:
    rules = TileSettings(min_side=int(scene["min_side"]))
    labels, found = components(scene["foreground"], rules.min_component)
    found = with_parts(labels, found, [pack(mask) for mask in scene["masks"][scene["kept"]]])
    np.testing.assert_array_equal(labels, scene["component_labels"])
    assert [component.box for component in found] == [tuple(box) for box in scene["component_boxes"].tolist()]
    assert [component.area for component in found] == np.bincount(labels.ravel())[1:].tolist()
    assert [component.parts for component in found] == scene["component_parts"].tolist()
    assert [is_elongated(component, rules) for component in found] == scene["component_elongated"].tolist()
    laid = list(tiles(found, scene["foreground"].shape, rules))
    assert [tile.box for tile in laid] == [tuple(box) for box in scene["tiles"].tolist()]
    assert [tile.component for tile in laid] == scene["tile_component"].tolist()


def test_components_are_numbered_by_their_first_pixels() -> None:
    foreground = np.zeros((4, 9), bool)
    foreground[3, :3] = foreground[2, 3] = foreground[1, 4] = True  # begins in the second row, from the left below
    foreground[1, 1] = foreground[1, 6] = foreground[0, 8] = True
    labels, found = components(foreground, 0.0)
    assert [component.box for component in found] == [(8, 0, 9, 1), (1, 1, 2, 2), (0, 1, 5, 4), (6, 1, 7, 2)]
    assert labels[3].tolist() == [3, 3, 3, 0, 0, 0, 0, 0, 0]


def first_pixels(labels: NDArray[np.int32]) -> list[int]:
    numbers, first = np.unique(labels, return_index=True)
    return list(first[numbers > 0])


@settings(max_examples=100)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    least=st.sampled_from([0.0, 0.001, 0.01, 0.2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_components_of_any_foreground(height: int, width: int, share: float, least: float, seed: int) -> None:
    foreground = np.random.default_rng(seed).random((height, width)) < share
    labels, found = components(foreground, least)
    assert not labels[~foreground].any()
    assert first_pixels(labels) == sorted(first_pixels(labels))
    assert np.bincount(labels.ravel(), minlength=1)[1:].tolist() == [component.area for component in found]
    assert bool(found) == foreground.any()
    small = [component.area < least * foreground.size for component in found]
    assert all(small) or not any(small)
    if not any(small) and least == 0:
        assert labels[foreground].all()
    for number, component in enumerate(found, 1):
        rows, columns = np.nonzero(labels == number)
        assert component.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    for tile in tiles(found, (height, width), TileSettings(min_side=5)):
        assert 0 <= tile.box.x0 < tile.box.x1 <= width
        assert 0 <= tile.box.y0 < tile.box.y1 <= height
        box = found[tile.component].box  # of a standard component: it has no parts
        assert tile.box.x0 <= box.x0 < box.x1 <= tile.box.x1
        assert tile.box.y0 <= box.y0 < box.y1 <= tile.box.y1


@settings(max_examples=200)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    x=st.integers(0, 30),
    y=st.integers(0, 30),
    right=st.integers(0, 30),
    bottom=st.integers(0, 30),
    side=st.integers(1, 40),
    step=st.sampled_from([0.25, 0.5, 1.0]),
    flush=st.booleans(),
    parts=st.sampled_from([0, 21]),
)
def test_tiles_cover_every_component(
    width: int, height: int, x: int, y: int, right: int, bottom: int, side: int, step: float, flush: bool, parts: int
) -> None:
    size = (y + height + bottom, x + width + right)
    component = Component(Box(x, y, x + width, y + height), width * height, parts)
    rules = TileSettings(min_side=side, step=step, flush=flush)
    laid = list(tiles([component], size, rules))
    covered = np.zeros(size, bool)
    for tile in laid:
        assert 0 <= tile.box.x0 < tile.box.x1 <= size[1]
        assert 0 <= tile.box.y0 < tile.box.y1 <= size[0]
        covered[tile.box.y0 : tile.box.y1, tile.box.x0 : tile.box.x1] = True
    assert covered[y : y + height, x : x + width].all()
    mirrored = list(tiles([component], size, rules.model_copy(update={"pad": "reflect"})))
    assert len(mirrored) == len(laid)
    assert len({tile.box.width for tile in mirrored} | {tile.box.height for tile in mirrored}) == 1
    if not is_elongated(component, rules):
        assert len(laid) == 1


def test_what_is_elongated() -> None:
    def elongated(width: int, height: int, parts: int) -> bool:
        return is_elongated(Component(Box(0, 0, width, height), 1, parts), DEFAULTS)

    assert elongated(301, 200, 21)
    assert elongated(200, 301, 21)
    assert not elongated(300, 200, 21)
    assert not elongated(301, 200, 20)


def test_a_row_of_tiles_flush_with_the_box_or_centred_on_its_ends() -> None:
    component = Component(Box(100, 50, 125, 55), 125, 21)
    flush = TileSettings(min_side=10)
    assert [tile.box.x0 for tile in tiles([component], (200, 200), flush)] == [100, 102, 105, 107, 110, 112, 115]
    assert {tile.box[1::2] for tile in tiles([component], (200, 200), flush)} == {(47, 57)}
    centred = TileSettings(min_side=10, flush=False, step=1.0)
    assert [tile.box.x0 for tile in tiles([component], (200, 200), centred)] == [95, 100, 105, 110, 115, 120]


def test_parts_are_masks_with_more_than_half_of_their_pixels_in_a_component() -> None:
    foreground = np.zeros((20, 40), bool)
    foreground[2:18, 3:18] = foreground[2:18, 22:38] = True
    labels, found = components(foreground, 0.0)
    inside, half, most, nowhere = (np.zeros((20, 40), bool) for _ in range(4))
    inside[4:6, 5:9] = True
    half[10, 14:26] = True  # 4 pixels in each of both components and 4 between them
    most[10:12, 14:26] = most[11, 14:38] = True
    nowhere[19] = True
    masks = [pack(mask) for mask in (inside, half, most, nowhere, foreground, np.zeros_like(inside))]
    # More of the foreground as a whole lies in the right component.
    assert [component.parts for component in with_parts(labels, found, masks)] == [1, 2]
    assert [component.parts for component in with_parts(labels, found, [])] == [0, 0]


def test_a_tile_beyond_the_image_mirrors_it() -> None:
    image = np.arange(5 * 4 * 3).reshape(5, 4, 3)
    assert np.shares_memory(cut(image, Box(1, 0, 4, 5)), image)
    np.testing.assert_array_equal(cut(image, Box(1, 0, 4, 5)), image[:, 1:4])
    np.testing.assert_array_equal(
        cut(image, Box(-9, -3, 11, 17)), np.pad(image, ((3, 12), (9, 7), (0, 0)), mode="reflect")
    )
    np.testing.assert_array_equal(cut(image[:1, :1], Box(-2, -2, 3, 3)), np.broadcast_to(image[0, 0], (5, 5, 3)))


@pytest.mark.slow
def test_thousands_of_specks() -> None:
    foreground = np.zeros((600, 800), bool)
    foreground[::4, ::5] = True
    labels, found = components(foreground, 0.001)
    assert len(found) == labels.max() == foreground.sum() == 24_000  # all below the limit: none is dropped
    laid = list(tiles(found, foreground.shape, DEFAULTS))
    assert laid[0] == Tile(Box(0, 0, 352, 352), 0)
    foreground[195:405, 195:405] = False
    foreground[200:400, 200:400] = True
    labels, found = components(foreground, 0.001)
    assert [component.area for component in found] == [40_000]
    assert np.count_nonzero(labels) == 40_000


@pytest.mark.parametrize("pixel", [False, True])
def test_an_image_of_one_pixel(pixel: bool) -> None:
    labels, found = components(np.full((1, 1), pixel), 0.001)
    assert labels.tolist() == [[int(pixel)]]
    assert [tile.box for tile in tiles(found, (1, 1), DEFAULTS)] == [(0, 0, 1, 1)] * pixel


def test_a_foreground_that_touches_all_borders() -> None:
    foreground = np.ones((500, 700), bool)
    foreground[1:-1, 1:-1] = False
    labels, found = components(foreground, 0.001)
    assert found == [Component(Box(0, 0, 700, 500), 2 * 700 + 2 * 498)]
    np.testing.assert_array_equal(labels, foreground)
    assert list(tiles(found, (500, 700), DEFAULTS)) == [Tile(Box(0, 0, 700, 500), 0)]


def test_a_component_of_a_thousandth_of_the_image_is_kept() -> None:
    foreground = np.zeros((100, 100), bool)
    foreground[0, :9] = foreground[50, :10] = foreground[80, :11] = True
    assert [component.area for component in components(foreground, 0.001)[1]] == [10, 11]


def test_centres_are_rounded_down_on_both_sides_of_the_border() -> None:
    rules = TileSettings(min_side=10, pad="reflect")
    found = [Component(Box(0, 0, 1, 1), 1), Component(Box(50, 60, 51, 61), 1)]
    assert [tile.box for tile in tiles(found, (100, 100), rules)] == [(-5, -5, 5, 5), (45, 55, 55, 65)]

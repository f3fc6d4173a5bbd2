"""Maps and object masks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsad.engine.scores.maps import common_scale, enlarged, object_mask, pixel_map, upsample

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(("name", "side", "size"), [("a", 8, 56), ("b", 6, 42)])
def test_golden_pixel_maps(golden: Path, name: str, side: int, size: int) -> None:
    arrays = np.load(golden / f"mutual_scoring_{name}.npz")
    for patch_scores, expected in zip(arrays["patch_scores"], arrays["pixel_scores"], strict=True):
        np.testing.assert_allclose(upsample(patch_scores.reshape(side, side), (size, size)), expected, atol=1e-5)


@settings(max_examples=50)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_upsampling_interpolates_between_aligned_corners(shape, size) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    plane = 2 * y - 3 * x + 1  # linear functions are reproduced exactly
    ys = np.linspace(0, shape[0] - 1, size[0]) if size[0] > 1 else np.zeros(1)
    xs = np.linspace(0, shape[1] - 1, size[1]) if size[1] > 1 else np.zeros(1)
    np.testing.assert_allclose(upsample(plane, size), 2 * ys[:, None] - 3 * xs + 1, atol=1e-4)


def test_one_map_alone_does_not_flatten_the_others() -> None:
    maps = [RNG.uniform(1, 1 + height, (6, 6)).astype(np.float32) for height in (0.5, 0.8, 1, 40)]
    low, second = min(values.min() for values in maps), sorted(values.max() for values in maps)[-2]
    assert common_scale(maps) == pytest.approx((low, low + 2 * (second - low)))
    assert common_scale(maps[:3]) == pytest.approx((low, second)), "maps alike are scaled by the highest"


def test_there_is_a_scale_where_maps_say_nothing() -> None:
    flat, peak = np.ones((2, 2), np.float32), np.array([[1, 5], [1, 1]], np.float32)
    assert common_scale([flat, flat]) == (1, 1)
    assert common_scale([flat, peak]) == (1, 5)
    assert common_scale([peak]) == (1, 5)


def test_pixel_map_uses_the_scale_of_the_category_and_clears_the_background() -> None:
    patch_map = RNG.uniform(2, 4, size=(5, 5))
    scores = pixel_map(patch_map, (20, 30), (1.0, 5.0))
    np.testing.assert_allclose(scores, (upsample(patch_map, (20, 30)) - 1) / 4, atol=1e-6)
    mask = np.zeros((10, 15), bool)
    mask[:5] = True
    masked = pixel_map(patch_map, (20, 30), (1.0, 5.0), mask)
    np.testing.assert_array_equal(masked[:10], scores[:10])
    assert not masked[10:].any()


@pytest.mark.parametrize(("seen", "rows", "columns"), [((1.0, 0.5), (0, 20), (10, 30)), ((0.4, 1.0), (6, 14), (0, 40))])
def test_a_map_of_the_middle_is_put_back_where_it_was(seen, rows, columns) -> None:
    patch_map = RNG.uniform(2, 4, size=(5, 5))
    found = pixel_map(patch_map, (20, 40), (1.0, 5.0), seen=seen)
    inside = (slice(*rows), slice(*columns))
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    np.testing.assert_allclose(found[inside], (upsample(patch_map, shape) - 1) / 4, atol=1e-6)
    found[inside] = 0
    assert not found.any()


def test_equal_scores_give_an_empty_map() -> None:
    assert not pixel_map(np.full((4, 4), 0.7), (8, 8), (0.7, 0.7)).any()


def naive_object_mask(image: np.ndarray) -> np.ndarray:
    """The rule pixel by pixel, without the circle."""
    height, width = image.shape[:2]
    side = height // 8
    colours = [
        image[(2 + i) * side : (3 + i) * side, (2 + j) * side : (3 + j) * side].reshape(-1, 3).mean(axis=0)
        for i in range(4)
        for j in range(4)
    ]
    mask = np.ones((height, width), bool)
    for y in range(height):
        for x in range(width):
            far = sum(np.linalg.norm(image[y, x] - colour) > 90 for colour in colours)
            mask[y, x] = far <= 0.9 * 16
    return mask


def test_object_mask_follows_the_rule() -> None:
    image = np.full((72, 72, 3), 250, np.uint8)
    image[10:62, 10:62] = (40, 60, 80)
    image = np.clip(image + RNG.integers(-20, 6, image.shape), 0, 255).astype(np.uint8)
    mask = object_mask(image)
    y, x = np.mgrid[:72, :72]
    inside = (y - 36) ** 2 + (x - 36) ** 2 < 31**2  # safely inside the circle of radius 4 · (72 // 9)
    outside = (y - 36) ** 2 + (x - 36) ** 2 > 33**2
    assert mask[inside].all()
    np.testing.assert_array_equal(mask[outside], naive_object_mask(image)[outside])
    assert not mask[0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (8, 200), (200, 9), (64, 64)])
def test_object_mask_of_small_and_narrow_images(shape) -> None:
    mask = object_mask(np.zeros((*shape, 3), np.uint8))
    assert mask.shape == shape
    assert mask.dtype == bool
    assert mask.all()


def test_object_mask_needs_three_channels() -> None:
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        object_mask(np.zeros((8, 8), np.uint8))


def test_maps_are_enlarged_between_corners_or_centres() -> None:
    ramp = np.array([[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(enlarged(ramp, 5, align_corners=True)[0], [0, 0.25, 0.5, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(enlarged(ramp, 4, align_corners=False)[0], [0, 0.25, 0.75, 1], atol=1e-6)

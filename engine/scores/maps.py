"""From patch scores to pixel maps, verdicts and regions."""

import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray


@functools.lru_cache(maxsize=64)
def _bilinear_matrix(source: int, target: int, covered: float | None) -> NDArray[np.float32]:
    """Return the weights [target, source] of a linear resize whose end samples coincide (align_corners=True).

    covered: how many of the source's samples, from the first one's border on, the target covers: samples then lie in
    the middle of what they stand for.
    """
    if covered is not None:
        position = ((np.arange(target) + 0.5) * (covered / target) - 0.5).clip(0, source - 1)
    else:
        position = np.linspace(0, source - 1, target) if target > 1 else np.zeros(1)
    left = np.minimum(position.astype(int), max(source - 2, 0))
    fraction = position - left
    weights = np.zeros((target, source))
    rows = np.arange(target)
    weights[rows, left] = 1 - fraction
    if source > 1:
        weights[rows, left + 1] = fraction
    matrix = weights.astype(np.float32)
    matrix.flags.writeable = False  # shared by every caller
    return matrix


def upsample(
    patch_map: ArrayLike, size: tuple[int, int], covered: tuple[float, float] | None = None
) -> NDArray[np.float32]:
    """Upsample one map [H, W] to size [h, w], bilinear with align_corners=True (MuSc).

    covered: rows and columns of the map that lie in the image, each in the middle of its own; the last may be cut.
    """
    scores = np.asarray(patch_map, np.float32)
    if scores.shape == tuple(size):
        return scores
    axes = zip(scores.shape, size, covered or (None, None), strict=True)
    rows, columns = (_bilinear_matrix(*axis) for axis in axes)
    upsampled: NDArray[np.float32] = (rows @ scores @ columns.T).astype(np.float32, copy=False)
    return upsampled


def enlarged(grid_map: NDArray[Any], size: int, align_corners: bool) -> NDArray[np.float32]:
    """Enlarge a map [g, g] to [size, size], bilinear: end samples coincide, or the centres of pixels are in line."""
    if align_corners:
        return upsample(grid_map, (size, size))
    wide: NDArray[np.float32] = np.asarray(
        cv2.resize(grid_map, (size, size), interpolation=cv2.INTER_LINEAR), np.float32
    )
    return wide


def object_mask(image_bgr: ArrayLike) -> NDArray[np.bool_]:
    """Tell the object from the background by colour (the challenge system's rule).

    image_bgr: [H, W, 3] uint8. A pixel is background when its colour is more than 90 away from more than 90 % of the
    mean colours of 4 × 4 central cells and it lies outside the central circle of radius 4·(H//9). Returns [H, W], True
    for the object.
    """
    image = np.asarray(image_bgr)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image_bgr must be [H, W, 3], got {image.shape}")
    height, width = image.shape[:2]
    side = height // 8
    cells = [
        image[(2 + i) * side : (3 + i) * side, (2 + j) * side : (3 + j) * side] for i in range(4) for j in range(4)
    ]
    colours = [cell.reshape(-1, 3).mean(axis=0) for cell in cells if cell.size]  # fewer where the image is narrow
    if not colours:
        return np.ones((height, width), bool)
    far = np.zeros((height, width), np.int32)
    rows = max(1, 2**20 // width)  # at once: in floats a whole image takes many times its bytes
    for start in range(0, height, rows):
        pixels = image[start : start + rows].astype(np.float32)
        for colour in colours:
            far[start : start + rows] += np.square(pixels - colour.astype(np.float32)).sum(axis=2) > 90.0**2
    circle = np.zeros((height, width), np.uint8)
    cv2.circle(circle, (width // 2, height // 2), (height // 9) * 4, 1, thickness=-1)
    return (far <= 0.9 * len(colours)) | (circle > 0)


def common_scale(maps: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Return which value of a category's patch maps [H, W] becomes 0 and which becomes 1.

    They are the lowest and the highest one, except that the highest map counts for at most twice what the next one
    reaches above the lowest value: one broken picture must not flatten all others.
    """
    low = min(float(values.min()) for values in maps)
    *_, second, highest = sorted([low, *(float(values.max()) for values in maps)])
    return low, min(highest, low + 2 * (second - low)) if second > low else highest


def pixel_map(
    patch_map: ArrayLike,
    size: tuple[int, int],
    scale: tuple[float, float],
    mask: NDArray[np.bool_] | None = None,
    seen: tuple[float, float] = (1.0, 1.0),
    covered: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """Upsample a patch map [H, W] to size [h, w] and map the scale to [0, 1], the background to 0.

    scale: lowest and highest patch score of the category. mask: [any, any], True for the object. seen: shares of height
    and width, in the middle, that the map is of; what lies outside is 0, since nothing speaks for a defect there.
    covered: see `upsample`.
    """
    low, high = scale
    height, width = (max(1, round(share * side)) for share, side in zip(seen, size, strict=True))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    enlarged = upsample(patch_map, (height, width), covered)
    as_it_is = mask is None and (*scale, height, width) == (0.0, 1.0, *size)
    if as_it_is and enlarged.min() >= 0 and enlarged.max() <= 1:
        return enlarged  # of a large image there is no second map
    scores: NDArray[np.float32] = enlarged - np.float32(low)  # a new one: the other may be the method's own
    if high > low:
        scores /= np.float32(high - low)
    else:
        scores[:] = 0
    if (height, width) != size:
        scores = np.pad(scores, ((top, size[0] - height - top), (left, size[1] - width - left)))
    if mask is not None:
        resized = cv2.resize(mask.astype(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
        scores[resized == 0] = 0.0
    np.clip(scores, 0.0, 1.0, out=scores)
    return scores

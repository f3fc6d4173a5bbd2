"""Launches of the product variants without a Gram in memory: per degree, in int8, and in tiles that serve all degrees.

fused: layer-normed tokens → pool_features → fused_max → interval average
int8:  layer-normed tokens → pool_features → int8_quantise → fused_max → winner_cosines → interval average
tiled: layer-normed tokens → pooled_norms → tiled_max → interval average

Each function queues one launch through `Device.launch`. Arrays may be views into larger ones as long as the patches
(and channels) of an image lie together: the distance from image to image is read off their strides.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from .device import DEVICE_ARRAY, MAX_SHARED_BYTES, int32

Launch = Callable[..., None]  # Device.launch

MAX_INT8_PATCHES = 1 << 16  # leaves an approximate cosine 7 bits of mantissa

# As in tile.h and fused.cu.
SPAN, STEP_BYTES, STAGES, THREADS = 128, 64, 3, 128
SHARED_BYTES = STAGES * 2 * SPAN * STEP_BYTES

# As in tiled.cu.
TILED_ROWS, TILED_COLUMNS, TILED_THREADS = 256, 128, 256
TILED_STAGES_BYTES = STAGES * (TILED_ROWS + TILED_COLUMNS) * STEP_BYTES
SLICE_BYTES = 4 * 32 * (TILED_COLUMNS + 8)

PATCH_WARPS = 4  # patches per block of the kernels with one warp per patch


def feature_stride(channels: int) -> int:
    """Return the channels of an fp16 feature filled up to whole steps of the fused product."""
    step = STEP_BYTES // 2
    return -(-channels // step) * step


def code_stride(channels: int) -> int:
    """Return the channels of int8 codes filled up to whole steps of the fused product."""
    return -(-channels // STEP_BYTES) * STEP_BYTES


def index_mask(patches: int) -> np.uint32:
    """Return the bits that hold the number of a winning patch."""
    mask: np.uint32 = np.uint32((1 << (patches - 1).bit_length()) - 1)
    return mask


def pool_features(
    launch: Launch,
    x: DEVICE_ARRAY,
    grid: tuple[int, int],
    degree: int,
    features: DEVICE_ARRAY,
    inverse: DEVICE_ARRAY,
    has_zero: DEVICE_ARRAY,
) -> None:
    """Queue the features of one degree and their inverse lengths.

    x: [B, P, C] fp16, layer-normed. Out: features [B, P, feature_stride(C)] fp16, inverse [B, P] float32, has_zero [B]
    bytes, zeroed before.
    """
    images, patches, channels = x.shape
    launch(
        "pool_features",
        (-(-patches // PATCH_WARPS), images),
        32 * PATCH_WARPS,
        (
            x,
            *int32(*grid, channels, degree // 2, features.shape[2]),
            features,
            step(features),
            inverse,
            step(inverse),
            has_zero,
            step(has_zero),
        ),
    )


def int8_quantise(
    launch: Launch, features: DEVICE_ARRAY, inverse: DEVICE_ARRAY, codes: DEVICE_ARRAY, weights: DEVICE_ARRAY
) -> None:
    """Queue the int8 codes of features [B, P, S] with inverse lengths [B, P].

    Out: codes [B, P, code_stride(S)] int8, weights [B, P] float32.
    """
    images, patches, stride = features.shape
    launch(
        "int8_quantise",
        (-(-patches // PATCH_WARPS), images),
        32 * PATCH_WARPS,
        (
            features,
            step(features),
            *int32(patches, stride, codes.shape[2]),
            inverse,
            step(inverse),
            codes,
            step(codes),
            weights,
            step(weights),
        ),
    )


def fused_max(
    launch: Launch,
    rows: DEVICE_ARRAY,
    column: DEVICE_ARRAY,
    row_weights: DEVICE_ARRAY,
    column_weights: DEVICE_ARRAY,
    best_rows: DEVICE_ARRAY | None,
    best_columns: DEVICE_ARRAY | None,
) -> None:
    """Queue raising the best cosines of one image with a run of others; None drops a direction.

    rows: [T, P, S] and column: [P, S], both fp16 features with inverse lengths as weights [T, P] and [P], or both int8
    codes with their weights. best_rows: [T, P] keys of the rows' patches, best_columns: [T, P] of the column's patches;
    with int8 codes keys of approximate winners, for `winner_cosines`.
    """
    images, patches, _ = rows.shape
    is_int8 = rows.dtype == np.int8
    launch(
        "fused_max_s8" if is_int8 else "fused_max_f16",
        ((-(-patches // SPAN)) ** 2, images),
        THREADS,
        (
            *_pairs(rows, column, row_weights, column_weights, best_rows, best_columns),
            *((index_mask(patches),) if is_int8 else ()),
        ),
        SHARED_BYTES,
    )


def tiled_max(
    launch: Launch,
    rows: DEVICE_ARRAY,
    column: DEVICE_ARRAY,
    grid: tuple[int, int],
    mask: int,
    row_inverse: DEVICE_ARRAY,
    column_inverse: DEVICE_ARRAY,
    best_rows: DEVICE_ARRAY | None,
    best_columns: DEVICE_ARRAY | None,
) -> None:
    """Queue raising the best cosines of one image with a run of others at every degree.

    rows: [T, P, S] and column: [P, S], layer-normed fp16 features. mask: bit k stands for degree 2k + 1. row_inverse:
    [T, R, P] and column_inverse: [R, P] float32 inverse lengths, packed. best_rows: [T, R, P] keys of the rows'
    patches, best_columns: [T, R, P] of the column's patches.
    """
    shape = tiled_shape(grid, mask)
    launch(
        "tiled_max",
        (shape.blocks, len(rows)),
        TILED_THREADS,
        (
            rows,
            step(rows),
            column,
            *int32(*grid, rows.shape[2]),
            row_inverse,
            column_inverse,
            best_rows,
            step(best_rows),
            best_columns,
            step(best_columns),
            *int32(mask, *shape.row_block, *shape.column_block),
        ),
        shape.shared_bytes,
    )


def winner_cosines(
    launch: Launch,
    rows: DEVICE_ARRAY,
    column: DEVICE_ARRAY,
    row_inverse: DEVICE_ARRAY,
    column_inverse: DEVICE_ARRAY,
    best_rows: DEVICE_ARRAY | None,
    best_columns: DEVICE_ARRAY | None,
) -> None:
    """Queue replacing approximate winners by their exact cosines.

    The arguments are those of `fused_max` with the fp16 features from which the codes were made.
    """
    images, patches, _ = rows.shape
    launch(
        "winner_cosines",
        (-(-patches // PATCH_WARPS), images),
        32 * PATCH_WARPS,
        (
            *_pairs(rows, column, row_inverse, column_inverse, best_rows, best_columns),
            index_mask(patches),
        ),
    )


@dataclass(frozen=True)
class TiledShape:
    """The launch of tiled.cu: patches that a block holds of either image at most, down and across, with their halo."""

    row_block: tuple[int, int]
    column_block: tuple[int, int]
    blocks: int  # per pair
    shared_bytes: int


@lru_cache
def tiled_shape(grid: tuple[int, int], mask: int) -> TiledShape:
    """Choose blocks of patches that fit a tile and shared memory, with the fewest tiles of a pair."""
    reach = mask.bit_length() - 1
    rows = {cut.blocks: cut for cut in sorted(_cuts(grid, reach, TILED_ROWS), key=_Cut.held, reverse=True)}
    columns = {cut.blocks: cut for cut in sorted(_cuts(grid, reach, TILED_COLUMNS), key=_Cut.own, reverse=True)}
    tiles = [
        (row.blocks * column.blocks, _summed_bytes(row, column), row.most, column.most)
        for row in rows.values()
        for column in columns.values()
        if SLICE_BYTES + _summed_bytes(row, column) <= MAX_SHARED_BYTES
    ]
    blocks, summed, row_block, column_block = min(tiles)
    return TiledShape(row_block, column_block, blocks, max(TILED_STAGES_BYTES, SLICE_BYTES + summed))


@dataclass(frozen=True)
class _Cut:
    """A patch grid in blocks that overlap by twice the reach."""

    blocks: int
    most: tuple[int, int]  # rows and columns that a block holds
    own_most: tuple[int, int]  # of which are its own

    def held(self) -> int:
        return math.prod(self.most)

    def own(self) -> int:
        return math.prod(self.own_most)


def _summed_bytes(rows: _Cut, columns: _Cut) -> int:
    """Count what box sums over column patches take: four of them to a vector."""
    return 16 * rows.held() * -(-columns.own() // 4)


def _cuts(grid: tuple[int, int], reach: int, patches: int) -> Iterator[_Cut]:
    """Yield the ways to cut a grid into blocks of so many patches at most."""
    axes: list[dict[int, tuple[int, int]]] = [{}, {}]  # [blocks] -> what each holds, and what is its own
    for axis, size in zip(axes, grid, strict=True):
        for held in range(min(2 * reach + 1, size), min(size, patches) + 1):
            whole = held == size
            blocks = 1 if whole else -(-(size - 2 * reach) // (held - 2 * reach))
            axis.setdefault(blocks, (held, held if whole else held - reach))
    for (down, (height, own_height)), (across, (width, own_width)) in product(*(axis.items() for axis in axes)):
        if height * width <= patches:
            yield _Cut(down * across, (height, width), (own_height, own_width))


def _pairs(
    rows: DEVICE_ARRAY,
    column: DEVICE_ARRAY,
    row_weights: DEVICE_ARRAY,
    column_weights: DEVICE_ARRAY,
    best_rows: DEVICE_ARRAY | None,
    best_columns: DEVICE_ARRAY | None,
) -> tuple[Any, ...]:
    """Give the kernel arguments of one image against a run of others."""
    return (
        rows,
        step(rows),
        column,
        *int32(*rows.shape[1:]),
        row_weights,
        step(row_weights),
        column_weights,
        best_rows,
        step(best_rows),
        best_columns,
        step(best_columns),
    )


def step(array: DEVICE_ARRAY | None) -> np.int64:
    """Return the entries from one image to the next."""
    entries: np.int64 = np.int64(0 if array is None else array.strides[0] // array.itemsize)
    return entries

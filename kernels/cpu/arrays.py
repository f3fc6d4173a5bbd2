"""Arrays on a CPU: memory that vector loads like, products, and tokens made into features by NumPy."""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zsad.kernels.reference import LAYER_NORM_EPS, ZERO_NORM

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]

Array = NDArray[np.float32]

CACHE_LINE = 64
HAS_TILES = _cpu is not None and bool(_cpu.instruction_sets("fp32_product"))
LEAST_TILED = 32  # rows for which splitting the other side pays


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Allocate an array that starts on a cache line; vector loads that straddle two take twice the time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def empty_gram(patches: int) -> Array:
    """Allocate a Gram [P, P] whose rows are filled up to whole cache lines, and with them to whole panels of int8."""
    floats = CACHE_LINE // 4
    return aligned_empty((patches, -(-patches // floats) * floats), np.float32)[:, :patches]


def multiply(left: Array, right: Array, out: Array) -> None:
    """Fill out [P, Q] with the dot products of left [P, C] and right [Q, C] in fp32, each array of contiguous rows."""
    if HAS_TILES and min(out.shape) >= LEAST_TILED:
        _cpu.fp32_product(left, right, out)
    else:
        np.matmul(left, right.T, out=out)


def product_bytes(rows: int, columns: int, channels: int) -> int:
    """Return what a thread keeps for products [rows, columns] beside them."""
    return _cpu.fp32_product_bytes(rows, columns, channels) if HAS_TILES else 0


def layer_normalise(tokens: Array) -> Array:
    """Remove the mean of all patches and channels and divide by their deviation; [P, C] -> [P, C]."""
    centred: Array = tokens - tokens.mean(dtype=np.float64).astype(np.float32)
    variance = np.vdot(centred, centred) / centred.size
    centred *= np.float32(1.0 / np.sqrt(variance + LAYER_NORM_EPS))
    return centred


def box_sum(x: Array, grid: tuple[int, int], degree: int) -> Array:
    """Add up the degree × degree neighbourhood of every patch, zero outside the grid; [P, C] -> [P, C]."""
    maps = x.reshape(*grid, -1)
    for axis in (0, 1):
        source = np.moveaxis(maps, axis, 0)
        maps = maps.copy()
        target = np.moveaxis(maps, axis, 0)
        for shift in range(1, min(degree // 2, grid[axis] - 1) + 1):
            target[shift:] += source[:-shift]
            target[:-shift] += source[shift:]
    return maps.reshape(x.shape)


def inverse_lengths(x: Array) -> Array:
    """Return 1 / length of every feature, 0 where there is none; [P, C] -> [P]."""
    lengths = np.sqrt(np.einsum("pc,pc->p", x, x))
    return np.where(lengths > ZERO_NORM, 1.0 / np.maximum(lengths, ZERO_NORM), 0.0).astype(np.float32)

"""How a CPU finds the best cosines of an image pair: Gram-once with the native pass, or NumPy alone."""

import importlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..reference import LAYER_NORM_EPS, ZERO_NORM

_cpu: Any
try:
    _cpu = importlib.import_module("._cpu", __name__)
except ImportError:  # installed without a working compiler
    _cpu = None

Array = NDArray[np.float32]


class PairKernel(Protocol):
    """Finds, for a pair of images and every degree, each patch's largest cosine with any patch of the other image."""

    feature_copies: int  # F, feature arrays per image

    def prepare(self, tokens: Array, features: Array, inverse: Array) -> None:
        """Fill features [F, P, C] and inverse lengths [R, P] (0 for a zero feature) from tokens [P, C]."""

    def best_cosines(
        self,
        left: Array,
        right: Array,
        inverse_left: Array,
        inverse_right: Array,
        tile: Array,
        out: tuple[Array, Array],
    ) -> float:
        """Fill out, the best cosines [R, P] of both images, using tile [P, P]; return the seconds inside BLAS."""


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


class GramOnce:
    """One product per pair serves every degree; the native pass filters the tile and takes both maxima."""

    feature_copies = 1

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int]) -> None:
        self.grid, self.degrees = grid, list(degrees)

    def prepare(self, tokens: Array, features: Array, inverse: Array) -> None:
        features[0] = layer_normalise(tokens)
        for r, degree in enumerate(self.degrees):
            inverse[r] = inverse_lengths(box_sum(features[0], self.grid, degree))

    def best_cosines(
        self,
        left: Array,
        right: Array,
        inverse_left: Array,
        inverse_right: Array,
        tile: Array,
        out: tuple[Array, Array],
    ) -> float:
        start = time.perf_counter()
        np.matmul(left[0], right[0].T, out=tile)
        seconds = time.perf_counter() - start
        _cpu.tile_pass(tile, self.grid, self.degrees, inverse_left, inverse_right, *out)
        return seconds


class ProductPerDegree:
    """NumPy alone: one product per degree on filtered unit features.

    Filtering the tile with array operations would cost more than the products it saves.
    """

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int]) -> None:
        self.grid, self.degrees = grid, list(degrees)
        self.feature_copies = len(self.degrees)

    def prepare(self, tokens: Array, features: Array, inverse: Array) -> None:
        normalised = layer_normalise(tokens)
        for r, degree in enumerate(self.degrees):
            pooled = box_sum(normalised, self.grid, degree)
            inverse[r] = inverse_lengths(pooled)
            np.multiply(pooled, inverse[r, :, None], out=features[r])

    def best_cosines(
        self,
        left: Array,
        right: Array,
        inverse_left: Array,
        inverse_right: Array,
        tile: Array,
        out: tuple[Array, Array],
    ) -> float:
        seconds = 0.0
        for r in range(len(self.degrees)):
            start = time.perf_counter()
            np.matmul(left[r], right[r].T, out=tile)
            seconds += time.perf_counter() - start
            tile.max(axis=1, out=out[0][r])
            tile.max(axis=0, out=out[1][r])
        return seconds


def native_pass_covers(degrees: Sequence[int]) -> bool:
    """Tell whether the native pass was built and has these degrees."""
    return _cpu is not None and bool(max(degrees) <= _cpu.MAX_DEGREE)


def pair_kernel(grid: tuple[int, int], degrees: Sequence[int]) -> PairKernel:
    """Choose the fastest kernel that this installation has for these degrees."""
    return GramOnce(grid, degrees) if native_pass_covers(degrees) else ProductPerDegree(grid, degrees)

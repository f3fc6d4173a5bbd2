"""How a CPU finds the best cosines of an image pair: Gram-once in fp32 or int8 with the native pass, or NumPy alone."""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zsad.kernels.reference import LAYER_NORM_EPS, ZERO_NORM

_cpu: Any
try:
    _cpu = importlib.import_module("._cpu", __name__)
except ImportError:  # installed without a working compiler
    _cpu = None

Array = NDArray[np.float32]
Prepare = Callable[[Array, NDArray[Any], Array], None]  # tokens, features, inverse lengths

CACHE_LINE = 64
MEAN_IMAGES = 8  # from which int8 takes the mean token of a layer


class PairKernel(Protocol):
    """Finds, for a pair of images and every degree, each patch's largest cosine with any patch of the other image."""

    degrees: tuple[int, ...]
    feature_copies: int  # fp32 feature arrays [P, C] that an image takes at most

    def feature_layout(self, patches: int, channels: int) -> tuple[tuple[int, ...], DTypeLike]:
        """Return shape and type of one image's features."""

    def start_layer(self, tokens: Array) -> None:
        """Learn from the tokens [N, P, C] of a layer what `prepare` has to know about all of its images."""

    def prepare(self, tokens: Array, features: NDArray[Any], inverse: Array) -> None:
        """Fill the features and their inverse lengths [R, P] (0 for a zero feature) from tokens [P, C]."""

    def best_cosines(
        self,
        left: NDArray[Any],
        right: NDArray[Any],
        inverse_left: Array,
        inverse_right: Array,
        tile: Array,
        out: tuple[Array, Array],
    ) -> float:
        """Fill out, the best cosines [R, P] of both images (int8: keys), using tile [P, P].

        Returns the seconds inside the product.
        """


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Allocate an array that starts on a cache line; vector loads that straddle two take twice the time."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def empty_tile(patches: int) -> Array:
    """Allocate a tile [P, P] whose rows are filled up to whole cache lines, and with them to whole panels of int8."""
    floats = CACHE_LINE // 4
    return aligned_empty((patches, -(-patches // floats) * floats), np.float32)[:, :patches]


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
    keys = False  # whether the maxima also name the winning patch

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int]) -> None:
        self.grid, self.degrees = grid, tuple(degrees)

    def feature_layout(self, patches: int, channels: int) -> tuple[tuple[int, ...], DTypeLike]:
        return (patches, channels), np.float32

    def start_layer(self, tokens: Array) -> None:
        pass

    def prepare(self, tokens: Array, features: NDArray[Any], inverse: Array) -> None:
        features[:] = layer_normalise(tokens)
        _cpu.pool(features, self.grid, self.degrees, ZERO_NORM, inverse)

    def multiply(self, left: NDArray[Any], right: NDArray[Any], tile: Array) -> None:
        """Fill tile [P, P] with the products of two images' features."""
        np.matmul(left, right.T, out=tile)

    def best_cosines(
        self,
        left: NDArray[Any],
        right: NDArray[Any],
        inverse_left: Array,
        inverse_right: Array,
        tile: Array,
        out: tuple[Array, Array],
    ) -> float:
        start = time.perf_counter()
        self.multiply(left, right, tile)
        seconds = time.perf_counter() - start
        _cpu.tile_pass(tile, self.grid, self.degrees, inverse_left, inverse_right, *out, keys=self.keys)
        return seconds


class Int8GramOnce(GramOnce):
    """Gram-once with an int8 product, which only chooses the winners; their distances are measured again in fp32.

    Tokens are quantised around the layer's mean token with one scale each. The int32 sums, scaled back, are an fp32
    Gram tile with a cosine error of a few 1e-4, so that one product and the same pass still serve every degree: a
    product per degree would take longer than the pass that it saves. The pass returns keys: 1 − cosine, with the
    winner's patch number in the lowest bits of the mantissa, which costs no memory and next to no time.
    `measure_winners` then replaces what was selected by exact cosines of unit features.
    """

    feature_copies = 1  # the codes take a quarter of it, the unit features of one degree all of it
    keys = True

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int]) -> None:
        super().__init__(grid, degrees)
        self.mean: Array = np.zeros(0, np.float32)  # [C] of the present layer

    def feature_layout(self, patches: int, channels: int) -> tuple[tuple[int, ...], DTypeLike]:
        return (int(_cpu.int8_bytes(patches, channels)),), np.uint8

    def start_layer(self, tokens: Array) -> None:
        # Any vector gives the same products up to rounding, and a mean over some images leaves little to round.
        sample = tokens[:: -(-len(tokens) // MEAN_IMAGES)]
        self.mean = np.mean([layer_normalise(np.asarray(image)).mean(axis=0) for image in sample], axis=0)

    def prepare(self, tokens: Array, features: NDArray[Any], inverse: Array) -> None:
        normalised = layer_normalise(tokens)
        _cpu.pool(normalised, self.grid, self.degrees, ZERO_NORM, inverse)
        _cpu.int8_quantise(normalised, self.mean, features)

    def prepare_unit(self, degree: int) -> Prepare:
        """Return what fills the unit features [P, C] of one degree and their inverse lengths [1, P]."""

        def prepare(tokens: Array, features: NDArray[Any], inverse: Array) -> None:
            _cpu.pool(layer_normalise(tokens), self.grid, [degree], ZERO_NORM, inverse, features[None])

        return prepare

    def multiply(self, left: NDArray[Any], right: NDArray[Any], tile: Array) -> None:
        _cpu.int8_multiply(left, right, tile)


def winning_patches(keys: Array, patches: int) -> NDArray[np.int32]:
    """Read the patch numbers out of keys of any shape."""
    numbers: NDArray[np.int32] = (keys.view(np.uint32) & np.uint32(_cpu.index_mask(patches))).astype(np.int32)
    return numbers


def measure_winners(
    left: Array, right: Array, first: int, image: NDArray[np.int32], patch: NDArray[np.int32], cosines: Array
) -> None:
    """Fill in the exact cosines of those winners whose image is among the resident ones.

    left: [P, C] and right: [B, P, C], unit features of one image and of the images from number `first` on; image and
    patch: [K, P], the winners of the left image's patches; cosines: [K, P].
    """
    _cpu.winner_cosines(left, right, first, image, patch, cosines)


class ProductPerDegree:
    """NumPy alone: one product per degree on filtered unit features.

    Filtering the tile with array operations would cost more than the products it saves.
    """

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int]) -> None:
        self.grid, self.degrees = grid, tuple(degrees)
        self.feature_copies = len(self.degrees)

    def feature_layout(self, patches: int, channels: int) -> tuple[tuple[int, ...], DTypeLike]:
        return (len(self.degrees), patches, channels), np.float32

    def start_layer(self, tokens: Array) -> None:
        pass

    def prepare(self, tokens: Array, features: NDArray[Any], inverse: Array) -> None:
        normalised = layer_normalise(tokens)
        for r, degree in enumerate(self.degrees):
            pooled = box_sum(normalised, self.grid, degree)
            inverse[r] = inverse_lengths(pooled)
            np.multiply(pooled, inverse[r, :, None], out=features[r])

    def best_cosines(
        self,
        left: NDArray[Any],
        right: NDArray[Any],
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


def pair_kernel(grid: tuple[int, int], degrees: Sequence[int], precision: str = "fp32") -> PairKernel:
    """Choose the fastest kernel that this installation has for these degrees.

    precision: "fp32", or "int8", which pays on processors with AVX-512 VNNI. Raises ValueError where the native kernel
    that int8 needs is missing or too small.
    """
    native = native_pass_covers(degrees)
    if precision == "fp32":
        return GramOnce(grid, degrees) if native else ProductPerDegree(grid, degrees)
    if precision != "int8":
        raise ValueError(f"precision must be fp32 or int8 on a CPU, not {precision!r}")
    if not native:
        raise ValueError(
            "precision='int8' needs the native kernel, which was not built or lacks a degree of "
            f"{tuple(degrees)}; use precision='fp32', or install a C++17 compiler and reinstall zsad"
        )
    if math.prod(grid) > _cpu.MAX_KEY_PATCHES:
        raise ValueError(
            f"precision='int8' takes at most {_cpu.MAX_KEY_PATCHES} patches per image, not {math.prod(grid)}; "
            "use precision='fp32'"
        )
    return Int8GramOnce(grid, degrees)

"""How a CPU finds the best cosines of image pairs at every degree.

    Bounded               exact products of unit features, of which bounds from short codes leave few to be taken
    GramOnce              one fp32 product serves all degrees, and the native pass reduces the Gram
    Int8GramOnce          the same from an int8 product, which only chooses the winners; they are measured again in fp32
    Int8ProductPerDegree  where tiles are multiplied, or patches few: an int8 product per degree; winners as before
    ProductPerDegree      NumPy alone: a product for each degree, and features per degree

With a window patches are compared with those near their own place only. Products further apart are left out where that
is simple: those of grid rows that no patch of a strip of grid rows meets, not even through its neighbourhood.

The plan counts what a comparer takes (plan.py); a scorer prepares images and compares pairs through it (scorer.py), all
degrees in one turn or one in each.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.reference import ZERO_NORM

from .arrays import CACHE_LINE, HAS_TILES, Array, box_sum, inverse_lengths, layer_normalise, multiply, product_bytes
from .bounds import HEAD, LEAD, LEAST_CHANNELS, Basis, taken_share

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]


MEAN_IMAGES = 8  # from which int8 takes the mean token of a layer
FEW_CHANNELS = 512  # up to which a product of tiles takes less than the pass that it saves
FEW_PATCHES = 100  # up to which a product per degree, which is the more exact, takes no time to speak of
BASIS_IMAGES, BASIS_ROWS = 16, 2048  # of a layer that a basis is found from: images, and features of all of them
LEAST_BOUNDED = {"fp32": 10, "int8": 12}  # images from which finding a basis is worth it
MOST_TAKEN = {"fp32": 0.03, "int8": 0.008}  # estimated share of products up to which taking them by bounds pays

Layout = tuple[tuple[int, ...], type[np.generic]]


@dataclass(frozen=True)
class Features:
    """What comparing reads of one image."""

    inverse: Array  # [R, P] inverse lengths of a turn's degrees, 0 for a zero feature
    array: NDArray[Any]  # as the comparer lays it out


Prepare = Callable[[Array, Features], None]  # fills features from tokens [P, C]


@dataclass(frozen=True)
class Winners:
    """Winners of one image and degree: those of the chosen ranks, or of all other images in their order."""

    image: NDArray[np.int32]  # [K, P]
    patch: NDArray[np.int32]  # [K, P]
    cosines: Array  # [K, P], filled in when they are measured


class Comparer(ABC):
    """Finds the best cosines of image pairs at every degree."""

    description: ClassVar[str]
    precision: ClassVar[str] = "fp32"  # of its products

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int], window: int | None = None) -> None:
        """window: rows and columns that compared patches are apart at most; None: any number."""
        self.grid, self.degrees, self.window = grid, tuple(degrees), window

    @property
    def turns(self) -> list[slice]:
        """The positions of the degrees that are prepared and compared together."""
        return [slice(0, len(self.degrees))]

    @staticmethod
    @abstractmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        """Return shape and type of one image's features."""

    @staticmethod
    def product_bytes(patches: int, channels: int) -> int:
        """Return what each worker keeps for products beside the Gram."""
        return 0

    @classmethod
    def feature_bytes(cls, patches: int, channels: int, degrees: int) -> int:
        """Return what an image's features take at most, without their inverse lengths."""
        shape, dtype = cls.layout(patches, channels, degrees)
        return math.prod(shape) * np.dtype(dtype).itemsize

    def start_layer(self, tokens: Array) -> None:  # noqa: B027
        """Learn from the tokens [N, P, C] of a layer what `prepare` has to know about all of its images."""

    def start_turn(self, degrees: slice) -> None:  # noqa: B027
        """Prepare and compare what follows at these positions of the degrees."""

    @abstractmethod
    def prepare(self, tokens: Array, features: Features) -> None:
        """Fill an image's features of a turn from its tokens [P, C]."""

    @abstractmethod
    def compare(self, left: Features, right: Features, gram: Array, best: tuple[Array, Array]) -> float:
        """Fill best, the largest cosine [R, P] of each patch of left and right with a patch of the other image.

        R: a turn's degrees.

        With int8 they are keys. gram: [P, P], for what the product leaves. Returns the seconds inside the product.
        """


class Bounded(Comparer):
    """Exact cosines of unit features, of which bounds leave few to be taken (bounds.py), a degree at a time.

    Patches of one product lie close to a few dozen directions, and few pairs of them come near the nearest.
    """

    description = "few exact products, by bounds from short codes"

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int], window: int | None = None) -> None:
        super().__init__(grid, degrees, window)
        self.bases: list[Basis] = []  # of the present layer's degrees
        self.position = 0  # of the present turn's degree

    @property
    def turns(self) -> list[slice]:
        return [slice(r, r + 1) for r in range(len(self.degrees))]

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (_unit_bytes(patches, channels) + _cpu.pair_bytes(patches, HEAD, LEAD),), np.uint8

    @staticmethod
    def product_bytes(patches: int, channels: int) -> int:
        # Unit features less their mean, and heads, while they are prepared. Bounds of products take half of the memory
        # that the plan has for a Gram.
        return 4 * patches * (channels + 2 * HEAD)

    @staticmethod
    def basis_bytes(patches: int, channels: int, degrees: int) -> int:
        """Return what finding the bases of a layer takes at most."""
        rows = BASIS_ROWS + BASIS_IMAGES  # features of all degrees, twice while they are put together, and centred
        features = (2 * degrees + 1) * rows + 4 * channels
        # Two images are looked at, with the bounds of a part of their products.
        return 4 * (channels * (features + 2 * degrees * patches) + patches * patches // 4)

    def pays(self, tokens: Array, most: float, pool: ThreadPoolExecutor) -> bool:
        """Find bases for the tokens [N, P, C] of a layer, and tell whether their bounds leave few enough products."""
        images = _sample(tokens, BASIS_IMAGES)
        step = max(1, len(images) * tokens.shape[1] // BASIS_ROWS)

        def some(image: Array) -> Array:
            chosen: Array = unit_features(image, self.grid, self.degrees)[:, ::step].copy()  # [R, p, C]
            return chosen

        rows = np.concatenate(list(pool.map(some, images)), axis=1)
        self.bases = list(pool.map(Basis.of, rows))
        first, last = (unit_features(images[at], self.grid, self.degrees[:1])[0] for at in (0, -1))
        return taken_share(self.bases[0], first, last) <= most

    def start_turn(self, degrees: slice) -> None:
        self.position = degrees.start

    def prepare(self, tokens: Array, features: Features) -> None:
        units, bounds = self._parts(features, *tokens.shape)
        _cpu.pool(
            layer_normalise(tokens),
            self.grid,
            [self.degrees[self.position]],
            ZERO_NORM,
            features.inverse,
            units[None],
        )
        self.bases[self.position].bound_image(units, bounds)

    def compare(self, left: Features, right: Features, gram: Array, best: tuple[Array, Array]) -> float:
        start, patches = time.perf_counter(), best[0].shape[1]
        channels = (len(left.array) - _cpu.pair_bytes(patches, HEAD, LEAD)) // (4 * patches)
        (units, bounds), (others, of_others) = (self._parts(side, patches, channels) for side in (left, right))
        _cpu.bounded_pair(units, others, bounds, of_others, HEAD, LEAD, best[0][0], best[1][0])
        return time.perf_counter() - start

    @staticmethod
    def _parts(features: Features, patches: int, channels: int) -> tuple[Array, NDArray[np.uint8]]:
        """Return the unit features [P, C] of an image and their bounds."""
        units: Array = features.array[: 4 * patches * channels].view(np.float32).reshape(patches, channels)
        return units, features.array[_unit_bytes(patches, channels) :]


def _unit_bytes(patches: int, channels: int) -> int:
    """Return what unit features take in whole cache lines."""
    return -(-4 * patches * channels // CACHE_LINE) * CACHE_LINE


class GramOnce(Comparer):
    """One product per pair serves every degree; the native pass filters the Gram and takes both maxima."""

    description = "one product for all degrees"
    keys: ClassVar[bool] = False  # whether the maxima also name the winning patch

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int], window: int | None = None) -> None:
        super().__init__(grid, degrees, window)
        # Sums of products are taken over neighbourhoods of both patches.
        self.rows_apart = None if window is None else window + 2 * (max(degrees) // 2)
        self.blocks = gram_blocks(grid, self.rows_apart)

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (patches, channels), np.float32

    @staticmethod
    def product_bytes(patches: int, channels: int) -> int:
        return product_bytes(patches, patches, channels)

    def prepare(self, tokens: Array, features: Features) -> None:
        features.array[:] = layer_normalise(tokens)
        _cpu.pool(features.array, self.grid, self.degrees, ZERO_NORM, features.inverse)

    def multiply(self, left: NDArray[Any], right: NDArray[Any], gram: Array) -> None:
        """Fill gram [P, P], as far as it is read, with the products of two images' features."""
        for rows, columns in self.blocks:
            multiply(left[rows], right[columns], gram[rows, columns])

    def compare(self, left: Features, right: Features, gram: Array, best: tuple[Array, Array]) -> float:
        start = time.perf_counter()
        self.multiply(left.array, right.array, gram)
        seconds = time.perf_counter() - start
        _cpu.gram_pass(
            gram,
            self.grid,
            self.degrees,
            left.inverse,
            right.inverse,
            *best,
            keys=self.keys,
            window=self.window,
            narrow=self.keys,  # of approximate products the pass may be so too
        )
        return seconds


class Int8(Comparer):
    """Int8 products only choose the winners; their distances are measured again in fp32.

    Vectors are quantised around their mean in the layer with one scale each, which leaves a cosine error of a few 1e-4,
    the less the nearer two of them are. What comparing finds are keys: 1 − cosine, with the winner's patch number in
    the lowest bits of the mantissa, which costs no memory and next to no time. `measure_winners` then replaces what was
    selected by exact cosines of unit features.
    """

    precision = "int8"

    @classmethod
    def feature_bytes(cls, patches: int, channels: int, degrees: int) -> int:
        codes = super().feature_bytes(patches, channels, degrees)
        return max(codes, 4 * patches * channels)  # the unit features of one degree take the place of the codes

    def prepare_unit(self, degree: int) -> Prepare:
        """Return what fills the unit features [P, C] of one degree and their inverse lengths [1, P]."""

        def prepare(tokens: Array, features: Features) -> None:
            normalised = layer_normalise(tokens)
            _cpu.pool(normalised, self.grid, [degree], ZERO_NORM, features.inverse, features.array[None])

        return prepare

    def measure_winners(self, left: Array, right: Array, first: int, winners: Winners) -> None:
        """Fill in the exact cosines of those winners whose image is among the resident ones.

        left: [P, C] and right: [B, P, C], unit features of one image and of the images from number `first` on;
        winners: of the left image's patches.
        """
        _cpu.winner_cosines(left, right, first, winners.image, winners.patch, winners.cosines)


class Int8GramOnce(Int8, GramOnce):
    """Gram-once with an int8 product.

    The int32 sums of tokens' codes, scaled back, are an fp32 Gram, so that one product and the same pass still serve
    every degree: where products are not much faster than the pass, one per degree would take longer than the pass that
    it saves. With AVX-512 the pass adds up in 16 bits where the tokens' lengths allow it, which adds typically 1e-4 to
    the error of a cosine, and at most a few 1e-3.
    """

    description = "one int8 product for all degrees, its winners measured in fp32"
    keys = True

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int], window: int | None = None) -> None:
        super().__init__(grid, degrees, window)
        self.mean: Array = np.zeros(0, np.float32)  # [C] of the present layer

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (_cpu.int8_bytes(patches, channels),), np.uint8

    @staticmethod
    def product_bytes(patches: int, channels: int) -> int:
        return 0

    def start_layer(self, tokens: Array) -> None:
        self.mean = np.mean([layer_normalise(image).mean(axis=0) for image in _sample(tokens)], axis=0)

    def prepare(self, tokens: Array, features: Features) -> None:
        normalised = layer_normalise(tokens)
        _cpu.pool(normalised, self.grid, self.degrees, ZERO_NORM, features.inverse)
        near = self.window is None  # what is nearest within a window may be far
        _cpu.int8_quantise(normalised, self.mean, features.array, near=near)

    def multiply(self, left: NDArray[Any], right: NDArray[Any], gram: Array) -> None:
        apart = None if self.rows_apart is None else (self.rows_apart + 1) * self.grid[1] - 1
        _cpu.int8_multiply(left, right, gram, apart)


class Int8ProductPerDegree(Int8):
    """An int8 product of unit features per degree, which is never written: both maxima are taken as it comes.

    Where the processor multiplies tiles such a product takes less time than the pass that it saves, unless tokens are
    long. A degree's features are rounded by themselves, so that means of many tokens are off as much as single tokens.
    """

    description = "an int8 product per degree, its winners measured in fp32"

    def __init__(self, grid: tuple[int, int], degrees: Sequence[int], window: int | None = None) -> None:
        super().__init__(grid, degrees, window)
        self.means: Array = np.zeros((0, 0), np.float32)  # [R, C] of the present layer

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (degrees, _cpu.int8_bytes(patches, channels)), np.uint8

    @staticmethod
    def product_bytes(patches: int, channels: int) -> int:
        # Unit features before they are quantised, codes that are filled up, and the best of 16 lanes so far.
        return patches * (5 * channels + 4 * 16)

    def start_layer(self, tokens: Array) -> None:
        images = [unit_features(image, self.grid, self.degrees).mean(axis=1) for image in _sample(tokens)]
        self.means = np.mean(images, axis=0)

    def prepare(self, tokens: Array, features: Features) -> None:
        normalised = layer_normalise(tokens)
        unit = np.empty((1, *tokens.shape), np.float32)
        for r, degree in enumerate(self.degrees):
            _cpu.pool(normalised, self.grid, [degree], ZERO_NORM, features.inverse[r : r + 1], unit)
            _cpu.int8_quantise(unit[0], self.means[r], features.array[r], near=True)

    def compare(self, left: Features, right: Features, gram: Array, best: tuple[Array, Array]) -> float:
        start = time.perf_counter()
        _cpu.int8_nearest(left.array, right.array, *best)
        return time.perf_counter() - start


class ProductPerDegree(Comparer):
    """NumPy alone: one product per degree on filtered unit features.

    Filtering the Gram with array operations would cost more than the products it saves.
    """

    description = "a product per degree"

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (degrees, patches, channels), np.float32

    def prepare(self, tokens: Array, features: Features) -> None:
        normalised = layer_normalise(tokens)
        for r, degree in enumerate(self.degrees):
            pooled = box_sum(normalised, self.grid, degree)
            features.inverse[r] = inverse_lengths(pooled)
            np.multiply(pooled, features.inverse[r, :, None], out=features.array[r])

    def compare(self, left: Features, right: Features, gram: Array, best: tuple[Array, Array]) -> float:
        seconds, width = 0.0, self.grid[1]
        best[1][:] = -np.inf
        for r in range(len(self.degrees)):
            for rows, columns in strips(self.grid, self.window, 1 if self.window is not None else self.grid[0]):
                start, block = time.perf_counter(), gram[rows, columns]
                np.matmul(left.array[r][rows], right.array[r][columns].T, out=block)
                seconds += time.perf_counter() - start
                if self.window is not None:
                    apart = np.abs(np.subtract.outer(np.arange(width), np.arange(width)))  # [left, right], in columns
                    np.copyto(block.reshape(width, -1, width), -np.inf, where=(apart > self.window)[:, None])
                block.max(axis=1, out=best[0][r, rows])
                np.maximum(best[1][r, columns], block.max(axis=0), out=best[1][r, columns])
        return seconds


def strips(grid: tuple[int, int], reach: int | None, height: int) -> list[tuple[slice, slice]]:
    """Cut an image into strips of grid rows: the patches of each, and those at most `reach` rows away; None: all."""
    rows, columns = grid
    reach = rows if reach is None else reach
    return [
        (
            slice(first * columns, min(first + height, rows) * columns),
            slice(max(first - reach, 0) * columns, min(first + height + reach, rows) * columns),
        )
        for first in range(0, rows, height)
    ]


def gram_blocks(grid: tuple[int, int], reach: int | None) -> list[tuple[slice, slice]]:
    """Return the blocks of a Gram that hold the products of patches at most `reach` grid rows apart; None: all."""
    # Higher strips hold more that is not read, flatter ones make small products, which take longer for their size.
    return strips(grid, reach, grid[0] if reach is None or 2 * reach >= grid[0] else max(reach, 3))


def _sample(tokens: Array, count: int = MEAN_IMAGES) -> list[Array]:
    """Return up to so many images [P, C] of a layer, from all over it.

    Any mean gives the same int8 products up to rounding, and one over some images leaves little to round.
    """
    return [np.asarray(image) for image in tokens[:: -(-len(tokens) // count)]]


def unit_features(tokens: Array, grid: tuple[int, int], degrees: Sequence[int]) -> Array:
    """Return what is compared of one layer of an image: features of unit length, [R, P, C], from tokens [P, C].

    Features without a direction are zero.
    """
    features = Features(
        np.empty((len(degrees), len(tokens)), np.float32), np.empty((len(degrees), *tokens.shape), np.float32)
    )
    if native_pass_covers(degrees):
        _cpu.pool(layer_normalise(tokens), grid, list(degrees), ZERO_NORM, features.inverse, features.array)
    else:
        ProductPerDegree(grid, degrees).prepare(tokens, features)
    return features.array


def winning_patches(keys: Array, patches: int) -> NDArray[np.int32]:
    """Read the patch numbers out of keys of any shape."""
    numbers: NDArray[np.int32] = (keys.view(np.uint32) & np.uint32(_cpu.index_mask(patches))).astype(np.int32)
    return numbers


def native_pass_covers(degrees: Sequence[int]) -> bool:
    """Tell whether the native pass was built and has these degrees."""
    return _cpu is not None and max(degrees) <= _cpu.MAX_DEGREE


def bounds_may_pay(images: int, channels: int, comparer: type[Comparer], window: int | None) -> bool:
    """Tell whether it is worth looking if bounds spare most products of a layer; comparer: what runs otherwise."""
    if _cpu is None or window is not None or comparer is ProductPerDegree or comparer is Int8ProductPerDegree:
        return False
    return images >= LEAST_BOUNDED[comparer.precision] and channels >= LEAST_CHANNELS


def choose_comparer(
    precision: str, degrees: Sequence[int], patches: int, channels: int, window: int | None = None
) -> type[Comparer]:
    """Choose the fastest comparer that this installation has for these degrees.

    precision: "fp32", or "int8", which pays on processors with AVX-512 VNNI. Raises ValueError for another one, where
    the native kernel that int8 needs is missing or too small, and for more patches than int8 can number.
    """
    native = native_pass_covers(degrees)
    if precision == "fp32":
        return GramOnce if native else ProductPerDegree
    if precision != "int8":
        raise ValueError(f"precision {precision!r} is not available on a CPU; use precision fp32 or int8")
    if not native:
        raise ValueError(
            "precision int8 needs the native kernel, which was not built or lacks a degree of "
            f"{tuple(degrees)}; use precision fp32, or install a C++17 compiler and reinstall zsad"
        )
    if patches > _cpu.MAX_KEY_PATCHES:
        raise ValueError(
            f"precision int8 takes at most {_cpu.MAX_KEY_PATCHES} patches per image, not {patches}; use precision fp32"
        )
    fast = patches <= FEW_PATCHES or (HAS_TILES and channels <= FEW_CHANNELS)
    return Int8ProductPerDegree if fast and window is None else Int8GramOnce

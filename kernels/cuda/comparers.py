"""How a device finds the best cosines of image pairs at every degree.

    GramOnce              one fp16 product (cuBLAS) serves all degrees, and filter_max reduces the Gram
    TiledProduct          the same in tiles with a halo, which are filtered and reduced on the spot: no Gram in memory
    ProductPerDegree      an fp16 product for each degree takes its maxima on the spot: no Gram, but features per degree
    Int8ProductPerDegree  the same in int8, which only chooses the winners; their cosines are measured in fp16

The plan counts what a comparer takes (plan.py); a scorer prepares images and queues pairs through it (scorer.py).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from . import variants
from .card import Card
from .device import DEVICE_ARRAY, MAX_SHARED_BYTES, Device, filter_max_kernel, int32

STAGED_IMAGES = 8  # prepared together

# As in filter_max.cu.
OWN_ROWS = 4
RESERVED_BYTES = 1 << 10  # of a multiprocessor's shared memory, for each of its blocks

Products = Literal["gram", "fused", "tiled"]

# [compute capability] -> the faster products in fp16. Nothing has been measured on a GPU yet, so "gram" everywhere. The
# estimate for Hopper: at P 1369 and C 1024 a fused product reads about 62 MB of L2 per pair, which caps it at half of
# the tensor peak, and there is one for every degree; what tiled ones pay for the halo stands in tiled.cu.
# bench/mutual_scoring_cuda.py measures all.
FASTER: dict[str, Products] = {"8.0": "gram", "8.6": "gram", "8.9": "gram", "9.0": "gram", "12.0": "gram"}

Layout = tuple[tuple[tuple[int, ...], Any], ...]


@dataclass(frozen=True)
class Features:
    """What comparing reads of one image, or of several with one more dimension in front."""

    inverse: DEVICE_ARRAY  # [R, P] float32: inverse lengths, 0 for a zero feature
    arrays: tuple[DEVICE_ARRAY, ...]  # as the comparer lays them out

    def of(self, at: int | slice) -> "Features":
        """Return those of an image, or of a run of images."""
        return Features(self.inverse[at], tuple(array[at] for array in self.arrays))


class Comparer(ABC):
    """Finds the best cosines of image pairs at every degree on one device."""

    description: ClassVar[str]

    def __init__(
        self,
        device: Device,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        pairs: int,
        window: int | None = None,
    ) -> None:
        """degrees: distinct and ascending. pairs: image pairs that a call of `compare` gets at most.

        window: rows and columns that compared patches are apart at most, None for any number. With one, zero features
        are told by the keys: they have cosine 1/2 with other features and 1 with each other.
        """
        self.device, self.grid, self.degrees, self.window = device, grid, degrees, window

    @staticmethod
    @abstractmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        """Return shape and type of one image's arrays beside its inverse lengths."""

    @staticmethod
    @abstractmethod
    def gram_bytes(patches: int) -> int:
        """Return what a pair takes in each of two workspaces; 0 where there are none."""

    @staticmethod
    @abstractmethod
    def scratch_bytes(patches: int, channels: int) -> int:
        """Return what preparing takes beside the features."""

    @abstractmethod
    def tokens(self, images: Features) -> DEVICE_ARRAY:
        """Return where `prepare` wants the layer-normed tokens of at most STAGED_IMAGES images: [B, P, C] fp16."""

    @abstractmethod
    def prepare(self, images: Features, has_zero: DEVICE_ARRAY) -> None:
        """Queue filling the features from `tokens`, and has_zero [B, R], zeroed before."""

    @abstractmethod
    def compare(
        self, column: Features, rows: Features, best_rows: DEVICE_ARRAY | None, best_columns: DEVICE_ARRAY | None
    ) -> None:
        """Queue the comparison of one image with a run of T others; None drops a direction.

        best_rows: [T, R, P] keys of the rows' patches, best_columns: of the column's. They are the lowest before.
        """


class _ProductOnce(Comparer):
    """Keeps layer-normed features, whose one product serves every degree, and the inverse lengths of their box sums."""

    def __init__(
        self,
        device: Device,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        pairs: int,
        window: int | None = None,
    ) -> None:
        super().__init__(device, grid, channels, degrees, pairs, window)
        self.reaches = device.to_device(np.array([degree // 2 for degree in degrees], np.int32))
        self.mask = degrees_mask(degrees)

    def prepare(self, images: Features, has_zero: DEVICE_ARRAY) -> None:
        (features,) = images.arrays
        count, patches, channels = features.shape
        self.device.launch(
            "pooled_norms",
            (-(-patches // 4), count),
            128,
            (
                features,
                *int32(*self.grid, channels),
                self.reaches,
                np.int32(len(self.degrees)),
                images.inverse,
                has_zero,
            ),
        )


class GramOnce(_ProductOnce):
    """One product per pair serves every degree; a pass filters the Gram and takes both maxima."""

    description = "one product for all degrees"

    def __init__(
        self,
        device: Device,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        pairs: int,
        window: int | None = None,
    ) -> None:
        super().__init__(device, grid, channels, degrees, pairs, window)
        patches = math.prod(grid)
        self.workspaces = [device.empty((pairs, patches, gram_stride(patches)), np.float32) for _ in range(2)]
        for workspace in self.workspaces:
            device.fill(workspace, 0)  # the padding stays so
        self.launches = 0

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (((patches, channels), np.float16),)

    @staticmethod
    def gram_bytes(patches: int) -> int:
        return 4 * patches * gram_stride(patches)

    @staticmethod
    def scratch_bytes(patches: int, channels: int) -> int:
        return 0

    def tokens(self, images: Features) -> DEVICE_ARRAY:
        return images.arrays[0]

    def compare(
        self, column: Features, rows: Features, best_rows: DEVICE_ARRAY | None, best_columns: DEVICE_ARRAY | None
    ) -> None:
        device, (features,) = self.device, rows.arrays
        slot = self.launches % 2  # one workspace is filled while the other is reduced
        self.launches += 1
        grams = self.workspaces[slot]
        with device.producing(slot):
            device.product(column.arrays[0], features, grams)
        shape = filter_max_shape(self.grid, self.mask, len(features), device.card, self.window)
        with device.consuming(slot):
            device.launch(
                filter_max_kernel(self.mask, self.window is not None),
                (shape.blocks, len(features)),
                shape.threads,
                (
                    grams,
                    np.int32(grams.shape[2]),
                    np.int64(grams.shape[1] * grams.shape[2]),
                    *int32(*self.grid),
                    rows.inverse,
                    column.inverse,
                    best_rows,
                    variants.step(best_rows),
                    best_columns,
                    variants.step(best_columns),
                    *int32(shape.segment, shape.band, *([] if self.window is None else [self.window])),
                ),
                shape.shared_bytes,
            )


class TiledProduct(_ProductOnce):
    """One product per pair in tiles of patch blocks with a halo, which are filtered and reduced where they are."""

    description = "one tiled product for all degrees"

    def __init__(
        self,
        device: Device,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        pairs: int,
        window: int | None = None,
    ) -> None:
        super().__init__(device, grid, channels, degrees, pairs, window)
        self.channels = channels
        self.staged = device.empty((self.scratch_bytes(math.prod(grid), channels) // 2,), np.float16)

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (((patches, variants.feature_stride(channels)), np.float16),)

    @staticmethod
    def gram_bytes(patches: int) -> int:
        return 0

    @staticmethod
    def scratch_bytes(patches: int, channels: int) -> int:
        filled_up = variants.feature_stride(channels) > channels
        return 2 * STAGED_IMAGES * patches * channels if filled_up else 0

    def tokens(self, images: Features) -> DEVICE_ARRAY:
        (features,) = images.arrays
        count, patches, stride = features.shape
        if stride == self.channels:
            return features
        return self.staged[: count * patches * self.channels].reshape(count, patches, self.channels)

    def prepare(self, images: Features, has_zero: DEVICE_ARRAY) -> None:
        tokens, (features,) = self.tokens(images), images.arrays
        if tokens is not features:
            self.device.fill(features, 0)
            self.device.copy(tokens, features[..., : self.channels])
        super().prepare(images, has_zero)

    def compare(
        self, column: Features, rows: Features, best_rows: DEVICE_ARRAY | None, best_columns: DEVICE_ARRAY | None
    ) -> None:
        variants.tiled_max(
            self.device.launch,
            rows.arrays[0],
            column.arrays[0],
            self.grid,
            self.mask,
            rows.inverse,
            column.inverse,
            best_rows,
            best_columns,
        )


class ProductPerDegree(Comparer):
    """A product for every degree, whose maxima are taken where its sums are."""

    description = "a fused product per degree"

    def __init__(
        self,
        device: Device,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        pairs: int,
        window: int | None = None,
    ) -> None:
        super().__init__(device, grid, channels, degrees, pairs, window)
        self.staged = device.empty((STAGED_IMAGES, math.prod(grid), channels), np.float16)

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        return (((degrees, patches, variants.feature_stride(channels)), np.float16),)

    @staticmethod
    def gram_bytes(patches: int) -> int:
        return 0

    @staticmethod
    def scratch_bytes(patches: int, channels: int) -> int:
        return 2 * STAGED_IMAGES * patches * channels

    def tokens(self, images: Features) -> DEVICE_ARRAY:
        return self.staged[: len(images.inverse)]

    def prepare(self, images: Features, has_zero: DEVICE_ARRAY) -> None:
        tokens, features = self.tokens(images), images.arrays[0]
        for r, degree in enumerate(self.degrees):
            variants.pool_features(
                self.device.launch, tokens, self.grid, degree, features[:, r], images.inverse[:, r], has_zero[:, r]
            )

    def compare(
        self, column: Features, rows: Features, best_rows: DEVICE_ARRAY | None, best_columns: DEVICE_ARRAY | None
    ) -> None:
        for r in range(len(self.degrees)):
            variants.fused_max(
                self.device.launch,
                rows.arrays[0][:, r],
                column.arrays[0][r],
                rows.inverse[:, r],
                column.inverse[r],
                _of_degree(best_rows, r),
                _of_degree(best_columns, r),
            )


class Int8ProductPerDegree(ProductPerDegree):
    """A product of int8 codes for every degree, which chooses the winners; their cosines are those of fp16 features.

    A pair is to be compared once only: afterwards its keys do not tell the winners any more.
    """

    description = "a fused int8 product per degree, its winners measured in fp16"

    @staticmethod
    def layout(patches: int, channels: int, degrees: int) -> Layout:
        ((features, half),) = ProductPerDegree.layout(patches, channels, degrees)
        codes = degrees, patches, variants.code_stride(features[2])
        return (features, half), (codes, np.int8), ((degrees, patches), np.float32)  # the last are the codes' weights

    def prepare(self, images: Features, has_zero: DEVICE_ARRAY) -> None:
        super().prepare(images, has_zero)
        features, codes, weights = images.arrays
        for r in range(len(self.degrees)):
            variants.int8_quantise(self.device.launch, features[:, r], images.inverse[:, r], codes[:, r], weights[:, r])

    def compare(
        self, column: Features, rows: Features, best_rows: DEVICE_ARRAY | None, best_columns: DEVICE_ARRAY | None
    ) -> None:
        (features, codes, weights), (feature, code, weight) = rows.arrays, column.arrays
        for r in range(len(self.degrees)):
            keys = _of_degree(best_rows, r), _of_degree(best_columns, r)
            variants.fused_max(self.device.launch, codes[:, r], code[r], weights[:, r], weight[r], *keys)
            variants.winner_cosines(
                self.device.launch, features[:, r], feature[r], rows.inverse[:, r], column.inverse[r], *keys
            )


COMPARERS: dict[Products, type[Comparer]] = {"gram": GramOnce, "fused": ProductPerDegree, "tiled": TiledProduct}


def choose_comparer(
    devices: Sequence[Device], precision: str, products: Products | None, patches: int, windowed: bool = False
) -> type[Comparer]:
    """Choose how devices compare: all alike, because they share features and keys.

    precision: "fp16" or "int8". products: "gram", "fused" or "tiled", instead of what is faster on these devices; int8
    products are always fused. windowed: whether patches meet those near their own place alone, which only "gram" has.
    Raises ValueError for another choice, and for more patches than int8 can number.
    """
    if products not in (None, *COMPARERS):
        raise ValueError(f"products must be 'gram', 'fused' or 'tiled', not {products!r}")
    if windowed and precision == "int8":
        raise ValueError("precision int8 has no position windows on a CUDA device; use precision fp16, or the CPU")
    if windowed and products not in (None, "gram"):
        raise ValueError(f"{products} products have no position windows; use products='gram'")
    if precision == "int8":
        if products not in (None, "fused"):
            raise ValueError("int8 products are always fused; use products='fused', or precision fp16")
        if patches > variants.MAX_INT8_PATCHES:
            raise ValueError(
                f"precision int8 takes at most {variants.MAX_INT8_PATCHES} patches per image, not {patches}; "
                "use precision fp16"
            )
        return Int8ProductPerDegree
    if precision != "fp16":
        raise ValueError(f"precision {precision!r} is not available on a CUDA device; use precision fp16 or int8")
    if windowed:
        products = "gram"
    if products is None:
        everywhere = {FASTER.get(device.card.compute_capability, "gram") for device in devices}
        products = everywhere.pop() if len(everywhere) == 1 else "gram"
    return COMPARERS[products]


def image_bytes(layout: Layout, patches: int, degrees: int) -> int:
    """Return the size of an image's features and inverse lengths."""
    return 4 * degrees * patches + sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout)


def gram_stride(patches: int) -> int:
    """Pad the rows of a Gram to whole memory sectors, and by one entry at least: the pass reads zeros there."""
    return (patches // 32 + 1) * 32


def _of_degree(best: DEVICE_ARRAY | None, r: int) -> DEVICE_ARRAY | None:
    return None if best is None else best[:, r]


def degrees_mask(degrees: Sequence[int]) -> int:
    """Return distinct degrees as bits: bit k stands for degree 2k + 1."""
    return sum(1 << degree // 2 for degree in degrees)


def max_threads(mask: int, near: bool = False) -> int:
    """Return how many threads a block of filter_max.cu may have; its registers leave room for one such block."""
    return 384 if mask < (4 if near else 8) else 256


def strip_rows(mask: int) -> int:
    """Return how many grid rows of row patches a block of filter_max.cu walks along."""
    return 4 if mask < 4 else 2 if mask < 8 else 1


@dataclass(frozen=True)
class FilterMaxShape:
    """The launch of filter_max.cu: how the row patches are cut into segments, the column patches into bands."""

    segment: int
    band: int
    blocks: int  # per Gram
    threads: int
    shared_bytes: int
    steps: int  # that a multiprocessor takes, one after another, for all of the launch's Grams
    resident: int  # blocks that a multiprocessor has at once


@lru_cache
def filter_max_shape(
    grid: tuple[int, int], mask: int, pairs: int, card: Card, window: int | None = None
) -> FilterMaxShape:
    """Choose bands that fit a block, and segments that fill the device in few waves without too many margins."""
    rows, columns = grid
    reach = mask.bit_length() - 1
    strips, most = -(-rows // strip_rows(mask)), max_threads(mask, window is not None)
    met = rows if window is None else min(strip_rows(mask) + 2 * window, rows)  # by a strip
    for held in range(OWN_ROWS * (most // columns), 0, -OWN_ROWS):  # grid rows of column patches in a block
        if held < min(rows, 2 * reach + 1):
            break
        bands = 1 if min(met + 2 * reach, rows) <= held else -(-met // (held - 2 * reach))
        band = -(-met // bands)
        runs = -(-min(band + 2 * reach, rows) // OWN_ROWS)
        threads = -(-runs * columns // 32) * 32
        choices = []
        for segment in range(1, columns + 1):
            shared_bytes = _shared_bytes(columns, mask, segment, threads)
            if shared_bytes > MAX_SHARED_BYTES:
                break
            resident = max(min(most // threads, card.shared_bytes // (shared_bytes + RESERVED_BYTES)), 1)
            blocks = strips * bands * -(-columns // segment)
            steps = -(-blocks * pairs // (card.multiprocessors * resident)) * (segment + 2 * reach)
            choices.append(FilterMaxShape(segment, band, blocks, threads, shared_bytes, steps, resident))
        if choices:
            return min(choices, key=lambda shape: (shape.steps * shape.resident, shape.segment))
    raise ValueError(f"a patch grid of {columns} columns is too wide for the CUDA kernels; use the CPU")


def _shared_bytes(columns: int, mask: int, segment: int, threads: int) -> int:
    """Count what filter_max.cu takes from shared memory, in the same order; every part is rounded up to 16 bytes."""
    reach, strip, runs = mask.bit_length() - 1, strip_rows(mask), -(-threads // columns)
    slots = strip * mask.bit_count() * (segment + 2 * reach)
    parts = [slots, threads // 32 * slots]
    for k in range(1, reach + 1):
        if mask >> k & 1:
            parts += [strip * (reach + runs * (columns + reach)) * OWN_ROWS, 2 * (runs + 1) * columns * k * strip]
    return sum(-(-4 * part // 16) * 16 for part in parts)

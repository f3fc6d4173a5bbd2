"""Mutual scoring on a CUDA device: the data flow from patch tokens to patch scores.

tokens → layer_norm → pooled_norms → for one image against a few: product (cuBLAS) → filter_max → interval_average

Features of a layer stay on the device as fp16. Products and passes run on two streams over two workspaces of tiles, so
that one is filled while the other is reduced; Python only queues, several image pairs at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..mutual_scoring import checked_degrees, checked_grid, checked_interval
from ..reference import LAYER_NORM_EPS, interval_ranks
from .device import DEVICE_ARRAY, Device, DeviceError, filter_max_kernel, int32, open_device
from .images import network_input, upsample

__all__ = [
    "CudaPlan",
    "DeviceError",
    "mutual_scores",
    "network_input",
    "open_device",
    "plan_mutual_scoring",
    "upsample",
]

MAX_DEGREE = 9
LOWEST_KEY = -(2**31)  # below the key of every cosine
STAGED_IMAGES = 8  # tokens on their way to the device
SLICES = 32  # blocks that share an image's layer norm
MEMORY_SHARE = 0.9  # of the free memory, unless a limit is given

# As in filter_max.cu.
OWN_PATCHES, MAX_THREADS = 2, 704

Timings = MutableMapping[str, float]


@dataclass(frozen=True)
class CudaPlan:
    """How one call of mutual scoring runs on a device; every plan gives the same scores."""

    images: int
    rows: int  # images whose best cosines with all others are resident
    columns: int  # images per block that the rows are compared with, where not all are resident
    tiles: int  # per workspace, of which there are two
    peak_bytes: int

    def comparisons(self) -> int:
        """Count the image pairs of one layer whose product is computed."""
        total = 0
        for first in range(0, self.images, self.rows):
            rows = min(self.rows, self.images - first)
            total += rows * (rows - 1) // 2 + rows * (self.images - rows)
        return total

    def describe(self) -> str:
        resident = (
            "all features of a layer resident" if self.rows >= self.images else f"{self.rows} images per block of rows"
        )
        return (
            f"mutual scoring of {self.images} images on the device: {resident}, {self.tiles} pairs per launch, "
            f"{self.peak_bytes / 2**20:.0f} MiB at the peak"
        )


def plan_mutual_scoring(
    images: int, patches: int, channels: int, degrees: int, memory_limit: int, cache_bytes: int
) -> CudaPlan:
    """Fit the working set into `memory_limit` bytes; raise MemoryError where even one row does not fit.

    Where the best cosines of all pairs do not fit, blocks of rows are compared with everything else in turn, which
    computes most products twice.
    """
    tile = 4 * patches * _stride(patches)
    resident = patches * (2 * channels + 4 * degrees)  # features and inverse lengths of an image
    minima = 4 * images * degrees * patches  # of one row
    always = 4 * patches * (images + STAGED_IMAGES * channels)

    def needed(rows: int, columns: int, tiles: int) -> int:
        return always + 2 * tiles * tile + rows * (resident + minima) + columns * resident

    # Half the cache for each workspace; at least four tiles, so that queueing a launch takes less time than running it.
    most = min(max(cache_bytes // 2 // tile, 4), max(images - 1, 1))
    choices = [most, *(tiles for tiles in (2, 1) if tiles < most)]
    for tiles in choices:
        if needed(images, 0, tiles) <= memory_limit:
            return CudaPlan(images, images, 0, tiles, needed(images, 0, tiles))
    for tiles in choices:
        for columns in (32, 8, 1):
            rows = (memory_limit - needed(0, columns, tiles)) // (resident + minima)
            if rows >= 1:
                return CudaPlan(images, rows, columns, tiles, needed(rows, columns, tiles))
    raise MemoryError(
        f"mutual scoring of {images} images with {patches} patches of {channels} channels needs at least "
        f"{needed(1, 1, 1) / 2**20:.0f} MiB on the device and the limit is {memory_limit / 2**20:.0f} MiB; "
        "raise --memory-limit, or make the work smaller with --image-size or --group-size"
    )


def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: str | Device = "cuda",
    precision: str = "fp16",
    memory_limit: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
    on_plan: Callable[[CudaPlan], None] | None = None,
) -> NDArray[np.float32]:
    """Score every patch by how far it is from the nearest patches of the other images, on a CUDA device.

    tokens: [N, L, P, C] float32 or float16, a NumPy array or memory map, or an array on the device.
    device: `cuda`, `cuda:<number>`, or an opened device.
    precision: `fp16`: fp16 features, fp32 sums, lengths of the rounded features.
    memory_limit: bytes of device memory; 90 % of what is free by default.
    The other arguments and the result are those of `zsad.kernels.mutual_scores`.
    """
    if getattr(tokens, "ndim", None) != 4 or 0 in tokens.shape or tokens.dtype not in (np.float32, np.float16):
        raise ValueError(f"tokens must be [N, L, P, C] of float32 or float16, got {getattr(tokens, 'shape', None)}")
    images, layers, patches, channels = (int(n) for n in tokens.shape)
    if images < 2:
        raise ValueError("mutual scoring compares images with each other and got only one; give it at least two")
    grid = checked_grid(grid, patches)
    chosen = checked_degrees(degrees)
    interval = checked_interval(interval)
    distinct = sorted(set(chosen))
    if distinct[-1] > MAX_DEGREE:
        raise ValueError(f"degrees on a CUDA device go up to {MAX_DEGREE}, not {distinct[-1]}; use device='cpu'")
    if precision != "fp16":
        raise ValueError(f"precision {precision!r} is not available on {device}; use precision='fp16'")

    opened = open_device(device) if isinstance(device, str) else device
    opened.follow()
    limit = int(MEMORY_SHARE * opened.free_bytes()) if memory_limit is None else memory_limit
    plan = plan_mutual_scoring(images, patches, channels, len(distinct), limit, opened.cache_bytes)
    if on_plan is not None:
        on_plan(plan)
    first, last = interval_ranks(images - 1, interval)
    weights = np.array([chosen.count(degree) for degree in distinct], np.float32)
    weights /= len(chosen) * layers * (last - first)
    scorer = _Scorer(opened, plan, grid, channels, distinct, timings if timings is not None else {})
    total, done = layers * plan.comparisons(), 0
    for layer in range(layers):
        for pairs in scorer.add_layer(tokens, layer, (first, last), weights):
            done += pairs
            if progress is not None:
                progress(done, total)
    scores: NDArray[np.float32] = opened.to_host(scorer.scores)
    return scores


class _Block:
    """Features and inverse lengths of a run of images of one layer."""

    def __init__(self, device: Device, size: int, grid: tuple[int, int], channels: int, degrees: int) -> None:
        patches = math.prod(grid)
        self.images = range(0)
        self.features = device.empty((size, patches, channels), np.float16)  # [B, P, C]
        self.inverse = device.empty((size, degrees, patches), np.float32)  # [B, R, P]


class _Scorer:
    """The arrays of one call and the launches over them."""

    def __init__(
        self,
        device: Device,
        plan: CudaPlan,
        grid: tuple[int, int],
        channels: int,
        degrees: Sequence[int],
        timings: Timings,
    ) -> None:
        self.device, self.plan, self.grid, self.timings = device, plan, grid, timings
        self.degrees, self.patches, self.channels = len(degrees), math.prod(grid), channels
        self.reaches = device.to_device(np.array([degree // 2 for degree in degrees], np.int32))
        self.mask = sum(1 << degree // 2 for degree in degrees)
        self.stride = _stride(self.patches)
        self.rows = _Block(device, min(plan.rows, plan.images), grid, channels, self.degrees)
        self.columns = _Block(device, plan.columns, grid, channels, self.degrees) if plan.columns else None
        self.best = device.empty((len(self.rows.features), plan.images, self.degrees, self.patches), np.int32)
        self.has_zero = device.empty((plan.images, self.degrees), np.uint8)
        self.workspaces = [device.empty((plan.tiles, self.patches, self.stride), np.float32) for _ in range(2)]
        self.scores = device.empty((plan.images, self.patches), np.float32)
        self.staging: DEVICE_ARRAY = None
        self.sums = device.empty((STAGED_IMAGES, SLICES, 2), np.float64)
        self.shift = device.empty((STAGED_IMAGES,), np.float32)
        self.finite = device.empty((plan.images,), np.int32)
        self.launches = 0
        device.fill(self.scores, 0)

    def add_layer(self, tokens: Any, layer: int, ranks: tuple[int, int], weights: NDArray[np.float32]) -> Iterator[int]:
        """Add one layer's distances to the scores; yield the image pairs done."""
        everything, step = range(self.plan.images), self.plan.rows
        self.device.fill(self.has_zero, 0)
        device_weights = self.device.to_device(weights)
        for first in everything[::step]:
            mine = everything[first : first + step]
            self._load(self.rows, tokens, layer, mine)
            self.device.fill(self.best, LOWEST_KEY)
            with self._stopwatch("product, filter and max"):
                for i in mine:
                    yield self._compare(i, self.rows, mine[i - first + 1 :])
            if self.columns is not None:
                for others in (everything[:first], everything[mine.stop :]):
                    for start in others[:: self.plan.columns]:
                        block = others[start - others.start :][: self.plan.columns]
                        self._load(self.columns, tokens, layer, block)
                        with self._stopwatch("product, filter and max"):
                            for i in mine:
                                yield self._compare(i, self.columns, block)
            with self._stopwatch("select"):
                self._select(mine, ranks, device_weights)

    def _load(self, block: _Block, tokens: Any, layer: int, images: range) -> None:
        """Normalise, round and measure a run of images."""
        with self._stopwatch("normalise"):
            self.device.synchronise()  # products may still be reading what is overwritten
            for start in images[::STAGED_IMAGES]:
                part = images[start - images.start :][:STAGED_IMAGES]
                at = slice(start - images.start, start - images.start + len(part))
                self._normalise(tokens[part.start : part.stop, layer], block.features[at], part)
            self.device.launch(
                "pooled_norms",
                (-(-self.patches // 4), len(images)),
                128,
                (
                    block.features,
                    *int32(*self.grid, self.channels),
                    self.reaches,
                    np.int32(self.degrees),
                    block.inverse,
                    self.has_zero[images.start : images.stop],
                ),
            )
            finite = self.device.to_host(self.finite[images.start : images.stop])
        if not finite.all():
            bad = images.start + int(np.argmin(finite))
            raise ValueError(f"the tokens of image {bad} are not finite; check the backbone's precision")
        block.images = images

    def _normalise(self, tokens: Any, features: DEVICE_ARRAY, images: range) -> None:
        """Fill features [B, P, C] from tokens [B, P, C] on the host or the device."""
        size = self.patches * self.channels
        if isinstance(tokens, np.ndarray):
            if self.staging is None:
                self.staging = self.device.empty((STAGED_IMAGES, self.patches, self.channels), tokens.dtype)
            source, step = self.staging[: len(images)], size
            self.device.upload(tokens, source)
        else:
            source, step = tokens, tokens.strides[0] // tokens.dtype.itemsize
        kind = "f32" if source.dtype == np.float32 else "f16"
        where = (source, np.int64(step), np.int32(size), self.shift, self.sums)
        self.device.launch(f"layer_norm_sums_{kind}", (SLICES, len(images)), 256, where, 8 * 256 // 32)
        self.device.launch(
            f"layer_norm_apply_{kind}",
            (SLICES, len(images)),
            256,
            (
                *where,
                np.int32(SLICES),
                np.float32(LAYER_NORM_EPS),
                features,
                self.finite[images.start : images.stop],
            ),
        )

    def _compare(self, i: int, block: _Block, partners: range) -> int:
        """Queue the comparison of row image i with a run of the block's images; return their number.

        Within the rows both directions are kept, otherwise that of image i alone.
        """
        mine, own_row = self.rows.images, i - self.rows.images.start
        both = block is self.rows
        for start in partners[:: self.plan.tiles]:
            chunk = partners[start - partners.start :][: self.plan.tiles]
            at = slice(chunk.start - block.images.start, chunk.stop - block.images.start)
            slot = self.launches % 2
            self.launches += 1
            tiles = self.workspaces[slot]
            with self.device.producing(slot):
                self.device.product(self.rows.features[own_row], block.features[at], tiles)
            shape = filter_max_shape(self.grid, self.mask, len(chunk), self.device.multiprocessors)
            pair = self.degrees * self.patches  # entries of one pair's best cosines
            with self.device.consuming(slot):
                self.device.launch(
                    filter_max_kernel(self.mask),
                    (shape.blocks, len(chunk)),
                    shape.threads,
                    (
                        tiles,
                        np.int32(self.stride),
                        np.int64(self.patches * self.stride),
                        *int32(*self.grid),
                        block.inverse[at],
                        self.rows.inverse[own_row],
                        self.best[chunk.start - mine.start, i] if both else None,
                        np.int64(self.plan.images * pair),
                        self.best[own_row, chunk.start],
                        np.int64(pair),
                        *int32(shape.segment, shape.band),
                    ),
                    shape.shared_bytes,
                )
        return len(partners)

    def _select(self, images: range, ranks: tuple[int, int], weights: DEVICE_ARRAY) -> None:
        """Queue the interval average of the rows."""
        self.device.launch(
            "interval_average",
            (-(-self.patches // 128), len(images)),
            128,
            (
                self.best,
                self.rows.inverse,
                self.has_zero,
                weights,
                *int32(self.plan.images, self.degrees, self.patches, images.start, *ranks),
                self.scores,
            ),
        )

    @contextmanager
    def _stopwatch(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            self.device.synchronise()
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class FilterMaxShape:
    """The launch of filter_max.cu: how the row patches are cut into segments, the column patches into bands."""

    segment: int
    band: int
    blocks: int  # per tile
    threads: int
    shared_bytes: int


@lru_cache
def filter_max_shape(grid: tuple[int, int], mask: int, tiles: int, multiprocessors: int) -> FilterMaxShape:
    """Choose segments that fill the device in few waves without walking the margins too often."""
    rows, columns = grid
    reach = mask.bit_length() - 1
    strip = 4 if reach < 2 else 2 if reach < 3 else 1
    capacity = OWN_PATCHES * MAX_THREADS
    band = rows if rows * columns <= capacity else capacity // columns - 2 * reach
    if band < 1:
        raise ValueError(f"a patch grid of {columns} columns is too wide for the CUDA kernels; use device='cpu'")
    covered = min(band + 2 * reach, rows)
    threads = -(-covered * columns // (OWN_PATCHES * 32)) * 32
    strips, bands = -(-rows // strip), -(-rows // band)
    at_once = multiprocessors * max(1, 768 // threads)

    def cost(segment: int) -> int:
        waves = -(-strips * bands * tiles * -(-columns // segment) // at_once)
        return waves * (segment + 2 * reach)

    segment = min(range(1, columns + 1), key=cost)
    plane = reach + (covered + 2 * reach) * (columns + reach)
    shared_bytes = 4 * strip * (2 * plane + mask.bit_count() * segment)
    return FilterMaxShape(segment, band, strips * bands * -(-columns // segment), threads, shared_bytes)


def _stride(patches: int) -> int:
    """Pad the rows of a tile to whole memory sectors; cuBLAS then writes whole vectors."""
    return -(-patches // 32) * 32

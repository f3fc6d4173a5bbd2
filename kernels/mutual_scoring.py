"""The public call of mutual scoring, and the data flow from patch tokens to patch scores on a CPU.

tokens [N, L, P, C] → per layer: features and inverse lengths → best cosines of every pair [N, N, R, P] → distances →
mean of the lowest ranks → mean over layers and degrees [N, P]
"""

import math
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from . import cpu
from .planner import Plan, available_cores, default_memory_limit, plan_mutual_scoring
from .reference import interval_ranks

Array = NDArray[np.float32]
Timings = MutableMapping[str, float]


def mutual_scores(
    tokens: Array,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: str = "cpu",
    precision: str = "fp32",
    memory_limit: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Array:
    """Score every patch by how far it is from the nearest patches of the other images (MuSc, sections 3.1 and 3.2).

    tokens: [N, L, P, C] float32 patch tokens straight from the backbone, without the class token; an array or a
        memory map. They are read a block at a time and not changed.
    grid: rows and columns of the patch grid; a square one by default.
    degrees: odd sizes of the neighbourhoods that LNAMD averages.
    interval: which of the N − 1 sorted distances are averaged; below 1 a fraction, from 1 on a count.
    memory_limit: bytes that may be used beside `tokens`; three quarters of the free memory by default.
    progress: called with the pairs done and the pairs in all.
    timings: seconds are added under "product", "filter and max", "normalise" and "select".
    on_plan: called with the plan before work starts.

    Returns scores [N, P] float32, distances between unit vectors averaged over layers and degrees.
    Raises ValueError for arguments that make no sense (N = 1 among them), MemoryError for a limit below the minimum.
    """
    tokens = _checked_tokens(tokens)
    images, layers, patches, channels = tokens.shape
    grid = _checked_grid(grid, patches)
    degrees = _checked_degrees(degrees)
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"interval must satisfy 0 <= low < high, not {tuple(interval)}")
    if device != "cpu":
        raise ValueError(f"device {device!r} is not available for mutual scoring in this build; use device='cpu'")
    if precision != "fp32":
        raise ValueError(f"precision {precision!r} is not available on {device}; use precision='fp32'")

    if not cpu.native_pass_covers(degrees):
        warnings.warn(
            "mutual scoring runs on NumPy alone (one product per degree, about "
            f"{len(degrees)} times the arithmetic): the native kernel was not built or lacks a degree of {degrees}; "
            "install a C++17 compiler and run: pip install --force-reinstall --no-deps zsad",
            RuntimeWarning,
            stacklevel=2,
        )
    kernel = cpu.pair_kernel(grid, degrees)
    limit = default_memory_limit() if memory_limit is None else memory_limit
    plan = plan_mutual_scoring(images, patches, channels, len(degrees), limit, kernel.feature_copies)
    if on_plan is not None:
        on_plan(plan)

    scores = np.zeros((images, patches))
    pairs_done, pairs = 0, layers * images * (images - 1) // 2
    spent: Timings = timings if timings is not None else {}
    ranks = interval_ranks(images - 1, interval)
    blas_threads = max(1, available_cores() // plan.workers)
    with (
        _minima((images, images, len(degrees), patches), plan) as minima,
        ThreadPoolExecutor(plan.workers) as pool,
        threadpool_limits(blas_threads, user_api="blas"),
    ):
        try:
            for layer in range(layers):
                usable = np.empty((images, len(degrees), patches), bool)
                for done in _fill_minima(tokens[:, layer], kernel, plan, pool, minima, usable, spent):
                    pairs_done += done
                    if progress is not None:
                        progress(pairs_done, pairs)
                with _stopwatch(spent, "select"):
                    selected = pool.map(lambda i: _interval_average(minima, usable, i, ranks), range(images))  # noqa: B023
                    for i, score in enumerate(selected):
                        scores[i] += score / layers
        except BaseException:  # Ctrl-C included: do not start what is still queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return scores.astype(np.float32)


def _checked_tokens(tokens: Any) -> Array:
    if getattr(tokens, "ndim", None) != 4 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [N, L, P, C] and not empty, got shape {getattr(tokens, 'shape', None)}")
    if tokens.dtype != np.float32:
        raise ValueError(f"tokens must be float32, not {tokens.dtype}")
    if len(tokens) < 2:
        raise ValueError(
            "mutual scoring compares images with each other and got only one; give it at least two images of the "
            "same product (ten or more for useful scores)"
        )
    return tokens  # type: ignore[no-any-return]


def _checked_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"{patches} patches are no square grid; pass grid=(rows, columns)")
        return side, side
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"grid {tuple(grid)} does not hold {patches} patches")
    return int(rows), int(columns)


def _checked_degrees(degrees: Sequence[int]) -> list[int]:
    checked = [int(degree) for degree in degrees]
    if not checked or any(degree < 1 or degree % 2 == 0 for degree in checked):
        raise ValueError(f"degrees must be odd and positive, and at least one, not {tuple(degrees)}")
    return checked


@contextmanager
def _stopwatch(timings: Timings, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def _minima(shape: tuple[int, ...], plan: Plan) -> Iterator[Array]:
    """Yield room for the best cosines of every pair [N, N, R, P], in memory or in a temporary file."""
    if plan.minima_in_memory:
        yield np.empty(shape, np.float32)
        return
    with tempfile.TemporaryFile(prefix="zsad-minima-") as file:
        yield np.memmap(file, np.float32, "w+", shape=shape)


class _Block:
    """Features and inverse lengths of a run of images of one layer."""

    def __init__(self, size: int, copies: int, degrees: int, patches: int, channels: int) -> None:
        self.first, self.count = 0, 0
        self.features = np.empty((size, copies, patches, channels), np.float32)  # [B, F, P, C]
        self.inverse = np.empty((size, degrees, patches), np.float32)  # [B, R, P]

    def load(self, first: int, tokens: Array, kernel: cpu.PairKernel, pool: ThreadPoolExecutor) -> None:
        """tokens: [B, P, C] of the images from number `first` on."""
        self.first, self.count = first, len(tokens)

        def prepare(b: int) -> None:
            image = np.asarray(tokens[b])
            if not np.isfinite(image).all():
                raise ValueError(f"the tokens of image {first + b} are not finite; check the backbone's precision")
            kernel.prepare(image, self.features[b], self.inverse[b])

        list(pool.map(prepare, range(self.count)))


def _fill_minima(
    tokens: Array,  # [N, P, C]
    kernel: cpu.PairKernel,
    plan: Plan,
    pool: ThreadPoolExecutor,
    minima: Array,  # [N, N, R, P] out: best cosine of patch p of image i with any patch of image j
    usable: NDArray[np.bool_],  # [N, R, P] out: False where a feature is zero
    timings: Timings,
) -> Iterator[int]:
    """Compare every pair of images once, block against block; yield the number of pairs done."""
    images, patches, channels = tokens.shape
    degrees = minima.shape[2]
    starts = range(0, images, plan.block)
    blocks = [_Block(plan.block, kernel.feature_copies, degrees, patches, channels) for _ in range(min(2, len(starts)))]
    tiles = threading.local()
    lock = threading.Lock()

    def compare(left: _Block, right: _Block, i: int) -> int:
        """Compare image i of the left block with the right block's images (only the later ones in its own block)."""
        if not hasattr(tiles, "tile"):
            # Rows padded to whole vectors keep the pass's loads aligned.
            tiles.tile = np.empty((patches, -(-patches // 16) * 16), np.float32)[:, :patches]
        start, product = time.perf_counter(), 0.0
        partners = range(i + 1 if left is right else 0, right.count)
        for j in partners:
            a, b = left.first + i, right.first + j
            product += kernel.best_cosines(
                left.features[i],
                right.features[j],
                left.inverse[i],
                right.inverse[j],
                tiles.tile,
                (minima[a, b], minima[b, a]),
            )
        seconds = time.perf_counter() - start
        with lock:
            timings["product"] = timings.get("product", 0.0) + product / plan.workers
            timings["filter and max"] = timings.get("filter and max", 0.0) + (seconds - product) / plan.workers
        return len(partners)

    for a in starts:
        with _stopwatch(timings, "normalise"):
            blocks[0].load(a, tokens[a : a + plan.block], kernel, pool)
        usable[a : a + plan.block] = blocks[0].inverse[: blocks[0].count] > 0
        left = blocks[0]
        yield from pool.map(lambda i: compare(left, left, i), range(left.count))  # noqa: B023
        for b in starts[starts.index(a) + 1 :]:
            right = blocks[1]
            with _stopwatch(timings, "normalise"):
                right.load(b, tokens[b : b + plan.block], kernel, pool)
            yield from pool.map(lambda i: compare(left, right, i), range(left.count))  # noqa: B023


def _interval_average(
    minima: Array, usable: NDArray[np.bool_], image: int, ranks: tuple[int, int]
) -> NDArray[np.float64]:
    """Turn one image's best cosines [N, R, P] into its mean distance over the chosen ranks and the degrees, [P]."""
    first, last = ranks
    others = np.arange(len(minima)) != image
    squared = 2.0 - 2.0 * minima[image][others]  # [N-1, R, P], for unit vectors
    if not usable.all():
        # A zero feature lies at distance 1 from every unit vector and at distance 0 from another zero feature.
        zero_there = ~usable[others].all(axis=2, keepdims=True)  # [N-1, R, 1]
        squared = np.where(
            usable[image], np.where(zero_there, np.minimum(squared, 1.0), squared), np.where(zero_there, 0.0, 1.0)
        )
    distances = np.sqrt(np.maximum(squared, 0.0))
    chosen = [rank for rank in (first - 1, last - 1) if rank >= 0]
    lowest = np.partition(distances, chosen, axis=0)[first:last]
    return lowest.mean(axis=(0, 1), dtype=np.float64)  # type: ignore[no-any-return]

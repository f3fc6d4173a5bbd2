"""The public call of mutual scoring, and the data flow from patch tokens to patch scores on a CPU.

tokens [N, L, P, C] → per layer: features and inverse lengths → best cosines of every pair [N, N, R, P] → distances →
mean of the lowest ranks → mean over layers and degrees [N, P]

With int8 products the best cosines are approximate and come as keys that also name the winning patch. The ranks are
selected by them, and only then are the winners of the selected ranks measured again from fp32 unit features: 30 % of
all winners with the default interval, read degree by degree so that one copy of the features is resident. Where the
int8 product chose the right winners and ranks the scores are exact; elsewhere the chosen winner is nearly as close.
"""

import importlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits

from . import cpu
from .planner import Plan, available_cores, default_memory_limit, plan_mutual_scoring, scratch
from .reference import interval_ranks

Array = NDArray[np.float32]
Timings = MutableMapping[str, float]


def mutual_scores(
    tokens: Array,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: str = "cpu",
    precision: str = "auto",
    memory_limit: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
    on_plan: Callable[[Any], None] | None = None,
) -> Array:
    """Score every patch by how far it is from the nearest patches of the other images (MuSc, sections 3.1 and 3.2).

    tokens: [N, L, P, C] float32 patch tokens straight from the backbone, without the class token; an array or a
        memory map. They are read a block at a time and not changed.
    grid: rows and columns of the patch grid; a square one by default.
    degrees: odd sizes of the neighbourhoods that LNAMD averages.
    interval: which of the N − 1 sorted distances are averaged; below 1 a fraction, from 1 on a count.
    device: "cpu", "cuda" or "cuda:N"; on a CUDA device tokens may also be a device array, and float16.
    precision: "fp32" on a CPU; "fp16" on a CUDA device: fp16 features, fp32 sums; "auto" is these two. "int8" on a CPU:
        products in int8 choose the winners, whose distances are then measured in fp32.
    memory_limit: bytes that may be used beside `tokens`; three quarters of the free memory by default.
    progress: called with the pairs done and the pairs in all.
    timings: seconds are added under "product", "filter and max", "normalise" and "select", with int8 also "re-measure".
    on_plan: called with the plan before work starts; `describe()` says it in words.

    Returns scores [N, P] float32, distances between unit vectors averaged over layers and degrees.
    Raises ValueError for arguments that make no sense (N = 1 among them), MemoryError for a limit below the minimum.
    """
    if device.startswith("cuda"):
        # Imported here because that package builds on this module, and most machines never need it.
        return importlib.import_module(".cuda", __package__).mutual_scores(  # type: ignore[no-any-return]
            tokens,
            grid,
            degrees,
            interval,
            device,
            "fp16" if precision == "auto" else precision,
            memory_limit,
            progress=progress,
            timings=timings,
            on_plan=on_plan,
        )
    tokens = _checked_tokens(tokens)
    images, layers, patches, channels = tokens.shape
    grid = checked_grid(grid, patches)
    degrees = checked_degrees(degrees)
    interval = checked_interval(interval)
    if device != "cpu":
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {device!r}")

    kernel = cpu.pair_kernel(grid, degrees, "fp32" if precision == "auto" else precision)
    if not cpu.native_pass_covers(degrees):
        warnings.warn(
            "mutual scoring runs on NumPy alone (one product per degree, about "
            f"{len(degrees)} times the arithmetic): the native kernel was not built or lacks a degree of {degrees}; "
            "install a C++17 compiler and reinstall zsad",
            RuntimeWarning,
            stacklevel=2,
        )
    plan = plan_on_cpu(kernel, images, patches, channels, interval, memory_limit)
    ranks = interval_ranks(images - 1, interval)
    if on_plan is not None:
        on_plan(plan)

    scores = np.zeros((images, patches))
    pairs_done, pairs = 0, layers * images * (images - 1) // 2
    spent: Timings = timings if timings is not None else {}
    blocks = _blocks(kernel, plan, patches, channels)
    blas_threads = max(1, available_cores() // plan.workers)
    with (
        scratch((images, images, len(degrees), patches), plan.minima_in_memory) as minima,
        ThreadPoolExecutor(plan.workers) as pool,
        threadpool_limits(blas_threads, user_api="blas"),
    ):
        try:
            for layer in range(layers):
                usable = np.empty((images, len(degrees), patches), bool)
                for done in _fill_minima(tokens[:, layer], kernel, plan, blocks, pool, minima, usable, spent):
                    pairs_done += done
                    if progress is not None:
                        progress(pairs_done, pairs)
                if isinstance(kernel, cpu.Int8GramOnce):
                    averages = _remeasured_averages(
                        tokens[:, layer], kernel, plan, blocks, pool, minima, usable, ranks, spent
                    )
                    scores += averages / layers
                    continue
                with _stopwatch(spent, "select"):
                    selected = pool.map(lambda i: _interval_average(minima, usable, i, ranks), range(images))  # noqa: B023
                    for i, score in enumerate(selected):
                        scores[i] += score / layers
        except BaseException:  # Ctrl-C included: do not start what is still queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return scores.astype(np.float32)


def plan_on_cpu(
    kernel: cpu.PairKernel,
    images: int,
    patches: int,
    channels: int,
    interval: tuple[float, float],
    memory_limit: int | None,
) -> Plan:
    """Plan a call on the CPU as that call would; raises MemoryError where the limit is too small."""
    limit = default_memory_limit() if memory_limit is None else memory_limit
    first, last = interval_ranks(images - 1, interval)
    remeasured = last - first if isinstance(kernel, cpu.Int8GramOnce) else 0
    return plan_mutual_scoring(images, patches, channels, len(kernel.degrees), limit, kernel.feature_copies, remeasured)


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


def checked_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"{patches} patches are no square grid; pass grid=(rows, columns)")
        return side, side
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"grid {tuple(grid)} does not hold {patches} patches")
    return int(rows), int(columns)


def checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"interval must satisfy 0 <= low < high, not {tuple(interval)}")
    return low, high


def checked_degrees(degrees: Sequence[int]) -> list[int]:
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


class _Block:
    """Features and inverse lengths of a run of images of one layer."""

    def __init__(self, size: int, room: int, degrees: int, patches: int) -> None:
        """size: images at most; room: bytes of one image's features at most.

        One block serves all layers: the first touch of fresh memory can take longer than what is then done with it.
        """
        self.first, self.count = 0, 0
        self._memory = cpu.aligned_empty((size, room), np.uint8)
        self._inverse = np.empty((size, degrees, patches), np.float32)

    def hold(self, shape: tuple[int, ...], dtype: DTypeLike, degrees: int) -> None:
        """Make room for features of this shape and type and for the inverse lengths of this many degrees."""
        size = len(self._memory)
        taken = size * math.prod(shape) * np.dtype(dtype).itemsize
        self.features = self._memory.reshape(-1)[:taken].view(dtype).reshape(size, *shape)
        self.inverse = self._inverse[:, :degrees]  # [B, R, P]

    def load(self, first: int, tokens: Array, prepare: cpu.Prepare, pool: ThreadPoolExecutor) -> None:
        """tokens: [B, P, C] of the images from number `first` on."""
        self.first, self.count = first, len(tokens)

        def fill(b: int) -> None:
            image = np.asarray(tokens[b])
            if not np.isfinite(image).all():
                raise ValueError(f"the tokens of image {first + b} are not finite; check the backbone's precision")
            prepare(image, self.features[b], self.inverse[b])

        list(pool.map(fill, range(self.count)))


def _blocks(kernel: cpu.PairKernel, plan: Plan, patches: int, channels: int) -> list[_Block]:
    """Allocate one block where it holds all images, else one for each side of a pair of blocks."""
    shape, dtype = kernel.feature_layout(patches, channels)
    room = math.prod(shape) * np.dtype(dtype).itemsize
    if isinstance(kernel, cpu.Int8GramOnce):
        room = max(room, 4 * patches * channels)  # the unit features of one degree
    sides = 1 if plan.block >= plan.images else 2
    return [_Block(plan.block, room, len(kernel.degrees), patches) for _ in range(sides)]


def _fill_minima(
    tokens: Array,  # [N, P, C]
    kernel: cpu.PairKernel,
    plan: Plan,
    blocks: Sequence[_Block],
    pool: ThreadPoolExecutor,
    minima: Array,  # [N, N, R, P] out: best cosine of patch p of image i with any patch of image j
    usable: NDArray[np.bool_],  # [N, R, P] out: False where a feature is zero
    timings: Timings,
) -> Iterator[int]:
    """Compare every pair of images once, block against block; yield the number of pairs done."""
    images, patches, channels = tokens.shape
    starts = range(0, images, plan.block)
    with _stopwatch(timings, "normalise"):
        kernel.start_layer(tokens)
    for block in blocks:
        block.hold(*kernel.feature_layout(patches, channels), len(kernel.degrees))
    tiles = threading.local()
    lock = threading.Lock()

    def compare(left: _Block, right: _Block, i: int) -> int:
        """Compare image i of the left block with the right block's images (only the later ones in its own block)."""
        if not hasattr(tiles, "tile"):
            tiles.tile = cpu.empty_tile(patches)
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
            blocks[0].load(a, tokens[a : a + plan.block], kernel.prepare, pool)
        usable[a : a + plan.block] = blocks[0].inverse[: blocks[0].count] > 0
        left = blocks[0]
        yield from pool.map(lambda i: compare(left, left, i), range(left.count))  # noqa: B023
        for b in starts[starts.index(a) + 1 :]:
            right = blocks[1]
            with _stopwatch(timings, "normalise"):
                right.load(b, tokens[b : b + plan.block], kernel.prepare, pool)
            yield from pool.map(lambda i: compare(left, right, i), range(left.count))  # noqa: B023


def _squared_distances(cosines: Array, usable: NDArray[np.bool_], zero_there: NDArray[np.bool_]) -> Array:
    """Turn cosines into squared distances between unit vectors.

    usable: False where the patch's own feature is zero; zero_there: whether the other image has a zero feature. A zero
    feature lies at distance 1 from every unit vector and at distance 0 from another zero feature.
    """
    squared: Array = 2.0 - 2.0 * cosines
    if zero_there.any() or not usable.all():
        squared = np.where(
            usable, np.where(zero_there, np.minimum(squared, 1.0), squared), np.where(zero_there, 0.0, 1.0)
        ).astype(np.float32)
    return np.maximum(squared, 0.0)


def _any_zero(usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which images have a zero feature; [..., P] -> [...]."""
    zero: NDArray[np.bool_] = np.any(~usable, axis=-1)
    return zero


def _interval_average(
    minima: Array, usable: NDArray[np.bool_], image: int, ranks: tuple[int, int]
) -> NDArray[np.float64]:
    """Turn one image's best cosines [N, R, P] into its mean distance over the chosen ranks and the degrees, [P]."""
    first, last = ranks
    others = np.arange(len(minima)) != image
    zero_there = _any_zero(usable)[others][..., None]  # [N-1, R, 1]
    distances = np.sqrt(_squared_distances(minima[image][others], usable[image], zero_there))  # [N-1, R, P]
    lowest = np.partition(distances, _boundaries(ranks), axis=0)[first:last]
    return lowest.mean(axis=(0, 1), dtype=np.float64)  # type: ignore[no-any-return]


def _boundaries(ranks: tuple[int, int]) -> list[int]:
    """Return where a partition has to be exact so that positions first … last − 1 hold those ranks."""
    return [rank - 1 for rank in ranks if rank > 0]


@dataclass(frozen=True)
class _Winners:
    """Winners of the chosen ranks of one image and degree."""

    image: NDArray[np.int32]  # [K, P]
    patch: NDArray[np.int32]  # [K, P]
    cosines: Array  # [K, P], exact ones once they are measured


def _select_winners(keys: Array, usable: NDArray[np.bool_], image: int, ranks: tuple[int, int]) -> _Winners:
    """Choose the winners of one image by their keys [N, P]; usable: [N, P], both of one degree."""
    others = np.flatnonzero(np.arange(len(keys)) != image)
    candidates = keys[others]  # [N-1, P]
    squared = _squared_distances(1.0 - candidates, usable[image], _any_zero(usable)[others, None])
    chosen = np.argpartition(squared, _boundaries(ranks), axis=0)[slice(*ranks)]  # [K, P]
    patch = cpu.winning_patches(np.take_along_axis(candidates, chosen, axis=0), keys.shape[1])
    return _Winners(others[chosen].astype(np.int32), patch, np.empty(chosen.shape, np.float32))


def _remeasured_averages(
    tokens: Array,  # [N, P, C]
    kernel: cpu.Int8GramOnce,
    plan: Plan,
    blocks: Sequence[_Block],
    pool: ThreadPoolExecutor,
    keys: Array,  # [N, N, R, P]
    usable: NDArray[np.bool_],  # [N, R, P]
    ranks: tuple[int, int],
    timings: Timings,
) -> NDArray[np.float64]:
    """Turn keys into mean distances over the chosen ranks and the degrees, [N, P], each distance measured exactly."""
    images, patches, channels = tokens.shape
    starts = range(0, images, plan.block)
    for block in blocks:
        block.hold((patches, channels), np.float32, 1)
    total = np.zeros((images, patches))
    for r, degree in enumerate(kernel.degrees):
        prepare = kernel.prepare_unit(degree)
        zeros = _any_zero(usable[:, r])  # [N]
        for a in starts:
            left = blocks[0]
            with _stopwatch(timings, "normalise"):
                left.load(a, tokens[a : a + plan.block], prepare, pool)
            numbers = range(a, a + left.count)
            with _stopwatch(timings, "select"):
                winners = list(pool.map(lambda i: _select_winners(keys[i, :, r], usable[:, r], i, ranks), numbers))  # noqa: B023
            for b in starts:
                right = left if a == b else blocks[1]
                if a != b:
                    with _stopwatch(timings, "normalise"):
                        right.load(b, tokens[b : b + plan.block], prepare, pool)
                with _stopwatch(timings, "re-measure"):
                    list(pool.map(lambda i: _measure_winners(left, right, i, winners[i]), range(left.count)))  # noqa: B023
            for i, w in zip(numbers, winners, strict=True):
                distances = np.sqrt(_squared_distances(w.cosines, usable[i, r], zeros[w.image]))
                total[i] += distances.mean(axis=0, dtype=np.float64) / len(kernel.degrees)
    return total


def _measure_winners(left: _Block, right: _Block, i: int, winners: _Winners) -> None:
    """Measure those winners of image i of the left block that are in the right block, both of unit features."""
    features = right.features[: right.count]  # [B, P, C]
    cpu.measure_winners(left.features[i], features, right.first, winners.image, winners.patch, winners.cosines)

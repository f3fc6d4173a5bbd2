"""The data flow of mutual scoring from patch tokens to patch scores on a CPU.

tokens [N, L, P, C] → per layer: features and inverse lengths → best cosines of every pair [N, N, R, P] → distances →
mean of the lowest ranks → mean over layers and degrees [N, P]

With int8 products the best cosines are approximate and come as keys that also name the winning patch. The ranks are
selected by them, and only then are the winners of the selected ranks measured again from fp32 unit features: 30 % of
all winners with the default interval, read degree by degree so that one copy of the features is resident. Where the
int8 product chose the right winners and ranks the scores are exact; elsewhere the chosen winner is nearly as close.
Where the distances to all images are handed back, all winners are measured.
"""

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits

from zsad.kernels import cpu
from zsad.kernels.machine import Timings, available_cores, default_memory_limit, scratch, stopwatch
from zsad.kernels.minima import ReturnedMinima
from zsad.kernels.planner import Plan, Sizes, least_bytes, plan_mutual_scoring
from zsad.kernels.task import Task

Array = NDArray[np.float32]


class Scoring:
    """Mutual scoring on the CPU."""

    exhausted = MemoryError

    def __init__(self, task: Task, precision: str) -> None:
        """precision: "fp32", which "auto" stands for, or "int8"; raises ValueError where it is not to be had."""
        self._task = task
        self.precision = "fp32" if precision == "auto" else precision
        self._kernel = cpu.pair_kernel(task.grid, task.degrees, self.precision)

    def check(self, tokens: Any) -> None:
        if tokens.dtype != np.float32:
            raise ValueError(f"tokens must be float32, not {tokens.dtype}")

    def memory_limit(self) -> int:
        return default_memory_limit()

    def needed(self, images: int) -> int:
        return least_bytes(self._sizes(images))

    def plan(self, images: int, memory_limit: int, returned_bytes: int = 0) -> Plan:
        return plan_mutual_scoring(self._sizes(images, returned_bytes), memory_limit)

    def _sizes(self, images: int, returned_bytes: int = 0) -> Sizes:
        task, remeasured = self._task, 0
        if isinstance(self._kernel, cpu.Int8GramOnce):
            first, last = task.ranks(images)
            remeasured = images - 1 if returned_bytes else last - first
        copies = self._kernel.feature_copies
        return Sizes(images, task.patches, task.channels, len(task.degrees), copies, remeasured, returned_bytes)

    def run(
        self,
        tokens: Array,
        plan: Plan,
        returned: ReturnedMinima,
        progress: Callable[[int, int], None] | None,
        timings: Timings,
    ) -> Array:
        """Score tokens [N, L, P, C] as planned; returns [N, P] and fills `returned`."""
        if not cpu.native_pass_covers(self._task.degrees):
            warnings.warn(
                "mutual scoring runs on NumPy alone (one product per degree, about "
                f"{len(self._task.degrees)} times the arithmetic): the native kernel was not built or lacks a degree "
                f"of {self._task.degrees}; install a C++17 compiler and reinstall zsad",
                RuntimeWarning,
                stacklevel=3,
            )
        ranks = self._task.ranks(len(tokens))
        return _score(tokens, self._kernel, plan, ranks, returned, progress, timings)


def _score(
    tokens: Array,
    kernel: cpu.PairKernel,
    plan: Plan,
    ranks: tuple[int, int],
    returned: ReturnedMinima,
    progress: Callable[[int, int], None] | None,
    timings: Timings,
) -> Array:
    images, layers, patches, channels = tokens.shape
    everything, degrees = range(images), len(kernel.degrees)
    scores = np.zeros((images, patches))
    pairs_done, pairs = 0, layers * plan.comparisons()
    blocks = _blocks(kernel, plan, patches, channels)
    blas_threads = max(1, available_cores() // plan.workers)
    select = _remeasured_averages if isinstance(kernel, cpu.Int8GramOnce) else _selected_averages
    with (
        scratch((plan.rows, images, degrees, patches), plan.minima_in_memory) as minima,
        ThreadPoolExecutor(plan.workers) as pool,
        threadpool_limits(blas_threads, user_api="blas"),
    ):
        try:
            for layer in range(layers):
                with stopwatch(timings, "normalise"):
                    kernel.start_layer(tokens[:, layer])
                for mine in _runs(everything, plan.rows):
                    job = _Job(tokens[:, layer], layer, kernel, plan, ranks, returned, blocks, pool, mine, timings)
                    usable = np.empty((images, degrees, patches), bool)
                    for done in _fill_minima(job, minima, usable):
                        pairs_done += done
                        if progress is not None:
                            progress(pairs_done, pairs)
                    scores[mine.start : mine.stop] += select(job, minima, usable) / layers
        except BaseException:  # Ctrl-C included: do not start what is still queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return scores.astype(np.float32)


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


@dataclass(frozen=True)
class _Job:
    """One layer's comparison of some images with all others."""

    tokens: Array  # [N, P, C]
    layer: int
    kernel: cpu.PairKernel
    plan: Plan
    ranks: tuple[int, int]
    returned: ReturnedMinima
    blocks: Sequence[_Block]
    pool: ThreadPoolExecutor
    mine: range  # the images whose minima are kept
    timings: Timings

    def load(self, side: int, images: range, prepare: cpu.Prepare) -> _Block:
        block = self.blocks[side]
        with stopwatch(self.timings, "normalise"):
            block.load(images.start, self.tokens[images.start : images.stop], prepare, self.pool)
        return block

    def own_runs(self) -> list[range]:
        return _runs(self.mine, self.plan.block)

    def other_runs(self) -> list[range]:
        """Cut what is not mine into blocks."""
        before, after = range(self.mine.start), range(self.mine.stop, len(self.tokens))
        return [*_runs(before, self.plan.block), *_runs(after, self.plan.block)]


def _runs(images: range, size: int) -> list[range]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _fill_minima(
    job: _Job,
    minima: Array,  # [rows, N, R, P] out: best cosine of patch p of image i with any patch of image j
    usable: NDArray[np.bool_],  # [N, R, P] out: False where a feature is zero
) -> Iterator[int]:
    """Compare every pair of images once that has an image of mine, block against block; yield the pairs done."""
    kernel, mine, timings = job.kernel, job.mine, job.timings
    patches, channels = job.tokens.shape[1:]
    for block in job.blocks:
        block.hold(*kernel.feature_layout(patches, channels), len(kernel.degrees))
    own = threading.local()
    lock = threading.Lock()

    def compare(left: _Block, right: _Block, i: int) -> int:
        """Compare image i of the left block with the right block's images (only the later ones in its own block)."""
        if not hasattr(own, "tile"):
            own.tile = cpu.empty_tile(patches)
            own.unwanted = np.empty(minima.shape[2:], np.float32)
        start, product = time.perf_counter(), 0.0
        partners = range(i + 1 if left is right else 0, right.count)
        for j in partners:
            a, b = left.first + i, right.first + j
            wanted = minima[b - mine.start, a] if b in mine else own.unwanted
            low = left.features[i], left.inverse[i], minima[a - mine.start, b]
            high = right.features[j], right.inverse[j], wanted
            if b < a:  # one order of every pair, so that every plan rounds alike
                low, high = high, low
            product += kernel.best_cosines(low[0], high[0], low[1], high[1], own.tile, (low[2], high[2]))
        seconds = time.perf_counter() - start
        with lock:
            workers = job.plan.workers
            timings["product"] = timings.get("product", 0.0) + product / workers
            timings["filter and max"] = timings.get("filter and max", 0.0) + (seconds - product) / workers
        return len(partners)

    def load(side: int, images: range) -> _Block:
        block = job.load(side, images, kernel.prepare)
        usable[images.start : images.stop] = block.inverse[: block.count] > 0
        return block

    runs = job.own_runs()
    for number, images in enumerate(runs):
        left = load(0, images)
        yield from job.pool.map(lambda i: compare(left, left, i), range(left.count))  # noqa: B023
        for others in (*runs[number + 1 :], *job.other_runs()):
            right = load(1, others)
            yield from job.pool.map(lambda i: compare(left, right, i), range(left.count))  # noqa: B023


def _squared_distances(cosines: Array, usable: NDArray[np.bool_], zero_there: NDArray[np.bool_]) -> Array:
    """Turn cosines into squared distances between unit vectors.

    usable: False where the patch's own feature is zero; zero_there: whether the other image has a zero feature. A zero
    feature lies at distance 1 from every unit vector and at distance 0 from another zero feature.
    """
    squared: Array = -2.0 * cosines
    squared += 2.0
    if zero_there.any():
        np.minimum(squared, 1.0, out=squared, where=zero_there)
    if not usable.all():
        np.copyto(squared, np.where(zero_there, np.float32(0.0), np.float32(1.0)), where=~usable)
    return np.maximum(squared, 0.0, out=squared)


def _any_zero(usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which images have a zero feature; [..., P] -> [...]."""
    zero: NDArray[np.bool_] = np.any(~usable, axis=-1)
    return zero


def _boundaries(ranks: tuple[int, int]) -> list[int]:
    """Return where a partition has to be exact so that positions first … last − 1 hold those ranks."""
    return [rank - 1 for rank in ranks if rank > 0]


def _chunks(patches: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, patches, size)]


def _hand_back(kept: Array | None, share: float, image: int, patches: slice, distances: Array) -> None:
    """Add one image's distances to the others, [N-1, p], to what the caller gets back of it, [P, N]."""
    if kept is not None:
        kept[patches, :image] += np.float32(share) * distances[:image].T
        kept[patches, image + 1 :] += np.float32(share) * distances[image:].T


def _selected_averages(job: _Job, minima: Array, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Turn best cosines [rows, N, R, P] into mean distances over the chosen ranks and the degrees, [rows, P]."""
    first, last = job.ranks
    zeros = _any_zero(usable)  # [N, R]
    returned = job.returned

    def average(image: int) -> NDArray[np.float64]:
        cosines = minima[image - job.mine.start]  # [N, R, P]
        others = np.arange(len(cosines)) != image
        scores = np.empty(cosines.shape[-1])
        for patches in _chunks(len(scores), job.plan.patches_at_once):
            squared = _squared_distances(
                cosines[..., patches][others], usable[image, :, patches], zeros[others][..., None]
            )
            distances = np.sqrt(squared, out=squared)  # [N-1, R, p]
            for r in range(cosines.shape[1]):
                _hand_back(returned.of(job.layer, r, image), returned.share, image, patches, distances[:, r])
            distances.partition(_boundaries(job.ranks), axis=0)
            scores[patches] = distances[first:last].mean(axis=(0, 1), dtype=np.float64)
        return scores

    with stopwatch(job.timings, "select"):
        return np.array(list(job.pool.map(average, job.mine)))


@dataclass(frozen=True)
class _Winners:
    """Winners of one image and degree: those of the chosen ranks, or of all other images in their order."""

    image: NDArray[np.int32]  # [K, P]
    patch: NDArray[np.int32]  # [K, P]
    cosines: Array  # [K, P], filled in when they are measured


def _choose_winners(job: _Job, keys: Array, usable: NDArray[np.bool_], image: int) -> _Winners:
    """Choose the winners of one image by their keys [N, P]; usable: [N, P], both of one degree."""
    others = np.flatnonzero(np.arange(len(keys)) != image)
    zeros, everyone = _any_zero(usable)[others, None], job.returned.array is not None
    first, last = (0, len(others)) if everyone else job.ranks
    shape = last - first, keys.shape[1]
    winners = _Winners(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.float32))
    for patches in _chunks(keys.shape[1], job.plan.patches_at_once):
        candidates = keys[:, patches][others]  # [N-1, p]
        if everyone:
            winners.image[:, patches] = others[:, None]
        else:
            squared = _squared_distances(1.0 - candidates, usable[image, patches], zeros)
            chosen = np.argpartition(squared, _boundaries(job.ranks), axis=0)[first:last]  # [K, p]
            winners.image[:, patches] = others[chosen]
            candidates = np.take_along_axis(candidates, chosen, axis=0)
        winners.patch[:, patches] = cpu.winning_patches(candidates, keys.shape[1])
    return winners


def _remeasured_averages(job: _Job, keys: Array, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Turn keys [rows, N, R, P] into mean distances over the chosen ranks and the degrees, [rows, P], all measured."""
    kernel, pool, returned, (first, last) = job.kernel, job.pool, job.returned, job.ranks
    assert isinstance(kernel, cpu.Int8GramOnce)
    patches, channels = job.tokens.shape[1:]
    for block in job.blocks:
        block.hold((patches, channels), np.float32, 1)
    total = np.zeros((len(job.mine), patches))

    def average(image: int, r: int, zeros: NDArray[np.bool_], winners: _Winners) -> None:
        kept = returned.of(job.layer, r, image)
        for some in _chunks(patches, job.plan.patches_at_once):
            squared = _squared_distances(
                winners.cosines[:, some], usable[image, r, some], zeros[winners.image[:, some]]
            )
            distances = np.sqrt(squared, out=squared)  # [K, p]
            if kept is not None:
                _hand_back(kept, returned.share, image, some, distances)
                distances.partition(_boundaries(job.ranks), axis=0)
                distances = distances[first:last]
            total[image - job.mine.start, some] += distances.mean(axis=0, dtype=np.float64) / len(kernel.degrees)

    for r, degree in enumerate(kernel.degrees):
        prepare = kernel.prepare_unit(degree)
        zeros = _any_zero(usable[:, r])  # [N]
        for images in job.own_runs():
            left = job.load(0, images, prepare)
            with stopwatch(job.timings, "select"):
                own_keys = keys[images.start - job.mine.start : images.stop - job.mine.start, :, r]
                winners = list(pool.map(lambda i, k: _choose_winners(job, k, usable[:, r], i), images, own_keys))  # noqa: B023
            for others in (*job.own_runs(), *job.other_runs()):
                right = left if others == images else job.load(1, others, prepare)
                with stopwatch(job.timings, "re-measure"):
                    list(pool.map(lambda i: _measure_winners(left, right, i, winners[i]), range(left.count)))  # noqa: B023
            with stopwatch(job.timings, "select"):
                list(pool.map(lambda i, w: average(i, r, zeros, w), images, winners))  # noqa: B023
            winners.clear()  # the next ones would otherwise stand beside them
    return total


def _measure_winners(left: _Block, right: _Block, i: int, winners: _Winners) -> None:
    """Measure those winners of image i of the left block that are in the right block, both of unit features."""
    features = right.features[: right.count]  # [B, P, C]
    cpu.measure_winners(left.features[i], features, right.first, winners.image, winners.patch, winners.cosines)

"""Mutual scoring on CUDA devices: the data flow from patch tokens to patch scores.

per layer: tokens → normalise: features [N, P, C] fp16 → compare: best cosines of every pair → select: interval average

Features of a layer stay on the device where they fit. Otherwise they are computed once and streamed from the host, and
so they are where several devices share the work: each owns a run of images (plan.py) and has a thread of its own.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.machine import Timings, stopwatch
from zsad.kernels.minima import ReturnedMinima, ReturnMinima
from zsad.kernels.mutual_scoring import checked_degrees, checked_grid, checked_interval
from zsad.kernels.planner import run_within_memory
from zsad.kernels.reference import interval_ranks

from .comparers import MAX_THREADS, OWN_PATCHES, Products, choose_comparer, filter_max_shape
from .device import Device, DeviceError, DeviceMemoryError, filter_max_kernel, open_device, open_devices
from .images import network_input, upsample
from .plan import CudaPlan, plan_mutual_scoring
from .scorer import Scorer, Work, open_store

__all__ = [
    "MAX_THREADS",
    "OWN_PATCHES",
    "CudaPlan",
    "Device",
    "DeviceError",
    "DeviceMemoryError",
    "Products",
    "choose_comparer",
    "filter_max_kernel",
    "filter_max_shape",
    "mutual_scores",
    "network_input",
    "open_device",
    "open_devices",
    "plan_mutual_scoring",
    "upsample",
]

MAX_DEGREE = 9
MEMORY_SHARE = 0.9  # of the free memory, unless a limit is given

Array = NDArray[np.float32]


@overload
def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str | Device | Sequence[Device] = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Callable[[int, int], None] | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[CudaPlan], None] | None = ...,
    host_memory_limit: int | None = ...,
    tiles: int | None = ...,
    products: Products | None = ...,
    return_minima: Literal[False] = ...,
) -> Array: ...


@overload
def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str | Device | Sequence[Device] = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Callable[[int, int], None] | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[CudaPlan], None] | None = ...,
    host_memory_limit: int | None = ...,
    tiles: int | None = ...,
    products: Products | None = ...,
    return_minima: Literal[True, "each"],
) -> tuple[Array, Array]: ...


def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: str | Device | Sequence[Device] = "cuda",
    precision: str = "fp16",
    memory_limit: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
    on_plan: Callable[[CudaPlan], None] | None = None,
    host_memory_limit: int | None = None,
    tiles: int | None = None,
    products: Products | None = None,
    return_minima: ReturnMinima = False,
) -> Array | tuple[Array, Array]:
    """Score every patch by how far it is from the nearest patches of the other images, on one or more CUDA devices.

    tokens: [N, L, P, C] float32 or float16, a NumPy array or memory map, or an array on the only device.
    device: `cuda`, `cuda:<number>`, `cuda:<number>,<number>`, `cuda:all`, or opened devices.
    precision: `fp16`: fp16 features, fp32 sums, lengths of the rounded features. `int8`: int8 products choose the
        winners, which are measured again in fp16.
    memory_limit: bytes of memory on each device; by default 90 % of what is free on the fullest.
    host_memory_limit: bytes of host memory for what the devices do not hold; three quarters of what is free by default.
    tiles: image pairs per launch, instead of the planned ones.
    products: in fp16, `gram`: one for all degrees, whose tiles are filtered; `fused`: one per degree without a tile.
        By default what is faster on the device.
    The other arguments and the results are those of `zsad.kernels.mutual_scores`.
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
    several = open_devices(device) if isinstance(device, str) else device
    devices: Sequence[Device] = several if isinstance(several, Sequence) else [several]
    if len(devices) > 1 and not isinstance(tokens, np.ndarray):
        raise ValueError("tokens on a device are scored by that device alone; copy them to the host to share the work")

    comparer = choose_comparer(devices, precision, products, patches)
    ranks = first, last = interval_ranks(images - 1, interval)
    shares = np.array([chosen.count(degree) for degree in distinct], np.float32)
    shares /= len(chosen) * layers
    one_by_one = [np.array([other == degree for other in distinct], np.float32) for degree in chosen]
    minima_weights = one_by_one if return_minima == "each" else [shares] if return_minima else []
    returned = ReturnedMinima(return_minima, images, layers, len(chosen), patches)
    work = Work(grid, channels, distinct, ranks, shares / np.float32(last - first), minima_weights, returned)

    def make_plan(limit: int) -> CudaPlan:
        plan = plan_mutual_scoring(
            images,
            patches,
            channels,
            len(distinct),
            limit,
            min(opened.cache_bytes for opened in devices),
            devices=len(devices),
            host_limit=host_memory_limit,
            returned_bytes=returned.bytes,
            tiles=tiles,
            comparer=comparer,
        )
        if on_plan is not None:
            on_plan(plan)
        return plan

    def run(plan: CudaPlan) -> Array:
        returned.allocate()
        return _score(tokens, devices[: plan.devices], plan, work, progress, timings if timings is not None else {})

    limit = memory_limit
    if limit is None:
        limit = min(int(MEMORY_SHARE * opened.free_bytes()) for opened in devices)
    scores = run_within_memory(limit, make_plan, run, DeviceMemoryError)
    return scores if returned.array is None else (scores, returned.array)


def _score(
    tokens: Any,
    devices: Sequence[Device],
    plan: CudaPlan,
    work: Work,
    progress: Callable[[int, int], None] | None,
    timings: Timings,
) -> Array:
    """Score tokens [N, L, P, C] as planned; returns [N, P] and fills what is handed back."""
    layers = tokens.shape[1]
    rounds = plan.rounds()
    with ExitStack() as stack:
        stack.callback(devices[0].use)
        for device in devices:  # also after a failure: nothing may still use the arrays when they go
            stack.callback(device.synchronise)
        team = _Team(stack, len(devices), layers * plan.comparisons(), progress)
        devices[0].follow()  # of several devices none has the tokens
        scorers = [Scorer(device, plan, work) for device in devices]
        store = stack.enter_context(open_store(devices[0], plan, work)) if plan.columns else None
        for layer in range(layers):
            blocks = [[mine[d] for mine in rounds if mine[d]] for d in range(len(devices))]
            with stopwatch(timings, "normalise"):
                team.do(lambda d: scorers[d].normalise(tokens, layer, blocks[d], store))  # noqa: B023
            for mine in rounds:
                with stopwatch(timings, "product, filter and max"):
                    team.do(lambda d: scorers[d].compare(mine[d], store, team.report))  # noqa: B023
                with stopwatch(timings, "select"):
                    team.do(lambda d: scorers[d].select(layer, mine[d], store))  # noqa: B023
        scores = np.empty((plan.images, work.patches), np.float32)
        for d, scorer in enumerate(scorers):
            for mine in rounds:
                scorer.device.use()
                at = slice(mine[d].start, mine[d].stop)
                scores[at] = scorer.device.to_host(scorer.scores[at])
    return scores


class _StoppedError(Exception):
    """Another device's thread has failed, or the caller was interrupted."""


class _Team:
    """Does the same step on every device at once, each in its own thread; a single one in the caller's."""

    def __init__(self, stack: ExitStack, size: int, pairs: int, progress: Callable[[int, int], None] | None) -> None:
        self.pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(size if size > 1 else 0)]
        self.pairs, self.done, self.progress = pairs, 0, progress
        self.lock, self.stop = threading.Lock(), threading.Event()

    def do(self, step: Callable[[int], None]) -> None:
        """Call step(number of the device) for all of them; raises the first failure after all have stopped."""
        if not self.pools:
            step(0)
            return
        futures = [pool.submit(step, number) for number, pool in enumerate(self.pools)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # all are done by now unless one has failed or the wait was interrupted
            if not all(future.done() and future.exception() is None for future in futures):
                self.stop.set()
        failures = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(failures, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def report(self, pairs: int) -> None:
        """Count pairs that were queued; raises _StoppedError where the work has no use any more."""
        if self.stop.is_set():
            raise _StoppedError
        with self.lock:
            self.done += pairs
            if self.progress is not None:
                self.progress(self.done, self.pairs)

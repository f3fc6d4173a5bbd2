"""Mutual scoring on CUDA devices: the data flow from patch tokens to patch scores.

per layer: tokens → normalise: features [N, P, C] fp16 → compare: best cosines of every pair → select: interval average

Features of a layer stay on the device where they fit. Otherwise they are computed once and streamed from the host, and
so they are where several devices share the work: each owns a run of images (plan.py) and has a thread of its own.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.machine import Timings, stopwatch
from zsad.kernels.minima import ReturnedMinima
from zsad.kernels.task import Task

from .comparers import Products, choose_comparer, degrees_mask
from .device import Device, DeviceMemoryError
from .model import Filtered
from .plan import Plan, Sizes, least_bytes, plan_mutual_scoring
from .scorer import Scorer, Work, open_store

MAX_DEGREE = 9
MEMORY_SHARE = 0.9  # of the free memory, unless a limit is given

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """What is otherwise chosen by the shapes and the devices; every choice gives the same scores up to rounding."""

    # In fp16, "gram": one for all degrees; without a Gram in memory "tiled", the same, and "fused", one per degree.
    products: Products | None = None
    pairs: int | None = None  # image pairs per launch
    host_memory_limit: int | None = None  # bytes of host memory for what the devices do not hold
    recorded: bool = True  # whether the comparisons of a layer are taken down as CUDA graphs for the next


class Scoring:
    """Mutual scoring on one or more CUDA devices."""

    exhausted = DeviceMemoryError

    def __init__(self, task: Task, precision: str, devices: Sequence[Device], options: Options) -> None:
        """precision: "fp16", which "auto" stands for: fp16 features, fp32 sums, lengths of the rounded features.

        "int8": int8 products choose the winners, which are measured again in fp16. Raises ValueError for another one
        and for degrees that the kernels do not have.
        """
        self._task, self._devices, self._options = task, devices, options
        self.precision = "fp16" if precision == "auto" else precision
        self._degrees = sorted(set(task.degrees))
        if self._degrees[-1] > MAX_DEGREE:
            raise ValueError(f"degrees on a CUDA device go up to {MAX_DEGREE}, not {self._degrees[-1]}; use the CPU")
        windowed = task.window is not None
        self._comparer = choose_comparer(devices, self.precision, options.products, task.patches, windowed)

    def check(self, tokens: Any) -> None:
        if tokens.dtype not in (np.float32, np.float16):
            raise ValueError(f"tokens must be float32 or float16, not {tokens.dtype}")
        if isinstance(tokens, np.ndarray):
            return
        if len(self._devices) > 1:
            raise ValueError(
                "tokens on a device are scored by that device alone; copy them to the host to share the work"
            )
        if tokens.device.id != self._devices[0].number:
            raise ValueError(
                f"tokens lie on device {tokens.device.id} and cannot be scored on device {self._devices[0].number}; "
                f"use cuda:{tokens.device.id}, or copy them there"
            )
        if not tokens[:1, 0].flags.c_contiguous:  # the kernels take an image's tokens of a layer for packed
            raise ValueError("the tokens [P, C] of an image must lie together; use cupy.ascontiguousarray(tokens)")

    def memory_limit(self) -> int:
        return min(int(MEMORY_SHARE * device.free_bytes()) for device in self._devices)

    def needed(self, images: int, references: int, returned: ReturnedMinima) -> int:
        return least_bytes(self._sizes(images, references, returned))

    def plan(self, images: int, references: int, memory_limit: int, returned: ReturnedMinima) -> Plan:
        card = min((device.card for device in self._devices), key=lambda card: card.cache_bytes)
        sizes = self._sizes(images, references, returned)
        return plan_mutual_scoring(sizes, memory_limit, card, self._options.host_memory_limit, self._options.pairs)

    def _sizes(self, images: int, references: int, returned: ReturnedMinima) -> Sizes:
        task = self._task
        sizes = images + references, task.patches, task.channels, len(self._degrees)
        filtered = Filtered(task.grid, degrees_mask(self._degrees), task.window)
        return Sizes(*sizes, len(self._devices), self._comparer, returned.bytes, references, filtered=filtered)

    def run(
        self,
        tokens: Any,
        plan: Plan,
        returned: ReturnedMinima,
        progress: Callable[[int, int], None] | None,
        timings: Timings,
    ) -> Array:
        """Score tokens [N + K, L, P, C] as planned; returns [N, P] and fills `returned`."""
        return _score(tokens, self._devices[: plan.devices], plan, self._work(len(tokens), returned), progress, timings)

    def _work(self, images: int, returned: ReturnedMinima) -> Work:
        task, distinct = self._task, self._degrees
        ranks = first, last = task.ranks(images)
        shares = np.array([task.degrees.count(degree) for degree in distinct], np.float32)
        shares /= len(task.degrees) * task.layers
        place = np.array([[other == degree for other in distinct] for degree in task.degrees], np.float32)
        minima_weights = returned.weights @ place  # [arrays, L, R]
        weights = shares / np.float32(last - first)
        recorded = self._options.recorded and task.layers > 1
        return Work(task.grid, task.channels, distinct, ranks, weights, minima_weights, returned, task.window, recorded)


def _score(
    tokens: Any,
    devices: Sequence[Device],
    plan: Plan,
    work: Work,
    progress: Callable[[int, int], None] | None,
    timings: Timings,
) -> Array:
    """Score tokens [N + K, L, P, C] as planned; returns [N, P] and fills what is handed back."""
    layers = tokens.shape[1]
    rounds, prepared = plan.rounds(), plan.prepared()
    with ExitStack() as stack:
        stack.callback(devices[0].use)
        for device in devices:  # also after a failure: nothing may still use the arrays when they go
            stack.callback(device.synchronise)
        team = _Team(stack, len(devices), layers * plan.comparisons(), progress)
        devices[0].follow()  # of several devices none has the tokens
        scorers = [Scorer(device, plan, work) for device in devices]
        store = stack.enter_context(open_store(devices[0], plan, work)) if plan.columns else None
        for layer in range(layers):
            with stopwatch(timings, "normalise"):
                team.do(lambda d: scorers[d].normalise(tokens, layer, prepared[d], store))  # noqa: B023
            for mine in rounds:
                with stopwatch(timings, "product, filter and max"):
                    team.do(lambda d: scorers[d].compare(mine[d], store, team.report))  # noqa: B023
                with stopwatch(timings, "select"):
                    team.do(lambda d: scorers[d].select(layer, mine[d], store))  # noqa: B023
        scores = np.empty((plan.scored, work.patches), np.float32)
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

"""Mutual scoring on a CPU: the data flow from patch tokens to patch scores.

tokens [N + K, L, P, C] → per layer: features and inverse lengths → best cosines of every pair [N, N + K, R, P] →
distances → mean of the lowest ranks → mean over layers and degrees [N, P]

The last K images are references, which nothing is compared for: there is no product among them.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from zsad.kernels.machine import Timings, available_cores, default_memory_limit, scratch, stopwatch
from zsad.kernels.minima import ReturnedMinima
from zsad.kernels.task import Task

from .arrays import Array
from .comparers import Int8, Int8GramOnce, bounds_may_pay, choose_comparer, native_pass_covers
from .plan import Plan, Sizes, least_bytes, plan_mutual_scoring
from .scorer import Scorer, runs_of


class Scoring:
    """Mutual scoring on the CPU."""

    exhausted = MemoryError

    def __init__(self, task: Task, precision: str) -> None:
        """precision: "fp32", which "auto" stands for, or "int8"; raises ValueError where it is not to be had."""
        self._task = task
        self.precision = "fp32" if precision == "auto" else precision
        self._comparer = choose_comparer(self.precision, task.degrees, task.patches, task.channels, task.window)

    def check(self, tokens: Any) -> None:
        if tokens.dtype != np.float32:
            raise ValueError(f"tokens must be float32, not {tokens.dtype}")

    def memory_limit(self) -> int:
        return default_memory_limit()

    def needed(self, images: int, references: int, returned: ReturnedMinima) -> int:
        return least_bytes(self._sizes(images, references, returned))

    def plan(self, images: int, references: int, memory_limit: int, returned: ReturnedMinima) -> Plan:
        return plan_mutual_scoring(self._sizes(images, references, returned), memory_limit)

    def _sizes(self, images: int, references: int, returned: ReturnedMinima) -> Sizes:
        task, remeasured, neighbour_rows, compared = self._task, 0, 0, images + references
        if issubclass(self._comparer, Int8):
            first, last = task.ranks(compared)
            remeasured = compared - 1 if returned.measured else last - first
        if self._comparer is Int8GramOnce:
            neighbour_rows = min(max(task.degrees), task.grid[0]) * task.grid[1]
        sizes = compared, task.patches, task.channels, len(task.degrees)
        return Sizes(
            *sizes,
            self._comparer,
            remeasured,
            returned.bytes,
            references,
            windowed=task.window is not None,
            neighbour_rows=neighbour_rows,
            may_be_bounded=bounds_may_pay(compared, task.channels, self._comparer, task.window),
        )

    def run(
        self,
        tokens: Array,
        plan: Plan,
        returned: ReturnedMinima,
        progress: Callable[[int, int], None] | None,
        timings: Timings,
    ) -> Array:
        """Score tokens [N + K, L, P, C] as planned; returns [N, P] and fills `returned`."""
        task = self._task
        if not native_pass_covers(task.degrees):
            warnings.warn(
                "mutual scoring runs on NumPy alone (one product per degree, about "
                f"{len(task.degrees)} times the arithmetic): the native kernel was not built or lacks a degree "
                f"of {task.degrees}; install a C++17 compiler and reinstall zsad",
                RuntimeWarning,
                stacklevel=3,
            )
        pairs_done, pairs = 0.0, task.layers * plan.comparisons()

        def report(done: float) -> None:
            nonlocal pairs_done
            pairs_done += done
            if progress is not None:
                progress(round(pairs_done), pairs)

        shape = plan.rows, plan.images, len(task.degrees), task.patches
        blas_threads = max(1, available_cores() // plan.workers)
        with (
            scratch(shape, plan.minima_in_memory) as best,
            ThreadPoolExecutor(plan.workers) as pool,
            threadpool_limits(blas_threads, user_api="blas"),
        ):
            scorer = Scorer(pool, plan, task, returned, best, timings)
            try:
                for layer in range(task.layers):
                    with stopwatch(timings, "normalise"):
                        scorer.start_layer(tokens[:, layer], layer)
                    for rows in runs_of(range(plan.scored), plan.rows):
                        scorer.compare(rows, report)
                        scorer.select(rows)
            except BaseException:  # Ctrl-C included: do not start what is still queued
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return scorer.scores.astype(np.float32)

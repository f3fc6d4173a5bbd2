"""The public call of mutual scoring: what it takes, what it refuses, and on which device it runs."""

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from . import cpu
from .cpu.scoring import score_on_cpu
from .machine import Timings, default_memory_limit
from .minima import ReturnedMinima, ReturnMinima
from .planner import Plan, plan_mutual_scoring, run_within_memory
from .reference import interval_ranks

Array = NDArray[np.float32]


@overload
def mutual_scores(
    tokens: Array,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Callable[[int, int], None] | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[Any], None] | None = ...,
    return_minima: Literal[False] = ...,
) -> Array: ...


@overload
def mutual_scores(
    tokens: Array,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Callable[[int, int], None] | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[Any], None] | None = ...,
    return_minima: Literal[True, "each"],
) -> tuple[Array, Array]: ...


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
    return_minima: ReturnMinima = False,
) -> Array | tuple[Array, Array]:
    """Score every patch by how far it is from the nearest patches of the other images (MuSc, sections 3.1 and 3.2).

    tokens: [N, L, P, C] float32 patch tokens straight from the backbone, without the class token; an array or a
        memory map. They are read a block at a time and not changed.
    grid: rows and columns of the patch grid; a square one by default.
    degrees: odd sizes of the neighbourhoods that LNAMD averages.
    interval: which of the N − 1 sorted distances are averaged; below 1 a fraction, from 1 on a count.
    device: "cpu", "cuda", "cuda:N", several devices that share the image pairs ("cuda:0,1") or "cuda:all"; on one CUDA
        device tokens may also be a device array, and on any number of them float16.
    precision: "fp32" on a CPU; "fp16" on a CUDA device: fp16 features, fp32 sums; "auto" is these two. "int8" on both:
        products in int8 choose the winners, whose distances are then measured in fp32 or from the fp16 features.
    memory_limit: bytes that may be used beside `tokens`; three quarters of the free memory by default. Where less can
        be had, the work is planned again for half as much.
    progress: called with the pairs done and the pairs in all; with several devices from their threads, one at a time.
    timings: seconds are added under "product", "filter and max", "normalise" and "select", with int8 also "re-measure".
    on_plan: called with the plan before work starts; `describe()` says it in words.
    return_minima: also hand back the distances of every patch to the nearest patch of each image, from which other
        references can be selected without new products: True averages them over layers and degrees, "each" does not.

    Returns scores [N, P] float32, distances between unit vectors averaged over layers and degrees; with `return_minima`
    also the minima, float32 [N, P, N] or for "each" [L, R, N, P, N] in the order of `degrees`, infinity for the image
    itself.
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
            return_minima=return_minima,
        )
    tokens = _checked_tokens(tokens)
    images, layers, patches, channels = tokens.shape
    grid = checked_grid(grid, patches)
    degrees = checked_degrees(degrees)
    interval = checked_interval(interval)
    if device != "cpu":
        raise ValueError(f"device must be cpu, cuda, cuda:N, cuda:N,M or cuda:all, not {device!r}")

    kernel = cpu.pair_kernel(grid, degrees, "fp32" if precision == "auto" else precision)
    if not cpu.native_pass_covers(degrees):
        warnings.warn(
            "mutual scoring runs on NumPy alone (one product per degree, about "
            f"{len(degrees)} times the arithmetic): the native kernel was not built or lacks a degree of {degrees}; "
            "install a C++17 compiler and reinstall zsad",
            RuntimeWarning,
            stacklevel=2,
        )
    returned = ReturnedMinima(return_minima, images, layers, len(degrees), patches)

    def make_plan(limit: int) -> Plan:
        plan = plan_on_cpu(kernel, images, patches, channels, interval, limit, returned=returned)
        if on_plan is not None:
            on_plan(plan)
        return plan

    def run(plan: Plan) -> Array:
        returned.allocate()
        ranks = interval_ranks(images - 1, interval)
        return score_on_cpu(tokens, kernel, plan, ranks, returned, progress, timings if timings is not None else {})

    limit = default_memory_limit() if memory_limit is None else memory_limit
    scores = run_within_memory(limit, make_plan, run, MemoryError)
    return scores if returned.array is None else (scores, returned.array)


def plan_on_cpu(
    kernel: cpu.PairKernel,
    images: int,
    patches: int,
    channels: int,
    interval: tuple[float, float],
    memory_limit: int | None,
    *,
    returned: ReturnedMinima | None = None,
) -> Plan:
    """Plan a call on the CPU as that call would; raises MemoryError where the limit is too small."""
    limit = default_memory_limit() if memory_limit is None else memory_limit
    bytes_returned = returned.bytes if returned is not None else 0
    remeasured = 0
    if isinstance(kernel, cpu.Int8GramOnce):
        first, last = interval_ranks(images - 1, interval)
        remeasured = images - 1 if bytes_returned else last - first
    return plan_mutual_scoring(
        images, patches, channels, len(kernel.degrees), limit, kernel.feature_copies, remeasured, bytes_returned
    )


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

"""Mutual scoring, whole: what it takes and refuses, and the call that plans, runs and plans again for less memory."""

import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from .cpu.scoring import Scoring as CpuScoring
from .machine import Timings
from .minima import ReturnedMinima, ReturnMinima
from .task import make_task

if TYPE_CHECKING:
    from .cuda.device import Device
    from .cuda.scoring import Options

log = logging.getLogger("zsad")

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]  # pairs done, pairs in all


class _Scoring(Protocol):
    """What the CPU half and the CUDA half have in common; each knows its own plans."""

    precision: str  # resolved

    @property
    def exhausted(self) -> type[MemoryError]:
        """What `run` raises where memory ends before the plan says so."""

    def check(self, tokens: Any) -> None:
        """Raise ValueError for tokens of a type or in a place that it does not take."""

    def memory_limit(self) -> int:
        """Return the bytes that it may use unless told otherwise."""

    def needed(self, images: int, references: int, returned: ReturnedMinima) -> int:
        """Return the least bytes for which there is a plan."""

    def plan(self, images: int, references: int, memory_limit: int, returned: ReturnedMinima) -> Any:
        """Plan a call that hands back these minima; raises MemoryError where the limit is too small."""

    def run(
        self, tokens: Any, plan: Any, returned: ReturnedMinima, progress: Progress | None, timings: Timings
    ) -> Array:
        """Score tokens [N + K, L, P, C] as planned; returns [N, P] and fills `returned`."""


class MutualScoring:
    """Mutual scoring for images of one shape, on the CPU or on CUDA devices (MuSc, sections 3.1 and 3.2)."""

    def __init__(
        self,
        grid: tuple[int, int],
        layers: int,
        channels: int,
        degrees: Sequence[int],
        interval: tuple[float, float],
        precision: str = "auto",
        devices: "Sequence[Device]" = (),
        options: "Options | None" = None,
        window: int | None = None,
    ) -> None:
        """Decide how images are compared; the arguments mean what they do in `mutual_scores`.

        grid: rows and columns of the patches. devices: opened CUDA devices that share the work; none is the CPU.
        options: of the devices, for benchmarks and tests. Raises ValueError for arguments that make no sense and for a
        precision that is not to be had there.
        """
        self._task = make_task(grid, layers, channels, degrees, interval, window)
        self._scoring: _Scoring
        if devices:
            from .cuda.scoring import Options
            from .cuda.scoring import Scoring as CudaScoring

            self._scoring = CudaScoring(self._task, precision, devices, options or Options())
        else:
            self._scoring = CpuScoring(self._task, precision)
        self.precision = self._scoring.precision

    def needed(self, images: int, references: int = 0, return_minima: ReturnMinima = False) -> int:
        """Return the least memory in bytes with which `scores` works, beside the tokens.

        images: that are scored; references: that they are compared with beside each other. On the CPU it is host
        memory, otherwise memory of each device. Minima that are handed back go to a temporary file where memory does
        not hold them.
        """
        return self._scoring.needed(images, references, ReturnedMinima(return_minima, images, self._task, references))

    def memory_limit(self) -> int:
        """Return the bytes that `scores` uses at most unless told otherwise, from what is free now.

        Three quarters of the free host memory on the CPU; otherwise nine tenths of the free memory of the fullest
        device.
        """
        return self._scoring.memory_limit()

    @overload
    def scores(
        self,
        tokens: Any,
        memory_limit: int | None = ...,
        *,
        progress: Progress | None = ...,
        timings: Timings | None = ...,
        on_plan: Callable[[Any], None] | None = ...,
        references: int = ...,
        return_minima: Literal[False] = ...,
    ) -> Array: ...

    @overload
    def scores(
        self,
        tokens: Any,
        memory_limit: int | None = ...,
        *,
        progress: Progress | None = ...,
        timings: Timings | None = ...,
        on_plan: Callable[[Any], None] | None = ...,
        references: int = ...,
        return_minima: Literal[True, "each", "smallest degree"],
    ) -> tuple[Array, Array]: ...

    @overload
    def scores(
        self,
        tokens: Any,
        memory_limit: int | None = ...,
        *,
        progress: Progress | None = ...,
        timings: Timings | None = ...,
        on_plan: Callable[[Any], None] | None = ...,
        references: int = ...,
        return_minima: ReturnMinima,
    ) -> Array | tuple[Array, Array]: ...

    def scores(
        self,
        tokens: Any,
        memory_limit: int | None = None,
        *,
        progress: Progress | None = None,
        timings: Timings | None = None,
        on_plan: Callable[[Any], None] | None = None,
        references: int = 0,
        return_minima: ReturnMinima = False,
    ) -> Array | tuple[Array, Array]:
        """Score images by each other and by references; arguments, result and errors as of `mutual_scores`.

        Plans once, and says the plan at the level DEBUG; where an allocation fails all the same it plans again for half
        as much, and warns.
        """
        self._check(tokens, references)
        images, timings = len(tokens) - references, timings if timings is not None else {}
        returned = ReturnedMinima(return_minima, images, self._task, references)
        limit = self.memory_limit() if memory_limit is None else memory_limit
        while True:
            plan = self._scoring.plan(images, references, limit, returned)
            log.debug("%s", plan.describe())
            if on_plan is not None:
                on_plan(plan)
            try:
                returned.allocate(plan.returned_in_memory)
                scores = self._scoring.run(tokens, plan, returned, progress, timings)
                return scores if returned.array is None else (scores, returned.array)
            except self._scoring.exhausted as error:
                why = str(error)
            gc.collect()  # the traceback held the arrays, perhaps in a cycle
            limit = min(limit, plan.peak_bytes) // 2
            log.warning("out of memory (%s): mutual scoring starts again with at most %d MiB", why, limit >> 20)

    def _check(self, tokens: Any, references: int) -> None:
        task = self._task
        if tuple(tokens.shape[1:]) != (task.layers, task.patches, task.channels):
            raise ValueError(
                f"tokens must be [N, {task.layers}, {task.patches}, {task.channels}], not {list(tokens.shape)}"
            )
        self._scoring.check(tokens)
        if not 0 <= references < len(tokens):
            raise ValueError(f"of {len(tokens)} images {references} cannot be references: at least one is scored")
        if len(tokens) < 2:
            raise ValueError(
                "mutual scoring compares images with each other and got only one; give it at least two images of the "
                "same product (ten or more for useful scores), or known-good images as references"
            )


@overload
def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Progress | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[Any], None] | None = ...,
    references: int = ...,
    window: int | None = ...,
    return_minima: Literal[False] = ...,
) -> Array: ...


@overload
def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = ...,
    degrees: Sequence[int] = ...,
    interval: tuple[float, float] = ...,
    device: str = ...,
    precision: str = ...,
    memory_limit: int | None = ...,
    *,
    progress: Progress | None = ...,
    timings: Timings | None = ...,
    on_plan: Callable[[Any], None] | None = ...,
    references: int = ...,
    window: int | None = ...,
    return_minima: Literal[True, "each", "smallest degree"],
) -> tuple[Array, Array]: ...


def mutual_scores(
    tokens: Any,
    grid: tuple[int, int] | None = None,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    device: str = "cpu",
    precision: str = "auto",
    memory_limit: int | None = None,
    *,
    progress: Progress | None = None,
    timings: Timings | None = None,
    on_plan: Callable[[Any], None] | None = None,
    references: int = 0,
    window: int | None = None,
    return_minima: ReturnMinima = False,
) -> Array | tuple[Array, Array]:
    """Score every patch by how far it is from the nearest patches of the other images (MuSc, sections 3.1 and 3.2).

    tokens: [N + K, L, P, C] float32 patch tokens straight from the network, without the class token; an array or a
        memory map. They are read a few images at a time and not changed.
    grid: rows and columns of the patch grid; a square one by default.
    degrees: odd sizes of the neighbourhoods that LNAMD averages.
    interval: which of the N − 1 + K sorted distances are averaged: below 1 a fraction, 1.0 all of them, above 1 a count
        (see `reference.interval_ranks`).
    device: "cpu", "cuda", "cuda:N", several devices that share the image pairs ("cuda:0,1") or "cuda:all"; on one CUDA
        device tokens may also be a device array, and on any number of them float16.
    precision: "fp32" on a CPU; "fp16" on a CUDA device: fp16 features, fp32 sums; "auto" is these two. "int8" on both:
        products in int8 choose the winners, whose distances are then measured in fp32 or from the fp16 features.
    memory_limit: bytes that may be used beside `tokens`; by default a share of what is free. Where less can be had, the
        work is planned again for half as much.
    progress: called with the pairs done and the pairs in all; with several devices from their threads, one at a time.
    timings: seconds are added under "product", "filter and max", "normalise" and "select", with int8 also "re-measure".
    on_plan: called with the plan before work starts; `describe()` says it in words.
    references: K, how many of the images, the last ones, have no scores: the others are compared with them and with
        each other, references are not. With one, a single image can be scored.
    window: with fixed cameras, a patch is compared only with those patches of the other images that lie at most so many
        rows and columns from its own place; 0: the same place, None: all of them. Not with int8 on a CUDA device.
    return_minima: also hand back the distances of every patch to the nearest patch of each image, from which other
        references can be selected without new products (`kept_averages`): True averages them over layers and degrees,
        "each" does not, "smallest degree" gives the averages and those over layers of the smallest degree alone; with
        int8 the distances beyond the interval are then as the products have them, to a few 1e-4. Where they take more
        than half of the limit, they are a memory map of a temporary file that goes with them.

    Returns scores [N, P] float32, distances between unit vectors averaged over layers and degrees; with `return_minima`
    also the minima, float32 [N, P, N + K], for "each" [L, R, N, P, N + K] in the order of `degrees`, for "smallest
    degree" [2, N, P, N + K], infinity for the image itself.
    Raises ValueError for arguments that make no sense (N + K = 1 among them), MemoryError for too low a limit.
    """
    if getattr(tokens, "ndim", None) != 4 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [N, L, P, C] and not empty, got shape {getattr(tokens, 'shape', None)}")
    _, layers, patches, channels = (int(n) for n in tokens.shape)
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"device must be cpu, cuda, cuda:N, cuda:N,M or cuda:all, not {device!r}")
    grid = square_grid(patches) if grid is None else grid
    if math.prod(grid) != patches:
        raise ValueError(f"grid {tuple(grid)} does not hold {patches} patches")
    devices: Sequence[Device] = ()
    if device != "cpu":
        from .cuda.device import open_devices

        devices = open_devices(device)
    scoring = MutualScoring(grid, layers, channels, degrees, interval, precision, devices, window=window)
    return scoring.scores(
        tokens,
        memory_limit,
        progress=progress,
        timings=timings,
        on_plan=on_plan,
        references=references,
        return_minima=return_minima,
    )


def square_grid(patches: int) -> tuple[int, int]:
    """Return rows and columns of the patch grid of a square image; raises ValueError where there is none."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square grid; pass grid=(rows, columns)")
    return side, side

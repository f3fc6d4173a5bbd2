"""Decides, before any work starts, what mutual scoring keeps in memory and what it streams."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

FLOAT_BYTES = 4


def available_cores() -> int:
    """Return the processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_memory_limit() -> int:
    """Return three quarters of the free memory in bytes, as the machine and its container see it."""
    free = psutil.virtual_memory().available
    limit, usage = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        free = min(free, int(limit.read_text()) - int(usage.read_text()))
    return int(0.75 * max(free, 0))


@contextmanager
def scratch(shape: tuple[int, ...], in_memory: bool) -> Iterator[NDArray[np.float32]]:
    """Yield an array of any content, in memory or in a memory-mapped temporary file; raises OSError on a full disk."""
    if in_memory:
        yield np.empty(shape, np.float32)
        return
    with tempfile.TemporaryFile(prefix="zsad-") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error when a page is written
            os.posix_fallocate(file.fileno(), 0, FLOAT_BYTES * math.prod(shape))
        yield np.memmap(file, np.float32, "w+", shape=shape)


@dataclass(frozen=True)
class Plan:
    """How one call of mutual scoring runs; every plan gives the same scores."""

    images: int
    block: int  # images of one layer whose features are resident, on each side of a pair of blocks
    workers: int  # image pairs in flight, each with a Gram tile of its own
    minima_in_memory: bool  # else [N, N, R, P] lives in a memory-mapped temporary file
    peak_bytes: int
    minima_bytes: int

    def describe(self) -> str:
        resident = "all features of a layer resident" if self.block >= self.images else f"{self.block} images per block"
        minima = "in memory" if self.minima_in_memory else "in a memory-mapped temporary file"
        return (
            f"mutual scoring of {self.images} images: {resident}, {self.workers} pairs at a time, "
            f"minima ({self.minima_bytes / 2**20:.0f} MiB) {minima}, {self.peak_bytes / 2**20:.0f} MiB at the peak"
        )


def plan_mutual_scoring(
    images: int,
    patches: int,
    channels: int,
    degrees: int,
    memory_limit: int,
    feature_copies: int = 1,
    remeasured_ranks: int = 0,
) -> Plan:
    """Fit the working set into `memory_limit` bytes, giving up speed in the order that costs least.

    feature_copies: feature arrays kept per image (one for Gram-once, one per degree without the native kernel).
    remeasured_ranks: ranks whose winners are measured again (int8; 0 for fp32).
    First the minima move to disk, then blocks shrink, then workers go. Raises MemoryError below the minimum.
    """
    tile = FLOAT_BYTES * patches**2
    minima = FLOAT_BYTES * images**2 * degrees * patches
    feature = FLOAT_BYTES * patches * (channels * feature_copies + degrees)
    # Selecting the ranks of one image takes a copy of its minima and the temporaries of the conversion to distances.
    selection = 3 * FLOAT_BYTES * images * degrees * patches
    if remeasured_ranks:
        feature += 3 * FLOAT_BYTES * remeasured_ranks * patches  # image, patch and cosine of the winners of one degree
        selection = max(selection, 6 * FLOAT_BYTES * images * patches)  # one degree at a time, with 64-bit positions

    def needed(block: int, workers: int, minima_in_memory: bool) -> int:
        sides = 1 if block >= images else 2
        loading = 2 * feature  # the image being normalised, in its source and its float32 form
        return sides * block * feature + workers * max(tile + loading, selection) + minima * minima_in_memory

    cores = min(available_cores(), max(1, images * (images - 1) // 2))
    for workers in [cores, *(w for w in (cores // 2, cores // 4, 1) if 0 < w < cores)]:
        for minima_in_memory in (True, False):
            if needed(images, workers, minima_in_memory) <= memory_limit:
                return Plan(
                    images, images, workers, minima_in_memory, needed(images, workers, minima_in_memory), minima
                )
        room = memory_limit - needed(0, workers, False)
        block = min(room // (2 * feature), images)
        if block >= min(images, 4) or (workers == 1 and block >= 1):
            return Plan(images, int(block), workers, False, needed(int(block), workers, False), minima)
    raise MemoryError(
        f"mutual scoring of {images} images with {patches} patches of {channels} channels needs at least "
        f"{needed(1, 1, False) / 2**20:.0f} MiB and the memory limit is {memory_limit / 2**20:.0f} MiB; "
        "raise --memory-limit, or make the work smaller with --image-size or --group-size"
    )

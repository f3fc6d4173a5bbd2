"""Decides, before any work starts, what mutual scoring keeps in memory and what it streams."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .machine import available_cores, default_disk_limit

log = logging.getLogger("zsad")

FLOAT_BYTES = 4
ROW_BLOCKS = (8, 2, 1)  # images per block where most memory goes to the minima of a few rows


class AnyPlan(Protocol):
    @property
    def peak_bytes(self) -> int: ...


SomePlan = TypeVar("SomePlan", bound=AnyPlan)
Result = TypeVar("Result")


def run_within_memory(
    limit: int, make_plan: Callable[[int], SomePlan], run: Callable[[SomePlan], Result], failure: type[MemoryError]
) -> Result:
    """Plan for `limit` bytes and run; where an allocation fails all the same, plan for half as much and run again.

    failure: what `run` raises then. Raises the MemoryError of `make_plan` where nothing is left to halve.
    """
    while True:
        plan = make_plan(limit)
        try:
            return run(plan)
        except failure as error:
            why = str(error)
        gc.collect()  # the traceback held the arrays, perhaps in a cycle
        limit = min(limit, plan.peak_bytes) // 2
        log.warning("out of memory (%s): mutual scoring starts again with at most %d MiB", why, limit >> 20)


def compared_pairs(images: int, rows: int) -> int:
    """Count the products of a layer where blocks of rows are compared in turn with themselves and everything else.

    Pairs within a block of rows serve both directions; all others are computed once for each.
    """
    total = 0
    for first in range(0, images, rows):
        count = min(rows, images - first)
        total += count * (count - 1) // 2 + count * (images - count)
    return total


@dataclass(frozen=True)
class Plan:
    """How one call of mutual scoring runs; every plan gives the same scores."""

    images: int
    rows: int  # images whose minima with all others are kept at a time
    block: int  # images of one layer whose features are resident, on each side of a pair of blocks
    workers: int  # image pairs in flight, each with a Gram tile of its own
    minima_in_memory: bool  # else [rows, N, R, P] lives in a memory-mapped temporary file
    patches_at_once: int  # whose ranks a worker selects together
    peak_bytes: int
    minima_bytes: int

    def comparisons(self) -> int:
        """Count the image pairs of one layer whose product is computed."""
        return compared_pairs(self.images, self.rows)

    def describe(self) -> str:
        resident = "all features of a layer resident" if self.block >= self.images else f"{self.block} images per block"
        turns = "" if self.rows >= self.images else f"{self.rows} images in turn against all others, "
        minima = "in memory" if self.minima_in_memory else "in a memory-mapped temporary file"
        return (
            f"mutual scoring of {self.images} images: {turns}{resident}, {self.workers} pairs at a time, "
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
    returned_bytes: int = 0,
    disk_limit: int | None = None,
) -> Plan:
    """Fit the working set into `memory_limit` bytes, giving up speed in the order that costs least.

    feature_copies: feature arrays kept per image (one for Gram-once, one per degree without the native kernel).
    remeasured_ranks: ranks whose winners are measured again (int8; 0 for fp32).
    returned_bytes: size of the minima that the caller gets back, which stay in memory.
    disk_limit: bytes that temporary files may take; nearly all of the free disk by default.
    First the minima move to disk, then blocks shrink, then workers go. Where the disk does not hold the minima of all
    images either, a few images at a time are compared with all others, which computes most products twice. Raises
    MemoryError below the minimum.
    """
    disk_limit = default_disk_limit() if disk_limit is None else disk_limit
    tile = FLOAT_BYTES * patches**2
    row = FLOAT_BYTES * images * degrees * patches  # minima of one image
    feature = FLOAT_BYTES * patches * (channels * feature_copies + degrees)
    if remeasured_ranks:
        feature += 3 * FLOAT_BYTES * remeasured_ranks * patches  # image, patch and cosine of the winners of one degree
    loading = 2 * feature  # the image being normalised, in its source and its float32 form
    always = returned_bytes + images * patches * (8 + 8 + degrees)  # scores, a layer's scores, flags of zero features
    # Selecting the ranks of a patch takes a copy of its minima and temporaries, with int8 64-bit positions and one
    # degree at a time. It may take what comparing takes.
    selecting = FLOAT_BYTES * images * max(3 * degrees, 6 if remeasured_ranks else 0)
    at_once = min(max((tile + loading) // max(selecting, 1), 1), patches)

    def planned(rows: int, block: int, workers: int, minima_in_memory: bool) -> Plan:
        sides = 1 if block >= images else 2
        peak = always + sides * block * feature + workers * max(tile + loading, at_once * selecting)
        peak += rows * row * minima_in_memory
        return Plan(images, rows, block, workers, minima_in_memory, at_once, peak, rows * row)

    cores = min(available_cores(), max(1, images * (images - 1) // 2))
    on_disk = images * row <= disk_limit
    for workers in [cores, *(w for w in (cores // 2, cores // 4, 1) if 0 < w < cores)]:
        for minima_in_memory in (True, False) if on_disk else (True,):
            plan = planned(images, images, workers, minima_in_memory)
            if plan.peak_bytes <= memory_limit:
                return plan
        room = memory_limit - planned(0, 0, workers, False).peak_bytes
        block = int(min(room // (2 * feature), images))
        if block < 1 or (block < min(images, 4) and workers > 1):
            continue
        if on_disk:
            return planned(images, block, workers, False)
        for block in ROW_BLOCKS:
            rows = int(min((room - 2 * block * feature) // row, images - 1))
            if rows >= block:
                return planned(rows, block, workers, True)
    raise MemoryError(
        f"mutual scoring of {images} images with {patches} patches of {channels} channels needs at least "
        f"{planned(1, 1, 1, not on_disk).peak_bytes / 2**20:.0f} MiB and the memory limit is "
        f"{memory_limit / 2**20:.0f} MiB; raise --memory-limit, or make the work smaller with --image-size or "
        "--group-size"
    )

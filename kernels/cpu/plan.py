"""Decides how mutual scoring runs on a CPU: what it keeps in memory and what it streams."""

from dataclasses import dataclass, replace

from zsad.kernels.machine import available_cores, default_disk_limit

from .comparers import Bounded, Comparer, GramOnce

FLOAT_BYTES = 4
ROW_CHUNKS = (8, 2, 1)  # images per chunk where most memory goes to the minima of a few rows


def compared_pairs(images: int, rows: int, references: int = 0) -> int:
    """Count the products of a layer where chunks of rows are compared in turn with themselves and everything else.

    images: all, of which references are never rows. Pairs within a chunk of rows serve both directions; all others are
    computed once for each.
    """
    total, scored = 0, images - references
    for first in range(0, scored, rows):
        count = min(rows, scored - first)
        total += count * (count - 1) // 2 + count * (images - count)
    return total


@dataclass(frozen=True)
class Plan:
    """How one call of mutual scoring runs; every plan gives the same scores."""

    images: int  # all, references among them
    references: int  # the last images, which are only compared with
    rows: int  # images whose minima with all others are kept at a time
    chunk: int  # images of one layer whose features are resident, on each side of a pair of chunks
    workers: int  # image pairs in flight, each with a Gram of its own
    minima_in_memory: bool  # else [rows, images, R, P] lives in a memory-mapped temporary file
    patches_at_once: int  # whose ranks a worker selects together
    peak_bytes: int
    minima_bytes: int
    returned_in_memory: bool  # what the caller gets back, else in a memory-mapped temporary file
    comparer: type[Comparer]
    may_be_bounded: bool  # layers whose products bounds can spare are compared by these instead
    feature_bytes: int  # of one image's features at most, whichever way a layer is compared

    def comparisons(self) -> int:
        """Count the image pairs of one layer whose product is computed."""
        return compared_pairs(self.images, self.rows, self.references)

    @property
    def scored(self) -> int:
        return self.images - self.references

    def describe(self) -> str:
        resident = "all features of a layer resident" if self.chunk >= self.images else f"{self.chunk} images per chunk"
        turns = "" if self.rows >= self.scored else f"{self.rows} images in turn against all others, "
        minima = "in memory" if self.minima_in_memory else "in a memory-mapped temporary file"
        known = f" with {self.references} references" if self.references else ""
        returned = "" if self.returned_in_memory else ", those handed back in a memory-mapped temporary file"
        return (
            f"mutual scoring of {self.scored} images{known}: {turns}{resident}, {self.workers} pairs at a time, "
            f"minima ({self.minima_bytes / 2**20:.0f} MiB) {minima}{returned}, "
            f"{self.peak_bytes / 2**20:.0f} MiB at the peak"
        )


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a call takes."""

    images: int  # all, references among them
    patches: int
    channels: int
    degrees: int
    comparer: type[Comparer] = GramOnce  # says what features take
    remeasured_ranks: int = 0  # ranks whose winners are measured again (int8; 0 for fp32)
    returned_bytes: int = 0  # of the minima that the caller gets back
    references: int = 0
    returned_in_memory: bool = True
    windowed: bool = False  # patches meet only those near their own place
    neighbour_rows: int = 0  # rows of the Gram that a pass keeps in 16 bits beside it (int8; 0 for fp32)
    may_be_bounded: bool = False

    @property
    def scored(self) -> int:
        return self.images - self.references

    @property
    def comparers(self) -> list[type[Comparer]]:
        return [self.comparer, *[Bounded] * self.may_be_bounded]

    def plan(self, rows: int, chunk: int, workers: int, minima_in_memory: bool) -> Plan:
        """Count what a plan takes; `rows` or `chunk` may be 0, for what is left without them."""
        gram = (FLOAT_BYTES * self.patches + 2 * self.neighbour_rows) * self.patches
        row = FLOAT_BYTES * self.images * self.degrees * self.patches  # minima of one image
        loading = 2 * self.image_bytes  # the image being normalised, in its source and its float32 form
        # Scores, a layer's scores, flags of zero features.
        always = self.returned_bytes * self.returned_in_memory
        flags = 2 if self.windowed else 1
        always += self.patches * (self.scored * (8 + 8) + flags * self.images * self.degrees)
        if self.may_be_bounded:
            always += Bounded.basis_bytes(self.patches, self.channels, self.degrees)
        # Selecting the ranks of a patch takes a copy of its minima and temporaries, with int8 64-bit positions and one
        # degree at a time. It may take what comparing takes.
        selecting = FLOAT_BYTES * self.images * max(3 * self.degrees, 6 if self.remeasured_ranks else 0)
        at_once = min(max((gram + loading) // max(selecting, 1), 1), self.patches)
        sides = 1 if chunk >= self.images else 2
        peak = always + sides * chunk * self.image_bytes + workers * max(gram + loading, at_once * selecting)
        sizes = self.patches, self.channels
        peak += rows * row * minima_in_memory + workers * max(kind.product_bytes(*sizes) for kind in self.comparers)
        return Plan(
            images=self.images,
            references=self.references,
            rows=rows,
            chunk=chunk,
            workers=workers,
            minima_in_memory=minima_in_memory,
            patches_at_once=at_once,
            peak_bytes=peak,
            minima_bytes=rows * row,
            comparer=self.comparer,
            may_be_bounded=self.may_be_bounded,
            feature_bytes=self.feature_bytes,
            returned_in_memory=self.returned_in_memory,
        )

    @property
    def feature_bytes(self) -> int:
        return max(kind.feature_bytes(self.patches, self.channels, self.degrees) for kind in self.comparers)

    @property
    def image_bytes(self) -> int:
        """What stays resident of one image: features, inverse lengths, and the winners of one degree."""
        return self.feature_bytes + FLOAT_BYTES * self.patches * (self.degrees + 3 * self.remeasured_ranks)

    def fits_disk(self, disk_limit: int | None) -> bool:
        """Tell whether all minima may go to a temporary file; by default nearly all that is free."""
        taken = 0 if self.returned_in_memory else self.returned_bytes
        return taken + self.plan(self.scored, 0, 0, False).minima_bytes <= _free_disk(disk_limit)

    def spilled(self, disk_limit: int | None) -> "Sizes":
        """Return the same with what is handed back in a temporary file, where the disk holds that."""
        fits = 0 < self.returned_bytes <= _free_disk(disk_limit)
        return replace(self, returned_in_memory=False) if fits else self


def _free_disk(disk_limit: int | None) -> int:
    return default_disk_limit() if disk_limit is None else disk_limit


def least_bytes(sizes: Sizes, disk_limit: int | None = None) -> int:
    """Return the smallest memory limit for which there is a plan."""
    sizes = sizes.spilled(disk_limit)
    return sizes.plan(1, 1, 1, not sizes.fits_disk(disk_limit)).peak_bytes


def plan_mutual_scoring(sizes: Sizes, memory_limit: int, disk_limit: int | None = None) -> Plan:
    """Fit the working set into `memory_limit` bytes, giving up speed in the order that costs least.

    disk_limit: bytes that temporary files may take; nearly all of the free disk by default.
    What is handed back goes to disk where it would take more than half of the limit. Then the minima move to disk, then
    chunks shrink, then workers go. Where the disk does not hold the minima of all images either, a few images at a time
    are compared with all others, which computes most products twice. Raises MemoryError below the minimum.
    """
    least = sizes.plan(1, 1, 1, not sizes.fits_disk(disk_limit)).peak_bytes
    if sizes.returned_bytes > memory_limit // 2 or least > memory_limit:
        sizes = sizes.spilled(disk_limit)
    images, scored, image = sizes.images, sizes.scored, sizes.image_bytes
    row = sizes.plan(1, 0, 0, True).minima_bytes
    cores = min(available_cores(), max(1, scored * (scored - 1) // 2 + scored * sizes.references))
    on_disk = sizes.fits_disk(disk_limit)
    for workers in [cores, *(w for w in (cores // 2, cores // 4, 1) if 0 < w < cores)]:
        for minima_in_memory in (True, False) if on_disk else (True,):
            plan = sizes.plan(scored, images, workers, minima_in_memory)
            if plan.peak_bytes <= memory_limit:
                return plan
        room = memory_limit - sizes.plan(0, 0, workers, False).peak_bytes
        chunk = int(min(room // (2 * image), images))
        if chunk < 1 or (chunk < min(images, 4) and workers > 1):
            continue
        if on_disk:
            return sizes.plan(scored, chunk, workers, False)
        for chunk in ROW_CHUNKS:
            rows = int(min((room - 2 * chunk * image) // row, scored, images - 1))
            if rows >= chunk:
                return sizes.plan(rows, chunk, workers, True)
    raise MemoryError(
        f"mutual scoring of {images} images with {sizes.patches} patches of {sizes.channels} channels needs at least "
        f"{least_bytes(sizes, disk_limit) / 2**20:.0f} MiB and the memory limit is {memory_limit / 2**20:.0f} MiB; "
        "raise --memory-limit, or make the work smaller with --image-size or --group-size"
    )

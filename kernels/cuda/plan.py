"""Decides how mutual scoring runs on CUDA devices: which images each one holds, and what streams past them from where.

Every device owns a run of images and compares them, a chunk of rows after another, with each other and with everything
else. Their best cosines with all images are resident until their ranks are selected.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal

from zsad.kernels.machine import default_disk_limit, default_memory_limit

from .card import Card
from .comparers import STAGED_IMAGES, Comparer, GramOnce, image_bytes
from .model import Filtered, best_pairs

SLICES = 32  # blocks that share an image's layer norm
MAX_PAIRS = 65535  # a launch's grid has no more rows of blocks
HIDING_ROWS = (16, 4)  # comparing so many rows with an image takes longer than fetching it, or not much less

Where = Literal["on the device", "in host memory", "in a memory-mapped file"]


@dataclass(frozen=True)
class Share:
    """Pairs of a chunk's rows with images outside of it that the chunk compares."""

    own: range
    others: range
    sent: bool = True  # whether what the others get goes to the chunk that they are rows of


@dataclass(frozen=True)
class Plan:
    """How one call of mutual scoring runs on its devices; every plan gives the same scores."""

    images: int  # all, references among them
    rows: int  # images of a device whose best cosines with all others are resident
    columns: int  # images per chunk that streams past the rows, two of which are resident; 0 where nothing does
    pairs: int  # image pairs per launch
    devices: int
    features: Where  # those that are not resident
    exchanges: bool  # whether pairs of two chunks are compared once, and what the other chunk needs goes there
    peak_bytes: int  # on each device
    host_bytes: int
    comparer: type[Comparer]
    references: int = 0  # the last images, which are only compared with
    returned_in_memory: bool = True  # what the caller gets back, else in a memory-mapped temporary file

    @property
    def scored(self) -> int:
        return self.images - self.references

    def rounds(self) -> list[list[range]]:
        """Return, for every round, the chunk of rows of each device; the last ones may be empty."""
        share, more = divmod(self.scored, self.devices)
        starts = [device * share + min(device, more) for device in range(self.devices + 1)]
        runs = [range(start, stop) for start, stop in pairwise(starts)]
        return [[run[at : at + self.rows] for run in runs] for at in range(0, len(runs[0]), self.rows)]

    def prepared(self) -> list[list[range]]:
        """Return, for every device, the chunks that it makes the features of: shares of the references, then its rows.

        Where nothing streams there is one chunk of all.
        """
        if not self.columns:
            return [[range(self.images)]]
        known = range(self.scored, self.images)
        shares = [known[at : at + self.rows] for at in range(0, len(known), self.rows)]
        return [
            [*shares[device :: self.devices], *(chunks[device] for chunks in self.rounds() if chunks[device])]
            for device in range(self.devices)
        ]

    def shares(self, rows: range) -> dict[range, Share]:
        """Return what a chunk of rows compares with images outside of it, by the run that these are of.

        Where chunks exchange, the two of one round halve their pairs and an earlier round takes all of a later one's.
        References take nothing: every chunk compares all of its rows with them.
        """
        if not self.exchanges:
            outside = range(rows.start), range(rows.stop, self.images)
            return {others: Share(rows, others, sent=False) for others in outside if others}
        rounds = self.rounds()
        now = next(number for number, chunks in enumerate(rounds) if rows in chunks)
        known = range(self.scored, self.images)
        shares = {known: Share(rows, known, sent=False)}
        shares |= {others: Share(rows, others) for chunks in rounds[now + 1 :] for others in chunks}
        for others in rounds[now]:
            if rows.start < others.start:
                shares[others] = Share(rows, others[: len(others) // 2])
            elif rows.start > others.start:
                shares[others] = Share(rows[len(rows) // 2 :], others)
        return {others: share for others, share in shares.items() if share.own and share.others}

    def chunks(self) -> list[range]:
        return [rows for chunks in self.rounds() for rows in chunks if rows]

    def outside_pairs(self) -> int:
        """Count the pairs of a layer that are compared across chunks of rows."""
        both_ways = sum(len(rows) * (self.scored - len(rows)) for rows in self.chunks())
        return both_ways // 2 if self.exchanges else both_ways

    def comparisons(self) -> int:
        """Count the image pairs of one layer whose product is computed."""
        within = sum(len(rows) * (len(rows) - 1) // 2 for rows in self.chunks())
        return within + self.outside_pairs() + self.scored * self.references

    def describe(self) -> str:
        where = "the device" if self.devices == 1 else f"{self.devices} devices"
        if self.features == "on the device":
            resident = "all features of a layer resident"
        else:
            resident = (
                f"{self.rows} images per chunk of rows, {self.columns} at a time stream past, "
                f"features {self.features}, "
                f"pairs across chunks compared {'once' if self.exchanges else 'by both sides'}"
            )
        known = f" with {self.references} references" if self.references else ""
        host = f", {self.host_bytes / 2**20:.0f} MiB on the host" if self.host_bytes else ""
        host += "" if self.returned_in_memory else ", minima handed back in a memory-mapped file"
        return (
            f"mutual scoring of {self.scored} images{known} on {where}: {resident}, {self.comparer.description}, "
            f"{self.pairs} pairs per launch, "
            f"{self.peak_bytes / 2**20:.0f} MiB at the peak{' of each' if self.devices > 1 else ''}{host}"
        )


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a call takes."""

    images: int  # all, references among them
    patches: int
    channels: int
    degrees: int  # distinct ones
    devices: int = 1
    comparer: type[Comparer] = GramOnce  # says what comparing takes
    returned_bytes: int = 0  # of the minima that the caller gets back
    references: int = 0
    returned_in_memory: bool = True  # of the host
    filtered: Filtered | None = None  # what the pass over a Gram looks at; without it the cache alone decides

    @property
    def scored(self) -> int:
        return self.images - self.references

    @property
    def image_bytes(self) -> int:
        """Features and inverse lengths of an image."""
        layout = self.comparer.layout(self.patches, self.channels, self.degrees)
        return image_bytes(layout, self.patches, self.degrees)

    @property
    def entry_bytes(self) -> int:
        """Best cosines of one image with another."""
        return 4 * self.degrees * self.patches

    def plan(self, rows: int, columns: int, pairs: int, exchanges: bool, features: Where) -> Plan:
        """Count what a plan takes; `rows` may be 0, for what is left without them."""
        images, patches = self.images, self.patches
        # Scores, distances of one image to all others if they are handed back, staged tokens, sums, flags of images.
        one_image = images if self.returned_bytes else 0
        peak = 4 * patches * (self.scored + one_image + STAGED_IMAGES * self.channels)
        peak += STAGED_IMAGES * (16 * SLICES + 4) + images * (self.degrees + 4)
        peak += self.comparer.scratch_bytes(patches, self.channels) + 2 * pairs * self.comparer.gram_bytes(patches)
        resident = images if features == "on the device" else rows
        peak += resident * self.image_bytes + rows * images * self.entry_bytes + 2 * columns * self.image_bytes
        peak += 2 * columns * rows * self.entry_bytes if exchanges else 0
        host = self.returned_bytes * self.returned_in_memory + (
            images * self.image_bytes if features == "in host memory" else 0
        )
        plan = Plan(
            images=images,
            rows=rows,
            columns=columns,
            pairs=pairs,
            devices=max(min(self.devices, self.scored), 1),
            features=features,
            exchanges=exchanges,
            peak_bytes=peak,
            host_bytes=host,
            comparer=self.comparer,
            references=self.references,
            returned_in_memory=self.returned_in_memory,
        )
        return replace(plan, host_bytes=host + plan.outside_pairs() * self.entry_bytes) if exchanges else plan


def least_bytes(sizes: Sizes) -> int:
    """Return the smallest memory limit for which there is a plan, if the host has room for what does not fit."""
    streaming = sizes.plan(1, min(1, sizes.images), 1, False, "in host memory").peak_bytes
    if sizes.devices > 1 < sizes.scored:
        return streaming
    return min(streaming, sizes.plan(sizes.scored, 0, 1, False, "on the device").peak_bytes)


def plan_mutual_scoring(
    sizes: Sizes, memory_limit: int, card: Card, host_limit: int | None = None, pairs: int | None = None
) -> Plan:
    """Fit the working set into `memory_limit` bytes on each device.

    card: in its second-level cache Grams stay between their product and their pass.
    host_limit: bytes of host memory for what the devices do not hold; three quarters of what is free by default.
    pairs: per launch, instead of the planned ones.
    Features that do not fit lie in host memory, or else in a file. Where the best cosines of all pairs do not fit,
    chunks of rows are compared in turn with everything else; what a pair gives to the other chunk is kept in host
    memory, or computed again where that does not hold it. Raises MemoryError where not even one row fits.
    """
    host_limit = default_memory_limit() if host_limit is None else host_limit
    if sizes.returned_bytes > host_limit:
        disk = default_disk_limit()
        if sizes.returned_bytes > disk:
            raise MemoryError(_too_little("in host memory or on the disk", sizes, sizes.returned_bytes, disk))
        sizes = replace(sizes, returned_in_memory=False)
    choices = _pairs_per_launch(sizes, card, pairs)
    devices = max(min(sizes.devices, sizes.scored), 1)
    if devices == 1:
        for pairs in choices:
            plan = sizes.plan(sizes.scored, 0, pairs, False, "on the device")
            if plan.peak_bytes <= memory_limit:
                return plan
    held = sizes.returned_bytes * sizes.returned_in_memory + sizes.images * sizes.image_bytes
    in_memory = held <= host_limit
    where: Where = "in host memory" if in_memory else "in a memory-mapped file"
    own = -(-sizes.scored // devices)
    # A launch compares at most as many images as are fetched together, so few pairs cost less than few columns.
    shapes = [(32, choices[0]), *((8, pairs) for pairs in choices), (1, choices[-1])]
    for least in (*(rows for rows in HIDING_ROWS if rows < own), 1):
        for exchanges, (columns, pairs) in product((True, False), shapes):
            columns = min(columns, sizes.images)
            room = memory_limit - sizes.plan(0, columns, pairs, False, where).peak_bytes
            row = sizes.image_bytes + (sizes.images + 2 * columns * exchanges) * sizes.entry_bytes
            rows = int(min(room // row, own))
            if rows < least:
                continue
            plan = sizes.plan(rows, columns, pairs, exchanges, where)
            if not exchanges or plan.host_bytes <= host_limit:
                return plan
    raise MemoryError(_too_little("on the device", sizes, least_bytes(sizes), memory_limit))


def _pairs_per_launch(sizes: Sizes, card: Card, wanted: int | None) -> list[int]:
    """Return how many image pairs a launch may have, most first."""
    most, gram = max(sizes.images - 1, 1), sizes.comparer.gram_bytes(sizes.patches)
    if gram:
        # A third of the cache for each workspace leaves one for features, so that Grams stay there; up to three Grams
        # are worth passing them through memory, where they fill the multiprocessors better.
        most = min(max(card.cache_bytes // 3 // gram, 3), most)
        if wanted is None and sizes.filtered is not None:
            most = best_pairs(sizes.filtered, sizes.channels, most, card)
    most = min(most if wanted is None else wanted, MAX_PAIRS)
    return [most, *(fewer for fewer in (2, 1) if fewer < most and gram)]


def _too_little(where: str, sizes: Sizes, needed: int, limit: int) -> str:
    return (
        f"mutual scoring of {sizes.images} images with {sizes.patches} patches of {sizes.channels} channels needs at "
        f"least {needed / 2**20:.0f} MiB {where} and the limit is {limit / 2**20:.0f} MiB; raise --memory-limit, or "
        "make the work smaller with --image-size or --group-size"
    )

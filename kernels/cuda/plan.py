"""Decides how mutual scoring runs on CUDA devices: which images each one holds, and what streams past them from where.

Every device owns a run of images and compares them, a block of rows after another, with each other and with everything
else. Their best cosines with all images are resident until their ranks are selected.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal

from zsad.kernels.machine import default_memory_limit

from .comparers import STAGED_IMAGES, Comparer, GramOnce, image_bytes

SLICES = 32  # blocks that share an image's layer norm
MAX_TILES = 65535  # a launch's grid has no more rows of blocks
HIDING_ROWS = (16, 4)  # comparing so many rows with an image takes longer than fetching it, or not much less

Where = Literal["on the device", "in host memory", "in a memory-mapped file"]


@dataclass(frozen=True)
class Share:
    """Pairs of a block's rows with images outside of it that the block compares."""

    own: range
    others: range


@dataclass(frozen=True)
class CudaPlan:
    """How one call of mutual scoring runs on its devices; every plan gives the same scores."""

    images: int
    rows: int  # images of a device whose best cosines with all others are resident
    columns: int  # images per block that streams past the rows, two of which are resident; 0 where nothing does
    tiles: int  # image pairs per launch
    devices: int
    features: Where  # those that are not resident
    exchanges: bool  # whether pairs of two blocks are compared once, and what the other block needs goes there
    peak_bytes: int  # on each device
    host_bytes: int
    comparer: type[Comparer]

    def rounds(self) -> list[list[range]]:
        """Return, for every round, the block of rows of each device; the last ones may be empty."""
        share, more = divmod(self.images, self.devices)
        starts = [device * share + min(device, more) for device in range(self.devices + 1)]
        runs = [range(start, stop) for start, stop in pairwise(starts)]
        return [[run[at : at + self.rows] for run in runs] for at in range(0, len(runs[0]), self.rows)]

    def shares(self, rows: range) -> dict[range, Share]:
        """Return what a block of rows compares with images outside of it, by the run that these are of.

        Where blocks exchange, the two of one round halve their pairs and an earlier round takes all of a later one's.
        """
        if not self.exchanges:
            outside = range(rows.start), range(rows.stop, self.images)
            return {others: Share(rows, others) for others in outside if others}
        rounds = self.rounds()
        now = next(number for number, blocks in enumerate(rounds) if rows in blocks)
        shares = {others: Share(rows, others) for blocks in rounds[now + 1 :] for others in blocks}
        for others in rounds[now]:
            if rows.start < others.start:
                shares[others] = Share(rows, others[: len(others) // 2])
            elif rows.start > others.start:
                shares[others] = Share(rows[len(rows) // 2 :], others)
        return {others: share for others, share in shares.items() if share.own and share.others}

    def blocks(self) -> list[range]:
        return [rows for blocks in self.rounds() for rows in blocks if rows]

    def outside_pairs(self) -> int:
        """Count the pairs of a layer that are compared across blocks."""
        both_ways = sum(len(rows) * (self.images - len(rows)) for rows in self.blocks())
        return both_ways // 2 if self.exchanges else both_ways

    def comparisons(self) -> int:
        """Count the image pairs of one layer whose product is computed."""
        return sum(len(rows) * (len(rows) - 1) // 2 for rows in self.blocks()) + self.outside_pairs()

    def describe(self) -> str:
        where = "the device" if self.devices == 1 else f"{self.devices} devices"
        if self.features == "on the device":
            resident = "all features of a layer resident"
        else:
            resident = (
                f"{self.rows} images per block of rows, {self.columns} at a time stream past, "
                f"features {self.features}, "
                f"pairs across blocks compared {'once' if self.exchanges else 'by both sides'}"
            )
        host = f", {self.host_bytes / 2**20:.0f} MiB on the host" if self.host_bytes else ""
        return (
            f"mutual scoring of {self.images} images on {where}: {resident}, {self.comparer.description}, "
            f"{self.tiles} pairs per launch, "
            f"{self.peak_bytes / 2**20:.0f} MiB at the peak{' of each' if self.devices > 1 else ''}{host}"
        )


def plan_mutual_scoring(
    images: int,
    patches: int,
    channels: int,
    degrees: int,
    memory_limit: int,
    cache_bytes: int,
    *,
    devices: int = 1,
    host_limit: int | None = None,
    returned_bytes: int = 0,
    tiles: int | None = None,
    comparer: type[Comparer] = GramOnce,
) -> CudaPlan:
    """Fit the working set into `memory_limit` bytes on each device.

    host_limit: bytes of host memory for what the devices do not hold; three quarters of what is free by default.
    returned_bytes: size of the minima that the caller gets back, in host memory.
    tiles: pairs per launch instead of the planned ones.
    comparer: what compares images; it says what that takes.
    Features that do not fit lie in host memory, or else in a file. Where the best cosines of all pairs do not fit,
    blocks of rows are compared in turn with everything else; what a pair gives to the other block is kept in host
    memory, or computed again where that does not hold it. Raises MemoryError where not even one row fits.
    """
    host_limit = default_memory_limit() if host_limit is None else host_limit
    devices = max(min(devices, images), 1)
    tile = comparer.tile_bytes(patches)
    entries = 4 * degrees * patches  # best cosines of a pair, or inverse lengths of an image
    resident = image_bytes(comparer.layout(patches, channels, degrees), patches, degrees)
    # Scores, distances of one image to all others if they are handed back, staged tokens, sums, and flags of images.
    always = 4 * patches * (images * (2 if returned_bytes else 1) + STAGED_IMAGES * channels)
    always += STAGED_IMAGES * (16 * SLICES + 4) + images * (degrees + 4) + comparer.scratch_bytes(patches, channels)
    store = images * resident
    in_memory = returned_bytes + store <= host_limit
    if returned_bytes > host_limit:
        raise MemoryError(_too_little("in host memory", images, patches, channels, returned_bytes, host_limit))

    def planned(rows: int, columns: int, tiles: int, exchanges: bool) -> CudaPlan:
        peak = always + 2 * tiles * tile + rows * (resident + images * entries) + 2 * columns * resident
        peak += 2 * columns * rows * entries if exchanges else 0
        where: Where = "on the device" if not columns else "in host memory" if in_memory else "in a memory-mapped file"
        host = returned_bytes + (store if columns and in_memory else 0)
        plan = CudaPlan(images, rows, columns, tiles, devices, where, exchanges, peak, host, comparer)
        return replace(plan, host_bytes=host + plan.outside_pairs() * entries) if exchanges else plan

    most = max(images - 1, 1)
    if tile:
        # Half the cache for each workspace; at least four, so that queueing a launch takes less time than running it.
        most = min(max(cache_bytes // 2 // tile, 4), most)
    most = min(most if tiles is None else tiles, MAX_TILES)
    choices = [most, *(fewer for fewer in (2, 1) if fewer < most and tile)]
    if devices == 1:
        for tiles in choices:
            plan = planned(images, 0, tiles, False)
            if plan.peak_bytes <= memory_limit:
                return plan
    own = -(-images // devices)
    # A launch compares at most as many images as are fetched together, so few tiles cost less than few columns.
    shapes = [(32, most), *((8, tiles) for tiles in choices), (1, choices[-1])]
    for least in (*(rows for rows in HIDING_ROWS if rows < own), 1):
        for exchanges, (columns, tiles) in product((True, False), shapes):
            columns = min(columns, images)
            room = memory_limit - planned(0, columns, tiles, False).peak_bytes
            rows = int(min(room // (resident + (images + 2 * columns * exchanges) * entries), own))
            if rows < least:
                continue
            plan = planned(rows, columns, tiles, exchanges)
            if not exchanges or plan.host_bytes <= host_limit:
                return plan
    needed = planned(1, 1, choices[-1], False).peak_bytes
    raise MemoryError(_too_little("on the device", images, patches, channels, needed, memory_limit))


def _too_little(where: str, images: int, patches: int, channels: int, needed: int, limit: int) -> str:
    return (
        f"mutual scoring of {images} images with {patches} patches of {channels} channels needs at least "
        f"{needed / 2**20:.0f} MiB {where} and the limit is {limit / 2**20:.0f} MiB; raise --memory-limit, or make the "
        "work smaller with --image-size or --group-size"
    )

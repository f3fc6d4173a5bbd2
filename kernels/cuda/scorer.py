"""One device's part of mutual scoring: its arrays, and the launches that fill them.

tokens → layer_norm → comparer.prepare → for one image against a few: comparer.compare → interval_average

Comparers (comparers.py) differ in what they keep of an image and in how they multiply. Images from outside the chunk of
rows come over a stream of their own, into one of two chunks while the other is compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.machine import scratch
from zsad.kernels.minima import ReturnedMinima
from zsad.kernels.reference import LAYER_NORM_EPS
from zsad.kernels.task import not_finite

from .comparers import STAGED_IMAGES, Features, Layout
from .device import DEVICE_ARRAY, Device, DeviceMemoryError, int32
from .plan import SLICES, Plan, Share
from .recorder import Recorder

LOWEST_KEY = -(2**31)  # below the key of every cosine
SQUARE = 32  # of minimum_distances in interval_average.cu
PART_LAUNCHES = 256  # recorded together: so many that the next part is recorded while this one runs

Report = Callable[[int], None]  # is told how many image pairs were queued


@dataclass(frozen=True)
class Work:
    """What a call asks of every device."""

    grid: tuple[int, int]
    channels: int
    degrees: Sequence[int]  # distinct and ascending
    ranks: tuple[int, int]
    score_weights: NDArray[np.float32]  # [R] of a distance in the scores
    minima_weights: NDArray[np.float32]  # [arrays, L, R]: what each array of returned minima adds up
    returned: ReturnedMinima
    window: int | None = None  # rows and columns that compared patches are apart at most
    recorded: bool = True  # whether comparisons come again, layer after layer, and are worth recording

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    def layout(self, plan: Plan) -> Layout:
        """Return what is kept of an image beside its inverse lengths."""
        return plan.comparer.layout(self.patches, self.channels, len(self.degrees))


@dataclass(frozen=True)
class Store:
    """What lies on the host during a layer: features that are not resident, and maxima for other chunks' rows."""

    inverse: NDArray[np.float32]  # [N, R, P]
    features: tuple[NDArray[Any], ...]  # [N, ...] as in the comparer's layout
    has_zero: NDArray[np.uint8]  # [N, R]
    # [chunk that compares, chunk it is for] -> the pairs, and their keys [others, own, R, P]
    exchange: dict[tuple[range, range], tuple[Share, NDArray[np.int32]]]


@contextmanager
def open_store(device: Device, plan: Plan, work: Work) -> Iterator[Store]:
    """Allocate as planned; raises OSError where the disk does not hold the file."""
    images, degrees, patches = plan.images, len(work.degrees), work.patches

    def page_locked(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        try:
            return device.host_empty(shape, dtype)
        except DeviceMemoryError:  # there is less of it than of other memory, which works too, if more slowly
            return np.empty(shape, dtype)

    exchange = {
        (rows, others): (share, page_locked((len(share.others), len(share.own), degrees, patches), np.int32))
        for rows in (plan.chunks() if plan.exchanges else ())
        for others, share in plan.shares(rows).items()
        if share.sent
    }
    inverse, has_zero = page_locked((images, degrees, patches), np.float32), np.empty((images, degrees), np.uint8)
    with ExitStack() as stack:
        features = tuple(
            stack.enter_context(scratch((images, *shape), False, dtype))
            if plan.features == "in a memory-mapped file"
            else page_locked((images, *shape), dtype)
            for shape, dtype in work.layout(plan)
        )
        yield Store(inverse, features, has_zero, exchange)


class _Chunk:
    """Features of a run of images of one layer."""

    def __init__(self, device: Device, size: int, layout: Layout, work: Work) -> None:
        self.images = range(0)
        self.all = Features(
            device.empty((size, len(work.degrees), work.patches), np.float32),
            tuple(device.empty((size, *shape), dtype) for shape, dtype in layout),
        )

    def __len__(self) -> int:
        return len(self.all.inverse)

    def fetched_from(self, store: Store, images: range) -> list[tuple[NDArray[Any], DEVICE_ARRAY]]:
        """Return the copies that fill the chunk."""
        self.images = images
        return self.copies(store, images)

    def copies(self, store: Store, images: range) -> list[tuple[NDArray[Any], DEVICE_ARRAY]]:
        """Return, for some of its images, the arrays in the store beside those on the device."""
        at, here = slice(images.start, images.stop), self.run(images)
        return [
            (store.inverse[at], here.inverse),
            *((array[at], mine) for array, mine in zip(store.features, here.arrays, strict=True)),
        ]

    def run(self, images: range) -> Features:
        """Return the features of some of its images."""
        return self.all.of(slice(images.start - self.images.start, images.stop - self.images.start))


class Scorer:
    """The arrays of one call on one device."""

    def __init__(self, device: Device, plan: Plan, work: Work) -> None:
        self.device, self.plan, self.work = device, plan, work
        images, patches, degrees = plan.images, work.patches, len(work.degrees)
        device.use()
        layout = work.layout(plan)
        rows = min(plan.rows, plan.scored)
        self.rows = _Chunk(device, rows if plan.columns else images, layout, work)
        self.columns = [_Chunk(device, plan.columns, layout, work) for _ in range(2 if plan.columns else 0)]
        self.comparer = plan.comparer(device, work.grid, work.channels, work.degrees, plan.pairs, work.window)
        self.recorder = Recorder(device, work.recorded)
        # Keys of the best cosines of the rows with all images, and of fetched images with the rows.
        self.best = device.empty((rows, images, degrees, patches), np.int32)
        room = plan.columns * rows * degrees * patches if plan.exchanges else 0
        self.sent = [device.empty((room,), np.int32) for _ in range(2 if room else 0)]
        self.has_zero = device.empty((images, degrees), np.uint8)
        self.scores = device.empty((plan.scored, patches), np.float32)
        self.distances = device.empty((1, patches, images), np.float32) if len(work.minima_weights) else None
        self.score_weights = device.to_device(work.score_weights)
        self.minima_weights = [device.to_device(weights) for weights in work.minima_weights]  # [L, R] each
        self.staging: DEVICE_ARRAY = None
        self.sums = device.empty((STAGED_IMAGES, SLICES, 2), np.float64)
        self.shift = device.empty((STAGED_IMAGES,), np.float32)
        self.finite = device.empty((images,), np.int32)
        device.fill(self.scores, 0)

    def normalise(self, tokens: Any, layer: int, chunks: Sequence[range], store: Store | None) -> None:
        """Prepare the features of this device's chunks; the last one's stay."""
        self.device.use()
        self.device.fill(self.has_zero, 0)
        for images in chunks:
            self._load(tokens, layer, images)
            if store is not None:
                at = slice(images.start, images.stop)
                for on_host, here in self.rows.copies(store, images):
                    self.device.download(here, on_host)
                self.device.download(self.has_zero[at], store.has_zero[at])
        self.device.synchronise()

    def compare(self, rows: range, store: Store | None, report: Report) -> None:
        """Find the best cosines of a chunk of rows: with each other, and with the outside as its shares say."""
        if not rows:
            return
        device = self.device
        device.use()
        device.fill(self.best, LOWEST_KEY)
        steps = self._steps(rows, store) if store is not None else []
        device.fetch(0, [] if store is None or self.rows.images == rows else self.rows.fetched_from(store, rows))
        with device.comparing(0):
            resident = rows if store is not None else self.rows.images  # with the references behind them
            for part, launches in self._parts(rows, resident[len(rows) :]):
                within = partial(self._compare_within, part, rows, resident[len(rows) :])
                self.recorder.run((rows, part), launches, within)
                report(sum(resident.stop - i - 1 for i in part))
        if steps:
            self._fetch(1, steps[0])
        for number, step in enumerate(steps, 1):
            slot = number % 2
            sent = None if step.target is None else self.sent[slot][: step.target.size].reshape(step.target.shape)
            columns, images = (step.own, step.others) if step.own.start < step.others.start else (step.others, step.own)
            launches = self._launches(len(columns), len(images))
            across = partial(self._compare_across, step, slot, sent)
            with device.comparing(slot):
                self.recorder.run((step.own, step.others, slot), launches, across)
            report(len(step.own) * len(step.others))
            # The next images come while these are compared, and before what these send, which waits for their end.
            if number < len(steps):
                self._fetch(1 - slot, steps[number])
            if step.target is not None:
                device.send(slot, sent, step.target)
        device.synchronise()

    def select(self, layer: int, rows: range, store: Store | None) -> None:
        """Take what other chunks have sent, add the layer's interval averages to the scores, and hand back minima."""
        if not rows:
            return
        device, work = self.device, self.work
        device.use()
        for (_, to), (share, keys) in store.exchange.items() if store is not None else ():
            if to == rows:
                for image, best in zip(share.others, keys, strict=True):
                    device.upload(best, self.best[image - rows.start, share.own.start : share.own.stop])
        inverse: DEVICE_ARRAY = self.rows.all.inverse
        if work.window is not None:  # then the keys say all of zero features
            inverse = None
            device.fill(self.has_zero, 0)
        elif store is not None:
            device.upload(store.has_zero, self.has_zero)
        sizes = int32(self.plan.images, len(work.degrees), work.patches)
        device.launch(
            "interval_average",
            (-(-work.patches // 128), len(rows)),
            128,
            (
                self.best,
                inverse,
                self.has_zero,
                self.score_weights,
                *sizes,
                *int32(rows.start, *work.ranks),
                self.scores,
            ),
        )
        squares = -(-work.patches // SQUARE) * -(-self.plan.images // SQUARE)
        for at, image in enumerate(rows):
            for (here, kept), weights in zip(work.returned.of(image), self.minima_weights, strict=True):
                if not here[layer].any():
                    continue
                device.launch(
                    "minimum_distances",
                    (squares, 1),
                    256,
                    (
                        self.best[at],
                        None if inverse is None else inverse[at],
                        self.has_zero,
                        weights[layer],
                        *sizes,
                        np.int32(image),
                        self.distances,
                    ),
                    4 * SQUARE * (SQUARE + 1),
                )
                kept += device.to_host(self.distances)[0]
        device.synchronise()

    def _steps(self, rows: range, store: Store) -> list["_Step"]:
        """Cut what a chunk of rows compares with the outside into chunks of columns."""
        steps = []
        for to, share in self.plan.shares(rows).items():
            _, target = store.exchange.get((rows, to), (share, None))
            for at in range(0, len(share.others), self.plan.columns):
                part = slice(at, at + self.plan.columns)
                steps.append(_Step(store, share.own, share.others[part], None if target is None else target[part]))
        return steps

    def _fetch(self, slot: int, step: "_Step") -> None:
        self.device.fetch(slot, self.columns[slot].fetched_from(step.store, step.others))

    def _load(self, tokens: Any, layer: int, images: range) -> None:
        """Normalise a chunk and make its features."""
        self.device.synchronise()  # products may still be reading what is overwritten
        self.rows.images = images
        for start in range(0, len(images), STAGED_IMAGES):
            part = images[start : start + STAGED_IMAGES]
            features = self.rows.run(part)
            self._normalise(tokens[part.start : part.stop, layer], self.comparer.tokens(features), part)
            self.comparer.prepare(features, self.has_zero[part.start : part.stop])
        finite = self.device.to_host(self.finite[images.start : images.stop])
        if not finite.all():
            raise not_finite(images.start + int(np.argmin(finite)))

    def _normalise(self, tokens: Any, out: DEVICE_ARRAY, images: range) -> None:
        """Fill out [B, P, C] with the layer-normed tokens [B, P, C], which are on the host or the device."""
        size = self.work.patches * self.work.channels
        if isinstance(tokens, np.ndarray):
            if self.staging is None:
                self.staging = self.device.empty((STAGED_IMAGES, *tokens.shape[1:]), tokens.dtype)
            source, step = self.staging[: len(images)], size
            self.device.upload(tokens, source)
        else:
            source, step = tokens, tokens.strides[0] // tokens.dtype.itemsize
        kind = "f32" if source.dtype == np.float32 else "f16"
        where = (source, np.int64(step), np.int32(size), self.shift, self.sums)
        self.device.launch(f"layer_norm_sums_{kind}", (SLICES, len(images)), 256, where, 8 * 256 // 32)
        self.device.launch(
            f"layer_norm_apply_{kind}",
            (SLICES, len(images)),
            256,
            (
                *where,
                np.int32(SLICES),
                np.float32(LAYER_NORM_EPS),
                out,
                self.finite[images.start : images.stop],
            ),
        )

    def _launches(self, columns: int, rows: int) -> int:
        return columns * -(-rows // self.plan.pairs)

    def _parts(self, rows: range, references: range) -> Iterator[tuple[range, int]]:
        """Cut rows into runs that are recorded together; yields their launches too."""
        start, launches = rows.start, 0
        for i in rows:
            launches += self._launches(1, rows.stop - i - 1) + self._launches(1, len(references))
            if launches >= PART_LAUNCHES or i == rows[-1]:
                yield range(start, i + 1), launches
                start, launches = i + 1, 0

    def _compare_within(self, part: range, rows: range, references: range) -> None:
        """Queue the comparison of row images with later row images, both directions, and with resident references."""
        for i in part:
            partners = rows[i - rows.start + 1 :]
            own, first = i - self.rows.images.start, partners.start - self.rows.images.start
            for others, best in (partners, self.best[first : first + len(partners), i]), (references, None):
                mine = self.best[own, others.start : others.stop]
                self._compare(self.rows.all.of(own), self.rows.run(others), best, mine)

    def _compare_across(self, step: "_Step", slot: int, theirs: DEVICE_ARRAY | None) -> None:
        """Queue the comparison of fetched images with rows; theirs: the fetched images' keys [others, own, R, P].

        The image with the lower number is the product's column as everywhere, so that every plan rounds alike.
        """
        rows, columns, own, others = self.rows, self.columns[slot], step.own, step.others
        first = own.start - rows.images.start
        mine = self.best[first : first + len(own), others.start : others.stop]  # [own, others, R, P]
        if theirs is not None:
            self.device.fill(theirs, LOWEST_KEY)
        if own.start < others.start:
            for n in range(len(own)):
                self._compare(
                    rows.all.of(first + n), columns.run(others), None if theirs is None else theirs[:, n], mine[n]
                )
        else:
            for n in range(len(others)):
                self._compare(columns.all.of(n), rows.run(own), mine[:, n], None if theirs is None else theirs[n])

    def _compare(
        self,
        column: Features,
        rows: Features,  # of T images
        best_rows: DEVICE_ARRAY | None,  # [T, R, P] keys of the rows' patches
        best_columns: DEVICE_ARRAY | None,  # [T, R, P] of the column's patches
    ) -> None:
        """Queue the comparison of one image with a run of others, a few pairs at a time."""
        for start in range(0, len(rows.inverse), self.plan.pairs):
            at = slice(start, start + self.plan.pairs)
            self.comparer.compare(
                column,
                rows.of(at),
                None if best_rows is None else best_rows[at],
                None if best_columns is None else best_columns[at],
            )


@dataclass(frozen=True)
class _Step:
    """Fetched images that are compared with some rows, and where their keys go."""

    store: Store
    own: range
    others: range
    target: NDArray[np.int32] | None  # [others, own, R, P] on the host

"""Metrics of all pixels of a category's images.

Masks and maps are held in memory up to a limit. Beyond it their scores go into a temporary file (`spilled.py`), and of
the images there is only what the threads work on.
"""

from __future__ import annotations

import errno
import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeGuard

from zsad.engine.images.stored import ImageError
from zsad.kernels.machine import available_cores, default_memory_limit, return_memory_at_once

from .metrics import SATURATED, STRICT, curve_metrics, pixel_metrics, split_pixels
from .pixels import Pixels, Source
from .spilled import Spilled
from .strict import AUPIMO, RATES, SEGMENTATION_F1, Aupimo, DrawnRegions, SegmentationF1

# Is told what is left out, or, as `note`, what is as it is; a sentence each, as an error where a file is unreadable.
Warn = Callable[[str | ImageError], None]
Protocol = Literal["official", "paper"]

PAPER_STEPS = 200
AT_ONCE = 256  # images that wait for a thread, each of which takes a KB or two then
# Beside those of today's, whose limit of AUPRO is free: MVTec AD 2's, MVTec LOCO's, and two that see images one by one.
STRICT_METRICS = (*STRICT, AUPIMO, SEGMENTATION_F1)


@dataclass(frozen=True)
class Comparison:
    """How results are compared with ground truth."""

    protocol: Protocol = "official"
    aupro_limit: float = 0.3  # false-positive rate
    strict: bool = False  # whether STRICT_METRICS are asked for too
    memory_limit: int | None = None  # bytes of masks, maps and curves; None: three quarters of what is free


class ComparedPixels:
    """The pixels of those images that can be compared, and the metrics that need all of them together."""

    def __init__(self, source: Source, how: Comparison, warn: Warn) -> None:
        """Read all images; `warn` hears of those that cannot be. Raises OSError where the disk has no room."""
        self._source, self._how, self._warn = source, how, warn
        self._held: dict[int, Pixels] | None = None  # by number; None: they are read again
        self._numbers: list[int] = []  # of the images that can be compared
        self.anomalous = False  # whether any of their pixels is
        self.metrics = self._measure()
        if source.saturation is None:
            self.metrics.pop(SATURATED, None)

    @property
    def images(self) -> int:
        return len(self._numbers)

    def strict_metrics(self, drawn: DrawnRegions | None, note: Callable[[str], None]) -> dict[str, float]:
        """AUPIMO, and SegF1 where the run has told regions; `note` hears why one of them is missing or coarse."""
        normal, anomalous = (
            [number for number in self._numbers if bool(self._source.images[number][0].anomalous) == kind]
            for kind in (False, True)
        )
        aupimo, f1, of_images = Aupimo(len(normal)), SegmentationF1(), []
        for number in (*normal, *anomalous):  # all normal ones before
            pixels = self._source.read(number) if self._held is None else self._held[number]
            image, _ = self._source.images[number]
            if image.anomalous:
                of_images.append(aupimo.of_image(pixels.mask, pixels.map))
            else:
                aupimo.add_normal(pixels.map)
            if drawn is not None:
                f1.add(pixels.mask, drawn.mask(image.relative, pixels.map))
        if not normal:
            note("no AUPIMO, since no normal image is compared")
        elif aupimo.finest_rate > RATES[0]:
            note(
                f"AUPIMO is coarse: it asks for false-positive rates from {RATES[0]:g} on, and the pixels of the "
                f"{len(normal)} normal images tell them from {aupimo.finest_rate:.1g} on"
            )
        if drawn is None:
            note("no SegF1, since the results tell no regions: run `zsad-infer` with --threshold")
        return {
            AUPIMO: sum(of_images) / len(of_images) if of_images else math.nan,
            SEGMENTATION_F1: math.nan if drawn is None else f1.value,
        }

    @property
    def _steps(self) -> int | None:
        return PAPER_STEPS if self._source.paper else None

    def _measure(self) -> dict[str, float]:
        limit = self._how.memory_limit
        limit = default_memory_limit() if limit is None else limit
        held: dict[int, Pixels] = {}
        waiting = iter(range(len(self._source.images)))
        size = 0
        for number in waiting:
            pixels = _tried(self._source, number)
            if not self._is_usable(pixels, number):
                continue
            held[number] = pixels
            size += pixels.bytes
            del pixels  # else it stays while the disk is used
            if size > limit:
                return self._measure_on_disk(held, waiting)
        self._held = held
        masks, maps = [of.mask for of in held.values()], [of.map for of in held.values()]
        regions = [of.regions for of in held.values()]
        self.anomalous = any(mask.any() for mask in masks)
        return pixel_metrics(masks, maps, self._how.aupro_limit, self._steps, regions, self._how.strict)

    def _measure_on_disk(self, held: dict[int, Pixels], waiting: Iterator[int]) -> dict[str, float]:
        """Metrics of the images that are held, which are let go, and of those that wait."""
        return_memory_at_once()
        connected = self._how.strict and self._source.gives_regions
        with tempfile.TemporaryFile(prefix="zsad-") as file, _full_disk_named():
            sample = Spilled(file)

            def spill(number: int) -> tuple[int, Exception | None]:
                pixels = held.pop(number, None) or _tried(self._source, number)
                if isinstance(pixels, Exception):
                    return number, pixels
                split = split_pixels(pixels.mask, pixels.map, pixels.regions, connected, str(number), in_place=True)
                del pixels
                sample.add(number, split)
                return number, None

            for number in list(held):
                spill(number)
            pool = ThreadPoolExecutor(available_cores())
            try:
                while numbers := list(islice(waiting, AT_ONCE)):
                    for number, error in pool.map(spill, numbers):
                        self._is_usable(error, number)
            finally:
                pool.shutdown(cancel_futures=True)
            self.anomalous = sample.positive_count > 0
            return curve_metrics(sample, self._how.aupro_limit, self._steps, self._how.strict)

    def _is_usable(self, read: Pixels | Exception | None, number: int) -> TypeGuard[Pixels]:
        """Tell whether an image could be read, after a word on why not."""
        if isinstance(read, Exception):
            self._warn(self._source.complaint(number, read))
            return False
        self._numbers.append(number)
        return True


def _tried(source: Source, number: int) -> Pixels | Exception:
    """Return an image's pixels, or why there are none."""
    try:
        return source.read(number)
    except (ImageError, OSError, ValueError) as error:
        return error


@contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{tempfile.gettempdir()}, where scores of pixels go that memory does not hold, is full: "
            "export TMPDIR=/path/to/folder on a larger disk, or raise --memory-limit"
        ) from error

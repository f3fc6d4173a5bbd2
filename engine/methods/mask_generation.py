"""All masks of an image: SAM is asked for what is under each point of a grid (Kirillov et al., 2023, section 4).

image [H, W, 3] → longer side resized to S, normalised, padded → encoder: embedding [1, D, g, g]
points [N, 2] → decoder: logits [N, 3, 4g, 4g], predicted IoU [N, 3] → sure ones → enlarged to [H, W]: stable ones
→ boxes → of boxes that overlap, the one whose IoU is predicted higher

As `SamAutomaticMaskGenerator` of segment_anything does it, with one crop: the same masks in the same order.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from zsad.engine.config import MaskSettings
from zsad.engine.images.decode import neighbours, recipe
from zsad.engine.networks.network import Graph, run_in_parts
from zsad.kernels.machine import available_cores

from .arrays import Arrays
from .bitmasks import BitMask, Box

NOWHERE = Box(0, 0, 0, 0)
STRIP = 1 << 17  # pixels that are enlarged at once, which a core's own cache holds


@dataclass(frozen=True)
class GeneratedMasks:
    """The masks of an image, the one with the highest predicted IoU first."""

    masks: list[BitMask]
    boxes: list[Box]  # around each mask; of no pixels where it has none
    predicted_iou: NDArray[np.float32]  # [M], as the network gives it
    stability: NDArray[np.float32]  # [M]
    points: NDArray[np.float64]  # [M, 2]: x and y in the image, where the network was asked


@dataclass(frozen=True)
class _Candidate:
    """A mask that has passed the filters."""

    part: "Part"
    box: Box  # around the mask
    predicted_iou: np.float32
    stability: np.float32
    point: NDArray[np.float64]


class MaskGenerator:
    """Makes all masks of one image after the other."""

    def __init__(self, encoder: Graph, decoder: Graph, arrays: Arrays, settings: MaskSettings) -> None:
        """encoder, decoder: the graphs `sam_image` and `sam_masks`."""
        self._encoder, self._decoder, self._arrays, self._settings = encoder, decoder, arrays, settings
        self._size: int = encoder.inputs["images"].shape[-1]
        self._side: int = decoder.outputs["logits"].shape[-1]

    def generate(self, image: NDArray[np.uint8]) -> GeneratedMasks:
        """Return the masks of an image [H, W, 3].

        No mask is ever there as pixels of the whole image: logits are enlarged in strips, by one thread for each core,
        and kept as the network gives them until it is known which masks stay, which then are bits. Raises MemoryError.
        """
        height, width, _ = image.shape
        resized = resized_size((height, width), self._size)
        images = self._arrays.send(padded_input(image, resized, self._size)[None])
        [(_, outputs)] = run_in_parts(self._encoder, {"images": images})
        points = point_grid(self._settings.points_per_side, (height, width))
        scaled = points * (np.array(resized[::-1]) / (width, height))
        inputs = {"embedding": outputs["embedding"], "points": self._arrays.send(scaled.astype(np.float32))}
        enlargement = Enlargement(self._side, self._size, resized, (height, width))
        candidates: list[_Candidate] = []
        # Products of strips are too small to be shared between threads.
        with ThreadPoolExecutor(available_cores()) as threads, threadpool_limits(1, user_api="blas"):
            for rows, found in run_in_parts(self._decoder, inputs):
                logits, iou = (self._arrays.fetch(found[name]) for name in ("logits", "iou"))
                candidates += self._kept(logits, iou, points[rows], enlargement, threads)
            best = self._best(candidates)
            masks = list(threads.map(lambda candidate: self._bits(candidate, enlargement), best))
        return GeneratedMasks(
            masks,
            [candidate.box for candidate in best],
            np.array([candidate.predicted_iou for candidate in best], np.float32),
            np.array([candidate.stability for candidate in best], np.float32),
            np.array([candidate.point for candidate in best]).reshape(-1, 2),
        )

    def _kept(
        self,
        logits: NDArray[np.float32],
        iou: NDArray[np.float32],
        points: NDArray[np.float64],
        enlargement: "Enlargement",
        threads: ThreadPoolExecutor,
    ) -> Iterator[_Candidate]:
        """Yield the masks of some points that pass both filters, the cheap one first."""
        settings = self._settings
        lowest = settings.mask_threshold - settings.stability_offset
        sure = (
            iou > np.float32(settings.min_predicted_iou) if settings.min_predicted_iou > 0 else np.ones_like(iou, bool)
        )

        def measured(place: NDArray[np.intp]) -> _Candidate:
            row, mask = place
            part = enlargement.part(logits[row, mask], lowest)
            stability, box = self._measured(part, enlargement)
            return _Candidate(part, box, iou[row, mask], stability, points[row])

        for candidate in threads.map(measured, np.argwhere(sure)):
            if settings.min_stability <= 0 or candidate.stability >= np.float32(settings.min_stability):
                part = replace(candidate.part, logits=candidate.part.logits.copy())  # the rest need not stay
                yield replace(candidate, part=part)

    def _measured(self, part: "Part", enlargement: "Enlargement") -> tuple[np.float32, Box]:
        """Return a mask's stability, NaN where nothing comes near to it, and its box."""
        threshold, offset = self._settings.mask_threshold, self._settings.stability_offset
        inner = outer = 0
        rows: list[int] = []
        columns = np.zeros(part.box.width, bool)
        for top, strip in enlargement.strips(part, part.box):
            inner += int(np.count_nonzero(strip > threshold + offset))
            outer += int(np.count_nonzero(strip > threshold - offset))
            mask = strip > threshold
            columns |= mask.any(axis=0)
            rows += (top + np.flatnonzero(mask.any(axis=1))).tolist()
        with np.errstate(invalid="ignore"):
            stability = np.float32(inner) / np.float32(outer)
        if not rows:
            return stability, NOWHERE
        left, right = (np.flatnonzero(columns)[[0, -1]] + part.box.x0).tolist()
        return stability, Box(left, rows[0], right + 1, rows[-1] + 1)

    def _best(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the candidates that no better one overlaps too much, the best first."""
        boxes = np.array([candidate.box for candidate in candidates], np.int64).reshape(-1, 4)
        boxes[:, 2:] = np.maximum(boxes[:, 2:] - 1, 0)  # the last pixels, to which segment_anything's boxes reach
        scores = np.array([candidate.predicted_iou for candidate in candidates], np.float32)
        return [candidates[index] for index in not_overlapping(boxes, scores, self._settings.max_box_iou)]

    def _bits(self, candidate: _Candidate, enlargement: "Enlargement") -> BitMask:
        byte = candidate.box.x0 // 8
        box = candidate.box._replace(x0=8 * byte)
        bits = np.empty((box.height, -(-box.width // 8)), np.uint8)
        for top, strip in enlargement.strips(candidate.part, box):
            rows = slice(top - box.y0, top - box.y0 + len(strip))
            bits[rows] = np.packbits(strip > self._settings.mask_threshold, axis=1)
        return BitMask(box.y0, byte, bits)


@dataclass(frozen=True)
class Part:
    """The logits that pixels of a box depend on."""

    logits: NDArray[np.float32]  # [h, w]
    row: int  # of the network's logits, where they begin
    column: int
    box: Box


class Enlargement:
    """Enlarges logits to an image's size, as two bilinear resizes do with the padding cut away between them."""

    def __init__(self, side: int, padded: int, resized: tuple[int, int], size: tuple[int, int]) -> None:
        """side: of the logits. padded: of the image as the network sees it. resized, size: heights and widths."""
        self._rows, self._columns = (
            _Axis(side, padded, inside, whole) for inside, whole in zip(resized, size, strict=True)
        )

    def part(self, logits: NDArray[np.float32], limit: float) -> Part:
        """Return the part of logits [side, side] that any pixel which may be above a limit depends on."""
        wanted_rows, wanted_columns = (np.logical_or.reduce(logits > limit, axis=axis) for axis in (1, 0))
        y, x = self._rows.pixels(wanted_rows), self._columns.pixels(wanted_columns)
        if y.start >= y.stop or x.start >= x.stop:
            return Part(logits[:0, :0], 0, 0, NOWHERE)
        x = slice(x.start // 8 * 8, x.stop)  # whole bytes of masks
        rows, columns = self._rows.values(y), self._columns.values(x)
        return Part(logits[rows, columns], rows.start, columns.start, Box(x.start, y.start, x.stop, y.stop))

    def strips(self, part: Part, box: Box) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield rows of pixels within the part's box, and in which row of the image they begin.

        A strip is valid until the next. Few rows depend on few rows of logits: products with the others, which would
        be with zeros, are left out.
        """
        if box == NOWHERE:
            return
        columns = slice(part.column, part.column + part.logits.shape[1])
        wide = part.logits @ self._columns.matrix[box.x0 : box.x1, columns].T
        step = max(1, STRIP // box.width)
        strip = np.empty((min(step, box.height), box.width), np.float32)
        for top in range(box.y0, box.y1, step):
            pixels = slice(top, min(top + step, box.y1))
            values = self._rows.values(pixels)
            own = slice(values.start - part.row, values.stop - part.row)
            yield top, np.matmul(self._rows.matrix[pixels, values], wide[own], out=strip[: pixels.stop - top])


class _Axis:
    """Both resizes of one axis as a matrix; every pixel is a sum of two to four values that are beside each other."""

    def __init__(self, side: int, padded: int, inside: int, whole: int) -> None:
        """`side` values become `padded` ones, of these the first `inside` become `whole` pixels."""
        left, right, near, far = neighbours(side, padded)
        first = np.zeros((padded, side), np.float32)
        np.add.at(first, (np.arange(padded), left), near)
        np.add.at(first, (np.arange(padded), right), far)
        before, after, near, far = neighbours(inside, whole)
        self.matrix = first[before] * near[:, None] + first[after] * far[:, None]  # [whole, side]
        self._first, self._last = left[before], right[after]  # values that a pixel depends on; both rise

    def pixels(self, wanted: NDArray[np.bool_]) -> slice:
        """Return which pixels depend on any of the values between the first and the last of those wanted [side]."""
        places = np.flatnonzero(wanted)
        if not places.size:
            return slice(0, 0)
        start, stop = np.searchsorted(self._last, places[0]), np.searchsorted(self._first, places[-1], "right")
        return slice(int(start), int(stop))

    def values(self, pixels: slice) -> slice:
        """Return which values pixels depend on."""
        return slice(int(self._first[pixels.start]), int(self._last[pixels.stop - 1]) + 1)


def resized_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return height and width of an image when its longer side is resized, to whole pixels."""
    height, width = size
    scale = longest / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def padded_input(image: NDArray[np.uint8], resized: tuple[int, int], size: int) -> NDArray[np.float32]:
    """Return the encoder's input [3, S, S] of an image [H, W, 3]: resized, normalised, then padded with zeros."""
    height, width = resized
    pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    own = recipe("imagenet", size)
    mean, deviation = (np.asarray(values, np.float32) * np.float32(255) for values in (own.mean, own.deviation))
    padded = np.zeros((3, size, size), np.float32)
    padded[:, :height, :width] = ((pixels - mean) / deviation).transpose(2, 0, 1)
    return padded


def point_grid(count: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return x and y of the middles of count × count parts of an image, in rows: [count², 2]."""
    middles = (np.arange(count) + 0.5) / count
    x, y = np.meshgrid(middles, middles)
    return np.stack([x.ravel(), y.ravel()], axis=1) * size[::-1]


def not_overlapping(boxes: NDArray[Any], scores: NDArray[np.float32], max_iou: float) -> NDArray[np.intp]:
    """Return which boxes [N, 4] (x0, y0, x1, y1) are left, the best first, after those that overlap a better one.

    Equal scores keep their order. In single precision, as torchvision has it: there are no pixels of large images that
    it could count one by one.
    """
    x0, y0, x1, y1 = boxes.astype(np.float32).T
    areas = (x1 - x0) * (y1 - y0)
    order = np.argsort(-scores, kind="stable")
    left = np.ones(len(boxes), bool)
    kept = []
    for index in order:
        if not left[index]:
            continue
        kept.append(index)
        wide = np.minimum(x1, x1[index]) - np.maximum(x0, x0[index])
        high = np.minimum(y1, y1[index]) - np.maximum(y0, y0[index])
        common = np.maximum(wide, 0) * np.maximum(high, 0)
        with np.errstate(invalid="ignore"):  # two lines or points: 0 / 0 is no overlap
            left &= ~(common / (areas + areas[index] - common) > np.float32(max_iou))
    return np.array(kept, np.intp)

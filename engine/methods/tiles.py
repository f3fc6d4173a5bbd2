"""From a foreground to tiles: its connected components, and the squares of the image that cover each of them.

foreground [H, W] → components (8-connected, specks dropped) → standard ones: a square around each;
elongated ones of many parts: a row of overlapping squares along the long side
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import TileSettings

from .bitmasks import BitMask, Box, overlap, pack

ROWS = 1 << 22  # pixels that are relabelled at once


@dataclass(frozen=True)
class Component:
    """A connected component of a foreground."""

    box: Box
    area: int  # pixels
    parts: int = 0  # masks that lie in it with more than half of their pixels


@dataclass(frozen=True)
class Tile:
    """A part cut out of an image for one of its components."""

    box: Box  # beyond the image where it is to be mirrored there
    component: int  # index


def components(foreground: NDArray[np.bool_], min_component: float) -> tuple[NDArray[np.int32], list[Component]]:
    """Return the 8-connected components of a foreground [H, W], in raster order of their first pixels.

    min_component: the share of the image below which one is dropped, unless all are. Returns with them the labels
    [H, W] of their pixels: index + 1, 0 for the background and what was dropped.
    """
    found, labelled, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(foreground).view(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    labels: NDArray[np.int32] = np.asarray(labelled, np.int32)
    areas = stats[:, cv2.CC_STAT_AREA]
    large = np.flatnonzero(areas[1:] >= min_component * foreground.size) + 1
    kept = large if large.size else np.arange(1, found)
    left, top, width, height = (stats[kept, column].tolist() for column in range(4))
    boxes = [Box(x, y, x + w, y + h) for x, y, w, h in zip(left, top, width, height, strict=True)]
    # OpenCV promises no order: the first pixel is the leftmost in the uppermost row.
    first = [
        (box.y0, box.x0 + int(np.argmax(labels[box.y0, box.x0 : box.x1] == label)))
        for label, box in zip(kept.tolist(), boxes, strict=True)
    ]
    order = sorted(range(len(first)), key=first.__getitem__)
    numbers = np.zeros(found, np.int32)
    numbers[kept[order]] = np.arange(1, len(order) + 1)
    rows = max(1, ROWS // labels.shape[1])  # at once: the labels of a large image are not there twice
    for start in range(0, len(labels), rows):
        labels[start : start + rows] = numbers[labels[start : start + rows]]
    return labels, [Component(boxes[index], int(areas[kept[index]])) for index in order]


def with_parts(labels: NDArray[np.int32], found: Sequence[Component], masks: Sequence[BitMask]) -> list[Component]:
    """Return components with their parts counted; labels: [H, W], as `components` returns them.

    A mask is part of the component that has more than half of its pixels, if there is one. Masks within masks, and one
    of the whole component, count as well.
    """
    areas = np.array([mask.area for mask in masks], np.int64)
    x0, y0, x1, y1 = np.array([mask.box for mask in masks], np.int64).reshape(-1, 4).T
    free = np.ones(len(masks), bool)  # those of no component yet
    counted = []
    for label, component in enumerate(found, 1):
        box = component.box
        width = np.minimum(x1, box.x1) - np.maximum(x0, box.x0)
        height = np.minimum(y1, box.y1) - np.maximum(y0, box.y0)
        near = free & (width > 0) & (height > 0) & (2 * width * height > areas)
        parts = 0
        if near.any():
            bits = pack(labels[box.y0 : box.y1, box.x0 : box.x1] == label, box.x0, box.y0)
            for index in np.flatnonzero(near).tolist():
                if 2 * overlap(bits, masks[index]) > areas[index]:
                    free[index] = False
                    parts += 1
        counted.append(replace(component, parts=parts))
    return counted


def is_elongated(component: Component, settings: TileSettings) -> bool:
    """Whether a component gets a row of tiles."""
    long, short = max(component.box.width, component.box.height), min(component.box.width, component.box.height)
    return long > settings.aspect * short and component.parts > settings.parts


def tiles(found: Sequence[Component], size: tuple[int, int], settings: TileSettings) -> Iterator[Tile]:
    """Yield the tiles of components, one component after another; size: height and width of the image.

    Two components may get the same box.
    """
    for index, component in enumerate(found):
        box = component.box
        if not is_elongated(component, settings):
            side = max(settings.min_side, box.width, box.height)
            starts = iter([(_centred(box.x0, box.x1, side), _centred(box.y0, box.y1, side))])
        else:
            side = max(settings.min_side, min(box.width, box.height))
            starts = _row(box, side, settings)
        for x, y in starts:
            yield Tile(_square(x, y, side, size, settings), index)


def _row(box: Box, side: int, settings: TileSettings) -> Iterator[tuple[int, int]]:
    """Yield where the tiles of an elongated component begin, x and y, along the long side of its box."""
    long, short = max(box.width, box.height), min(box.width, box.height)
    x, y = _centred(box.x0, box.x1, side), _centred(box.y0, box.y1, side)
    if long <= side:
        yield x, y
        return
    # Flush: the first begins where the box does, the last ends where it does. Else their centres are there.
    way, before = (long - side, 0) if settings.flush else (long, -(-side // 2))
    step = settings.step * short
    for number in range(math.ceil(way / step) + 1):
        offset = min(math.floor(number * step), way) - before
        yield (box.x0 + offset, y) if box.width > box.height else (x, box.y0 + offset)


def _centred(start: int, end: int, side: int) -> int:
    """Return where what has a side and the same centre as [start, end) begins."""
    return (start + end - side) // 2


def _square(x: int, y: int, side: int, size: tuple[int, int], settings: TileSettings) -> Box:
    """Return the box of a tile that would begin at x and y, within the image unless that is mirrored."""
    if settings.pad == "reflect":
        return Box(x, y, x + side, y + side)
    (y0, y1), (x0, x1) = (_within(start, side, extent) for start, extent in zip((y, x), size, strict=True))
    return Box(x0, y0, x1, y1)


def _within(start: int, side: int, extent: int) -> tuple[int, int]:
    """Move a side into [0, extent), or cut it to that."""
    if side >= extent:
        return 0, extent
    start = min(max(start, 0), extent - side)
    return start, start + side


def cut(image: NDArray[Any], box: Box) -> NDArray[Any]:
    """Return a tile [h, w, ...] of an image [H, W, ...]: a view, or a copy where the image is mirrored."""
    height, width = image.shape[:2]
    if box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height:
        return image[box.y0 : box.y1, box.x0 : box.x1]
    rows, columns = _mirrored(box.y0, box.y1, height), _mirrored(box.x0, box.x1, width)
    return image[rows[:, None], columns]


def _mirrored(start: int, end: int, extent: int) -> NDArray[np.intp]:
    """Return the positions in [0, extent) that [start, end) shows, the border itself once."""
    period = max(2 * (extent - 1), 1)
    positions = np.arange(start, end) % period
    return np.minimum(positions, period - positions) if extent > 1 else np.zeros(end - start, np.intp)

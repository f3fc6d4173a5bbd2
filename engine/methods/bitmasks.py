"""Masks of an image's pixels as bits, so that thousands of candidates of a large image fit into memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray


class Box(NamedTuple):
    """Pixels of an image, half-open: x0 and y0 belong to it, x1 and y1 do not."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0


@dataclass(frozen=True, eq=False)
class BitMask:
    """A mask of an image, cut down to the bytes that its box touches.

    Columns of bytes are the same in all masks, so that two masks meet byte by byte: the first bit of byte b of a row is
    pixel 8·b of the image.
    """

    row: int  # of the image, where `bits` begins
    byte: int  # of an image's row of bits, where `bits` begins
    bits: NDArray[np.uint8]  # [rows, bytes], the first pixel in the highest bit; zeros beyond the image

    @cached_property
    def area(self) -> int:
        """How many pixels it has."""
        return _ones(self.bits)

    @property
    def box(self) -> Box:
        """What its bytes cover, up to 7 pixels more than the mask on the left and on the right."""
        rows, columns = self.bits.shape
        return Box(8 * self.byte, self.row, 8 * (self.byte + columns), self.row + rows)


def pack(pixels: NDArray[np.bool_], x0: int = 0, y0: int = 0) -> BitMask:
    """Return a mask as bits; pixels: [h, w], the part of it that holds all of its pixels; x0, y0: where that begins."""
    before = x0 % 8
    if before:
        pixels = np.pad(pixels, ((0, 0), (before, 0)))
    return BitMask(y0, x0 // 8, np.packbits(pixels, axis=1))


def overlap(one: BitMask, other: BitMask) -> int:
    """Return how many pixels are in both masks."""
    top, left = max(one.row, other.row), max(one.byte, other.byte)
    bottom = min(mask.row + mask.bits.shape[0] for mask in (one, other))
    right = min(mask.byte + mask.bits.shape[1] for mask in (one, other))
    if bottom <= top or right <= left:
        return 0
    first, second = (
        mask.bits[top - mask.row : bottom - mask.row, left - mask.byte : right - mask.byte] for mask in (one, other)
    )
    return _ones(first & second)


def union(masks: Iterable[BitMask], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels [H, W] are in any of the masks of an image; size: its height and width."""
    height, width = size
    bits = np.zeros((height, -(-width // 8)), np.uint8)
    for mask in masks:
        rows, columns = mask.bits.shape
        bits[mask.row : mask.row + rows, mask.byte : mask.byte + columns] |= mask.bits
    return np.unpackbits(bits, axis=1, count=width).view(bool)


def _ones(bits: NDArray[np.uint8]) -> int:
    # OpenCV counts bits in the processor's vectors; it takes no empty arrays.
    return round(cv2.norm(bits, cv2.NORM_HAMMING)) if bits.size else 0

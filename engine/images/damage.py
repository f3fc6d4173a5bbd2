"""Signs of damage that decoders pass over: what they make of the rest looks like the most unusual image.

The bits of a whole JPEG picture end where the file's end marker is. Damaged bits are still decoded, to something wrong,
but then mostly too few or too many of them: the last row is there too early, or still missing when they are used up. In
a progressive file that holds for each of its scans, whose codes are followed once more; so are those of the strips of a
compressed TIFF.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .deep import SEPARATE

try:
    from zsad.kernels.cpu import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

END = b"\xff\xd9"
END_OF_HEADER = struct.Struct(">HHB")  # marker and length of a scan's header, and how many channels are in the scan
TAIL = 1 << 16  # bytes at the end among which the end marker is looked for
AHEAD = 16  # bytes that the decoder may want beyond the last one: it looks ahead
BACK = 16  # bytes at the end, among which there always are bits of the picture
LEAST_WIDTH = 16  # below, a last row of noise could be taken for the picture's

TOO_FEW, TOO_MANY = "its bits end before its picture does", "its picture ends before its bits do"
MISSING = "a part of its picture is missing"
IN_SCANS = (None, TOO_FEW, TOO_MANY, MISSING, "there are bits in it that stand for nothing")  # as `_cpu` numbers them

LOOKS_DAMAGED = "the file looks damaged: "

LZW, PACK_BITS, DEFLATE = 5, 32773, (8, 32946)  # compressions of TIFF
YCBCR = 6  # of TIFF's PhotometricInterpretation: pixels share samples
PART = 1 << 14  # bytes that are decompressed at once, to a thousand times as many at most


class WatchedJpeg:
    """Stands between a JPEG that Pillow decodes and its file.

    Of progressive files it says nothing where the native kernels were not built.
    """

    def __init__(self, image: Any, file: BinaryIO) -> None:
        """image: open, its pixels not decoded yet."""
        self._image, self._file = image, file
        self._broken: str | None = None  # what is wrong with it, if anything is
        self._stops: list[int] = []  # bytes in the file that the decoder has to ask for more at
        self._noise: Any = None  # what the last row is before it is decoded
        if image.info.get("progressive") or image.width < LEAST_WIDTH:
            return
        self._start = file.tell()  # behind the header of the first scan
        header = END_OF_HEADER.pack(0xFFDA, 6 + 2 * image.layers, image.layers)
        file.seek(max(0, self._start - 2 * image.layers - 8))
        if file.read(len(header)) == header and (end := _end(file)) > self._start:  # one scan: rows come as their bits
            self._stops = [max(self._start, end - BACK), end]
            file.seek(0)
            if b"\xff\xdd" in file.read(self._start):  # parts that are decoded by themselves: is none missing?
                self._broken = _broken_parts(file)
            image.load_read = self._read
        file.seek(self._start)

    def damage(self) -> str | None:
        """Return, once the image is decoded, what speaks for damage."""
        if self._image.info.get("progressive") and _cpu is not None:
            self._file.seek(0)
            self._broken = IN_SCANS[_cpu.jpeg_scan_damage(self._file.read(), self._image.height, self._image.width)]
        elif len(self._stops) == 2 and not self._ends_within():
            self._broken = self._broken or TOO_MANY
        return self._broken and LOOKS_DAMAGED + self._broken

    def _read(self, size: int) -> bytes:
        if self._noise is None:
            pixels = np.random.default_rng(0).integers(0, 256, 4 * self._image.width, dtype=np.uint8).tobytes()
            self._noise = Image.frombytes(self._image.mode, (self._image.width, 1), pixels)
            self._image.im.paste(self._noise.im, self._last)
        position = self._file.tell()
        if self._stops and position == self._stops[0]:
            del self._stops[0]
            if not self._stops:
                return bytes(AHEAD)
        elif not self._stops and self._last_row() == self._noise.tobytes():
            self._broken = self._broken or TOO_FEW
        return self._file.read(min(size, self._stops[0] - position) if self._stops else size)

    @property
    def _last(self) -> tuple[int, int, int, int]:
        return (0, self._image.height - 1, self._image.width, self._image.height)

    def _last_row(self) -> bytes:
        row: bytes = self._noise._new(self._image.im.crop(self._last)).tobytes()
        return row

    def _ends_within(self) -> bool:
        """Whether the picture has an end marker of its own, and another one follows."""
        self._file.seek(self._start)
        return END in self._file.read(self._stops[0] - self._start)


def _end(file: BinaryIO) -> int:
    """Return where the end marker is of a file that ends with it, but for zeros."""
    start = max(0, file.seek(0, 2) - TAIL)
    file.seek(start)
    tail = file.read().rstrip(b"\0")
    return start + len(tail) - len(END) if tail.endswith(END) else -1


def _broken_parts(file: BinaryIO) -> str | None:
    """Tell whether the parts between restart markers are not all there, in order."""
    file.seek(0)
    restart = 0
    for marker in _markers(file.read()):
        if 0xD0 <= marker <= 0xD7:
            if marker & 7 != restart:
                return MISSING
            restart = (restart + 1) % 8
        elif marker == 0xD9:
            break
        elif marker == 0xDA:
            restart = 0
        elif marker < 0xC0 or marker == 0xC8 or 0xF0 <= marker <= 0xFD:
            return f"there is no marker FF{marker:02X} within a picture"
    return None


def _markers(content: bytes) -> Iterator[int]:
    """Yield the markers of a JPEG file, without those that are within segments."""
    values = np.frombuffer(content, np.uint8)
    (found,) = np.nonzero(values[:-1] == 0xFF)
    following = values[found + 1]
    marks = found[(following != 0) & (following != 0xFF)]  # escaped values, and filling
    position = index = 0
    while (index := index + int(np.searchsorted(marks[index:], position))) < len(marks):
        position = int(marks[index]) + 2
        marker = int(values[position - 1])
        yield marker
        if marker >= 0xC0 and not 0xD0 <= marker <= 0xD9:  # a segment
            position += int.from_bytes(content[position : position + 2], "big")


def strip_damage(image: Any, file: BinaryIO) -> str | None:
    """Return what speaks for damage in the strips or tiles of a TIFF that Pillow has opened, compressed without loss.

    LZW and PackBits are looked at where the native kernels were built.
    """
    tags = image.tag_v2
    compression = tags.get(259, 1)
    known = compression in DEFLATE or (_cpu is not None and compression in (LZW, PACK_BITS))
    if not known or tags.get(262) == YCBCR or tags.get(266, 1) != 1:  # the bits of bytes in the other order
        return None
    with suppress(LookupError, TypeError, ValueError):  # tags that the decoder has found another way around
        if not all(_is_whole(strip, compression, sizes) for strip, sizes in _strips(tags, image.height, file)):
            return LOOKS_DAMAGED + "a part of its picture is longer or shorter than its pixels"
    return None


def _strips(tags: Any, height: int, file: BinaryIO) -> Iterator[tuple[bytes, set[int]]]:
    """Yield the strips or tiles of a TIFF, and how many bytes each may become."""
    end, tiled = file.seek(0, 2), 324 in tags
    places, sizes = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    columns, rows = (tags[322], tags[323]) if tiled else (tags[256], min(tags.get(278, height), height))
    samples = 1 if tags.get(284, 1) == SEPARATE else tags.get(277, 1)
    row_bytes = (columns * samples * tags.get(258, (1,))[0] + 7) // 8
    in_plane = len(places) if tiled else -(-height // rows)
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        # The last strip may hold the rows that are left, or as many as the others.
        last = height - (in_plane - 1) * rows if not tiled and (number + 1) % in_plane == 0 else rows
        file.seek(place)
        yield file.read(max(0, min(size, end - place))), {row_bytes * rows, row_bytes * last}


def _is_whole(strip: bytes, compression: int, sizes: set[int]) -> bool:
    """Tell whether a strip of a TIFF becomes one of these numbers of bytes, and no more."""
    if compression not in DEFLATE:
        return any(_cpu.tiff_strip_is_whole(strip, compression, size) for size in sizes)
    decoder, found = zlib.decompressobj(), 0
    try:
        for start in range(0, len(strip), PART):
            found += len(decoder.decompress(strip[start : start + PART]))
    except zlib.error:
        return False
    return decoder.eof and found in sizes

"""How many bits the 16-bit files of a batch really use: cameras of 10, 12 and 14 bits store their values unshifted."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .deep import tiff_of_pillow
from .remote import Location
from .stored import ImageError, Stored, opened, read_stored, regular_file

BIT_DEPTHS = (8, 10, 12, 14, 16)  # that --bit-depth takes


@dataclass(frozen=True)
class Depth:
    """Bits that the 16-bit files of a batch use, and a sentence for the user where these are not all 16."""

    bits: int
    note: str | None


def batch_bit_depth(paths: Iterable[Location]) -> Depth:
    """Return the fewest bits of BIT_DEPTHS that hold all values of all 16-bit files; unreadable ones do not count.

    Only PNG and TIFF files count, which store a camera's values as they are. What a file says of its bits (sBIT,
    BitsPerSample, MaxSampleValue, SignificantBits) counts where its values bear it out. Reads files only as long as
    less than 16 bits are possible, so the usual batch costs one of them.
    """
    most, files, said = 0, 0, 0
    for path in paths:
        try:
            if not _has_16_bits(path):
                continue
            stored = read_stored(path)
        except ImageError:
            continue
        if isinstance(stored.values, Image.Image) or not stored.unscaled or stored.values.dtype.kind == "f":
            continue
        largest = _largest(stored)
        files += 1
        most, said = max(most, largest), max(said, stored.said_bits or 0)
        if most > 2 ** BIT_DEPTHS[-2] - 1:
            break
    bits = next((bits for bits in BIT_DEPTHS if max(most, 2**said - 1) < 2**bits), 16)
    if bits == 16 or most == 0:
        return Depth(16, None)
    are = f"none of the {files} 16-bit files has" if files > 1 else "the only 16-bit file does not have"
    return Depth(bits, f"{are} a value above {2**bits - 1}: taken as {bits} bits (--bit-depth 16 takes them as 16)")


def _largest(stored: Stored) -> int:
    """Return the largest level that can be seen, counted from black."""
    levels = np.asarray(stored.values)
    hidden = stored.hidden
    if hidden is not None:
        levels = levels[~hidden]
    largest = int(levels.max())
    # Inverted within a camera's own bits, or within all 16: black is then the largest number that there is.
    return min(largest, 65535 - int(levels.min())) if stored.white_is_zero else largest


def _has_16_bits(path: Location) -> bool:
    """Whether a file's first bytes or header leave this open; most files are ruled out without opening an image."""
    with regular_file(path) as file:
        start = file.read(26)
    if start.startswith(b"\x89PNG"):
        return start[24:25] == b"\x10"
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return False
    try:
        with opened(path) as image:
            return max(tiff_of_pillow(image).bits) > 8
    except ImageError:
        return True

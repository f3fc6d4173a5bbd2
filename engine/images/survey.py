"""How large a category's images are, by their headers alone: the side that networks take them at follows from it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .remote import Location, asked_ahead
from .stored import Header, ImageError, read_header

SMALLEST = 224  # pixels; below, a network sees too few patches
TAIL = 0.05  # of the images at either end that may be of any size
MIXED = 1.5  # times the smaller side that the larger one may be, between the two tails


@dataclass(frozen=True)
class Survey:
    """What the headers of a category's readable images say."""

    shorter: Mapping[int, int]  # how many images have a shorter side of so many pixels
    deep: bool  # whether there may be 16-bit files of a camera among them
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict, compare=False)  # how many are so high and wide

    @property
    def median(self) -> float | None:
        """The median of the shorter sides; None where no image is readable."""
        count = sum(self.shorter.values())
        return (self._ranked((count - 1) // 2) + self._ranked(count // 2)) / 2 if count else None

    def side(self, patch: int, largest: int) -> int | None:
        """Return the side of a network's input for them: their median, a multiple of its patches; None without one.

        At least SMALLEST, at most `largest`, or if no multiple lies between these the smallest above.
        """
        median = self.median
        if median is None:
            return None
        return max(int(min(median, largest)) // patch, -(-SMALLEST // patch)) * patch

    @property
    def mixed(self) -> tuple[int, int] | None:
        """The shorter sides between which most images lie, where these are far apart."""
        count = sum(self.shorter.values())
        tail = int(TAIL * count)
        low, high = (self._ranked(tail), self._ranked(count - 1 - tail)) if count else (0, 0)
        return (low, high) if high > MIXED * low else None

    def _ranked(self, rank: int) -> int:
        """Return the shorter side of one image, of all in ascending order."""
        for side in sorted(self.shorter):
            rank -= self.shorter[side]
            if rank < 0:
                return side
        raise IndexError(rank)


def survey(paths: Iterable[Location], seen: Callable[[], None]) -> Survey:
    """Read the headers of image files; unreadable ones do not count. seen: is called after each."""
    shorter: Counter[int] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    deep = False
    for header in asked_ahead(paths, _header):
        if header is not None:
            shorter[min(header.rows, header.columns)] += 1
            sizes[header.rows, header.columns] += 1
            deep = deep or header.deep
        seen()
    return Survey(shorter, deep, sizes)


def _header(path: Location) -> Header | None:
    try:
        return read_header(path)
    except ImageError:
        return None

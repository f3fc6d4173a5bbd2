"""Whether more images are rejected than chance explains: the line has changed, or the bank no longer fits it."""

from collections import deque
from math import comb

WINDOW = 200  # images that are looked at, the last ones
LEAST = 20  # images before anything is said
# Chance goes beyond the limit once in so many windows of normal images; it counts as over where chance explains it.
BEGINS, ENDS = 1e-4, 0.05


def tail(count: int, number: int, share: float) -> float:
    """Return the probability that of `number` images, each above the bound with probability `share`, `count` are."""
    return 1 - sum(comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(count))


class Drift:
    """Follows the images as they come, and tells when there are too many above the bound, and when no longer."""

    def __init__(self, share: float) -> None:
        """share: of images that are expected above the bound."""
        self._share, self._window = share, deque[bool](maxlen=WINDOW)
        self._there = False
        self.note: str | None = None  # while there is one

    def follow(self, above: bool) -> str | None:
        """Take an image in; returns what to say, None unless something began or ended with it."""
        self._window.append(above)
        number, count = len(self._window), sum(self._window)
        if number < LEAST:
            return None
        chance = tail(count, number, self._share)
        said = f"{count} of the last {number} images are rejected, where {self._share * number:.1f} are expected"
        if self._there:
            self.note = said
        if not self._there and chance < BEGINS:
            self._there, self.note = True, f"{said}: the images have drifted, or there are more defects than usual"
            return self.note
        if self._there and chance >= ENDS:
            self._there, self.note = False, None
            return f"the drift is over: {said}"
        return None

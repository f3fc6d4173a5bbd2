"""Whether more images are rejected than chance explains: the line has changed, or the bank no longer fits it."""

from collections import deque
from math import exp, lgamma, log, log1p

WINDOW = 200  # images that are looked at, the last ones
LEAST = 20  # images before anything is said
# Chance goes beyond the limit once in so many windows of normal images; it counts as over where chance explains it.
BEGINS, ENDS = 1e-4, 0.05


def tail(count: int, number: int, above: int, normal: int, defects: float = 0.0) -> float:
    """Return the probability that of `number` images at least `count` are above a bound.

    A share `defects` of them is; of the others the rate is only known from `normal` images of which `above` are above
    it. Over banks that are drawn anew that makes their number beta-binomial, with parameters 1 + above and normal −
    above: much wider than if a bank of a hundred images knew its rate.
    """
    a, b = 1 + above, max(normal - above, 1)
    whole, below = _log_beta(a, b), 0.0
    # By logarithms: of a thousand images binomial coefficients are beyond any floating-point number.
    for others in range(count if defects else min(count, 1)):  # defects among the images
        left = number - others
        weight = others * log(defects) + left * log1p(-defects) if defects else 0.0
        of_all = weight + lgamma(number + 1) - lgamma(others + 1) - lgamma(left + a + b) - whole
        below += sum(
            exp(of_all - lgamma(k + 1) - lgamma(left - k + 1) + lgamma(k + a) + lgamma(left - k + b))
            for k in range(count - others)
        )
    return 1 - below


def _log_beta(a: int, b: int) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


class Drift:
    """Follows the images as they come, and tells when there are too many above the bound, and when no longer."""

    def __init__(self, above: int, normal: int, defects: float = 0.0) -> None:
        """above: how many of so many normal images are above the bound; defects: the share that is usual."""
        self._known = (above, normal, defects)
        good = (1 + above) / (1 + normal)
        self._share, self._window = good + (1 - good) * defects, deque[bool](maxlen=WINDOW)
        self._there = False
        self.note: str | None = None  # while there is one

    def follow(self, above: bool) -> str | None:
        """Take an image in; returns what to say, None unless something began or ended with it."""
        self._window.append(above)
        number, count = len(self._window), sum(self._window)
        if number < LEAST:
            return None
        chance = tail(count, number, *self._known)
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

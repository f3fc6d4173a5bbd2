"""Bounds of the products of unit vectors, from short codes.

    u = mean + V (head, tail),   V orthogonal, so that the heads carry most of what vectors of one kind differ by
    u . w <= code . code' + terms + |code| |error'| + |error| |code'| + |rest| |rest'|,   rest = (error, tail)

where codes are the heads in 8 bits, and errors what that leaves of them. The native code (bounded_nearest.cpp) takes
those products in full whose bounds reach the largest so far, so that its results are the largest of all exact products.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]

HEAD = 64  # coordinates of a head: one tile of AMX, and few enough for the rest of the work to count
SPARE, ROUNDS = 16, 2  # directions more than wanted, and rounds, by which the largest ones are found
SHARE_ROWS = 8  # of so many patches one is looked at


def least_channels() -> int:
    """Return the channels from which a product with a head takes so much less than a whole one that bounds may pay."""
    return 3 * HEAD


@dataclass(frozen=True)
class Basis:
    """A mean and orthogonal directions."""

    mean: Array  # [C]
    directions: Array  # [C, HEAD]

    @staticmethod
    def of(units: Array) -> "Basis":
        """Find the directions in which unit vectors [n, C] differ most from their mean, by subspace iteration.

        Any orthogonal ones give true bounds, if larger ones.
        """
        mean: Array = units.mean(axis=0)
        centred = units - mean
        spread = centred.T @ centred  # [C, C]
        found = np.random.default_rng(0).standard_normal((len(mean), min(HEAD + SPARE, len(mean))), dtype=np.float32)
        for _ in range(ROUNDS):
            found = np.linalg.qr(spread @ found)[0]
        _, turned = np.linalg.eigh(found.T @ spread @ found)  # the largest come last
        return Basis(mean, np.ascontiguousarray((found @ turned)[:, ::-1][:, :HEAD]))

    def coordinates(self, units: Array) -> tuple[Array, Array, Array]:
        """Return of unit vectors [n, C] the heads [n, HEAD], terms [n] and squares of the tails' lengths [n]."""
        centred = units - self.mean
        heads: Array = centred @ self.directions
        terms = units @ self.mean - self.mean @ self.mean / 2
        tails = np.einsum("nc,nc->n", centred, centred) - np.einsum("nh,nh->n", heads, heads)
        return heads, terms, np.maximum(tails, 0)

    def bound(self, units: Array, out: NDArray[np.uint8]) -> None:
        """Fill out with the bounds of unit vectors [n, C], in bytes."""
        _cpu.bound_vectors(*self.coordinates(units), out)


def taken_share(basis: Basis, left: Array, right: Array) -> float:
    """Estimate the share of the products of unit vectors [P, C] and [Q, C] that bounds leave beside the largest ones."""
    rows = left[::SHARE_ROWS]
    nearest = (rows @ right.T).max(axis=1)
    (heads, terms, tails), (others, of_others, rests) = basis.coordinates(rows), basis.coordinates(right)
    bounds: NDArray[Any] = heads @ others.T
    bounds += terms[:, None] + of_others + np.sqrt(tails[:, None] * rests)
    return float((bounds >= nearest[:, None]).mean()) - 1 / len(right)

"""Bounds of the products of unit vectors, from short codes.

    u = mean + V (head, tail),   V orthogonal, so that the heads carry most of what vectors of one kind differ by

Codes are the first coordinates of heads, in 8 bits where two images meet and in 16 bits for a bank; what a product of
codes leaves is bounded by lengths. The native code (bounded_pair.cpp, bounded_bank.cpp) takes those products in full
whose bounds reach the largest so far, so that its results are the largest of all exact products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, aligned_empty

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]

HEAD = 64  # coordinates of a head: few enough for the rest of the work to count
LEAD = HEAD // 2  # of these, those with codes where images meet
SPARE, ROUNDS = 16, 2  # directions more than wanted, and rounds, by which the largest ones are found
SHARE_ROWS = 8  # of so many patches one is looked at
READ_ROWS = 1024  # of a bank at a time
SLACK = 2e-5  # for rounding
LEAST_CHANNELS = 3 * HEAD  # from which a product with a head takes so much less than a whole one that bounds may pay


@dataclass(frozen=True)
class Basis:
    """A mean and orthogonal directions."""

    mean: Array  # [C]
    directions: Array  # [C, h], those first in which vectors differ most

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
        """Return of unit vectors [n, C] the heads [n, h], terms [n] and squares of the tails' lengths [n]."""
        heads: Array = units @ self.directions
        heads -= self.mean @ self.directions
        along, square = units @ self.mean, float(self.mean @ self.mean)
        tails = np.einsum("nc,nc->n", units, units)  # of u − mean: |u|² − 2 u · mean + |mean|², less the head
        tails -= 2 * along - square + np.einsum("nh,nh->n", heads, heads)
        return heads, along - square / 2, np.maximum(tails, 0)

    def first(self, directions: int) -> "Basis":
        return Basis(self.mean, np.ascontiguousarray(self.directions[:, :directions]))

    def bound_image(self, units: Array, out: NDArray[np.uint8]) -> None:
        """Fill out with the bounds of an image's unit vectors [P, C], in bytes."""
        _cpu.bound_image(*self.coordinates(units), LEAD, out)


@dataclass(frozen=True)
class Groups:
    """A bank of unit vectors in groups of those that lie near each other, and the bounds of their products."""

    basis: Basis  # of as many directions as coordinates have codes: more would only make the spheres larger
    order: NDArray[np.int32]  # [G, GROUP] the vectors of each group, −1 for none
    codes: NDArray[np.int16]  # [G, GROUP · CODES]
    lengths: tuple[float, float]  # of the coded coordinates and of what codes leave of them, at most
    centres: Array  # [G, CODED + 2] of spheres that the heads of groups lie in, see `squares`
    radii: Array  # [G] of these

    @staticmethod
    def of(basis: Basis, vectors: int, read: Callable[[slice, Array], None], channels: int) -> "Groups":
        """Group a bank of so many unit vectors; read: fills an array [n, C] with those of some rows."""
        basis = basis.first(_cpu.CODED)
        heads = np.empty((vectors, _cpu.CODED), np.float32)
        terms, tails = np.empty(vectors, np.float32), np.empty(vectors, np.float32)
        units = np.empty((READ_ROWS, channels), np.float32)
        for first in range(0, vectors, READ_ROWS):
            at = slice(first, min(first + READ_ROWS, vectors))
            read(at, units[: at.stop - first])
            heads[at], terms[at], tails[at] = basis.coordinates(units[: at.stop - first])
        groups = halved(heads, _cpu.GROUP)
        order = np.full((len(groups), _cpu.GROUP), -1, np.int32)
        centres, radii = np.empty((len(groups), _cpu.CODED + 2), np.float32), np.empty(len(groups), np.float32)
        for g, members in enumerate(groups):
            order[g, : len(members)] = members
            centre = heads[members].mean(axis=0)
            centres[g] = *(-2 * centre), 1, centre @ centre
            radii[g] = np.linalg.norm(heads[members] - centre, axis=1).max() + SLACK
        places = np.where(order < 0, order[:, :1], order).reshape(-1)  # what fills up is never taken
        codes = aligned_empty((len(groups), _cpu.GROUP * _cpu.CODES), np.int16)
        lengths = _cpu.code_bank(heads[places], terms[places], tails[places], codes)
        return Groups(basis, order, codes, lengths, centres, radii)

    def halves(self, vectors: Array) -> NDArray[np.uint16] | None:
        """Return the bits of a bank's vectors [M, C] in groups, [G · GROUP, C], if 16-bit floats are exactly these.

        None also where the native code has no use for them.
        """
        if vectors.shape[1] % 64 or not _cpu.instruction_sets("bounded_bank")[0].startswith("avx512"):
            return None
        halves = aligned_empty((self.order.size, vectors.shape[1]), np.float16)
        for first in range(0, self.order.size, READ_ROWS):
            rows = vectors[np.maximum(self.order.reshape(-1)[first : first + READ_ROWS], 0)]
            halves[first : first + READ_ROWS] = rows
            if not np.array_equal(halves[first : first + READ_ROWS], rows):
                return None
        return halves.view(np.uint16)

    def squares(self, heads: Array) -> Array:
        """Return the squares of the distances from heads [n, CODED] to the centres of groups, [n, G]."""
        lengths = np.einsum("nh,nh->n", heads, heads)
        squares: Array = np.column_stack([heads, lengths, np.ones(len(heads), np.float32)]) @ self.centres.T
        return squares


def grouped_bytes(vectors: int, channels: int) -> int:
    """Return what the groups of so many vectors hold, and take while they are made, beside the vectors."""
    groups = -(-vectors // _cpu.GROUP)
    held = groups * (2 * _cpu.GROUP * _cpu.CODES + 4 * (_cpu.CODED + 3 + _cpu.GROUP))
    halves = 2 * groups * _cpu.GROUP * channels + 4 * READ_ROWS * channels
    return int(held + halves + 4 * vectors * (3 * _cpu.CODED + 4))


def halved(vectors: Array, size: int) -> list[NDArray[np.intp]]:
    """Cut vectors [n, h] in halves along the direction in which they differ most, until parts have at most this size.

    Parts that follow each other lie near each other, too.
    """
    parts, todo = [], [np.arange(len(vectors))]
    while todo:
        members = todo.pop()
        if len(members) <= size:
            parts.append(members)
            continue
        centred = vectors[members] - vectors[members].mean(axis=0)
        direction = np.abs(centred).max(axis=0)
        for _ in range(ROUNDS + 1):
            direction = (centred @ direction) @ centred
            direction /= max(float(np.linalg.norm(direction)), 1e-30)
        middle = (len(members) // 2 + size - 1) // size * size  # all parts but one are full
        at = np.argpartition(centred @ direction, middle)
        todo += [members[at[middle:]], members[at[:middle]]]
    return parts


def taken_share(basis: Basis, left: Array, right: Array) -> float:
    """Estimate the share of the products of unit vectors [P, C] and [Q, C] that bounds leave beside the largest."""
    rows = left[::SHARE_ROWS]
    nearest = (rows @ right.T).max(axis=1)
    (heads, terms, tails), (others, of_others, rests) = basis.coordinates(rows), basis.coordinates(right)
    bounds: NDArray[Any] = heads @ others.T
    bounds += terms[:, None] + of_others + np.sqrt(tails[:, None] * rests)
    return float((bounds >= nearest[:, None]).mean()) - 1 / len(right)

"""A few vectors that cover many: each of the many lies near one of the few.

unit vectors [N, C] → random projections [N, D] → farthest first (k-center greedy, as PatchCore thins its memory)

Farthest first takes one vector at a time and then measures all again, which waits for memory. Here those that are
farthest are taken together, as long as nothing outside of them can have become the farthest, and measured in one
product: the order is the same.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Read = Callable[[int], Array]  # the vectors [n, C] of a part

DIRECTIONS = 64  # of the projection, whose distances are off with a standard deviation of 9 %
CANDIDATES = 512  # that are taken together at most
ROWS = 16384  # vectors that are measured at once
COPY = 1e-6  # of the longest one's squared length: what is nearer to a chosen one is a copy of it, but for rounding


def project(parts: int, rows: int, channels: int, read: Read, seed: int = 0) -> Array:
    """Project vectors that are read part by part, of so many rows each, on random directions: [parts · rows, D].

    Vectors with fewer channels than there are directions stay as they are.
    """
    directions = None
    if channels > DIRECTIONS:
        drawn = np.random.default_rng(seed).standard_normal((channels, DIRECTIONS))
        directions = (drawn / np.sqrt(DIRECTIONS)).astype(np.float32)
    projected = np.empty((parts * rows, min(channels, DIRECTIONS)), np.float32)
    for part in range(parts):
        vectors = read(part)
        projected[part * rows : (part + 1) * rows] = vectors if directions is None else vectors @ directions
    return projected


def thinning_bytes(points: int, channels: int) -> int:
    """Return the memory that `project` and `farthest_first` take for so many vectors, beside one part of them."""
    directions, measured = min(channels, DIRECTIONS), min(points, ROWS) * min(points, CANDIDATES)
    return points * (4 * directions + 20) + 16 * measured


def farthest_first(points: Array, count: int, taken_more: Callable[[int], None] = lambda _: None) -> NDArray[np.int64]:
    """Choose points [N, D] one after another, each the farthest from those before; returns their numbers, ascending.

    The first is the one nearest to the mean of all; of equally far ones any comes first. count: how many; fewer where
    all others are copies of those. taken_more: is told how many were chosen since it was last told. Memory beside the
    points: about 20 bytes for each, and 0.1 GB.
    """
    if count >= len(points):
        return np.arange(len(points))
    lengths = np.einsum("nd,nd->n", points, points)
    chosen = [int((lengths - 2 * (points @ points.mean(axis=0, dtype=np.float64).astype(np.float32))).argmin())]
    nearest = np.full(len(points), np.inf, np.float32)  # squared distance to the chosen
    _measure(points, lengths, chosen, nearest)
    least = COPY * lengths.max()
    while len(chosen) < count and nearest.max() > least:
        taken = _next(points, lengths, nearest, count - len(chosen), least)
        _measure(points, lengths, taken, nearest)
        chosen += taken
        taken_more(len(taken))
    return np.sort(np.array(chosen, np.int64))


def _next(points: Array, lengths: Array, nearest: Array, most: int, least: float) -> list[int]:
    """Return the next points of the order, at least one: as many as surely come before all that are not looked at.

    Those that are as near as `least` to a chosen one, squared, are not taken.
    """
    size = min(CANDIDATES, len(points))
    candidates = np.sort(np.argpartition(-nearest, size - 1)[:size])
    rest = np.partition(nearest, len(nearest) - size - 1)[-size - 1] if size < len(points) else np.float32(-1)
    own = points[candidates]
    squared = lengths[candidates, None] + lengths[candidates] - 2 * own @ own.T  # [size, size]
    distances, taken = nearest[candidates], list[int]()
    while len(taken) < most:
        best = int(distances.argmax())
        if taken and distances[best] <= max(rest, least):
            break
        taken.append(int(candidates[best]))
        np.minimum(distances, squared[best], out=distances)
        distances[best] = -1
    return taken


def _measure(points: Array, lengths: Array, chosen: list[int], nearest: Array) -> None:
    """Lower the squared distances of all points to the nearest of those that were chosen."""
    centres = points[chosen]
    for first in range(0, len(points), ROWS):
        rows = slice(first, first + ROWS)
        squared = lengths[rows, None] + lengths[chosen] - 2 * points[rows] @ centres.T
        np.minimum(nearest[rows], squared.min(axis=1), out=nearest[rows])
    nearest[chosen] = -1

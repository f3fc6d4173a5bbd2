"""What distances of the chosen ranks add up to on a CPU: by the native kernel, else by NumPy."""

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]


def rank_sums(distances: Array, images: NDArray[np.integer], ranks: tuple[int, int]) -> NDArray[np.float64]:
    """Add up every patch's distances of the ranks first … last − 1, ascending, among some images.

    distances: [P, N], none negative, in any order in memory; images: [n] numbers of those that count. Returns [P]; the
    sums of so few floats are exact, so that no order changes them.
    """
    first, last = ranks
    if not _native():
        chosen = distances[:, images]
        chosen.partition([rank - 1 for rank in ranks if rank > 0], axis=1)
        added: NDArray[np.float64] = chosen[:, first:last].sum(axis=1, dtype=np.float64)
        return added
    sums = np.empty(len(distances))
    _cpu.rank_sums(distances, images.astype(np.int32), first, last, sums)
    return sums


def _native() -> bool:
    return _cpu is not None

"""Averages of the minima over those images that are kept as references: other references without new products."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cpu import averages as cpu
from .machine import available_cores
from .reference import interval_ranks

if TYPE_CHECKING:
    from .cuda.device import Device

Array = NDArray[np.float32]


def kept_averages(
    minima: Array, kept: NDArray[np.bool_], interval: tuple[float, float], devices: "Sequence[Device]" = ()
) -> NDArray[np.float64]:
    """Average every patch's distances to the images that are kept, over the ranks of an interval (MuSc, section 3.2).

    minima: [M, P, N] of the first M of N images, as `mutual_scores` hands them back; in memory or a memory map, which
        is read image by image. The distance of image i to itself, [i, :, i], never counts.
    kept: [N], at least one beside each image.
    interval: as of `mutual_scores`, of the images that are kept.
    devices: opened CUDA devices, of which the first does the work, where it has memory for one image; none is the CPU.

    Returns [M, P]. Raises ValueError where no image is kept for one of them.
    """
    images, _, all_images = minima.shape
    if kept.shape != (all_images,):
        raise ValueError(f"kept must be [{all_images}], not {list(kept.shape)}")
    others = int(kept.sum()) - kept[:images]  # [M]
    if others.min() < 1:
        raise ValueError("an image has no other that is kept; keep at least two")
    ranks = [interval_ranks(int(n), interval) for n in others]
    sums = None
    if devices:
        from .cuda import averages as cuda
        from .cuda.device import DeviceMemoryError

        with suppress(DeviceMemoryError):  # then the CPU does it
            sums = cuda.kept_sums(devices[0], minima, kept, ranks)
    if sums is None:
        references = [np.flatnonzero(kept & (np.arange(all_images) != image)) for image in range(images)]
        with ThreadPoolExecutor(available_cores()) as pool:
            sums = np.array(list(pool.map(cpu.rank_sums, minima, references, ranks)))
    averages: NDArray[np.float64] = sums / np.array([last - first for first, last in ranks])[:, None]
    return averages

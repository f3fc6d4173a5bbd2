"""What distances of the chosen ranks add up to on a CUDA device: minima come from the host, a few images at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .device import DEVICE_ARRAY, Device, int32

Array = NDArray[np.float32]

STAGED_BYTES = 64 << 20  # of minima on the device; at least one image's
THREADS = 128


def kept_sums(
    device: Device, minima: Array, kept: NDArray[np.bool_], ranks: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """Add up every patch's distances of an image's ranks, among the images that are kept and not itself.

    minima: [M, P, N]; kept: [N]; ranks: first and last, of each image. Returns [M, P]. Raises DeviceMemoryError.
    """
    images, patches, others = minima.shape
    device.use()
    at_once = min(max(STAGED_BYTES // (4 * patches * others), 1), images)
    staged: DEVICE_ARRAY = device.empty((at_once, patches, others), np.float32)
    sums: DEVICE_ARRAY = device.empty((at_once, patches), np.float64)
    flags, bounds = device.to_device(kept.astype(np.uint8)), device.to_device(np.array(ranks, np.int32))
    found = np.empty((images, patches))
    for first in range(0, images, at_once):
        part = slice(first, min(first + at_once, images))
        size = part.stop - part.start
        device.upload(np.ascontiguousarray(minima[part]), staged[:size])
        device.launch(
            "kept_sums",
            (-(-patches // THREADS), size),
            THREADS,
            (staged, flags, bounds[part], *int32(others, patches, first), sums),
        )
        found[part] = device.to_host(sums[:size])
    return found

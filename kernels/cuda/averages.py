"""What distances of the chosen ranks add up to on a CUDA device: minima come from the host, a few images at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .device import DEVICE_ARRAY, Device, DeviceMemoryError, int32

Array = NDArray[np.float32]

STAGED_BYTES = 64 << 20  # of minima on the device; at least one image's
THREADS = 128


def kept_sums(
    device: Device, minima: Array, kept: NDArray[np.bool_], ranks: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """Add up every patch's distances of an image's ranks, among the images that are kept and not itself.

    minima: [M, P, N]; kept: [N]; ranks: first and last, of each image. Returns [M, P]. Raises
    DeviceMemoryError where the device does not hold one image's.
    """
    images, patches, others = minima.shape
    device.use()
    staged, sums = _room(device, min(max(STAGED_BYTES // (4 * patches * others), 1), images), patches, others)
    at_once = len(staged)
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


def _room(device: Device, at_once: int, patches: int, others: int) -> tuple[DEVICE_ARRAY, DEVICE_ARRAY]:
    """Allocate the minima and sums of so many images, or of as many as the device has memory for."""
    while True:
        try:
            staged = device.empty((at_once, patches, others), np.float32)
            return staged, device.empty((at_once, patches), np.float64)
        except DeviceMemoryError:
            if at_once == 1:
                raise
        at_once //= 2

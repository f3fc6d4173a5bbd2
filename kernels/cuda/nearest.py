"""Nearest neighbours on a CUDA device: fp16 products of chunks, and a pass that keeps the best of every query.

unit queries [Q, C] → chunk by chunk of the bank: product (cuBLAS, fp32 sums), running best [Q, k] → sorted on the host

Products of one chunk are computed while the pass reads those of the one before.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .device import DEVICE_ARRAY, Device, int32

Array = NDArray[np.float32]
Read = Callable[[slice, Array], None]  # fills an array [n, C] with the unit vectors of n rows of the bank

QUERY_ROWS, BANK_ROWS = 2048, 8192  # of a product
WARPS = 4  # of a block of the pass, each with a query of its own
ALIGNED_CHANNELS = 8  # that cuBLAS multiplies on tensor cores
MEMORY_SHARE = 0.9  # of the free memory, unless a limit is given
LOWEST_KEY = -(2**31)  # below the key of every float


class Search:
    """Searches a bank of unit vectors on one CUDA device."""

    precision = "fp16"

    def __init__(
        self, device: Device, vectors: int, channels: int, k: int, precision: str, read: Read, memory_limit: int | None
    ) -> None:
        """Bring the bank to the device, where that fits into the limit beside the work; else for every search.

        precision: "fp16", which "auto" stands for. Raises ValueError for another, MemoryError for a limit below the
        least, DeviceMemoryError where there is less than the limit, and what `read` raises.
        """
        self._device, self._vectors, self._k, self._read = device, vectors, k, read
        self._channels, self._stride = channels, channel_stride(channels)
        device.use()
        limit = int(MEMORY_SHARE * device.free_bytes()) if memory_limit is None else memory_limit
        least = needed(vectors, channels, k, precision, resident=False)
        if limit < least:
            raise MemoryError(
                f"searching {vectors} vectors of {channels} channels on a device takes at least {least} bytes, but the "
                f"limit is {limit}; raise memory_limit"
            )
        self._resident: DEVICE_ARRAY | None = None
        if needed(vectors, channels, k, precision, resident=True) <= limit:
            self._resident = device.empty((vectors, self._stride), np.float16)
            for chunk in _chunks(vectors, BANK_ROWS):
                device.upload(self._halves(chunk, read), self._resident[chunk])
            device.synchronise()

    def _halves(self, rows: slice, read: Read) -> NDArray[np.float16]:
        """Return unit vectors of bank or queries rounded to fp16, [n, stride]."""
        units = np.empty((rows.stop - rows.start, self._channels), np.float32)
        read(rows, units)
        halves = np.zeros((len(units), self._stride), np.float16)
        halves[:, : self._channels] = units
        return halves

    def search(self, count: int, read: Read) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest of `count` queries; returns cosines [Q, k] and indices [Q, k].

        read: fills an array [n, C] with the unit vectors of n of them.
        """
        device = self._device
        device.use()
        device.follow()
        cosines, indices = np.empty((count, self._k), np.float32), np.empty((count, self._k), np.int64)
        rows, columns = min(QUERY_ROWS, count), min(BANK_ROWS, self._vectors)
        products = [device.empty((1, rows, columns), np.float32) for _ in range(2)]
        staged = None if self._resident is not None else device.empty((columns, self._stride), np.float16)
        try:
            for at in _chunks(count, QUERY_ROWS):
                keys, numbers = self._search(self._halves(at, read), products, staged)
                values = _key_to_float(keys)
                order = np.lexsort((numbers, -values))
                cosines[at] = np.clip(np.take_along_axis(values, order, axis=1), -1, 1)
                indices[at] = np.take_along_axis(numbers, order, axis=1)
        finally:
            device.synchronise()  # also after a failure: nothing may still use the arrays when they go
        return cosines, indices

    def _search(
        self, queries: NDArray[np.float16], products: list[DEVICE_ARRAY], staged: DEVICE_ARRAY | None
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return keys of the largest products and their numbers [Q, k], in any order."""
        device, count = self._device, len(queries)
        halves = device.empty((1, count, self._stride), np.float16)
        device.upload(queries[None], halves)
        keys = device.to_device(np.full((count, self._k), LOWEST_KEY, np.int32))
        numbers = device.to_device(np.tile(-1 - np.arange(self._k, dtype=np.int32), (count, 1)))
        device.synchronise()  # products have a stream of their own
        for number, chunk in enumerate(_chunks(self._vectors, BANK_ROWS)):
            slot, size = number % 2, chunk.stop - chunk.start
            with device.producing(("nearest", slot)):
                if self._resident is not None:
                    column = self._resident[chunk]
                else:
                    assert staged is not None
                    column = staged[:size]
                    device.upload(self._halves(chunk, self._read), column)
                device.product(column, halves, products[slot][:, :count])
            with device.consuming(("nearest", slot)):
                running_top(device, products[slot][0, :count], size, chunk.start, keys, numbers)
        return device.to_host(keys), device.to_host(numbers)


def running_top(
    device: Device, products: DEVICE_ARRAY, columns: int, first: int, keys: DEVICE_ARRAY, indices: DEVICE_ARRAY
) -> None:
    """Queue raising the largest of every row, keys [P, K] and indices [P, K], by products [P, stride].

    columns: how many of each row count, numbered from `first` on.
    """
    rows, stride = products.shape
    device.launch(
        "running_top",
        (-(-rows // WARPS), 1),
        32 * WARPS,
        (products, *int32(stride, rows, columns, first), keys, indices, *int32(keys.shape[1])),
    )


def channel_stride(channels: int) -> int:
    """Return the channels of an fp16 vector, filled up with zeros."""
    return -(-channels // ALIGNED_CHANNELS) * ALIGNED_CHANNELS


def needed(vectors: int, channels: int, k: int, precision: str, resident: bool) -> int:
    """Return the bytes of device memory that a search takes; resident: with the bank."""
    if precision not in ("auto", "fp16"):
        raise ValueError(f"precision {precision!r} is not available on a CUDA device; use precision fp16")
    stride, columns = channel_stride(channels), min(BANK_ROWS, vectors)
    work = QUERY_ROWS * (2 * 4 * columns + 2 * stride + 8 * k)
    return work + 2 * stride * (vectors if resident else columns)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _key_to_float(keys: NDArray[np.int32]) -> Array:
    """Turn keys (device.h) back into floats."""
    floats: Array = (keys ^ ((keys >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    return floats

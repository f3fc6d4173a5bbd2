"""Where the arrays of a group of images live: in host memory, or on a CUDA device, in both cases with a way out.

What does not fit goes to a temporary file, or from the device to host memory.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zsad.kernels.machine import default_memory_limit, scratch

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

Array = Any  # a NumPy array, or an array on the device


class Arrays(Protocol):
    """Room for arrays beside the networks' outputs."""

    devices: "Sequence[Device]"  # that compute on them; none is the CPU

    @property
    def device(self) -> "Device | Literal['cpu']":
        """The first that computes on them."""
        return self.devices[0] if self.devices else "cpu"

    def limit(self) -> int:
        """Return the bytes that may be used where they are computed on: of each device, or of host memory."""

    def share(self, size: int, limit: int, needed: int) -> tuple[bool, int]:
        """Tell whether arrays of so many bytes stay in memory, and how many bytes are left to compute with.

        Where the limit is theirs too, they do if they take at most half of it and leave what the computation needs.
        """

    def room(self, shape: tuple[int, ...], dtype: DTypeLike, kept: bool) -> AbstractContextManager[Array]:
        """Make room for an array, until the context ends; raises MemoryError or OSError where there is none."""

    def put(self, values: Array, room: Array) -> None:
        """Copy a network's output, or another part, into a part of what `room` gave."""

    def complete(self) -> None:
        """Wait for the copies that are still under way."""

    def fetch(self, array: Array) -> NDArray[Any]:
        """Wait for what is still under way and return an array's content in host memory."""

    def send(self, array: NDArray[Any]) -> Array:
        """Return an array of the host's where networks read it."""


class HostArrays(Arrays):
    """Networks on the CPU; what computes on their outputs may be devices that take them from host memory."""

    def __init__(self, devices: "Sequence[Device]", memory_limit: int | None) -> None:
        """memory_limit: bytes; None: nearly all that is free."""
        self.devices, self._asked = devices, memory_limit

    def limit(self) -> int:
        return free_memory(self.devices) if self._asked is None else self._asked

    def share(self, size: int, limit: int, needed: int) -> tuple[bool, int]:
        if self.devices:  # the limit is theirs
            return size <= default_memory_limit() // 2, limit
        return _shared(size, limit, needed)

    def room(self, shape: tuple[int, ...], dtype: DTypeLike, kept: bool) -> AbstractContextManager[Array]:
        return scratch(shape, kept, dtype)

    def put(self, values: Array, room: Array) -> None:
        room[...] = values

    def complete(self) -> None:
        pass

    def fetch(self, array: Array) -> NDArray[Any]:
        return np.asarray(array)

    def send(self, array: NDArray[Any]) -> Array:
        return array


class DeviceArrays(Arrays):
    """Networks on a device. Where several devices compute, what the first one's networks give goes to host memory."""

    def __init__(self, devices: "Sequence[Device]", memory_limit: int | None) -> None:
        """memory_limit: bytes of each device; None: nearly all that is free."""
        self.devices, self._asked, self._device = devices, memory_limit, devices[0]

    def limit(self) -> int:
        return free_memory(self.devices) if self._asked is None else self._asked

    def share(self, size: int, limit: int, needed: int) -> tuple[bool, int]:
        return _shared(size, limit, needed) if len(self.devices) == 1 else (False, limit)

    @contextmanager
    def room(self, shape: tuple[int, ...], dtype: DTypeLike, kept: bool) -> Iterator[Array]:
        if kept:
            yield self._device.empty(shape, dtype)
            return
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with scratch(shape, size <= default_memory_limit() // 2, dtype) as array:
            yield array

    def put(self, values: Array, room: Array) -> None:
        if isinstance(room, np.ndarray):
            room[...] = values if isinstance(values, np.ndarray) else self._device.to_host(values)
        else:
            self._device.copy(values, room)

    def complete(self) -> None:
        self._device.synchronise()

    def fetch(self, array: Array) -> NDArray[Any]:
        return self._device.to_host(array)

    def send(self, array: NDArray[Any]) -> Array:
        return self._device.to_device(array)


def _shared(size: int, limit: int, needed: int) -> tuple[bool, int]:
    kept = size <= limit // 2 and needed <= limit - size
    return kept, limit - size if kept else limit


def free_memory(devices: "Sequence[Device]") -> int:
    """Return the bytes that may be used of each device, or of host memory where there is none."""
    if not devices:
        return default_memory_limit()
    from zsad.kernels.cuda.scoring import MEMORY_SHARE

    return min(int(MEMORY_SHARE * device.free_bytes()) for device in devices)

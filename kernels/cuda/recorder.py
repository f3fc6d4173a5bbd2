"""Queues work that comes again with the same arrays: taken down as CUDA graphs, which cost the host one launch each.

Queueing a product and its pass takes the host some 40 to 50 µs, which a fast GPU needs for little more than one pair of
images. The comparisons of a layer, taken down once, serve all layers.
"""

import logging
from collections.abc import Callable, Hashable
from weakref import WeakSet

from .device import Device, DeviceMemoryError

MAX_LAUNCHES = 1 << 15  # taken down at once: the driver keeps memory for each, which no plan counts

log = logging.getLogger(__name__)
_refusing: WeakSet[Device] = WeakSet()  # devices whose libraries cannot be taken down, which was said


class Recorder:
    """Takes down one device's work, and queues it."""

    def __init__(self, device: Device, wanted: bool) -> None:
        """wanted: otherwise all work is queued launch by launch."""
        self._device, self._left = device, MAX_LAUNCHES if wanted else 0
        self._recorded: dict[Hashable, Callable[[], None]] = {}
        self._ready = False  # kernels and libraries are loaded at their first use, which cannot be taken down

    def run(self, key: Hashable, launches: int, queue: Callable[[], None]) -> None:
        """Queue some work, about so many launches; work of the same key must be the same, on the same arrays."""
        if self._ready and key not in self._recorded and launches <= self._left:
            self._record(key, launches, queue)
        self._recorded.get(key, queue)()
        self._ready = self._ready or launches > 0

    def _record(self, key: Hashable, launches: int, queue: Callable[[], None]) -> None:
        if self._device in _refusing:
            return
        refusals: tuple[type[Exception], ...] = (*self._device.failures, DeviceMemoryError)
        try:
            self._recorded[key] = self._device.capture(queue)
        except refusals as error:
            _refusing.add(self._device)
            log.warning(
                "%s takes no CUDA graphs of mutual scoring (%s: %s); its work is queued launch by launch, which gives "
                "the same scores and can take longer",
                self._device.name,
                type(error).__name__,
                error,
            )
        else:
            self._left -= launches

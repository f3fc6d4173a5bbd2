"""How many images may be in memory at once, by their bytes instead of by the number of workers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

Result = TypeVar("Result")


class Budget:
    """Bytes that worker threads share. First come, first served, so that large images are not starved by small ones.

    A thread that holds room must not ask for more: it would wait for itself.
    """

    def __init__(self, limit: int) -> None:
        """limit: bytes."""
        self._limit = limit
        self._used = 0
        self._holders = 0
        self._alone = False
        self._waiting: list[object] = []  # in the order they came
        self._changed = threading.Condition()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free and hold them; what is larger than the limit gets in when all is free."""
        size = min(size, self._limit)
        self._enter(lambda: not self._alone and self._used + size <= self._limit, size)
        try:
            yield
        finally:
            self._leave(size)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody holds anything, and let nobody in meanwhile."""
        self._enter(lambda: self._holders == 0, 0, alone=True)
        try:
            yield
        finally:
            self._leave(0)

    def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Return what `work` returns in a room of `size` bytes; work that meets MemoryError is tried again alone."""
        with suppress(MemoryError), self.room(size):
            return work()
        # Out of the handler, whose traceback would keep alive what the first attempt had allocated.
        with self.alone():
            return work()

    def _enter(self, fits: Callable[[], bool], size: int, alone: bool = False) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and fits())
                self._used += size
                self._holders += 1
                self._alone = alone
            finally:  # also where the wait is interrupted: nobody must queue behind a ticket without an owner
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _leave(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._holders -= 1
            self._alone = False
            self._changed.notify_all()

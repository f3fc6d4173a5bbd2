"""Work on images in threads, a little ahead of who takes the results, within a number of bytes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Failed(Enum):
    """Stands for a result: a MemoryError would keep alive all that was allocated before it, by its traceback."""

    FOR_LACK_OF_MEMORY = 0


class Ahead(Generic[Item, Result]):
    """Calls a function in threads and gives the results in the order in which the items came."""

    def __init__(self, work: Callable[[Item, bool], Result], threads: int, most: int, limit: int, name: str) -> None:
        """work: takes an item, and whether this is its last try: after a MemoryError it gets one alone.

        most: items at once. limit: bytes that these may take; one that takes more is worked on alone.
        """
        self._work, self._most, self._limit = work, most, limit
        self._pool = ThreadPoolExecutor(threads, name)
        self._queue: deque[tuple[Item, int, Future[Result | _Failed]]] = deque()
        self._bytes = 0

    def __enter__(self) -> "Ahead[Item, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After a failure, Ctrl-C included, what is queued has no use any more; what runs may still be writing files.
        self._pool.shutdown(cancel_futures=error is not None)

    def put(self, item: Item, size: int) -> Iterator[tuple[Item, Result]]:
        """Queue an item that takes so many bytes; yield the results that have to go before there is room for it."""
        while self._queue and (len(self._queue) >= self._most or self._bytes + size > self._limit):
            yield self._take()
        self._bytes += size
        self._queue.append((item, size, self._pool.submit(self._first_try, item)))

    def ready(self) -> Iterator[tuple[Item, Result]]:
        """Yield the results that are there, up to the first that is not or that failed; after the end too."""
        while self._queue:
            item, size, future = self._queue[0]
            if not future.done() or future.cancelled() or future.exception() is not None:
                return
            result = future.result()
            if isinstance(result, _Failed):
                return
            self._queue.popleft()
            self._bytes -= size
            yield item, result

    def rest(self) -> Iterator[tuple[Item, Result]]:
        """Yield all results that are left."""
        while self._queue:
            yield self._take()

    def _first_try(self, item: Item) -> Result | _Failed:
        try:
            return self._work(item, False)
        except MemoryError:
            return _Failed.FOR_LACK_OF_MEMORY

    def _take(self) -> tuple[Item, Result]:
        item, size, future = self._queue.popleft()
        result = future.result()
        if isinstance(result, _Failed):  # perhaps it was only the others that left too little
            wait([other for _, _, other in self._queue])
            result = self._pool.submit(self._work, item, True).result()
        self._bytes -= size
        return item, result

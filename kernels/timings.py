"""Seconds by stage, added up."""

import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

Timings = MutableMapping[str, float]


@contextmanager
def stopwatch(timings: Timings, stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the context to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start

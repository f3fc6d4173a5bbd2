"""The machine that the work runs on: its cores and memory, temporary arrays, and how long what took."""

import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import psutil
from numpy.typing import DTypeLike, NDArray

Timings = MutableMapping[str, float]


@contextmanager
def stopwatch(timings: Timings, stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the context to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start


CONTROL_GROUP = Path("/sys/fs/cgroup")  # of the container, as it sees itself


def available_cores() -> int:
    """Return the processors this process may keep busy: those it may run on, less where a container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    quota = _processor_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _processor_quota() -> float | None:
    """Return how many processors' time the container may use; None without a quota."""
    with suppress(OSError, ValueError):  # no container, or one without a quota ("max")
        quota, period = (CONTROL_GROUP / "cpu.max").read_text("utf-8").split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1
        quota, period = (
            (CONTROL_GROUP / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def cache_folder() -> Path:
    """Return the folder of everything that can be fetched or built again: $ZSAD_CACHE, else the user's cache folder."""
    return Path(os.environ.get("ZSAD_CACHE") or platformdirs.user_cache_path("zsad"))


def default_memory_limit() -> int:
    """Return three quarters of the free memory in bytes, as the machine and its container see it."""
    free = psutil.virtual_memory().available
    limit, usage = (CONTROL_GROUP / name for name in ("memory.max", "memory.current"))
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        free = min(free, int(limit.read_text()) - int(usage.read_text()))
    return int(0.75 * max(free, 0))


def default_disk_limit() -> int:
    """Return the bytes that temporary files may take: what is free on their disk, less a tenth."""
    return int(0.9 * shutil.disk_usage(tempfile.gettempdir()).free)


@contextmanager
def scratch(shape: tuple[int, ...], in_memory: bool, dtype: DTypeLike = np.float32) -> Iterator[NDArray[Any]]:
    """Yield an array of any content, in memory or in a memory-mapped temporary file; raises OSError on a full disk."""
    if in_memory:
        yield np.empty(shape, dtype)
        return
    with tempfile.TemporaryFile(prefix="zsad-") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS; a full disk is an error now, not a bus error at a page
            os.posix_fallocate(file.fileno(), 0, np.dtype(dtype).itemsize * math.prod(shape))
        yield np.memmap(file, dtype, "w+", shape=shape)


def peak_memory() -> int:
    """Return the most bytes of host memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere

"""The machine that the work runs on: its cores and memory, its cache, temporary arrays, and how long what took."""

import atexit
import ctypes
import errno
import importlib.metadata
import logging
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import psutil
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger("zsad")

Timings = MutableMapping[str, float]


@cache  # finding it takes milliseconds
def zsad_version() -> str:
    """Return the version of zsad that is installed."""
    return importlib.metadata.version("zsad")


@contextmanager
def stopwatch(timings: Timings, stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the context to a stage, less those that stages within it are given."""
    start, before = time.perf_counter(), sum(timings.values())
    try:
        yield
    finally:
        within = sum(timings.values()) - before
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start - within


CONTROL_GROUP = Path("/sys/fs/cgroup")  # of the container, as it sees itself
PROCESSORS = Path("/proc/cpuinfo")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


_most_cores: list[int] = []  # what `use_cores` has said


def available_cores() -> int:
    """Return the processors this process may keep busy: those it may run on, less where a container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    quota = _processor_quota(CONTROL_GROUP)
    return min([cores if quota is None else max(1, min(cores, math.ceil(quota))), *_most_cores])


def use_cores(most: int) -> None:
    """Hold this process to so many processors from now on; others have the rest of the machine."""
    _most_cores[:] = [most]


@cache  # a search of few vectors takes little longer than reading these files
def _processor_quota(control_group: Path) -> float | None:
    """Return how many processors' time the container may use; None without a quota."""
    with suppress(OSError, ValueError):  # no container, or one without a quota ("max")
        quota, period = (control_group / "cpu.max").read_text("utf-8").split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1
        quota, period = (
            (control_group / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def processor(fact: str = "model name") -> str:
    """Return what the system says of the first processor: its name, or on Linux another fact, such as its flags."""
    with suppress(OSError, StopIteration):
        lines = PROCESSORS.read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == fact)
    return (platform.processor() or platform.machine()) if fact == "model name" else ""


def cache_folder() -> Path:
    """Return the folder of everything that can be fetched or built again: $ZSAD_CACHE, else the user's cache folder."""
    return Path(os.environ.get("ZSAD_CACHE") or platformdirs.user_cache_path("zsad"))


class CacheError(Exception):
    """The cache cannot be written; the message says why and how to mend it."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(
            f"the cache {cache_folder()} cannot be written ({reason.strerror}); "
            "set ZSAD_CACHE to a folder that can be: export ZSAD_CACHE=/path/to/folder"
        )
        self.read_only = reason.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


_stand_ins: dict[Path, Path] = {}  # cache that cannot be written → temporary folder of this process


def cache_places(kind: str) -> list[Path]:
    """Return the folders to look for a kind of file in: those there are of the cache and of what stands in for it."""
    cache = cache_folder()
    places = [folder / kind for folder in (cache, _stand_ins.get(cache)) if folder is not None]
    return [place for place in places if os.access(place, os.R_OK | os.X_OK)]


def cache_to_write(kind: str, keep: bool = False) -> Path:
    """Return the folder, which is there, that files of a kind are to be written into.

    keep: they are of no use but in the cache. Otherwise a temporary folder, which goes when the process ends, stands in
    for a cache that may only be read. Raises CacheError.
    """
    cache = cache_folder()
    try:
        _check_writable(cache / kind)
        return cache / kind
    except OSError as error:
        problem = CacheError(error)
    if keep or not problem.read_only:
        raise problem
    if cache not in _stand_ins:
        _stand_ins[cache] = Path(tempfile.mkdtemp(prefix="zsad-cache-"))
        atexit.register(shutil.rmtree, _stand_ins[cache], ignore_errors=True)
        log.warning("what is built now goes into a temporary folder that is removed at the end, because %s", problem)
    folder = _stand_ins[cache] / kind
    folder.mkdir(exist_ok=True)
    return folder


def _check_writable(folder: Path) -> None:
    """Make sure of a folder and that files can be made in it; raises OSError."""
    if not folder.is_absolute() and not os.environ.get("ZSAD_CACHE"):
        raise OSError(errno.EACCES, "there is no home folder")
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise OSError(errno.ENOTDIR, f"{part} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # modes and mounts do not tell: trying does
        pass


def default_memory_limit() -> int:
    """Return three quarters of the free memory in bytes, as the machine, its container and `ulimit -v` see it."""
    free = psutil.virtual_memory().available
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free = min(free, address_space - psutil.Process().memory_info().vms)
    limit, usage = (CONTROL_GROUP / name for name in ("memory.max", "memory.current"))
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        free = min(free, int(limit.read_text()) - int(usage.read_text()))
    return int(0.75 * max(free, 0))


def default_disk_limit() -> int:
    """Return the bytes that temporary files may take: what is free on their disk, less a tenth."""
    return int(0.9 * shutil.disk_usage(tempfile.gettempdir()).free)


def tell_allocator(option: int, value: int) -> None:
    """Call the C library's mallopt, where it has one."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(option, value)


def return_memory_at_once() -> None:
    """From now on give arrays of 1 MB and more back to the system as soon as nothing holds them.

    glibc keeps what has been freed for the thread that has freed it, up to twice the largest array.
    """
    tell_allocator(M_MMAP_THRESHOLD, 2**20)


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
    with suppress(OSError, IndexError):  # of Linux; what it tells otherwise begins with who started the process
        return 1024 * int(Path("/proc/self/status").read_text(errors="replace").split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere

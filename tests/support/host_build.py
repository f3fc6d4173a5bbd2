"""Builds the CUDA sources as host libraries and runs their kernels: the device that the tests without a GPU use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.cuda import device as cuda_device
from zsad.kernels.cuda.card import Card

COMPILER = shutil.which("g++")
MISSING_COMPILER = "g++ is not installed: the CUDA sources cannot be compiled for the host"
OPTIONS: tuple[str, ...] = ("-std=c++17", "-O1", "-DZSAD_HOST", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
OPTIONS += ("-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
LAUNCHING = threading.Lock()  # the emulation runs one block at a time, whichever thread asks
CACHE = Path(__file__).resolve().parents[2] / "build" / "host"  # which git ignores
WARPGROUPS = ("__CUDA_ARCH_FEAT_SM90_ALL=1",)  # what compilers define for sm_90a: products by wgmma
FENCE = 64  # entries around every array that a kernel sees
ALIGNMENT = 512  # bytes: as CuPy's memory pool gives them


class KernelError(RuntimeError):
    """The emulation refused what a kernel did."""


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint32),
        ("error", ctypes.c_char * 256),
    )


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


@functools.cache
def standard_headers() -> Path:
    """Precompile what the emulation includes, most of a small source's compile time; return the header to include."""
    header = (cuda_device.FOLDER / "host/cuda_host.h").read_text("utf-8")
    text = "\n".join(re.findall(r"^#include <.*>$", header, re.MULTILINE)) + "\n"
    folder = CACHE / f"headers-{digest(text, *OPTIONS)}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "standard.h"
    if not (folder / "standard.h.gch").exists():
        path.write_text(text, "utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "standard.h.gch"
            subprocess.run([str(COMPILER), *OPTIONS, "-x", "c++-header", "-o", str(built), str(path)], check=True)
            built.replace(folder / built.name)
    return path


def build(source: str, folder: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile one source text as a host library, or load it when the same text was compiled before.

    folder: holds the headers.
    """
    kernels = cuda_device.kernels_of(source)
    kernels += [
        cuda_device.filter_max_kernel(int(mask), name == "ZSAD_NEAR_MASK")
        for name, mask in (define.split("=") for define in defines)
        if name.endswith("MASK")
    ]
    entries = "".join(
        f"ZSAD_ENTRY launch_{kernel}(zsad_host::Launch* how, void** arguments) {{ "
        f"return zsad_host::launch({kernel}, how, arguments); }}\n"
        for kernel in kernels
    )
    text = f"{source}\n{entries}"
    headers = [path.read_text("utf-8") for path in (*sorted(folder.glob("*.h")), folder / "host/cuda_host.h")]
    key = digest(text, *headers, *OPTIONS, *defines)
    cache = CACHE / f"kernels-{key}.so"
    if not cache.exists():
        assert COMPILER, MISSING_COMPILER
        standard = standard_headers()
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            built = Path(scratch) / "kernels.so"
            options = [*OPTIONS, *(f"-D{define}" for define in defines), f"-I{folder}", "-include", str(standard)]
            command = [COMPILER, *options, "-shared", "-x", "c++", "-o", str(built), "-"]
            done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ could not compile a CUDA source for the host:\n{done.stderr}")
            built.replace(cache)
    return ctypes.CDLL(str(cache))


@functools.cache
def library(name: str, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build one of the repository's CUDA sources."""
    return build(cuda_device.sources(name)[f"{name}.cu"], cuda_device.FOLDER, defines)


def poison(dtype: Any) -> Any:
    """Return a value that shows wherever it is read: infinity survives sums, maxima and a weight of zero."""
    return np.inf if np.issubdtype(dtype, np.floating) else np.array(0x7B7B7B7B).astype(dtype)


def fenced(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Allocate a poisoned array inside a poisoned fence."""
    count, dtype = int(np.prod(shape)), np.dtype(dtype)
    raw = bytearray((count + 2 * FENCE) * dtype.itemsize + ALIGNMENT)
    start = -(np.frombuffer(raw, np.uint8).ctypes.data + FENCE * dtype.itemsize) % ALIGNMENT
    memory = np.frombuffer(raw, dtype, count + 2 * FENCE, start)
    memory.fill(poison(dtype))
    return memory[FENCE : FENCE + count].reshape(shape)


def copied(array: NDArray[Any]) -> NDArray[Any]:
    """Copy an array into a fence."""
    inside = fenced(array.shape, array.dtype)
    inside[...] = array
    return inside


def check_fence(array: NDArray[Any]) -> None:
    """Raise KernelError where something was written around an array made by `fenced`."""
    memory = array
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    if (memory[:FENCE] != poison(memory.dtype)).any() or (memory[-FENCE:] != poison(memory.dtype)).any():
        raise KernelError(f"written outside an array of shape {array.shape}")


def run(
    built: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int],
    threads: int,
    arguments: Sequence[Any],
    shared_bytes: int = 0,
    seed: int = 0,
) -> None:
    """Run a kernel on the host; the arguments are those of Device.launch."""
    how = Launch((*grid, 1), (threads, 1, 1), shared_bytes, seed)
    values = []
    for argument in arguments:
        if argument is None:
            values.append(np.array([0], np.uint64))
        elif isinstance(argument, np.ndarray):
            values.append(np.array([argument.ctypes.data], np.uint64))
        else:
            assert isinstance(argument, np.generic), f"{argument!r} has no C type"
            values.append(np.array([argument]))
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    if getattr(built, f"launch_{kernel}")(ctypes.byref(how), pointers):
        raise KernelError(f"{kernel}: {how.error.decode()}")
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            check_fence(argument)


def probes(parameters: str, *bodies: str, threads: int, defines: Sequence[str] = ()) -> list[Callable[..., None]]:
    """Build small kernels, all at once, for the tests of the emulation itself; each is launched as one block."""
    kernels = [f"probe{number}" for number in range(len(bodies))]
    source = '#include "device.h"\n' + "".join(
        f"ZSAD_KERNEL(1024, 1)\n{kernel}({parameters}) {{\n{body}\n}}\n"
        for kernel, body in zip(kernels, bodies, strict=True)
    )
    built = build(source, cuda_device.FOLDER, defines)

    def launch(kernel: str, *arguments: Any, shared_bytes: int = 0) -> None:
        run(built, kernel, (1, 1), threads, arguments, shared_bytes)

    return [functools.partial(launch, kernel) for kernel in kernels]


class Recording(threading.local):
    """The work that is kept instead of run while this thread records; other emulated libraries look here too."""

    work: list[Callable[[], None]] | None = None


RECORDING = Recording()


def placed(array: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """Return what finds an array again by its address, as a recorded launch does, unless its memory was freed."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    memory, offset = weakref.ref(owner), array.ctypes.data - owner.ctypes.data
    shape, dtype, strides = array.shape, array.dtype, array.strides

    def there() -> NDArray[Any]:
        alive = memory()
        if alive is None:
            raise KernelError(f"a recorded launch uses an array of shape {shape} that was freed")
        return np.ndarray(shape, dtype, alive.data, offset, strides)

    return there


class HostDevice:
    """A device on the host: NumPy arrays, the CUDA sources as host code, products by NumPy."""

    kind, number, name = "cpu", 0, "the host"
    stream = 0
    failures = (KernelError,)

    def __init__(self, cache_bytes: int = 1, free: int = 1 << 30) -> None:
        self.card, self.free = Card("8.9", 3, cache_bytes, 100 << 10), free
        self.filled: dict[Hashable, bool] = defaultdict(bool)  # workspaces, and whether they hold unread products
        self.waited: list[Hashable] = []
        self.products = self.launches = self.recordings = self.captures = self.replays = 0
        self.refusal: Exception | None = None  # of `capture`
        self.allocated: list[int] = []  # bytes of every array
        self.fail_at: set[int] = set()  # allocations that fail, counted from 0
        self.fetching: dict[int, Sequence[tuple[NDArray[Any], NDArray[Any]]]] = {}  # [slot]
        self.sending: dict[int, list[tuple[NDArray[Any], NDArray[Any]]]] = {}  # [slot]

    def free_bytes(self) -> int:
        return self.free

    def adopt(self, array: Any) -> NDArray[Any]:
        return copied(np.asarray(array))

    def used_bytes(self) -> int:
        return sum(self.allocated)

    def use(self) -> None:
        pass

    def _queue(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do some work, or keep it while this thread records."""
        if RECORDING.work is None:
            work(*arguments)
            return
        places = [placed(a) if isinstance(a, np.ndarray) else partial(lambda value: value, a) for a in arguments]
        RECORDING.work.append(lambda: work(*(place() for place in places)))

    def _not_recorded(self) -> None:
        """What waits, allocates, or copies from and to the host has no place in a recording."""
        assert RECORDING.work is None, "this cannot be recorded"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        self._not_recorded()
        array = fenced(shape, dtype)
        self.allocated.append(array.nbytes)
        if len(self.allocated) - 1 in self.fail_at:
            raise cuda_device.DeviceMemoryError(f"no {array.nbytes} bytes left")
        return array

    def host_empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.full(shape, poison(dtype), dtype)

    def to_device(self, array: NDArray[Any]) -> NDArray[Any]:
        self._not_recorded()
        return copied(array)

    def fill(self, array: NDArray[Any], value: int) -> None:
        self._queue(np.ndarray.fill, array, value)

    def upload(self, array: NDArray[Any], out: NDArray[Any]) -> None:
        self._not_recorded()
        assert array.shape == out.shape
        np.copyto(out, array, casting="no")

    def to_host(self, array: NDArray[Any]) -> NDArray[Any]:
        self._not_recorded()
        return array.copy()

    def download(self, array: NDArray[Any], out: NDArray[Any]) -> None:
        self._not_recorded()
        assert array.shape == out.shape
        assert out.flags.c_contiguous
        np.copyto(out, array, casting="no")

    def copy(self, source: NDArray[Any], out: NDArray[Any]) -> None:
        assert source.shape == out.shape
        self._queue(partial(np.copyto, casting="no"), out, source)

    def record(self, queue: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        queue()
        return self._capture(queue)

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        if self.refusal is not None:  # the real device notices in the middle, and runs nothing either
            self._capture(queue)
            raise self.refusal
        self.captures += 1
        return self._capture(queue)

    def _capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        self._not_recorded()
        outside, self.filled = self.filled, defaultdict(bool)
        RECORDING.work = recorded = []
        try:
            queue()
            assert not any(self.filled.values()), "a recording ends with a product that no pass has joined"
            slots = list(self.filled)
        finally:
            RECORDING.work, self.filled = None, outside

        def replay() -> None:
            self._not_recorded()
            assert not any(self.filled[slot] for slot in slots), "a workspace is overwritten before it was read"
            self.replays += 1
            for work in recorded:
                work()

        return replay

    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        self._queue(self._launch, kernel, grid, threads, shared_bytes, *arguments)

    def _launch(self, kernel: str, grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: Any) -> None:
        name, defines = cuda_device.build_of(kernel)
        self.launches += 1
        if name in ("fused", "tiled"):
            self.products += grid[1]
        with LAUNCHING:
            run(library(name, defines), kernel, grid, threads, arguments, shared_bytes, seed=self.launches)

    def product(self, column: NDArray[Any], rows: NDArray[Any], grams: NDArray[Any]) -> None:
        self._queue(self._product, column, rows, grams)

    def _product(self, column: NDArray[Any], rows: NDArray[Any], grams: NDArray[Any]) -> None:
        self.products += len(rows)
        patches = len(column)
        grams[..., :patches] = poison(grams.dtype)
        grams[: len(rows), :, :patches] = rows.astype(np.float32) @ column.astype(np.float32).T

    @contextmanager
    def producing(self, slot: Hashable) -> Iterator[None]:
        assert not self.filled[slot], "a workspace is overwritten before it was read"
        yield
        self.filled[slot] = True

    @contextmanager
    def consuming(self, slot: Hashable) -> Iterator[None]:
        assert self.filled[slot], "a workspace is read before it was written"
        try:
            yield
        finally:
            self.filled[slot] = False

    def wait(self, slot: Hashable) -> None:
        self._not_recorded()
        self.waited.append(slot)

    # A copy lands as late as it may: fetched images when somebody waits for them, sent ones when all is waited for or
    # their slot is compared again.

    def fetch(self, slot: int, copies: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        self._not_recorded()
        assert slot not in self.fetching, "fetched images are overwritten before they were compared"
        for array, out in copies:
            assert array.shape == out.shape
            assert array.flags.c_contiguous
            assert out.flags.c_contiguous
            out[...] = poison(out.dtype)
        self.fetching[slot] = copies

    @contextmanager
    def comparing(self, slot: int) -> Iterator[None]:
        self._not_recorded()
        self._send(slot)
        for array, out in self.fetching.pop(slot):
            np.copyto(out, array, casting="no")
        yield

    def send(self, slot: int, array: NDArray[Any], out: NDArray[Any]) -> None:
        assert array.shape == out.shape
        assert out.flags.c_contiguous
        self._not_recorded()
        self.sending.setdefault(slot, []).append((array, out))

    def _send(self, slot: int) -> None:
        for array, out in self.sending.pop(slot, []):
            np.copyto(out, array, casting="no")

    def follow(self) -> None:
        pass

    def synchronise(self) -> None:
        self._not_recorded()
        for slot in list(self.sending):
            self._send(slot)

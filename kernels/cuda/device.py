"""The CUDA device as the kernels' Python side sees it: arrays, launches, products, copies and streams, all by CuPy.

CuPy is imported when a device is opened. Kernels come from the fatbins of an installation that asked for such, else
NVRTC compiles them on first use into the user's cache, keyed by sources, options, compiler and architecture.
"""

import hashlib
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.files import find_sealed, write_sealed
from zsad.kernels.machine import cache_places, cache_to_write

from .card import Card

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17", "--ptxas-options=-O3", "--device-as-default-execution-space")  # the last for lambdas
DEVICE_ARRAY = Any  # a cupy.ndarray
MAX_SHARED_BYTES = 99 << 10  # that a block may have on compute capabilities 8.6, 8.9 and 12.0; others have more
STAGED_UPLOADS = 2  # on their way before the host waits for the first of them; each keeps its page-locked memory
OUT_OF_MEMORY = {"CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}  # [CuPy's error] -> its status


class DeviceError(ValueError):
    """There is no usable CUDA device; the message says what brings one."""


class DeviceMemoryError(MemoryError):
    """A device, or the driver's page-locked memory, has less memory than was asked for."""


class Device(Protocol):
    """What the data flow needs from a device; tests run it on the host."""

    kind: str  # cuda
    number: int
    name: str
    card: Card
    stream: int  # handle of the stream of the passes
    failures: tuple[type[Exception], ...]  # errors of the device's own libraries, after which it is not usable

    def __hash__(self) -> int:
        """Devices are keys of caches."""

    def use(self) -> None:
        """Make it the calling thread's device."""

    def free_bytes(self) -> int:
        """Return the memory that may still be taken."""

    def used_bytes(self) -> int:
        """Return the memory in use by everybody."""

    def adopt(self, array: Any) -> DEVICE_ARRAY:
        """Take another library's array on this device, once the default stream has completed it; packed rows."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DEVICE_ARRAY:
        """Allocate an array with any content; raises DeviceMemoryError."""

    def host_empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Allocate page-locked host memory, which `fetch` and `send` copy at the bus's speed; DeviceMemoryError."""

    def to_device(self, array: NDArray[Any]) -> DEVICE_ARRAY:
        """Copy a small host array."""

    def fill(self, array: DEVICE_ARRAY, value: int) -> None:
        """Queue setting every entry."""

    def upload(self, array: NDArray[Any], out: DEVICE_ARRAY) -> None:
        """Copy a host array into `out` (of the same shape), which work already queued may still be reading."""

    def to_host(self, array: DEVICE_ARRAY) -> NDArray[Any]:
        """Wait for the passes and copy back."""

    def download(self, array: DEVICE_ARRAY, out: NDArray[Any]) -> None:
        """Wait for the passes and copy into a contiguous host array."""

    def copy(self, source: DEVICE_ARRAY, out: DEVICE_ARRAY) -> None:
        """Queue a copy between arrays on the device, of the same shape."""

    def record(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Queue some work now and return what queues the same work again at once, as `capture` does."""

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Take down what `queue` queues, without running any of it, and return what queues it at once (a CUDA graph).

        Every time it has the addresses and scalars of now. `queue` may launch, fill, copy on the device, produce and
        consume; what it sets up lazily must be there already. Raises one of `failures` or DeviceMemoryError where the
        libraries refuse to be taken down; then nothing was queued.
        """

    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Queue a kernel; arguments are device arrays, NumPy scalars of the kernel's types, or None for a null."""

    def product(self, column: DEVICE_ARRAY, rows: DEVICE_ARRAY, grams: DEVICE_ARRAY) -> None:
        """Queue grams[t, q, p] = rows[t, q] · column[p], fp16 in, fp32 sums; p beyond P is left alone.

        column: [P, C], rows: [T, Q, C], grams: [>= T, Q, stride].
        """

    def producing(self, slot: Hashable) -> Any:
        """Context: what is queued in it runs beside the passes, once workspace `slot` has been consumed.

        Whoever has workspaces of its own names them so that nobody else's have the same names.
        """

    def consuming(self, slot: Hashable) -> Any:
        """Context: what is queued in it waits until workspace `slot` has been produced."""

    def wait(self, slot: Hashable) -> None:
        """Wait until workspace `slot`, if it ever was, has been produced."""

    def fetch(self, slot: int, copies: Sequence[tuple[NDArray[Any], DEVICE_ARRAY]]) -> None:
        """Queue copying contiguous host arrays to the device beside products and passes.

        The copies wait for what was last queued in `comparing(slot)` and for its `send`.
        """

    def comparing(self, slot: int) -> Any:
        """Context: what is queued in it waits for the last `fetch(slot)`."""

    def send(self, slot: int, array: DEVICE_ARRAY, out: NDArray[Any]) -> None:
        """Queue copying to a contiguous host array what was last queued in `comparing(slot)`; `synchronise` waits."""

    def synchronise(self) -> None:
        """Wait for everything queued."""

    def follow(self) -> None:
        """Let what is queued from now on wait for the caller's current stream."""


def address(array: Any) -> int:
    """Return where an array on the device starts."""
    interface: dict[str, Any] = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return int(interface["data"][0])


def int32(*values: int) -> tuple[np.int32, ...]:
    """Give kernel arguments their C type."""
    return tuple(np.int32(value) for value in values)


def filter_max_kernel(mask: int, near: bool = False) -> str:
    """Name the filter-and-max kernel of a choice of degrees: bit k stands for degree 2k + 1; near: with a window."""
    return f"filter_max_near_{mask}" if near else f"filter_max_{mask}"


def kernels_of(source: str) -> list[str]:
    """Name the kernels that a source text defines, for filter_max those of the degrees that it does not wait for."""
    masks = re.findall(r"^ZSAD_FILTER_MAX\((\d+)\)", source, re.MULTILINE)
    return re.findall(r"^ZSAD_KERNEL\(.*\)\s(\w+)\(", source, re.MULTILINE) + [filter_max_kernel(int(m)) for m in masks]


@cache
def _source_files() -> dict[str, str]:
    """Return the name of every kernel's source file."""
    return {kernel: path.stem for path in FOLDER.glob("*.cu") for kernel in kernels_of(path.read_text("utf-8"))}


def build_of(kernel: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of a kernel's source file and what must be defined for it; raises KeyError for no kernel."""
    name, _, mask = kernel.rpartition("_")
    if name == "filter_max" and kernel not in _source_files():  # degrees that are compiled when first asked for
        return name, (f"ZSAD_MASK={mask}",)
    if name == "filter_max_near":
        return "filter_max", (f"ZSAD_NEAR_MASK={mask}",)
    return _source_files()[kernel], ()


def sources(name: str) -> dict[str, str]:
    """Return the texts that a kernel file is made of, by file name: its own, then the headers."""
    texts: dict[str, str] = {}
    waiting = [f"{name}.cu"]
    while waiting:
        file = waiting.pop()
        texts[file] = (FOLDER / file).read_text("utf-8")
        waiting += re.findall(r'^#include "(\w+\.h)"', texts[file], re.MULTILINE)
    return texts


def prebuilt(name: str) -> Path | None:
    """Return the fatbin that was built from exactly these sources, if the installation has one."""
    fatbin, sums = FOLDER / f"{name}.fatbin", FOLDER / f"{name}.sha256"
    if not fatbin.exists() or not sums.exists():
        return None
    recorded = sums.read_text("utf-8").split()
    current = [hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() for file in sources(name)]
    return fatbin if all(digest in recorded for digest in current) else None


def architecture(capability: str) -> str:
    """Name what kernels are compiled for on a compute capability (`89`): on 90 with what only that one has, wgmma."""
    return f"sm_{capability}a" if capability == "90" else f"sm_{capability}"


def compile_cubin(name: str, architecture: str, defines: tuple[str, ...] = ()) -> Path:
    """Compile one kernel file for an architecture (`sm_89`) unless the cache has it; return the cubin's path."""
    from cupy.cuda import nvrtc

    texts = sources(name)
    options = (*OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{define}" for define in defines))
    parts = [*texts.values(), *options, str(nvrtc.getVersion()), "whole"]  # earlier versions lack their last byte
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    file = f"{name}-{architecture}-{key}.cubin"
    for folder in cache_places("kernels"):
        if (known := find_sealed(folder / file)) is not None:
            return known
    source, *headers = texts
    contents, names = [texts[header].encode() for header in headers], [header.encode() for header in headers]
    program = nvrtc.createProgram(texts[source], source, contents, names)
    try:
        nvrtc.compileProgram(program, options)
        cubin = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(
            f"NVRTC could not compile {name}.cu for {architecture} ({error}):\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return write_sealed(cache_to_write("kernels") / file, whole_elf(cubin))


def whole_elf(cubin: bytes) -> bytes:
    """Return a cubin with the byte that CuPy takes for a terminating NUL and drops: ELF files end at 8 bytes."""
    return cubin + bytes(-len(cubin) % 8)


Method = TypeVar("Method", bound=Callable[..., Any])


def _names_exhaustion(method: Method) -> Method:
    """Turn the ways in which CuPy, CUDA and cuBLAS report exhausted memory into DeviceMemoryError."""

    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return method(*arguments, **keywords)
        except Exception as error:
            status = getattr(error, "status", None)
            if isinstance(error, MemoryError) or OUT_OF_MEMORY.get(type(error).__name__, "none") == status:
                raise DeviceMemoryError(str(error)) from error
            raise

    return cast(Method, call)


class CupyDevice:
    """A CUDA device; products run on one stream and everything else on another."""

    kind = "cuda"

    def __init__(self, number: int = 0) -> None:
        try:
            import cupy
            from cupy.cuda import cublas
            from cupy.cuda.device import get_cublas_handle
        except ImportError as error:
            raise DeviceError(
                f"CuPy or the CUDA libraries are not installed ({error}); in a new environment run: "
                "pip install 'zsad[gpu]' (in a clone of zsad '.[gpu]')"
            ) from error
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            needed = {12: 525, 13: 580}.get(cupy.cuda.runtime.runtimeGetVersion() // 1000, 525)
            raise DeviceError(
                f"CuPy finds no CUDA device ({error}); check nvidia-smi: the driver must be {needed} or newer"
            ) from error
        if not 0 <= number < count:
            raise DeviceError(f"device 'cuda:{number}' does not exist; there are {count}, numbered from 0")
        self._cupy, self._cublas, self._cublas_handle = cupy, cublas, get_cublas_handle
        self.number, self.count = number, int(count)  # count: devices of this machine
        runtime, driver = cupy.cuda.runtime, cupy.cuda.driver
        self.failures: tuple[type[Exception], ...] = (
            runtime.CUDARuntimeError,
            driver.CUDADriverError,
            cublas.CUBLASError,
        )
        self._device = cupy.cuda.Device(number)
        self._device.use()
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = str(properties["name"].decode())
        self.card = Card(
            f"{properties['major']}.{properties['minor']}",
            int(properties["multiProcessorCount"]),
            int(properties["l2CacheSize"]),
            int(properties["sharedMemPerMultiprocessor"]),
        )
        self._architecture = architecture(self._device.compute_capability)
        self._passes, self._products, self._copies = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self._queue = self._passes  # where launches and copies go
        self.stream = int(self._passes.ptr)
        self._event: Callable[[], Any] = partial(cupy.cuda.Event, disable_timing=True)
        self._produced: dict[Hashable, Any] = defaultdict(self._event)  # by workspace
        self._consumed: dict[Hashable, Any] = defaultdict(self._event)
        self._begun = self._event()  # of a recording; outside of one it never comes and nobody waits for it
        self._fetched = [self._event() for _ in range(2)]
        self._compared = [self._event() for _ in range(2)]
        self._staged: deque[tuple[Any, Any]] = deque()  # events of uploads and their pinned sources, alive until then
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._functions: dict[str, Any] = {}
        self._shared_bytes: dict[str, int] = {}  # that a kernel may ask for; reading it is a call of the driver

    def use(self) -> None:
        self._device.use()

    def free_bytes(self) -> int:
        with self._device:  # both are asked of the calling thread's device
            free, _ = self._cupy.cuda.runtime.memGetInfo()
            return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    def used_bytes(self) -> int:
        with self._device:
            free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(total) - int(free)

    def adopt(self, array: Any) -> DEVICE_ARRAY:
        with self._cupy.cuda.Stream.null as default:
            packed = self._cupy.ascontiguousarray(self._cupy.asarray(array))
            default.synchronize()
        return packed

    @_names_exhaustion
    def empty(self, shape: tuple[int, ...], dtype: Any) -> DEVICE_ARRAY:
        return self._cupy.empty(shape, dtype)

    @_names_exhaustion
    def host_empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        # Not from the pool of `upload`, which would keep it locked after the call.
        cuda, size = self._cupy.cuda, math.prod(shape)
        pinned = cuda.PinnedMemoryPointer(cuda.PinnedMemory(size * np.dtype(dtype).itemsize), 0)
        return np.frombuffer(pinned, dtype, size).reshape(shape)

    @_names_exhaustion
    def to_device(self, array: NDArray[Any]) -> DEVICE_ARRAY:
        with self._queue:
            return self._cupy.asarray(array)

    def fill(self, array: DEVICE_ARRAY, value: int) -> None:
        with self._queue:
            array.fill(value)

    @_names_exhaustion
    def upload(self, array: NDArray[Any], out: DEVICE_ARRAY) -> None:
        # Pinned memory copies at the bus's speed and lets the host prepare the next images meanwhile.
        pinned = self._cupy.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(pinned, array.dtype, array.size).reshape(array.shape)
        np.copyto(host, array)
        while self._staged and (self._staged[0][0].done or len(self._staged) >= STAGED_UPLOADS):
            self._staged.popleft()[0].synchronize()
        with self._queue:
            out.set(host, stream=self._queue)
            done = self._cupy.cuda.Event(disable_timing=True)
            done.record()
        self._staged.append((done, pinned))

    def to_host(self, array: DEVICE_ARRAY) -> NDArray[Any]:
        self._passes.synchronize()
        result: NDArray[Any] = self._cupy.asnumpy(array, stream=self._passes)
        return result

    def download(self, array: DEVICE_ARRAY, out: NDArray[Any]) -> None:
        self._copy_to_host(array, out, self._passes)
        self._passes.synchronize()

    def _copy_to_host(self, array: DEVICE_ARRAY, out: NDArray[Any], stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(out.ctypes.data, array.data.ptr, out.nbytes, runtime.memcpyDeviceToHost, stream.ptr)

    def copy(self, source: DEVICE_ARRAY, out: DEVICE_ARRAY) -> None:
        with self._queue:
            out[...] = source

    def record(self, queue: Callable[[], None]) -> Callable[[], None]:
        queue()  # what is set up lazily must not fall into the recording
        self._passes.synchronize()
        return self.capture(queue)

    @_names_exhaustion
    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        outside = self._begun, self._produced, self._consumed
        # Nothing may wait for events from outside; the stream of the products joins where it waits for the first one.
        self._begun, self._produced, self._consumed = self._event(), defaultdict(self._event), defaultdict(self._event)
        try:
            graph, slots = self._captured(queue), tuple(self._consumed)
        finally:
            self._begun, self._produced, self._consumed = outside

        def replay() -> None:
            graph.launch(self._passes)
            for slot in slots:
                self._consumed[slot].record(self._passes)

        return replay

    def _captured(self, queue: Callable[[], None]) -> Any:
        with self._passes:
            self._passes.begin_capture()
            try:
                self._begun.record(self._passes)
                queue()
            except BaseException:
                with suppress(self._cupy.cuda.runtime.CUDARuntimeError):  # of the recording, which is of no use now
                    self._passes.end_capture()
                raise
            return self._passes.end_capture()

    @_names_exhaustion
    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        function = self._functions.get(kernel) or self._load(kernel)
        if shared_bytes > self._shared_bytes[kernel]:
            self._shared_bytes[kernel] = function.max_dynamic_shared_size_bytes = shared_bytes
        with self._queue:
            pointers = tuple(np.uintp(0) if argument is None else argument for argument in arguments)
            function(grid, (threads,), pointers, shared_mem=shared_bytes)

    @_names_exhaustion
    def product(self, column: DEVICE_ARRAY, rows: DEVICE_ARRAY, grams: DEVICE_ARRAY) -> None:
        cublas, half, single = self._cublas, self._cupy.cuda.runtime.CUDA_R_16F, self._cupy.cuda.runtime.CUDA_R_32F
        (patches, channels), stride = column.shape, grams.shape[-1]
        # cuBLAS counts columns first: the row-major [T·Q, stride] workspace is its [stride, T·Q].
        cublas.gemmEx(
            self._cublas_handle(),
            cublas.CUBLAS_OP_T,
            cublas.CUBLAS_OP_N,
            patches,
            rows.shape[0] * rows.shape[1],
            channels,
            self._one.ctypes.data,
            column.data.ptr,
            half,
            channels,
            rows.data.ptr,
            half,
            channels,
            self._zero.ctypes.data,
            grams.data.ptr,
            single,
            stride,
            cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )

    @contextmanager
    def producing(self, slot: Hashable) -> Iterator[None]:
        self._products.wait_event(self._consumed.get(slot, self._begun))
        self._queue = self._products
        try:
            with self._products:
                yield
        finally:
            self._queue = self._passes
        self._produced[slot].record(self._products)

    @contextmanager
    def consuming(self, slot: Hashable) -> Iterator[None]:
        self._passes.wait_event(self._produced[slot])
        try:
            yield
        finally:
            self._consumed[slot].record(self._passes)

    def wait(self, slot: Hashable) -> None:
        self._produced[slot].synchronize()

    def fetch(self, slot: int, copies: Sequence[tuple[NDArray[Any], DEVICE_ARRAY]]) -> None:
        runtime = self._cupy.cuda.runtime
        self._copies.wait_event(self._compared[slot])
        for array, out in copies:
            source, kind = array.ctypes.data, runtime.memcpyHostToDevice
            runtime.memcpyAsync(out.data.ptr, source, array.nbytes, kind, self._copies.ptr)
        self._fetched[slot].record(self._copies)

    @contextmanager
    def comparing(self, slot: int) -> Iterator[None]:
        for stream in (self._products, self._passes):
            stream.wait_event(self._fetched[slot])
        yield
        # Every product is followed by its pass, so that the passes are what ends last.
        self._compared[slot].record(self._passes)

    def send(self, slot: int, array: DEVICE_ARRAY, out: NDArray[Any]) -> None:
        self._copies.wait_event(self._compared[slot])
        self._copy_to_host(array, out, self._copies)

    def follow(self) -> None:
        self.use()  # events are the calling thread's device's
        done = self._cupy.cuda.Event(disable_timing=True)
        done.record()
        self._passes.wait_event(done)

    def synchronise(self) -> None:
        for stream in (self._passes, self._products, self._copies):
            stream.synchronize()

    def _load(self, kernel: str) -> Any:
        name, defines = build_of(kernel)
        fatbin = None if defines else prebuilt(name)
        function = None
        if fatbin is not None:
            # A driver older than the nvcc that built it refuses the module or, where it loads lazily, the kernel.
            with suppress(self._cupy.cuda.driver.CUDADriverError):
                function = self._cupy.RawModule(path=str(fatbin)).get_function(kernel)
        if function is None:
            cubin = compile_cubin(name, self._architecture, defines)
            function = self._cupy.RawModule(path=str(cubin)).get_function(kernel)
        self._functions[kernel], self._shared_bytes[kernel] = function, function.max_dynamic_shared_size_bytes
        return function


@cache
def _opened(number: int) -> CupyDevice:
    return CupyDevice(number)


def open_devices(name: str) -> list[CupyDevice]:
    """Open `cuda`, `cuda:<number>`, several as `cuda:<number>,<number>`, or `cuda:all`; kernels stay loaded.

    The first becomes the calling thread's device. Raises DeviceError for a bad name or a device that is not there.
    """
    kind, _, numbers = name.partition(":")
    parts = (numbers or "0").split(",")
    if kind != "cuda" or not (numbers == "all" or all(part.isdecimal() for part in parts)):
        raise DeviceError(f"device {name!r} is not 'cuda', 'cuda:<number>', 'cuda:<number>,<number>' or 'cuda:all'")
    wanted = list(range(_opened(0).count)) if numbers == "all" else [int(part) for part in parts]
    if len(set(wanted)) < len(wanted):
        raise DeviceError(f"device {name!r} names a device twice")
    devices = [_opened(number) for number in wanted]
    devices[0].use()
    return devices


def open_device(name: str) -> CupyDevice:
    """Make `cuda` or `cuda:<number>` the calling thread's device; its kernels stay loaded for the next call."""
    devices = open_devices(name)
    if len(devices) > 1:
        raise DeviceError(f"device {name!r} is several, where one is needed; use 'cuda' or 'cuda:<number>'")
    return devices[0]

"""The CUDA device as the kernels' Python side sees it: arrays, launches, products and two streams, all by CuPy.

CuPy is imported when a device is opened. Kernels come from the fatbins of an installation that had nvcc, otherwise
NVRTC compiles them on first use into the user's cache, keyed by sources, options, compiler and architecture.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17", "--ptxas-options=-O3")
BUILT_IN_MASKS = (0b1, 0b11, 0b111)  # the choices of degrees that filter_max.cu compiles without being asked
DEVICE_ARRAY = Any  # a cupy.ndarray

# [kernel] -> its source file
KERNELS = {
    "layer_norm_sums_f32": "layer_norm",
    "layer_norm_sums_f16": "layer_norm",
    "layer_norm_apply_f32": "layer_norm",
    "layer_norm_apply_f16": "layer_norm",
    "pooled_norms": "pooled_norms",
    "interval_average": "interval_average",
    "upsample": "upsample",
    "resize": "resize_normalise",
    "resize_normalise": "resize_normalise",
}


class DeviceError(ValueError):
    """There is no usable CUDA device; the message says what brings one."""


class Device(Protocol):
    """What the data flow needs from a device; tests run it on the host."""

    multiprocessors: int
    cache_bytes: int  # L2

    def free_bytes(self) -> int:
        """Return the memory that may still be taken."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DEVICE_ARRAY:
        """Allocate an array with any content."""

    def to_device(self, array: NDArray[Any]) -> DEVICE_ARRAY:
        """Copy a small host array."""

    def fill(self, array: DEVICE_ARRAY, value: int) -> None:
        """Queue setting every entry."""

    def upload(self, array: NDArray[Any], out: DEVICE_ARRAY) -> None:
        """Copy a host array into `out` (of the same shape), which work already queued may still be reading."""

    def to_host(self, array: DEVICE_ARRAY) -> NDArray[Any]:
        """Wait for the passes and copy back."""

    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Queue a kernel; arguments are device arrays, NumPy scalars of the kernel's types, or None for a null."""

    def product(self, column: DEVICE_ARRAY, rows: DEVICE_ARRAY, tiles: DEVICE_ARRAY) -> None:
        """Queue tiles[t, p, q] = rows[t, p] · column[q], fp16 in, fp32 sums; q beyond P is left alone.

        column: [P, C], rows: [T, P, C], tiles: [>= T, P, stride].
        """

    def producing(self, slot: int) -> Any:
        """Context: what is queued in it waits until workspace `slot` has been consumed."""

    def consuming(self, slot: int) -> Any:
        """Context: what is queued in it waits until workspace `slot` has been produced."""

    def synchronise(self) -> None:
        """Wait for everything queued."""

    def follow(self) -> None:
        """Let what is queued from now on wait for the caller's current stream."""


def int32(*values: int) -> tuple[np.int32, ...]:
    """Give kernel arguments their C type."""
    return tuple(np.int32(value) for value in values)


def filter_max_kernel(mask: int) -> str:
    """Name the filter-and-max kernel of a choice of degrees: bit k stands for degree 2k + 1."""
    return f"filter_max_{mask}"


def sources(name: str) -> dict[str, str]:
    """Return the texts that a kernel file is made of, by file name."""
    return {file: (FOLDER / file).read_text("utf-8") for file in (f"{name}.cu", "device.h")}


def prebuilt(name: str) -> Path | None:
    """Return the fatbin that was built from exactly these sources, if the installation has one."""
    fatbin, sums = FOLDER / f"{name}.fatbin", FOLDER / f"{name}.sha256"
    if not fatbin.exists() or not sums.exists():
        return None
    recorded = sums.read_text("utf-8").split()
    current = [hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() for file in sources(name)]
    return fatbin if all(digest in recorded for digest in current) else None


def cache_folder() -> Path:
    """Return the folder of compiled kernels; ZSAD_KERNEL_CACHE names another one."""
    import platformdirs

    return Path(os.environ.get("ZSAD_KERNEL_CACHE") or platformdirs.user_cache_path("zsad") / "kernels")


def compile_cubin(name: str, architecture: str, defines: tuple[str, ...] = ()) -> Path:
    """Compile one kernel file for an architecture (`sm_89`) unless the cache has it; return the cubin's path."""
    from cupy.cuda import nvrtc

    texts = sources(name)
    options = (*OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{define}" for define in defines))
    parts = [*texts.values(), *options, str(nvrtc.getVersion())]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = cache_folder() / f"{name}-{architecture}-{key}.cubin"
    if path.exists():
        return path
    program = nvrtc.createProgram(texts[f"{name}.cu"], f"{name}.cu", [texts["device.h"].encode()], [b"device.h"])
    try:
        nvrtc.compileProgram(program, options)
        cubin = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(
            f"NVRTC could not compile {name}.cu for {architecture} ({error}):\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    Path(file.name).replace(path)  # another process may be writing the same
    return path


class CupyDevice:
    """A CUDA device; products run on one stream and everything else on another."""

    def __init__(self, number: int = 0) -> None:
        try:
            import cupy
            from cupy.cuda import cublas
            from cupy.cuda.device import get_cublas_handle
        except ImportError as error:
            raise DeviceError(
                f"device 'cuda' needs CuPy and the CUDA libraries ({error}); install those for your driver: "
                "pip install 'cupy-cuda12x[ctk]' (or 'cupy-cuda13x[ctk]'), or use device='cpu'"
            ) from error
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"CuPy finds no CUDA device ({error}); check nvidia-smi, or use device='cpu'") from error
        if not 0 <= number < count:
            raise DeviceError(f"device 'cuda:{number}' does not exist; there are {count}, numbered from 0")
        self._cupy, self._cublas, self._cublas_handle = cupy, cublas, get_cublas_handle
        self._device = cupy.cuda.Device(number)
        self._device.use()
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = str(properties["name"].decode())
        self.multiprocessors = int(properties["multiProcessorCount"])
        self.cache_bytes = int(properties["l2CacheSize"])
        self._architecture = f"sm_{self._device.compute_capability}"
        self._passes, self._products = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        self._produced = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._consumed = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._staged: Any = None  # the last upload's event and its pinned source, alive until it is done
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._functions: dict[str, Any] = {}

    def use(self) -> None:
        self._device.use()

    def free_bytes(self) -> int:
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DEVICE_ARRAY:
        return self._cupy.empty(shape, dtype)

    def to_device(self, array: NDArray[Any]) -> DEVICE_ARRAY:
        with self._passes:
            return self._cupy.asarray(array)

    def fill(self, array: DEVICE_ARRAY, value: int) -> None:
        with self._passes:
            array.fill(value)

    def upload(self, array: NDArray[Any], out: DEVICE_ARRAY) -> None:
        # Pinned memory copies at the bus's speed and lets the host prepare the next block meanwhile.
        pinned = self._cupy.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(pinned, array.dtype, array.size).reshape(array.shape)
        np.copyto(host, array)
        if self._staged is not None:
            self._staged[0].synchronize()
        with self._passes:
            out.set(host, stream=self._passes)
            done = self._cupy.cuda.Event(disable_timing=True)
            done.record()
        self._staged = (done, pinned)

    def to_host(self, array: DEVICE_ARRAY) -> NDArray[Any]:
        self._passes.synchronize()
        result: NDArray[Any] = self._cupy.asnumpy(array, stream=self._passes)
        return result

    def launch(
        self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        function = self._functions.get(kernel) or self._load(kernel)
        if shared_bytes > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        with self._passes:
            pointers = tuple(np.uintp(0) if argument is None else argument for argument in arguments)
            function(grid, (threads,), pointers, shared_mem=shared_bytes)

    def product(self, column: DEVICE_ARRAY, rows: DEVICE_ARRAY, tiles: DEVICE_ARRAY) -> None:
        cublas, half, single = self._cublas, self._cupy.cuda.runtime.CUDA_R_16F, self._cupy.cuda.runtime.CUDA_R_32F
        (patches, channels), stride = column.shape, tiles.shape[-1]
        # cuBLAS counts columns first: the row-major [T·P, stride] workspace is its [stride, T·P].
        cublas.gemmEx(
            self._cublas_handle(),
            cublas.CUBLAS_OP_T,
            cublas.CUBLAS_OP_N,
            patches,
            len(rows) * patches,
            channels,
            self._one.ctypes.data,
            column.data.ptr,
            half,
            channels,
            rows.data.ptr,
            half,
            channels,
            self._zero.ctypes.data,
            tiles.data.ptr,
            single,
            stride,
            cublas.CUBLAS_COMPUTE_32F,
            cublas.CUBLAS_GEMM_DEFAULT,
        )

    @contextmanager
    def producing(self, slot: int) -> Iterator[None]:
        self._products.wait_event(self._consumed[slot])
        with self._products:
            yield
        self._produced[slot].record(self._products)

    @contextmanager
    def consuming(self, slot: int) -> Iterator[None]:
        self._passes.wait_event(self._produced[slot])
        yield
        self._consumed[slot].record(self._passes)

    def follow(self) -> None:
        done = self._cupy.cuda.Event(disable_timing=True)
        done.record()
        self._passes.wait_event(done)

    def synchronise(self) -> None:
        self._passes.synchronize()
        self._products.synchronize()

    def _load(self, kernel: str) -> Any:
        name = KERNELS.get(kernel, "filter_max")
        defines: tuple[str, ...] = ()
        if name == "filter_max" and int(kernel.rpartition("_")[2]) not in BUILT_IN_MASKS:
            defines = (f"ZSAD_MASK={kernel.rpartition('_')[2]}",)
        fatbin = None if defines else prebuilt(name)
        module = None
        if fatbin is not None:
            try:
                module = self._cupy.RawModule(path=str(fatbin))
                module.compile()
            except self._cupy.cuda.driver.CUDADriverError:  # a driver older than the nvcc that built it
                module = None
        if module is None:
            module = self._cupy.RawModule(path=str(compile_cubin(name, self._architecture, defines)))
        self._functions[kernel] = module.get_function(kernel)
        return self._functions[kernel]


@cache
def _opened(number: int) -> CupyDevice:
    return CupyDevice(number)


def open_device(name: str) -> CupyDevice:
    """Make `cuda` or `cuda:<number>` the calling thread's device; its kernels stay loaded for the next call."""
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise DeviceError(f"device {name!r} is not 'cuda' or 'cuda:<number>'")
    device = _opened(int(number or "0"))
    device.use()
    return device

"""TensorRT's engine and context on the host: the device that tests without a GPU use runs them."""

import ctypes
import math
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from host_build import RECORDING
from numpy.typing import NDArray

from zsad.export.libraries import import_onnxruntime
from zsad.export.tensorrt_engine import LoadedEngine

# ONNX Runtime's types → TensorRT's and NumPy's.
TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int32)": ("INT32", np.int32),
}

ALIGNMENT = 256  # bytes, of addresses


def loaded(engine: "HostEngine", rtx: bool = False) -> LoadedEngine:
    """Give an engine the library, TensorRT or TensorRT-RTX, and the logger that it comes with."""
    library = types.SimpleNamespace(
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
        TensorIOMode=types.SimpleNamespace(INPUT="input"),
    )
    if rtx:
        library.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
    return LoadedEngine(engine, library, None, types.SimpleNamespace(said=lambda: "no reason given"))


class HostEngine:
    """An ICudaEngine on the host: ONNX Runtime behind the calls that TensorRT has, addresses in host memory."""

    def __init__(self, onnx: Path, most: int) -> None:
        ort = import_onnxruntime()
        self.session, self.most = ort.InferenceSession(str(onnx), providers=["CPUExecutionProvider"]), most
        self.tensors = {tensor.name: tensor for tensor in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.num_io_tensors = len(self.tensors)
        self.refuses_context = False
        self.runs: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        first, *others = self.tensors[name].shape
        return (first if isinstance(first, int) else -1, *others)

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{TYPES[self.tensors[name].type][0]}"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name in self.inputs
        assert profile == 0
        first, *others = self.get_tensor_shape(name)
        return [(count if first < 0 else first, *others) for count in (1, self.most, self.most)]

    def create_runtime_config(self) -> "HostRuntimeConfig":
        return HostRuntimeConfig()

    def create_execution_context(self, how: "str | HostRuntimeConfig") -> "HostContext | None":
        settings = how if isinstance(how, HostRuntimeConfig) else None
        assert (settings.strategy if settings else how) == "user managed"
        return None if self.refuses_context else HostContext(self, settings and settings.cache)


class HostRuntimeConfig:
    """TensorRT-RTX's IRuntimeConfig."""

    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def __init__(self) -> None:
        self.strategy, self.cache = "static", None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "HostRuntimeCache":
        return HostRuntimeCache()

    def set_runtime_cache(self, cache: "HostRuntimeCache") -> bool:
        assert self.dynamic_shapes_kernel_specialization_strategy == "eager"
        self.cache = cache
        return True


class HostRuntimeCache:
    """TensorRT-RTX's IRuntimeCache: knows which batch sizes it holds kernels for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.compiled: list[int] = []  # by this process

    def serialize(self) -> memoryview:
        return memoryview(b"kernels " + bytes(self.sizes))

    def deserialize(self, blob: bytes) -> bool:
        start, found, sizes = blob.partition(b"kernels ")
        if start or not found:
            return False
        self.sizes = list(sizes)
        return True

    def _compile(self, size: int) -> None:
        if size not in self.sizes:
            self.sizes.append(size)
            self.compiled.append(size)


class HostContext:
    """An IExecutionContext on the host."""

    def __init__(self, engine: HostEngine, kernels: HostRuntimeCache | None) -> None:
        self.engine, self.addresses, self.kernels = engine, dict[str, int](), kernels
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.fails, self.capturable, self.laid_out_for = False, True, 0
        self.changes = 0  # of shapes, each of which ends what was recorded before

    @property
    def _rows(self) -> int:
        """Of the batch."""
        return next(self.shapes[name][0] for name in self.shapes if self.engine.get_tensor_shape(name)[0] < 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        first, *others = self.engine.get_tensor_shape(name)
        assert name in self.engine.inputs
        assert shape == (shape[0] if first < 0 else first, *others)
        if not 1 <= shape[0] <= max(self.engine.most, first):
            return False
        self.shapes[name] = shape
        self.changes += 1
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1024 * self._rows

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        assert size >= 1024 * self._rows
        self.laid_out_for = self._rows

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % ALIGNMENT:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        rows = self._rows
        assert self.laid_out_for == rows
        if self.fails:
            return False
        if self.kernels is not None:
            assert RECORDING.work is None or rows in self.kernels.sizes  # compiling is nothing to record
            self.kernels._compile(rows)
        work = partial(self._execute, dict(self.addresses), dict(self.shapes), rows, self.changes)
        if RECORDING.work is not None:  # what is replayed later knows nothing of what the context is told until then
            RECORDING.work.append(work)
        else:
            work()
        return True

    def _execute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], rows: int, changes: int) -> None:
        engine = self.engine
        assert changes == self.changes, "replayed after its context's shapes were set again"
        engine.runs.append(rows)

        def memory(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
            dtype = np.dtype(TYPES[engine.tensors[name].type][1])
            size = math.prod(shape) * dtype.itemsize
            content = (ctypes.c_char * size).from_address(addresses[name])
            return np.frombuffer(content, dtype).reshape(shape)

        outputs = engine.session.run(None, {name: memory(name, shape).copy() for name, shape in shapes.items()})
        for tensor, value in zip(engine.session.get_outputs(), outputs, strict=True):
            memory(tensor.name, value.shape)[...] = value

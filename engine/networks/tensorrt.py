"""Graphs on TensorRT and TensorRT-RTX engines: one execution context on the device's stream."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from zsad.export.libraries import EngineError
from zsad.export.tensorrt_engine import load_engine
from zsad.kernels.cuda.device import Device, address
from zsad.kernels.files import written_whole

from .network import TensorSpec, batch_rows

log = logging.getLogger("zsad")

Array = Any  # an array on the device

SEAL = hashlib.sha256().digest_size  # bytes of the digest in front of what is kept

RECORDINGS = 128  # CUDA graphs that are kept of an engine; inputs that lie elsewhere every time make ever more

TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


class CompiledKernels:
    """What TensorRT-RTX compiles at run time, for this GPU and for the batches that it meets; kept beside the engine.

    Unless told otherwise it runs a new batch size with slow general kernels and compiles fitting ones meanwhile. A CUDA
    graph recorded then would hold the slow ones for good, and tokens would depend on when the others came.
    """

    def __init__(self, settings: Any, library: Any, engine: Path) -> None:
        """settings: of the context to be made (an IRuntimeConfig)."""
        settings.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        self._path, self._kept, self._sizes = engine.with_name(engine.name + ".kernels"), b"", set[int]()
        self._cache = settings.create_runtime_cache()
        with suppress(OSError):
            seal, content = (stored := self._path.read_bytes())[:SEAL], stored[SEAL:]
            if hashlib.sha256(content).digest() != seal:
                log.warning("%s: damaged, it is made anew", self._path)
            elif self._cache.deserialize(content):  # not if another GPU, driver or version has made it
                self._kept = content
        settings.set_runtime_cache(self._cache)

    def keep(self, batch: int) -> None:
        """Write down what a batch of this size has added."""
        if batch in self._sizes:
            return
        self._sizes.add(batch)
        content = bytes(self._cache.serialize())
        if content != self._kept:
            self._kept = content
            with suppress(OSError), written_whole(self._path) as temporary:  # else they are compiled again
                temporary.write_bytes(hashlib.sha256(content).digest() + content)


class TensorRTGraph:
    """An engine with one context and fixed outputs (see `Graph`).

    Full batches are replayed as a CUDA graph: a ViT-L is several hundred launches, more than the host queues in the
    time that a fast GPU takes for them.
    """

    def __init__(self, path: Path, onnx: Path, device: Device, batch_size: int) -> None:
        """onnx: the graph that the engine was built from.

        Raises EngineError for an engine that is not for this machine, MemoryError where one row does not fit.
        """
        self._loaded, self._path, self._device = load_engine(path, device.number, onnx), path, device
        engine, library = self._loaded.engine, self._loaded.library
        # Its working memory is ours: as much as our batches need, not the largest one that the engine was built for.
        ours = library.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels: CompiledKernels | None = None
        if hasattr(library, "DynamicShapesKernelSpecializationStrategy"):
            settings = engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(ours)
            self._kernels = CompiledKernels(settings, library, path)
            self._context = engine.create_execution_context(settings)
        else:
            self._context = engine.create_execution_context(ours)
        if self._context is None:
            raise EngineError(f"{path}: {self._loaded.log.said()}; see nvidia-smi for what else uses the GPU")
        specs = {name: _spec(engine, name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}
        is_input = {name: engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in specs}
        self.inputs = {name: spec for name, spec in specs.items() if is_input[name]}
        self.outputs = {name: spec for name, spec in specs.items() if not is_input[name]}
        profiles = [engine.get_tensor_profile_shape(name, 0) for name, spec in self.inputs.items() if spec.batched]
        self.largest_batch = min(batch_size, *(int(largest[0]) for _, _, largest in profiles))
        while True:
            try:
                self._allocate()
                break
            except MemoryError as error:
                if self.largest_batch == 1:
                    raise
                self.largest_batch //= 2
                log.warning("%s (%s); going on with batches of %d", path.name, error, self.largest_batch)
        self._full = self.largest_batch
        self._recorded: dict[tuple[int, ...], Callable[[], None]] = {}  # addresses of a full batch → its CUDA graph

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See Graph.run."""
        where = tuple(address(inputs[name]) for name in self.inputs)
        rows = batch_rows(self.inputs, inputs)

        def queue() -> None:
            for name, array in {**inputs, **self._buffers}.items():
                self._context.set_tensor_address(name, address(array))
            if not self._context.execute_async_v3(self._device.stream):
                raise EngineError(f"{self._path}: the engine failed: {self._loaded.log.said()}")

        if rows == self._full and where in self._recorded:
            self._recorded[where]()
        else:
            self._set_batch(rows)
            if rows < self._full or len(self._recorded) == RECORDINGS or not self._recordable():
                queue()
            else:  # the loader alternates between two inputs, so of an image tower there are two recordings
                self._recorded[where] = self._device.record(queue)
            if self._kernels is not None:
                self._kernels.keep(rows)
        return {name: buffer[:rows] for name, buffer in self._buffers.items()}

    def _recordable(self) -> bool:
        # TensorRT-RTX may want to allocate while it runs, which cannot be recorded.
        return self._kernels is None or bool(self._context.is_stream_capturable(self._device.stream))

    def _allocate(self) -> None:
        """Make room for the largest batch; raises MemoryError."""
        self._buffers = {
            name: self._device.empty((self.largest_batch, *spec.shape), spec.dtype)
            for name, spec in self.outputs.items()
        }
        self._set_shapes(self.largest_batch)
        self._workspace = self._device.empty((self._context.update_device_memory_size_for_shapes(),), np.uint8)

    def _set_batch(self, rows: int) -> None:
        """Lay the working memory out for a batch; smaller ones need no more than the largest."""
        self._set_shapes(rows)
        self._context.update_device_memory_size_for_shapes()
        self._context.set_device_memory(address(self._workspace), self._workspace.nbytes)

    def _set_shapes(self, rows: int) -> None:
        for name, spec in self.inputs.items():
            self._context.set_input_shape(name, spec.whole(rows))


def _spec(engine: Any, name: str) -> TensorSpec:
    """Describe an engine's input or output, which is dynamic in the batch at most."""
    shape = tuple(map(int, engine.get_tensor_shape(name)))
    batched = shape[0] < 0
    dtype = np.dtype(TYPES[str(engine.get_tensor_dtype(name)).rpartition(".")[2]])
    return TensorSpec(shape[batched:], dtype, batched)

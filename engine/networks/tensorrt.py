"""Graphs on TensorRT and TensorRT-RTX engines, on the device's stream."""

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
    """An engine with inputs and outputs of its own (see `Graph`).

    Inputs are copied to where the engine reads them: TensorRT takes addresses at multiples of 256 bytes alone, which
    parts of a batch do not have, and a copy costs a thousandth of a ViT-L's pass.

    Full batches are replayed as a CUDA graph: a ViT-L is several hundred launches, more than the host queues in the
    time that a fast GPU takes for them. They have a context to themselves, since a recording does not outlast a change
    of its context's shapes.
    """

    def __init__(self, path: Path, onnx: Path, device: Device, batch_size: int) -> None:
        """onnx: the graph that the engine was built from.

        Raises EngineError for an engine that is not for this machine, MemoryError where one row does not fit.
        """
        self._loaded, self._path, self._device = load_engine(path, device.number, onnx), path, device
        engine, library = self._loaded.engine, self._loaded.library
        self._kernels: CompiledKernels | None = None
        # Its working memory is ours: as much as our batches need, not the largest one that the engine was built for,
        # and one for both contexts, which follow each other on one stream.
        self._context_settings = ours = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(library, "DynamicShapesKernelSpecializationStrategy"):
            self._context_settings = engine.create_runtime_config()
            self._context_settings.set_execution_context_allocation_strategy(ours)
            self._kernels = CompiledKernels(self._context_settings, library, path)
        self._full = self._context()
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
        self._full_rows = self.largest_batch
        self._lay_out(self._full, self._full_rows)
        self._replay: Callable[[], None] | None = None  # a full batch, once it is recorded
        self._part: Any = None  # the context of all other batches, made when the first one comes

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See Graph.run."""
        rows = batch_rows(self.inputs, inputs)
        for name, array in inputs.items():
            self._device.copy(array, self._buffers[name][: len(array)])
        if rows < self._full_rows:
            self._part = self._part or self._context()
            self._lay_out(self._part, rows)
            self._queue(self._part)
        elif self._replay is not None:
            self._replay()
        elif self._kernels is not None and not self._full.is_stream_capturable(self._device.stream):
            self._queue(self._full)  # TensorRT-RTX wants to allocate while it runs, which cannot be recorded
        else:
            self._replay = self._device.record(lambda: self._queue(self._full))
        if self._kernels is not None:
            self._kernels.keep(rows)
        return {name: self._buffers[name][:rows] for name in self.outputs}

    def _context(self) -> Any:
        context = self._loaded.engine.create_execution_context(self._context_settings)
        if context is None:
            raise self._error("see nvidia-smi for what else uses the GPU")
        return context

    def _allocate(self) -> None:
        """Make room for the largest batch; raises MemoryError."""
        specs = {**self.inputs, **self.outputs}
        self._buffers = {
            name: self._device.empty(spec.whole(self.largest_batch), spec.dtype) for name, spec in specs.items()
        }
        self._workspace = self._device.empty((self._workspace_bytes(self._full, self.largest_batch),), np.uint8)

    def _lay_out(self, context: Any, rows: int) -> None:
        """Tell a context where it works; smaller batches need no more memory than the largest."""
        self._workspace_bytes(context, rows)
        context.set_device_memory(address(self._workspace), self._workspace.nbytes)
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, address(buffer)):
                raise self._error(f"the engine refuses the address of {name}")

    def _workspace_bytes(self, context: Any, rows: int) -> int:
        """Set the batch of a context; returns the working memory that it takes."""
        for name, spec in self.inputs.items():
            if not context.set_input_shape(name, spec.whole(rows)):
                raise self._error(f"the engine refuses the shape {spec.whole(rows)} of {name}")
        size = int(context.update_device_memory_size_for_shapes())
        if size == 0:
            raise self._error(f"the engine cannot lay its memory out for a batch of {rows}")
        return size

    def _queue(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise self._error("the engine failed")

    def _error(self, what: str) -> EngineError:
        return EngineError(f"{self._path}: {what}: {self._loaded.log.said()}")


def _spec(engine: Any, name: str) -> TensorSpec:
    """Describe an engine's input or output, which is dynamic in the batch at most."""
    shape = tuple(map(int, engine.get_tensor_shape(name)))
    batched = shape[0] < 0
    dtype = np.dtype(TYPES[str(engine.get_tensor_dtype(name)).rpartition(".")[2]])
    return TensorSpec(shape[batched:], dtype, batched)

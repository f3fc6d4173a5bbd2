"""Backbones on TensorRT and TensorRT-RTX engines: one execution context on the device's stream."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from zsad.export.onnx_export import ExportedModel
from zsad.export.tensorrt_engine import EngineError, load_engine
from zsad.kernels.cuda.device import Device, address
from zsad.kernels.files import written_whole

log = logging.getLogger("zsad")

Array = Any  # an array on the device


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
            content = self._path.read_bytes()
            if self._cache.deserialize(content):  # not if another GPU, driver or version has made it
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
                temporary.write_bytes(content)


class TensorRTBackbone:
    """An engine with one context and fixed outputs (see `Backbone`).

    Full batches are replayed as a CUDA graph: a ViT-L is several hundred launches, more than the host queues in the
    time that a fast GPU takes for them.
    """

    def __init__(self, path: Path, model: ExportedModel, device: Device, batch_size: int) -> None:
        """Raises EngineError for an engine that is not for this machine, MemoryError where one image does not fit."""
        self._loaded, self._device = load_engine(path, device.number, model.path), device
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
        self.checkpoint, self.sha256 = model.checkpoint, model.sha256
        _, self.layers, patches, self.channels = (int(n) for n in engine.get_tensor_shape("tokens"))
        side = round(patches**0.5)
        assert side * side == patches
        self.grid = side, side
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.token_type = self._type("tokens")
        self.embedding_width = int(engine.get_tensor_shape("embedding")[1]) if "embedding" in names else None
        # The profile is dynamic in the batch alone.
        _, _, (most, *self._image_shape) = engine.get_tensor_profile_shape("images", 0)
        self.largest_batch = min(batch_size, int(most))
        while True:
            try:
                self._allocate([name for name in names if name != "images"])
                break
            except MemoryError as error:
                if self.largest_batch == 1:
                    raise
                self.largest_batch //= 2
                log.warning("%s (%s); going on with batches of %d", model.checkpoint, error, self.largest_batch)
        self._full = self.largest_batch
        self._recorded: dict[int, Callable[[], None]] = {}  # address of a full batch → its CUDA graph

    def run(self, images: Array) -> tuple[Array, Array | None]:
        """See Backbone.run."""
        where = address(images)

        def queue() -> None:
            for name, array in {"images": images, **self._outputs}.items():
                self._context.set_tensor_address(name, address(array))
            if not self._context.execute_async_v3(self._device.stream):
                raise EngineError(f"{self.checkpoint}: its engine failed: {self._loaded.log.said()}")

        if len(images) == self._full and where in self._recorded:
            self._recorded[where]()
        else:
            self._set_batch(len(images))
            if len(images) < self._full or not self._recordable():
                queue()
            else:  # the pipeline alternates between two inputs, so there are two recordings
                self._recorded[where] = self._device.record(queue)
            if self._kernels is not None:
                self._kernels.keep(len(images))
        embedding = self._outputs.get("embedding")
        return self._outputs["tokens"][: len(images)], None if embedding is None else embedding[: len(images)]

    def _recordable(self) -> bool:
        # TensorRT-RTX may want to allocate while it runs, which cannot be recorded.
        return self._kernels is None or bool(self._context.is_stream_capturable(self._device.stream))

    def _type(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float16 if "HALF" in str(self._loaded.engine.get_tensor_dtype(name)) else np.float32)

    def _allocate(self, outputs: Sequence[str]) -> None:
        """Make room for the largest batch; raises MemoryError."""
        shapes = {name: self._loaded.engine.get_tensor_shape(name)[1:] for name in outputs}
        self._outputs = {
            name: self._device.empty((self.largest_batch, *shape), self._type(name)) for name, shape in shapes.items()
        }
        self._context.set_input_shape("images", (self.largest_batch, *self._image_shape))
        self._workspace = self._device.empty((self._context.update_device_memory_size_for_shapes(),), np.uint8)

    def _set_batch(self, size: int) -> None:
        """Lay the working memory out for a batch; smaller ones need no more than the largest."""
        self._context.set_input_shape("images", (size, *self._image_shape))
        self._context.update_device_memory_size_for_shapes()
        self._context.set_device_memory(address(self._workspace), self._workspace.nbytes)

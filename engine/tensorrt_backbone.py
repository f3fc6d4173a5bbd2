"""Backbones on TensorRT and TensorRT-RTX engines: one execution context on the device's stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zsad.export.onnx_export import ExportedModel
from zsad.export.tensorrt_engine import EngineError, load_engine
from zsad.kernels.cuda.device import Device, address

Array = Any  # an array on the device


class TensorRTBackbone:
    """An engine with one context and fixed outputs (see `Backbone`).

    Full batches are replayed as a CUDA graph: a ViT-L is several hundred launches, more than the host queues in the
    time that a fast GPU takes for them.
    """

    def __init__(self, path: Path, model: ExportedModel, device: Device, batch_size: int) -> None:
        """Raises EngineError for an engine that is not for this machine, MemoryError where the device is full."""
        self._engine, self._log = load_engine(path, device.number, model.path)
        # The profile is dynamic in the batch alone.
        _, _, most = self._engine.get_tensor_profile_shape("images", 0)
        self._full = self.largest_batch = min(batch_size, int(most[0]))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise MemoryError(f"{path}: {self._log.said()}; free memory on the device or build for a smaller --batch")
        self.checkpoint, self.sha256 = model.checkpoint, model.sha256
        _, self.layers, patches, self.channels = (int(n) for n in self._engine.get_tensor_shape("tokens"))
        side = round(patches**0.5)
        assert side * side == patches
        self.grid = side, side
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._device = device
        self._outputs = {
            name: device.empty((self._full, *self._engine.get_tensor_shape(name)[1:]), self._type(name))
            for name in names
            if name != "images"
        }
        self.token_type = self._outputs["tokens"].dtype
        self.embedding_width = self._outputs["embedding"].shape[1] if "embedding" in self._outputs else None
        self._recorded: dict[int, Callable[[], None]] = {}  # address of a full batch → its CUDA graph

    def _type(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float16 if "HALF" in str(self._engine.get_tensor_dtype(name)) else np.float32)

    def run(self, images: Array) -> tuple[Array, Array | None]:
        """See Backbone.run."""
        where = address(images)

        def queue() -> None:
            self._context.set_input_shape("images", tuple(images.shape))
            for name, array in {"images": images, **self._outputs}.items():
                self._context.set_tensor_address(name, address(array))
            if not self._context.execute_async_v3(self._device.stream):
                raise EngineError(f"{self.checkpoint}: its engine failed: {self._log.said()}")

        if len(images) < self._full:
            queue()
        elif where in self._recorded:
            self._recorded[where]()
        else:
            # The pipeline alternates between two inputs, so there are two recordings.
            self._recorded[where] = self._device.record(queue)
        embedding = self._outputs.get("embedding")
        return self._outputs["tokens"][: len(images)], None if embedding is None else embedding[: len(images)]

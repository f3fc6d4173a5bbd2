"""Backbones on ONNX Runtime: on a CPU, and on a CUDA device without copies through the host."""

from typing import Any

import numpy as np

from zsad.engine.config import ConfigError
from zsad.export.libraries import ort
from zsad.export.onnx_export import ExportedModel
from zsad.kernels.cuda.device import Device, address
from zsad.kernels.machine import available_cores

Fail = ort.capi.onnxruntime_pybind11_state.Fail
RuntimeException = ort.capi.onnxruntime_pybind11_state.RuntimeException

Array = Any  # a NumPy array, or an array on the device


class OnnxRuntimeBackbone:
    """A session over one exported graph (see `Backbone`)."""

    def __init__(self, model: ExportedModel, device: Device | None, batch_size: int) -> None:
        """device: None is the CPU. Raises ConfigError where the CUDA provider does not start."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        # Threads that spin between batches would take their core from decoding and from mutual scoring.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
        if device is not None and device.kind == "cuda":
            ort.preload_dlls()  # CUDA's libraries may come from wheels
            # TF32 would cut the factors of fp32 products to 10 bits.
            cuda = {
                "device_id": str(device.number),
                "user_compute_stream": str(device.stream),
                "use_tf32": "0",
            }
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        self.session = ort.InferenceSession(str(model.path), options, providers=providers)
        if len(self.session.get_providers()) < len(providers):  # it only warns and goes on with what is left
            raise ConfigError(
                "ONNX Runtime could not start its CUDA provider; its messages above say why, mostly CUDA or cuDNN of "
                "another version than it was built for; run: pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]', or "
                "use --device cpu"
            )
        self.checkpoint, self.sha256 = model.checkpoint, model.sha256
        tokens, *embedding = self.session.get_outputs()
        _, self.layers, patches, self.channels = tokens.shape
        side = int(self.session.get_modelmeta().custom_metadata_map["grid"])
        assert side * side == patches
        self.grid = side, side
        self.token_type = np.dtype(np.float16 if tokens.type == "tensor(float16)" else np.float32)
        self.largest_batch = batch_size
        self.embedding_width = int(embedding[0].shape[1]) if embedding else None
        self._device, self._outputs = device, {}
        if device is not None:
            self._outputs["tokens"] = device.empty((batch_size, *tokens.shape[1:]), self.token_type)
            if self.embedding_width:
                self._outputs["embedding"] = device.empty((batch_size, self.embedding_width), np.float32)

    def run(self, images: Array) -> tuple[Array, Array | None]:
        """See Backbone.run."""
        try:
            if self._device is not None:
                return self._queue(images, self._device)
            outputs = self.session.run(None, {"images": images})
        except (Fail, RuntimeException) as error:
            if "allocat" in str(error):  # it has no error class of its own for want of memory
                raise MemoryError(str(error)) from error
            raise
        return outputs[0], outputs[1] if self.embedding_width else None

    def _queue(self, images: Array, device: Device) -> tuple[Array, Array | None]:
        binding = self.session.io_binding()
        binding.bind_input("images", device.kind, device.number, np.float32, images.shape, address(images))
        outputs = {name: array[: len(images)] for name, array in self._outputs.items()}
        for name, array in outputs.items():
            binding.bind_output(name, device.kind, device.number, array.dtype, array.shape, address(array))
        how = ort.RunOptions()
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")  # later work waits on the stream
        self.session.run_with_iobinding(binding, how)
        return outputs["tokens"], outputs.get("embedding")

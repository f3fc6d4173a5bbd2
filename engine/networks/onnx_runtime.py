"""Graphs on ONNX Runtime: on a CPU, and on a CUDA device without copies through the host."""

import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zsad.engine.config import ConfigError
from zsad.export.libraries import DRIVERS, gpu_extras, import_onnxruntime, install_command, mixed_cuda
from zsad.kernels.machine import available_cores

from .network import TensorSpec, batch_rows

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

Array = Any  # a NumPy array, or an array on the device

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

# Of ONNX Runtime's own arena, of the allocator beneath it, of CUDA, cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(r"allocat|alloc_failed|bad_alloc|out.of.memory|memory_allocation", re.IGNORECASE)


def session(graph: str | bytes, device: "Device | None", profile: str = "") -> Any:
    """Open a file, or a model in bytes; raises ConfigError where the CUDA provider does not start on the device.

    profile: where the times of all operators are written to, how the file's name begins.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.intra_op_num_threads = available_cores()
    # Between batches spinning threads would take their core from decoding and from mutual scoring.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device is not None and device.kind == "cuda":
        with redirect_stdout(sys.stderr):  # it prints, where results go
            ort.preload_dlls()  # CUDA's libraries may come from wheels
        # TF32 would cut the factors of fp32 products to 10 bits.
        cuda = {"device_id": str(device.number), "user_compute_stream": str(device.stream), "use_tf32": "0"}
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    opened = ort.InferenceSession(graph, options, providers=providers)
    if len(opened.get_providers()) < len(providers):  # it only warns and goes on with what is left
        why = mixed_cuda() or f"mostly CUDA or cuDNN of another version than it was built for ({DRIVERS})"
        raise ConfigError(
            f"ONNX Runtime could not start its CUDA provider; its messages above say why, {why}; run: "
            f"{install_command('--upgrade ' + gpu_extras('gpu'))}, or use --device cpu"
        )
    return opened


def try_provider(device: "Device") -> None:
    """Make sure that networks can run on a device; raises ConfigError."""
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "try", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session(model.SerializeToString(), device)


class OnnxRuntimeGraph:
    """A session over one ONNX file (see `Graph`)."""

    def __init__(self, path: Path, device: "Device | None", batch_size: int) -> None:
        """device: None is the CPU. Raises ConfigError where the CUDA provider does not start."""
        self._ort = import_onnxruntime()
        self._session = session(str(path), device)
        self.inputs = {tensor.name: _spec(tensor) for tensor in self._session.get_inputs()}
        self.outputs = {tensor.name: _spec(tensor) for tensor in self._session.get_outputs()}
        self.largest_batch = batch_size
        self._device = device
        self._buffers: dict[str, Array] = {}  # of the outputs on the device
        if device is not None:
            for name, spec in self.outputs.items():
                self._buffers[name] = device.empty((batch_size, *spec.shape), spec.dtype)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See Graph.run."""
        try:
            if self._device is not None:
                return self._queue(inputs, self._device)
            outputs = self._session.run(None, dict(inputs))
        except Exception as error:  # ONNX Runtime has a dozen kinds with no base of their own
            if OUT_OF_MEMORY.search(str(error)):  # nor one where memory runs out
                raise MemoryError(str(error)) from error
            raise
        return dict(zip(self.outputs, outputs, strict=True))

    def _queue(self, inputs: Mapping[str, Array], device: "Device") -> dict[str, Array]:
        from zsad.kernels.cuda.device import address

        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, device.kind, device.number, array.dtype, array.shape, address(array))
        rows = batch_rows(self.inputs, inputs)
        outputs = {name: buffer[:rows] for name, buffer in self._buffers.items()}
        for name, array in outputs.items():
            binding.bind_output(name, device.kind, device.number, array.dtype, array.shape, address(array))
        how = self._ort.RunOptions()
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")  # later work waits on the stream
        self._session.run_with_iobinding(binding, how)
        return outputs


def _spec(tensor: Any) -> TensorSpec:
    """Describe a session's input or output, which is dynamic in the batch at most."""
    batched = not isinstance(tensor.shape[0], int)
    return TensorSpec(tuple(map(int, tensor.shape[batched:])), np.dtype(TYPES[tensor.type]), batched)

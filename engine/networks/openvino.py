"""Graphs on OpenVINO, on a CPU."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.export.libraries import EngineError, import_openvino
from zsad.kernels.machine import available_cores

from .network import TensorSpec
from .onnx_runtime import OUT_OF_MEMORY

Array = NDArray[Any]

PRECISIONS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}  # of a graph -> what is left of it as it is runs in
GROUP = 32  # channels of a token that share a scale in front of an int8 layer; one for all takes a quarter longer


@cache
def _core() -> Any:
    """Return OpenVINO, which lives as long as the process.

    On processors with AMX it gives the thread that starts it another stack for signals, and takes it back in whichever
    thread lets go of it: the first Ctrl-C in the one that it is taken from would then be a crash.
    """
    return import_openvino().Core()


def compiled(path: Path, precision: str, **settings: object) -> tuple[Any, Any]:
    """Return an ONNX file as OpenVINO reads it, and as it compiles it for this processor.

    precision: fp32, which is fp32 throughout whatever the processor could do instead, int8 or bf16. settings: further
    ones of OpenVINO. Raises EngineError where it is missing or refuses the graph, MemoryError where that does not fit.
    """
    openvino = import_openvino()
    try:
        core = _core()
        read = core.read_model(str(path))
        made = core.compile_model(
            read,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": available_cores(),
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
                "ENABLE_CPU_PINNING": False,  # decoding, scoring and other processes want the same cores
                **settings,
            },
        )
    except RuntimeError as error:
        raise _said(error) or EngineError(
            f"OpenVINO {openvino.__version__} refuses {path.name}: {_first_line(error)}; use --runtime onnxruntime, "
            "or auto, which takes it for such graphs"
        ) from error
    return read, made


class OpenVINOGraph:
    """A compiled ONNX file (see `Graph`)."""

    def __init__(self, path: Path, precision: str, batch_size: int) -> None:
        """See `compiled`."""
        read, model = compiled(path, precision)  # in which outputs have further names, those of what they equal
        self.inputs = {port.get_any_name(): _spec(port) for port in read.inputs}
        self.outputs = {port.get_any_name(): _spec(port) for port in read.outputs}
        self.largest_batch = batch_size
        self._request = model.create_infer_request()

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See Graph.run."""
        try:
            results = self._request.infer(dict(inputs), share_inputs=True)
        except RuntimeError as error:
            raise _said(error) or error from error
        return dict(zip(self.outputs, results.values(), strict=True))


def _spec(port: Any) -> TensorSpec:
    """Describe a model's input or output, which is dynamic in the batch at most."""
    shape = port.get_partial_shape()
    batched = shape[0].is_dynamic
    return TensorSpec(
        tuple(length.get_length() for length in list(shape)[batched:]),
        np.dtype(port.get_element_type().to_dtype()),
        batched,
    )


def _said(error: RuntimeError) -> MemoryError | None:
    """Return an error of OpenVINO as one of memory where it is one."""
    return MemoryError(_first_line(error)) if OUT_OF_MEMORY.search(str(error)) else None


def _first_line(error: Exception) -> str:
    """Return what went wrong: OpenVINO puts lines before it that name its own files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if not line.startswith(("Exception from", "Check "))), lines[0] if lines else ""
    )

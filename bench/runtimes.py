"""The runtimes that a benchmark finds installed, and the rate of products beside which their networks are seen."""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from zsad.engine.config import Config, ConfigError, NetworkPrecision
from zsad.engine.networks.runtime import Runtime, choose_runtime

from .mutual_scoring_cuda import peak_flops

CPU_PRECISIONS: Mapping[str, tuple[NetworkPrecision, ...]] = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "int8", "bf16"),
    "native": ("fp32", "int8"),
}
# Whose rate is the peak on a CPU: a large product, and a linear layer of a ViT-L.
PEAK_SHAPES = ((4096, 4096, 4096), (1370, 1024, 4096))  # rows, depth, columns


def runtimes(device: str) -> Iterator[tuple[str, Runtime, NetworkPrecision]]:
    """Yield every installed way to run a network on the device: name, runtime, precision."""
    if device == "cpu":
        for library, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"), ("native", "native code")):
            for precision in CPU_PRECISIONS[library]:
                try:
                    runtime = choose_runtime("cpu", library)
                    runtime.network_precision(precision)
                    yield f"{name} {precision}", runtime, precision
                except ConfigError as error:
                    print(f"{name} {precision}: not measured ({error})")
        return
    for library, name in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX"), ("onnxruntime", "ONNX Runtime")):
        try:
            runtime = choose_runtime(device, library)
        except ConfigError as error:
            print(f"{name}: not measured ({error})")
            continue
        if runtime.device is None:
            print(f"{name}: not measured ({runtime.reason})")
        else:
            yield f"{name} fp16", runtime, "fp16"


def in_precision(config: Config, precision: NetworkPrecision) -> Config:
    """Return a configuration whose networks run in a precision, and its scoring in the nearest one that it has."""
    settings = config.settings
    if "precision" in type(settings).model_fields:
        settings = settings.model_copy(update={"precision": "int8" if precision == "bf16" else precision})
    return config.model_copy(update={"network_precision": precision, "settings": settings})


def product_peak(runtime: Runtime) -> Callable[[], float]:
    """Return what measures the rate of large products, FLOP/s: fp32 on a CPU, fp16 with fp32 sums on a device."""
    if runtime.devices:
        return lambda: peak_flops(runtime.devices[0], repeats=1)
    rng = np.random.default_rng(0)
    factors = [tuple(rng.standard_normal(side, np.float32) for side in ((m, k), (k, n))) for m, k, n in PEAK_SHAPES]

    def measure() -> float:
        rates = []
        for left, right in factors:
            start = time.perf_counter()
            np.matmul(left, right)
            rates.append(2.0 * left.size * right.shape[1] / (time.perf_counter() - start))
        return float(max(rates))

    return measure

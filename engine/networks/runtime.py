"""A vision transformer ready to run, and the choice among the libraries that can run it.

TensorRT, TensorRT-RTX or ONNX Runtime on a CUDA device, ONNX Runtime on a CPU: one protocol. On a device images, tokens
and embeddings are device arrays, and `run` only queues.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from zsad.engine.config import Config, ConfigError
from zsad.export.agreement import sample_batch
from zsad.export.onnx_export import export_onnx
from zsad.export.tensorrt_engine import (
    RTX_CAPABILITIES,
    EngineError,
    EngineOptions,
    build_engine,
    confirm_engine,
    import_tensorrt,
    rebuild_command,
)
from zsad.kernels.cuda.device import Device, DeviceError, open_devices

from .onnx_runtime import OnnxRuntimeBackbone
from .tensorrt import TensorRTBackbone

log = logging.getLogger("zsad")

Array = Any  # a NumPy array, or an array on the device
Library = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

# The two packages share one folder: what is left of the other must go first.
INSTALL_CUDA_ORT = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"


class Backbone(Protocol):
    """An image tower in some library, on a CPU or on a device."""

    checkpoint: str
    sha256: str  # of the checkpoint file
    grid: tuple[int, int]
    layers: int
    channels: int
    token_type: np.dtype[Any]  # float32 or float16
    embedding_width: int | None  # None where the graph has no image embedding
    largest_batch: int  # falls where memory turns out to be short

    def run(self, images: Array) -> tuple[Array, Array | None]:
        """Return patch tokens [B, L, P, C] and, where exported, image embeddings [B, D] of images [B, 3, S, S].

        B is at most `largest_batch`. On a device the results are valid until the next call. Raises MemoryError where
        the batch does not fit.
        """


@dataclass(frozen=True)
class Runtime:
    """Which library runs the backbones, on what, where scores are computed, and why."""

    library: Library
    devices: Sequence[Device]  # that score; none is the CPU
    device: Device | None  # the one of them that runs the backbones; None is the CPU
    reason: str

    @property
    def device_name(self) -> str:
        """What the backbones run on: cpu or cuda:N."""
        return f"cuda:{self.device.number}" if self.device else "cpu"

    def describe(self) -> str:
        """Name the library with its version and what it runs on."""
        version = ort.__version__ if self.library == "onnxruntime" else import_tensorrt(self.library).__version__
        return f"{self.library} {version} on {self.device.name if self.device else 'the CPU'}"

    def resolve(self, config: Config) -> Config:
        """Put the precisions that `auto` stands for into a configuration; raises ConfigError for impossible ones."""
        backbones = ("fp16", "fp32") if self.device else ("fp32", "int8")
        scoring = ("fp16", "int8") if self.devices else ("fp32", "int8")
        chosen: dict[str, Any] = {}
        for key, option, allowed, on_gpu in (
            ("backbone_precision", "--backbone-precision", backbones, self.device),
            ("precision", "--precision", scoring, self.devices),
        ):
            asked = getattr(config, key)
            if asked not in ("auto", *allowed):
                where = "a GPU" if on_gpu else "a CPU"
                raise ConfigError(f"{option} {asked} is not available on {where}; use {' or '.join(allowed)}")
            chosen[key] = allowed[0] if asked == "auto" else asked
        return replace(config, **chosen)


def choose_runtime(device: str = "auto", library: str = "auto") -> Runtime:
    """Choose the fastest runtime that is installed, within what is asked for.

    device: auto, cpu, cuda:N, or several that share the scoring: cuda:N,M or cuda:all. library: auto, onnxruntime,
    tensorrt or tensorrt-rtx. Raises ConfigError with the command that brings what is missing.
    """
    if library not in ("auto", *get_args(Library)):
        raise ConfigError(f"--runtime must be auto or one of {', '.join(get_args(Library))}, not {library!r}")
    if device == "cpu":
        if library not in ("auto", "onnxruntime"):
            raise ConfigError(f"--runtime {library} needs a GPU; on a CPU use --runtime onnxruntime")
        return Runtime("onnxruntime", (), None, "asked for")
    if device != "auto" and not device.startswith("cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda:N, cuda:N,M or cuda:all, not {device!r}")
    cpu_will_do = device == "auto" and library in ("auto", "onnxruntime")
    if cpu_will_do and importlib.util.find_spec("cupy") is None:
        return Runtime("onnxruntime", (), None, "no GPU is used: CuPy is not installed")
    try:
        devices = open_devices("cuda" if device == "auto" else device)
    except DeviceError as error:
        if cpu_will_do:
            return Runtime("onnxruntime", (), None, f"no GPU is used: {error}")
        raise ConfigError(str(error)) from None

    unusable: dict[str, str] = {}
    for candidate in (library,) if library != "auto" else ("tensorrt", "tensorrt-rtx", "onnxruntime"):
        missing = _missing(candidate, devices[0])
        if missing is None:
            reason = f"{' and '.join(unusable)} cannot be used here" if unusable else "the fastest"
            return Runtime(candidate, devices, devices[0], "asked for" if library != "auto" else reason)  # type: ignore[arg-type]
        unusable[candidate] = missing
        log.debug("%s", missing)
    if library in ("tensorrt", "tensorrt-rtx"):
        raise ConfigError(unusable[library])
    return Runtime(
        "onnxruntime", devices, None, f"only scoring uses the GPU; for the backbones too, run: {INSTALL_CUDA_ORT}"
    )


def _missing(library: str, device: Device) -> str | None:
    """Say why a library cannot run backbones on a device; None where it can."""
    if library == "onnxruntime":
        if "CUDAExecutionProvider" in ort.get_available_providers():
            return None
        return f"the installed ONNX Runtime has no CUDA provider; run: {INSTALL_CUDA_ORT}"
    try:
        import_tensorrt(library)
    except EngineError as error:
        return str(error)
    if library == "tensorrt-rtx" and device.compute_capability not in RTX_CAPABILITIES:
        return (
            f"tensorrt-rtx does not run on compute capability {device.compute_capability} "
            f"(only {', '.join(RTX_CAPABILITIES)})"
        )
    return None


def load_backbone(config: Config, name: str, runtime: Runtime, batch_size: int) -> Backbone:
    """Make one of the configuration's backbones ready: export its graph, build its engine, unless done before.

    config: with its precisions resolved. batch_size: images per call at most, as far as memory allows.
    An engine is compared with its graph the first time that it runs. Raises CheckpointError for weights that cannot be
    had or used, EngineError for engines likewise, ConfigError where the library does not start.
    """
    checkpoint = config.backbones[name].checkpoint
    attention = "fused" if runtime.library == "onnxruntime" else "standard"
    graph = config.export_options(name, config.backbone_precision, attention)
    model = export_onnx(checkpoint, graph)
    if model.built:
        log.info("%s: exported, %s", checkpoint, model.agreement)
    if runtime.library == "onnxruntime":
        return OnnxRuntimeBackbone(model, runtime.device, batch_size)
    assert runtime.device is not None
    options = EngineOptions(runtime.library, device=runtime.device.number)
    command = rebuild_command(checkpoint, graph, options)
    log.info("%s: loading its engine; the first time it is built, which can take minutes", checkpoint)
    engine = build_engine(model.path, graph.image_size, graph.precision, options, command)
    backbone = TensorRTBackbone(engine.path, model, runtime.device, batch_size)
    if not engine.fingerprint.agreement:
        log.info("%s: comparing its engine with its graph on the CPU, this once", checkpoint)
        images = sample_batch(graph.image_size)
        confirm_engine(engine, model.path, _outputs(backbone, images, runtime.device), images)
    return backbone


def _outputs(backbone: Backbone, images: NDArray[np.float32], device: Device) -> list[NDArray[np.float32]]:
    """Return what a backbone on a device gives for images [B, 3, S, S], in host memory."""
    parts = [
        [device.to_host(array).astype(np.float32) for array in arrays if array is not None]
        for _, *arrays in run_in_parts(backbone, device.to_device(images))
    ]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def run_in_parts(backbone: Backbone, images: Array) -> Iterator[tuple[slice, Array, Array | None]]:
    """Run images [B, 3, S, S] in parts that fit; yield which, their tokens and their embeddings.

    A part that does not fit is halved, and later ones stay that small. Raises MemoryError where one image is too much.
    """
    start = 0
    while start < len(images):
        part = slice(start, min(start + backbone.largest_batch, len(images)))
        try:
            tokens, embeddings = backbone.run(images[part])
        except MemoryError as error:
            size = part.stop - part.start
            if size == 1:
                raise
            backbone.largest_batch = size // 2
            log.warning("%d images at once do not fit (%s); going on with %d", size, error, size // 2)
            continue
        yield part, tokens, embeddings
        start = part.stop

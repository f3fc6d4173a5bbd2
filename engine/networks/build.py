"""A configuration's networks, ready to run: exported, built and compared with their source unless done before."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, NetworkSpec
from zsad.export.agreement import sample_batch
from zsad.export.onnx_export import ExportOptions, export_onnx
from zsad.export.tensorrt_engine import EngineOptions, build_engine, confirm_engine, rebuild_command
from zsad.kernels.cuda.device import Device

from .network import Graph, GraphRequest, Network, TensorSpec, run_in_parts
from .onnx_runtime import OnnxRuntimeBackbone
from .runtime import Backbone, Runtime
from .tensorrt import TensorRTBackbone

log = logging.getLogger("zsad")

Array = Any  # a NumPy array, or an array on the device


def export_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> ExportOptions:
    """Return what one of a network's graphs is exported with."""
    return ExportOptions(
        taps=spec.taps,
        image_size=spec.image_size,
        activation=spec.activation,
        heads=spec.heads,
        embedding="embedding" in request.outputs,
        precision=precision,
        attention=attention,
        preprocessing=spec.preprocessing or "imagenet",
    )


def load_networks(
    config: Config, requests: Sequence[GraphRequest], runtime: Runtime, batch_size: int
) -> dict[str, Network]:
    """Make the graphs that a method asks for ready; batch_size: rows per call at most, as far as memory allows.

    An engine is compared with its graph the first time that it runs. Raises CheckpointError for weights that cannot be
    had or used, EngineError for engines likewise, ConfigError where the library does not start.
    """
    precision = runtime.network_precision(config.network_precision)
    networks: dict[str, Network] = {}
    for request in requests:
        spec = config.networks[request.network]
        backbone = _load(spec, request, runtime, precision, batch_size)
        networks[request.network] = Network(
            spec,
            backbone.checkpoint,
            backbone.sha256,
            spec.preprocessing or "imagenet",
            {request.graph: _ImageTower(backbone, spec.image_size)},
        )
    return networks


class _ImageTower:
    def __init__(self, backbone: Backbone, size: int) -> None:
        self._backbone = backbone
        self.inputs = {"images": TensorSpec((3, size, size), np.dtype(np.float32))}
        tokens = TensorSpec((backbone.layers, math.prod(backbone.grid), backbone.channels), backbone.token_type)
        self.outputs = {"tokens": tokens}
        if backbone.embedding_width:
            self.outputs["embedding"] = TensorSpec((backbone.embedding_width,), np.dtype(np.float32))

    @property
    def largest_batch(self) -> int:
        return self._backbone.largest_batch

    @largest_batch.setter
    def largest_batch(self, batch: int) -> None:
        self._backbone.largest_batch = batch

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        tokens, embedding = self._backbone.run(inputs["images"])
        return {"tokens": tokens} if embedding is None else {"tokens": tokens, "embedding": embedding}


def _load(spec: NetworkSpec, request: GraphRequest, runtime: Runtime, precision: str, batch_size: int) -> Backbone:
    attention = "fused" if runtime.library == "onnxruntime" else "standard"
    graph = export_options(spec, request, precision, attention)
    model = export_onnx(spec.checkpoint, graph)
    if model.built:
        log.info("%s: exported, %s", spec.checkpoint, model.agreement)
    if runtime.library == "onnxruntime":
        return OnnxRuntimeBackbone(model, runtime.device, batch_size)
    assert runtime.device is not None
    options = EngineOptions(runtime.library, device=runtime.device.number)
    command = rebuild_command(spec.checkpoint, graph, options)
    log.info("%s: loading its engine; the first time it is built, which can take minutes", spec.checkpoint)
    engine = build_engine(model.path, graph.image_size, graph.precision, options, command)
    backbone = TensorRTBackbone(engine.path, model, runtime.device, batch_size)
    if not engine.fingerprint.agreement:
        log.info("%s: comparing its engine with its graph on the CPU, this once", spec.checkpoint)
        images = sample_batch(graph.image_size)
        tower = _ImageTower(backbone, spec.image_size)
        confirm_engine(engine, model.path, _outputs(tower, images, runtime.device), images)
    return backbone


def _outputs(graph: Graph, images: NDArray[np.float32], device: Device) -> list[NDArray[np.float32]]:
    """Return what a graph on a device gives for images [B, 3, S, S], in host memory."""

    def parts() -> Iterator[list[NDArray[np.float32]]]:
        for _, outputs in run_in_parts(graph, {"images": device.to_device(images)}):
            yield [device.to_host(array).astype(np.float32) for array in outputs.values()]

    return [np.concatenate(outputs) for outputs in zip(*parts(), strict=True)]

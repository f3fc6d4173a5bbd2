"""A configuration's networks, ready to run: exported, built and compared with their source unless done before."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, NetworkSpec
from zsad.export.agreement import sample_inputs
from zsad.export.checkpoints import check_present, find_checkpoint
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import (
    ClipSegDecoderOptions,
    ClipSegImageOptions,
    ExportOptions,
    GraphOptions,
    IsnetOptions,
    SamImageOptions,
    SamMasksOptions,
    TextOptions,
)
from zsad.export.tensorrt_engine import EngineOptions, build_engine, confirm_engine, rebuild_command
from zsad.export.vision_transformer import read_patch_size
from zsad.kernels.cuda.device import Device

from .network import Graph, GraphRequest, Network, run_in_parts
from .onnx_runtime import OnnxRuntimeGraph
from .runtime import Runtime
from .tensorrt import TensorRTGraph

log = logging.getLogger("zsad")


def export_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> ExportOptions:
    """Return what a network's image tower is exported with."""
    return ExportOptions(
        taps=spec.taps if "tokens" in request.outputs else (),
        image_size=spec.side,
        activation=spec.activation,
        heads=spec.heads,
        outputs=request.outputs,
        precision=precision,
        attention=attention,
        antialias=spec.antialias,
        preprocessing=spec.preprocessing,
    )


def text_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> TextOptions:
    """Return what a network's text tower is exported with."""
    assert request.outputs == ("embedding",), request
    return TextOptions(
        spec.activation,
        heads=spec.text_heads,
        precision=precision,
        attention=attention,
    )


def sam_image_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> SamImageOptions:
    """Return what the image encoder of SAM is exported with."""
    return SamImageOptions(spec.side, precision, attention)


def sam_masks_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> SamMasksOptions:
    """Return what SAM's mask decoder is exported with."""
    heads = SamMasksOptions.heads if spec.heads is None else spec.heads
    return SamMasksOptions(spec.side, heads=heads, precision=precision)


def clipseg_image_options(
    spec: NetworkSpec, request: GraphRequest, precision: str, attention: str
) -> ClipSegImageOptions:
    """Return what CLIPSeg's image tower is exported with."""
    return ClipSegImageOptions(
        spec.side,
        activation=spec.activation,
        heads=spec.heads,
        precision=precision,
        attention=attention,
    )


def clipseg_decoder_options(
    spec: NetworkSpec, request: GraphRequest, precision: str, attention: str
) -> ClipSegDecoderOptions:
    """Return what CLIPSeg's decoder is exported with."""
    return ClipSegDecoderOptions(spec.side, precision=precision, attention=attention)


def isnet_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> IsnetOptions:
    """Return what IS-Net is exported with."""
    return IsnetOptions(spec.side, precision)


# By the names that requests have.
OPTIONS: Mapping[str, Callable[[NetworkSpec, GraphRequest, str, str], GraphOptions]] = {
    "image": export_options,
    "text": text_options,
    "clipseg_image": clipseg_image_options,
    "clipseg_decoder": clipseg_decoder_options,
    "isnet": isnet_options,
    "sam_image": sam_image_options,
    "sam_masks": sam_masks_options,
}


def graph_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> GraphOptions:
    """Return what one of a network's graphs is exported with: in fp32 where it is no image tower and those are int8."""
    if precision == "int8" and request.graph != "image":
        precision = "fp32"
    return OPTIONS[request.graph](spec, request, precision, attention)


def patch_sizes(config: Config) -> dict[str, int]:
    """Return the sides in pixels of the patches of those networks whose images have no size yet; raises as below."""
    check_present([*(spec.checkpoint for spec in config.specs.values()), *config.settings.files])
    return {name: read_patch_size(find_checkpoint(config.networks[name].checkpoint)[0]) for name in config.unsized}


def load_networks(
    config: Config, requests: Sequence[GraphRequest], runtime: Runtime, batch_size: int
) -> dict[str, Network]:
    """Make the graphs that a method asks for ready; batch_size: rows per call at most, as far as memory allows.

    requests: each graph of a network once; those on demand are left to `load_graph`. An engine is compared with its
    graph the first time that it runs. Raises CheckpointError for weights that cannot be had or used, EngineError for
    engines and libraries likewise, ConfigError where the library does not start.
    """
    check_present([*(config.specs[request.network].checkpoint for request in requests), *config.settings.files])
    graphs: dict[str, dict[str, Graph]] = {}
    networks = {}
    for request in (request for request in requests if not request.on_demand):
        model, graph = _make_ready(config, request, runtime, batch_size)
        own = graphs.setdefault(request.network, {})
        assert request.graph not in own
        own[request.graph] = graph
        spec = config.specs[request.network]
        preprocessing = spec.preprocessing or model.preprocessing
        networks[request.network] = Network(spec, model.checkpoint, model.sha256, preprocessing, own)
    return networks


def load_graph(config: Config, request: GraphRequest, runtime: Runtime, batch_size: int) -> Graph:
    """Make a single graph ready, when it turns out to be needed, as `load_networks` does."""
    return _make_ready(config, request, runtime, batch_size)[1]


def _make_ready(
    config: Config, request: GraphRequest, runtime: Runtime, batch_size: int
) -> tuple[ExportedModel, Graph]:
    precision = runtime.network_precision(config.network_precision)
    attention = "fused" if runtime.library == "onnxruntime" else "standard"
    spec = config.specs[request.network]
    options = graph_options(spec, request, precision, attention)
    model = export_onnx(spec.checkpoint, options)
    if model.built:
        log.info("%s: exported, %s", spec.checkpoint, model.agreement)
    return model, _load(model, options, runtime, request, batch_size)


def engine_batch(request: GraphRequest) -> tuple[int, int, int]:
    """Return the smallest, best and largest batch of a graph's engine: of those that have their own rows no more."""
    return (1, request.rows, request.rows) if request.rows else EngineOptions.batch


def _load(
    model: ExportedModel, options: GraphOptions, runtime: Runtime, request: GraphRequest, batch_size: int
) -> Graph:
    rows = request.rows or batch_size
    if runtime.library == "onnxruntime":
        return OnnxRuntimeGraph(model.path, runtime.device, rows)
    assert runtime.device is not None
    target = EngineOptions(runtime.library, engine_batch(request), runtime.device.number)
    command = rebuild_command(model.checkpoint, options, target)
    log.info("%s: loading its engine; the first time it is built, which can take minutes", model.checkpoint)
    engine = build_engine(model, target, command)
    graph = TensorRTGraph(engine.path, model.path, runtime.device, rows)
    if not engine.fingerprint.agreement:
        log.info("%s: comparing its engine with its graph on the CPU, this once", model.checkpoint)
        inputs = sample_inputs(model.inputs)
        confirm_engine(engine, model.path, inputs, _outputs(graph, inputs, runtime.device))
    return graph


def _outputs(graph: Graph, inputs: Mapping[str, NDArray[Any]], device: Device) -> dict[str, NDArray[np.float32]]:
    """Return what a graph on a device gives, in host memory."""
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in graph.outputs}
    for _, outputs in run_in_parts(graph, {name: device.to_device(array) for name, array in inputs.items()}):
        for name, array in outputs.items():
            parts[name].append(device.to_host(array).astype(np.float32))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}

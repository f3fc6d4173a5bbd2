"""A configuration's networks, ready to run: exported, built and compared with their source unless done before."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, NetworkSpec
from zsad.export.checkpoints import check_present, find_checkpoint
from zsad.export.libraries import EngineError
from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import (
    NATIVE,
    ClipSegDecoderOptions,
    ClipSegImageOptions,
    ExportOptions,
    GraphOptions,
    IsnetOptions,
    SamImageOptions,
    SamMasksOptions,
    TextOptions,
)
from zsad.export.state_dict import CheckpointError
from zsad.kernels.cpu.native import vectors_are_wide
from zsad.kernels.machine import cache_folder

from .fastest import CLEARLY, Note, seconds
from .network import Graph, GraphRequest, Network, run_in_parts
from .onnx_runtime import OnnxRuntimeGraph
from .runtime import Library, Runtime

if TYPE_CHECKING:
    from zsad.kernels.cuda.device import Device

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


def graph_precision(request: GraphRequest, precision: str) -> str:
    """Return the precision of one of a network's graphs: fp32 where it is no image tower and those are int8 or bf16."""
    return "fp32" if precision in ("int8", "bf16") and request.graph != "image" else precision


def graph_options(spec: NetworkSpec, request: GraphRequest, precision: str, attention: str) -> GraphOptions:
    """Return what one of a network's graphs is exported with; to run it in bf16 is up to what runs it."""
    exported = graph_precision(request, precision)
    return OPTIONS[request.graph](spec, request, "fp32" if exported == "bf16" else exported, attention)


def patch_sizes(config: Config) -> dict[str, int]:
    """Return the sides in pixels of the patches of those networks whose images have no size yet; raises as below."""
    check_present([*(spec.checkpoint for spec in config.specs.values()), *config.settings.files])
    if not config.unsized:
        return {}
    from zsad.export.vision_transformer import read_patch_size

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
    ready: dict[str, dict[str, Ready]] = {}
    for request in (request for request in requests if not request.on_demand):
        own = ready.setdefault(request.network, {})
        assert request.graph not in own
        own[request.graph] = _make_ready(config, request, runtime, batch_size)
    networks = {}
    for name, own in ready.items():
        spec, model = config.specs[name], next(reversed(own.values())).model
        preprocessing = spec.preprocessing or model.preprocessing
        graphs = {kind: each.graph for kind, each in own.items()}
        libraries = frozenset(each.library for each in own.values())
        networks[name] = Network(spec, model.checkpoint, model.sha256, preprocessing, graphs, libraries)
    return networks


def load_graph(config: Config, request: GraphRequest, runtime: Runtime, batch_size: int) -> Graph:
    """Make a single graph ready, when it turns out to be needed, as `load_networks` does."""
    return _make_ready(config, request, runtime, batch_size).graph


@dataclass(frozen=True)
class Ready:
    """A graph that can run, the file it was made from, and what runs it."""

    model: ExportedModel
    graph: Graph
    library: Library


@dataclass(frozen=True)
class Loading:
    """A graph that is to be made ready, by one library or another."""

    spec: NetworkSpec
    request: GraphRequest
    runtime: Runtime
    precision: str  # of this graph
    rows: int  # of a batch at most

    def exported(self, library: Library, precision: str = "") -> ExportedModel:
        """Return the file that a library reads; precision: another one than the graph's own."""
        model = export_onnx(self.spec.checkpoint, self._options(library, precision or self.precision))
        if model.built:
            log.info("%s: exported, %s", self.spec.checkpoint, model.agreement)
        return model

    def _options(self, library: Library, precision: str) -> GraphOptions:
        return graph_options(self.spec, self.request, precision, attention_of(library))

    def by(self, library: Library) -> Ready:
        """Make it ready in a library."""
        model, runtime = self.exported(library), self.runtime
        if library == "onnxruntime":
            return Ready(model, OnnxRuntimeGraph(model.path, runtime.device, self.rows), library)
        if library == "native":
            from .native import NativeGraph

            return Ready(model, NativeGraph(model.path, self.rows), library)
        if library == "openvino":
            return Ready(model, self._compiled(model), library)
        return Ready(model, self._engine(library, model), library)

    def _engine(self, library: Library, model: ExportedModel) -> Graph:
        """Let TensorRT build an engine of a graph, or take the one that is there, and compare the two once."""
        from zsad.export.agreement import sample_inputs
        from zsad.export.tensorrt_engine import EngineOptions, build_engine, confirm_engine, rebuild_command

        from .tensorrt import TensorRTGraph

        runtime = self.runtime
        assert runtime.device is not None
        options = self._options(library, self.precision)
        target = EngineOptions(library, engine_batch(self.request), runtime.device.number)
        command = rebuild_command(model.checkpoint, options, target)
        log.info("%s: loading its engine; the first time it is built, which can take minutes", model.checkpoint)
        engine = build_engine(model, target, command)
        graph = TensorRTGraph(engine.path, model.path, runtime.device, self.rows)
        if not engine.fingerprint.agreement:
            log.info("%s: comparing its engine with its graph on the CPU, this once", model.checkpoint)
            inputs = sample_inputs(model.inputs)
            confirm_engine(engine, model.path, inputs, _outputs(graph, inputs, runtime.device))
        return graph

    def _compiled(self, model: ExportedModel) -> Graph:
        """Let OpenVINO compile a graph, and compare what it gives with the fp32 graph in ONNX Runtime, once."""
        from .openvino import OpenVINOGraph

        graph = OpenVINOGraph(model.path, self.precision, self.rows)
        note = Note(model.path, "openvino", self.precision)
        if note.read() is None:
            from zsad.export.agreement import check_agreement, run_graph, sample_inputs

            exact = model if model.precision == "fp32" else self.exported("openvino", "fp32")
            inputs = sample_inputs(model.inputs)
            found = _outputs(graph, inputs, None)
            try:
                line = check_agreement(found, run_graph(exact.path, inputs), self.precision, "the fp32 graph")
            except CheckpointError as error:
                raise EngineError(f"{model.checkpoint} in OpenVINO: {error}; or use --runtime onnxruntime") from None
            log.info("%s: compiled by OpenVINO, %s", model.checkpoint, line)
            note.write(agreement=line)
        return graph

    def faster(self, usual: Library, rivals: Sequence[Library]) -> Ready:
        """Make it ready in the library that is fastest here, which is measured once; the usual one if in doubt."""
        note = Note(self.exported(usual).path, "fastest", self.precision, self.rows, *rivals)
        noted = note.read() or {}
        known, why = noted.get("library"), noted.get("why", "")
        others: dict[Library, Ready] = {}
        for rival in () if known == usual else [each for each in rivals if each == known] or rivals:
            try:
                others[rival] = self.by(rival)
            except (CheckpointError, EngineError, MemoryError) as error:
                why = f"{usual} runs it, since {error}"
                log.warning("%s: %s", self.spec.checkpoint, why)
        if known is not None and (known == usual or known in others):
            log.debug("%s: %s", self.spec.checkpoint, why)
            return self.by(usual) if known == usual else others[known]
        found = own = self.by(usual)
        if others:
            names = " and ".join([usual, *others])
            log.info("%s: trying which of %s runs it faster, this once", self.spec.checkpoint, names)
            from zsad.export.agreement import sample_rows

            inputs = sample_rows(own.model.inputs, self.rows)
            taken = seconds({usual: own.graph, **{name: each.graph for name, each in others.items()}}, inputs)
            best = min(taken, key=lambda name: taken[name], default=usual)
            if best != usual and taken[best] < CLEARLY * taken.get(usual, math.inf):
                found = others[best]
            times = " and ".join(f"{1e3 * value:.0f} ms in {library}" for library, value in taken.items())
            why = f"{found.library} runs it: a batch takes {times}"
            log.info("%s: %s", self.spec.checkpoint, why)
        note.write(library=found.library, why=why)
        return found


def attention_of(library: Library) -> str:
    """Return the attention that graphs for a library are exported with; a native one means the rest too."""
    return {"onnxruntime": "fused", "native": NATIVE}.get(library, "standard")


def candidates(request: GraphRequest, precision: str, runtime: Runtime) -> tuple[Library, ...]:
    """Return what may run a graph: the first one, unless another one turns out to be faster."""
    tower = request.graph == "image" and precision in ("fp32", "int8")
    if runtime.library == "native":
        return ("native",) if tower else ("onnxruntime",)
    libraries = runtime.libraries(precision, request.on_demand)
    if not (runtime.native and tower) or request.on_demand:
        return libraries
    if precision == "int8" and vectors_are_wide():
        return ("native",)
    cache = cache_folder()
    lasting = not cache.exists() or os.access(cache, os.W_OK)  # else it would be measured in every run
    return (*libraries, "native") if lasting and runtime.measures else libraries


def _make_ready(config: Config, request: GraphRequest, runtime: Runtime, batch_size: int) -> Ready:
    precision = graph_precision(request, runtime.network_precision(config.network_precision))
    loading = Loading(config.specs[request.network], request, runtime, precision, request.rows or batch_size)
    usual, *rivals = candidates(request, precision, runtime)
    return loading.faster(usual, rivals) if rivals else loading.by(usual)


def engine_batch(request: GraphRequest) -> tuple[int, int, int]:
    """Return the smallest, best and largest batch of a graph's engine: of those that have their own rows no more."""
    from zsad.export.tensorrt_engine import EngineOptions

    return (1, request.rows, request.rows) if request.rows else EngineOptions.batch


def _outputs(
    graph: Graph, inputs: Mapping[str, NDArray[Any]], device: "Device | None"
) -> dict[str, NDArray[np.float32]]:
    """Return what a graph gives, on a device or the CPU, in host memory."""
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in graph.outputs}
    fed = inputs if device is None else {name: device.to_device(array) for name, array in inputs.items()}
    for _, outputs in run_in_parts(graph, fed):
        for name, array in outputs.items():
            parts[name].append(np.asarray(array if device is None else device.to_host(array), np.float32))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}

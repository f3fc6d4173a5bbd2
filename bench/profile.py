"""Where the time goes: every stage of whole runs, and within every graph each class of operators.

`python -m zsad.bench.throughput --profile` calls this. Products are counted as `bench/products.py` counts them, of the
fp32 graph in standard operators, whatever runs; bytes are those of the operators' inputs and outputs.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from zsad.engine.config import Config, ConfigError
from zsad.engine.networks.build import attention_of, candidates, graph_options, graph_precision
from zsad.engine.networks.network import GraphRequest
from zsad.engine.networks.onnx_runtime import session
from zsad.engine.networks.openvino import compiled
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.export.agreement import sample_rows
from zsad.export.builders import read_builder
from zsad.export.checkpoints import find_checkpoint
from zsad.export.native_tower import PARTS, NativeTower
from zsad.export.onnx_export import export_onnx
from zsad.export.transformer_graph import IR_VERSION, OPSET
from zsad.kernels.machine import available_cores

from .products import ATTENTION, LINEAR, ROWS, classed_products, image_requests, plain_options, row_count
from .records import append
from .runs import measure_run
from .runtimes import in_precision, product_peak, runtimes
from .untrained import replaced

SIDE = 4096  # of the products that peaks are measured with
COPIED = 1 << 25  # values that each core copies, more than caches hold
WHOLE_ATTENTION = "attention in one operator"
SOFTMAX, NORMALISATION, ACTIVATION = "softmax", "normalisation", "activation"
SUMS, LAYOUT, OTHER, WAITING = "sums", "layout", "other", "waiting"
CLASSES = (LINEAR, ATTENTION, WHOLE_ATTENTION, SOFTMAX, NORMALISATION, ACTIVATION, SUMS, LAYOUT, OTHER, WAITING)

# Operators of ONNX, ONNX Runtime and OpenVINO. Matrix products are linear layers unless both sides are activations.
NATIVE_PARTS = {"linear": LINEAR, "attention": ATTENTION}  # others are called as they are here
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul"}
OPERATORS: Mapping[str, set[str]] = {
    LINEAR: {
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "DynamicQuantizeMatMul", "MatMulInteger"),
        *("MatMulIntegerToFloat", "MatMulNBits", "FullyConnected", "FullyConnectedCompressed", "Convolution"),
        *("Deconvolution",),
    },
    WHOLE_ATTENTION: {"MultiHeadAttention", "Attention", "ScaledDotProductAttention"},
    SOFTMAX: {"Softmax"},
    NORMALISATION: {"LayerNormalization", "SkipLayerNormalization", "LpNormalization", "MVN", "NormalizeL2"},
    ACTIVATION: {"Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Sigmoid", "Relu", "Erf", "Swish"},
    SUMS: {"Add", "Mul", "Sub", "Div", "Sum", "Eltwise", "Clip", "Resize", "Interpolate", "MaxPool", "Pooling"},
    LAYOUT: {
        *("Transpose", "Reshape", "Concat", "Split", "Slice", "StridedSlice", "Pad", "Gather", "Squeeze", "Unsqueeze"),
        *("Identity", "Cast", "Convert", "Reorder", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"),
        *("ReorderInput", "ReorderOutput", "Expand", "Tile", "RotaryEmbedding", "RoPE", "Broadcast", "VariadicSplit"),
    },
}
BODIES = ("Scan", "Loop", "If", "TensorIterator")  # whose operators are timed by themselves
BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1, "int32": 4, "int64": 8, "double": 8}


@dataclass
class Class:
    """What a class of operators takes for a batch."""

    seconds: float = 0.0
    bytes: float = 0.0
    operators: dict[str, float] = field(default_factory=dict)  # seconds by their names

    def add(self, operator: str, seconds: float, moved: float) -> None:
        self.seconds += seconds
        self.bytes += moved
        self.operators[operator] = self.operators.get(operator, 0.0) + seconds


def kind_of(operator: str, shapes: Sequence[Sequence[int]]) -> str:
    """Return the class of an operator; shapes: of its inputs."""
    if operator in PRODUCTS:
        both = len(shapes) > 1 and min(len(shapes[0]), len(shapes[1])) > 2
        return ATTENTION if both else LINEAR
    return next((kind for kind, known in OPERATORS.items() if operator in known), OTHER)


def collected(found: Iterator[tuple[str, str, float, float]], whole: float) -> dict[str, Class]:
    """Put class, operator, seconds and bytes of all operators together; whole: the seconds of the batch."""
    classes = {name: Class() for name in CLASSES}
    for kind, operator, seconds, moved in found:
        classes[kind].add(operator, seconds, moved)
    spent = sum(each.seconds for each in classes.values())
    classes[WAITING].seconds = max(0.0, whole - spent)
    return {name: each for name, each in classes.items() if each.seconds}


def in_onnx_runtime(path: Path, inputs: Mapping[str, NDArray[Any]], repeats: int) -> dict[str, Class]:
    """Return what each class of operators takes in ONNX Runtime on the CPU, a mean over several runs."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(str(path), None, profile=str(Path(folder) / "profile"))
        whole = mean_seconds(lambda: opened.run(None, dict(inputs)), repeats)
        events = json.loads(Path(opened.end_profiling()).read_text("utf-8"))
    counted = sorted(event["ts"] for event in events if event["name"] == "model_run")[1]  # the first run warms up

    def found() -> Iterator[tuple[str, str, float, float]]:
        for event in events:
            if event["cat"] != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < counted:
                continue
            operator = event["args"]["op_name"]
            if operator in BODIES:
                continue
            ends = [event["args"].get(f"{end}_type_shape", []) for end in ("input", "output")]
            tensors = [tensor for end in ends for typed in end for tensor in typed.items()]
            moved = sum(BYTES.get(name, 4) * prod(shape) for name, shape in tensors)
            shapes = [shape for typed in ends[0] for shape in typed.values()]
            yield kind_of(operator, shapes), operator, 1e-6 * event["dur"] / repeats, moved / repeats

    return collected(found(), whole)


def in_openvino(path: Path, precision: str, inputs: Mapping[str, NDArray[Any]], repeats: int) -> dict[str, Class]:
    """Return what each class of operators takes in OpenVINO, a mean over several runs."""
    _, model = compiled(path, precision, PERF_COUNT=True)
    request, runs = model.create_infer_request(), []

    def run() -> None:
        request.infer(dict(inputs), share_inputs=True)
        runs.append(request.get_profiling_info())

    whole = mean_seconds(run, repeats)
    nodes = {node.get_friendly_name(): node for node in model.get_runtime_model().get_ordered_ops()}

    def found() -> Iterator[tuple[str, str, float, float]]:
        for each in (each for run in runs[1:] for each in run if each.real_time):
            node = nodes.get(each.node_name)
            inputs_of = [] if node is None else [node.input(i) for i in range(node.get_input_size())]
            outputs_of = [] if node is None else [node.output(i) for i in range(node.get_output_size())]
            moved = sum(_bytes(port) for port in (*inputs_of, *outputs_of))
            facts = {} if node is None else node.get_rt_info()
            made_of = str(facts["originalLayersNames"].value) if "originalLayersNames" in facts else ""
            shapes = [list(port.get_partial_shape()) for port in inputs_of]
            kind = kind_of(each.node_type, shapes)
            if kind == OTHER and made_of:
                kind = fused_class(made_of)
            yield kind, each.node_type, each.real_time.total_seconds() / repeats, moved / repeats

    return collected(found(), whole)


def in_native_code(path: Path, inputs: Mapping[str, NDArray[Any]], repeats: int) -> dict[str, Class]:
    """Return what each class of work takes in native code, a mean over several runs; bytes are not counted."""
    tower, runs = NativeTower(path), list[NDArray[np.float64]]()

    def run() -> None:
        runs.append(np.zeros(len(PARTS)))
        tower.run(inputs["images"], runs[-1])

    whole = mean_seconds(run, repeats)
    spent = dict(zip(PARTS, np.mean(runs[1:], axis=0), strict=True))
    found = ((NATIVE_PARTS.get(part, part), part, value, 0.0) for part, value in spent.items() if part != WAITING)
    return collected(found, whole)


def fused_class(made_of: str) -> str:
    """Return the class of several operators that OpenVINO has made one of, by the names that they had."""
    if ".logits" in made_of:
        return WHOLE_ATTENTION
    for word, kind in ((".softmax", SOFTMAX), (".activation", ACTIVATION), ("norm", NORMALISATION)):
        if word in made_of:
            return kind
    return SUMS


def _bytes(port: Any) -> float:
    """Return the bytes of a value of a compiled model; 0 where its shape is not fixed."""
    shape = port.get_partial_shape()
    return port.get_element_type().size * prod(port.get_shape()) if shape.is_static else 0.0


def mean_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the mean seconds of several runs behind one that warms up."""
    run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def copy_rate() -> float:
    """Return the bytes that all cores together read and write in a second when they copy large arrays."""
    cores = available_cores()
    pairs = [(np.zeros(COPIED, np.float32), np.ones(COPIED, np.float32)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as threads:
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            list(threads.map(lambda pair: np.copyto(*pair), pairs))
            best = max(best, 2 * 4 * COPIED * cores / (time.perf_counter() - start))
    return best


def product_rates(runtime: Runtime) -> dict[str, float]:
    """Return the rate of large products in every precision that can be had here, operations per second."""
    rates = {"fp32": max(product_peak(runtime)() for _ in range(3))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        for precision, (kind, operator) in {"int8": (np.int8, "MatMulInteger"), "bf16": (np.float32, "MatMul")}.items():
            onnx.save(product_graph(operator, kind), path)
            left = {"x": np.ones((SIDE, SIDE), np.uint8 if precision == "int8" else np.float32)}
            if precision == "int8":
                run = partial(session(str(path), None).run, None, left)
            else:
                try:
                    choose_runtime("cpu", "openvino").network_precision(precision)
                except ConfigError:
                    continue
                run = partial(compiled(path, precision)[1].create_infer_request().infer, left)
            rates[precision] = 2.0 * SIDE**3 / min(mean_seconds(run, 1) for _ in range(3))
    return rates


def product_graph(operator: str, kind: Any) -> onnx.ModelProto:
    """Return the graph of one large product with weights of a type."""
    element = TensorProto.UINT8 if kind is np.int8 else TensorProto.FLOAT
    weights = numpy_helper.from_array(np.ones((SIDE, SIDE), kind), "weights")
    given = helper.make_tensor_value_info("x", element, [SIDE, SIDE])
    found = helper.make_tensor_value_info("y", TensorProto.INT32 if kind is np.int8 else element, [SIDE, SIDE])
    node = helper.make_node(operator, ["x", "weights"], ["y"])
    graph = helper.make_graph([node], "product", [given], [found], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def profile(config: Config, weights: Mapping[str, str], arguments: argparse.Namespace, record: Any) -> None:
    """Print where the time of each variant goes, and append one record for each."""
    peaks = {**product_rates(choose_runtime("cpu", "onnxruntime")), "memory": copy_rate()}
    print("\nmeasured peaks: " + ", ".join(peak_text(name, rate) for name, rate in peaks.items()))
    for name, runtime, precision in runtimes(arguments.device):
        chosen = in_precision(config, precision)
        with replaced(weights):
            run = measure_run(chosen, runtime, arguments)
        graphs = [profile_graph(chosen, request, runtime, arguments) for request in image_requests(chosen)]
        found = {**record, "kind": "profile", "preset": config.preset, "weights": dict(weights), "variant": name}
        found |= {"peaks": peaks, **run, "graphs": graphs}
        print(profile_text(found))
        append(arguments.output, found)


def peak_text(name: str, rate: float) -> str:
    return f"{name} {rate / 1e9:.0f} {'GB/s' if name == 'memory' else 'GFLOP/s'}"


def profile_graph(
    config: Config, request: GraphRequest, runtime: Runtime, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what each class of operators of a graph takes for one of its rows, and the operations counted for it."""
    spec, rows = config.specs[request.network], row_count(request, arguments.batch_size)
    precision = graph_precision(request, config.network_precision)
    library, *_ = candidates(request, precision, runtime)
    attention = attention_of(library)
    model = export_onnx(spec.checkpoint, graph_options(spec, request, precision, attention))
    inputs = sample_rows(model.inputs, rows)
    if library == "native":
        classes = in_native_code(model.path, inputs, arguments.repeats)
    elif library == "onnxruntime":
        classes = in_onnx_runtime(model.path, inputs, arguments.repeats)
    else:
        classes = in_openvino(model.path, precision, inputs, arguments.repeats)
    source = find_checkpoint(spec.checkpoint)[0]
    flops = classed_products(read_builder(source, plain_options(spec, request)), rows)
    flops |= {WHOLE_ATTENTION: 0.0 if ATTENTION in classes else flops[ATTENTION]}
    return {
        "network": request.network,
        "graph": request.graph,
        "precision": precision,
        "row": ROWS.get(request.graph, "image"),
        "batch": rows,
        "classes": {
            name: {
                "seconds": each.seconds / rows,
                "bytes": each.bytes / rows,
                "flops": flops.get(name, 0.0),
                "operators": {key: value / rows for key, value in each.operators.items()},
            }
            for name, each in classes.items()
        },
    }


def profile_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the lines of a record: stage or class, time, share of the whole, rate, share of the peak."""
    images, peaks, together = record["images"], record["peaks"], record["seconds_together"]
    products = {graph["graph"]: sum(each["flops"] for each in graph["classes"].values()) for graph in record["graphs"]}
    per_image = sum(products[graph["graph"]] for graph in record["graphs"] if graph["row"] == "image")
    networks, scoring = record["precision"]
    counted = {"networks": (images * per_image, networks), "scoring": (record["flops_of_pairs"], scoring or "fp32")}
    for stage, seconds in record["seconds_alone"].items():
        flops, precision = counted.get(stage, (0.0, "fp32"))
        yield (
            f"**{stage}**",
            *_cells(seconds / images, seconds / together, flops / images, 0.0, peaks[precision], peaks),
        )
        if stage == "networks":
            for graph in record["graphs"]:
                yield from _graph_rows(graph, together / images, peaks)
    idle = max(0.0, record["cores"] * together - record["seconds_of_processors"]) / record["cores"]
    yield ("**waiting**, processors idle", *_cells(idle / images, idle / together, 0.0, 0.0, 1.0, peaks))
    yield ("**all together**", *_cells(together / images, 1.0, 0.0, 0.0, 1.0, peaks))


def _graph_rows(
    graph: Mapping[str, Any], whole: float, peaks: Mapping[str, float]
) -> Iterator[tuple[str, str, str, str, str]]:
    prefix = "" if graph["graph"] == "image" else f"{graph['graph']}, one {graph['row']}: "
    for name, each in graph["classes"].items():
        precision = graph["precision"] if name == LINEAR or graph["precision"] == "bf16" else "fp32"
        share = each["seconds"] / whole if graph["row"] == "image" else float("nan")
        yield (
            f"{prefix}{name}",
            *_cells(each["seconds"], share, each["flops"], each["bytes"], peaks[precision], peaks),
        )


def _cells(
    seconds: float, share: float, flops: float, moved: float, peak: float, peaks: Mapping[str, float]
) -> tuple[str, str, str, str]:
    time_and_share = (f"{1e3 * seconds:.1f} ms", "–" if share != share else f"{100 * share:.0f} %")
    if flops and seconds:
        return (*time_and_share, f"{flops / seconds / 1e9:.0f} GFLOP/s", f"{100 * flops / seconds / peak:.0f} %")
    if moved and seconds:
        rate = moved / seconds
        return (*time_and_share, f"{rate / 1e9:.1f} GB/s", f"{100 * rate / peaks['memory']:.0f} %")
    return (*time_and_share, "–", "–")


def profile_text(record: Mapping[str, Any]) -> str:
    """Return a record as columns for a terminal."""
    head = f"\n{record['variant']}: preset {record['preset']} at {record['image_size']} px, {record['images']} images"
    rows = [tuple(cell.replace("**", "") for cell in row) for row in profile_rows(record)]
    return "\n".join([head, *(f"  {a:<34}{b:>12}{c:>8}{d:>16}{e:>8}" for a, b, c, d, e in rows)])

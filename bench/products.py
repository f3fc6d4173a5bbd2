"""Counts the products of the networks' graphs, and keeps them for the roofline: `python -m zsad.bench.products`.

Counted are multiplications and additions of the fp32 graph in standard operators, which does no more than is needed:
the fused one has columns of padding, and carries positions of SAM through its attention. It takes minutes, since every
published shape is written with random weights.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from zsad.engine.config import Config, load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.networks.build import graph_options
from zsad.engine.networks.network import GraphRequest
from zsad.engine.presets.names import preset_names
from zsad.export.adopt import ReadyGraph
from zsad.export.builders import GraphBuilder, read_builder
from zsad.export.options import GraphOptions

from .random_weights import write_random
from .records import RESULTS

FILE = RESULTS / "products.jsonl"
LINEAR, ATTENTION = "linear layers", "attention products"  # with weights, and of activations alone
ROWS = {"clipseg_decoder": "prompt", "sam_masks": "point"}  # graph → what its rows are, where they are no images
SMALL = 1024  # values of a constant that shapes may depend on


@dataclass(frozen=True)
class Products:
    """What a graph does for one row of its batch."""

    preset: str
    network: str
    graph: str
    checkpoint: str
    rows: int  # of the batch that it was counted for: what rows share counts once
    flops_per_row: float
    weights: int  # values


def image_requests(config: Config) -> list[GraphRequest]:
    """Return the graphs that run on every image."""
    return [request for request in graph_requests(config) if not request.on_demand]


def row_count(request: GraphRequest, batch_size: int) -> int:
    """Return how many rows a graph gets at once where so many images are read."""
    return request.rows or batch_size


def count_products(builder: GraphBuilder | ReadyGraph, rows: int) -> tuple[float, int]:
    """Return the operations for one of so many rows, and the number of weights, of fp32 in standard operators."""
    model = builder.build((), {})
    weights = sum(
        prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT and tensor.dims
    )
    return sum(_flops_by_class(model, rows).values()) / rows, weights


def classed_products(builder: GraphBuilder | ReadyGraph, rows: int) -> dict[str, float]:
    """Return the operations for one of so many rows, of linear layers and of products of activations."""
    return {name: flops / rows for name, flops in _flops_by_class(builder.build((), {}), rows).items()}


def _flops_by_class(model: onnx.ModelProto, rows: int) -> dict[str, float]:
    shapes, weights = _shapes(model, rows), {tensor.name for tensor in model.graph.initializer}
    found = {LINEAR: 0.0, ATTENTION: 0.0}
    for node in model.graph.node:
        found[LINEAR if weights & set(node.input[:2]) else ATTENTION] += _flops(node, shapes)
    return found


def _shapes(model: onnx.ModelProto, rows: int) -> Mapping[str, Sequence[int]]:
    """Return the shape of every value in a graph for a batch of so many rows."""
    bare = onnx.ModelProto()  # without weights, which inference would copy
    bare.ir_version, graph = model.ir_version, bare.graph
    bare.opset_import.extend(model.opset_import)
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for value in graph.input:
        if value.type.tensor_type.shape.dim[0].dim_param:
            value.type.tensor_type.shape.dim[0].dim_value = rows
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    known = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in known.initializer}
    for value in (*known.input, *known.value_info, *known.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return shapes


def _flops(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> float:
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0.0
    left, right, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":
        products = prod(out) * prod(right[1:])
    elif node.op_type == "ConvTranspose":
        products = prod(left) * prod(right[1:])
    else:
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        products = prod(out) * left[0 if transposed else -1]
    if not products:
        raise ValueError(f"{node.name}: {node.op_type} of {left} and {right} to {out}: a length is not known")
    return 2.0 * products


def plain_options(spec: Any, request: GraphRequest) -> GraphOptions:
    """Return the options of the graph whose products are counted."""
    return graph_options(spec, request, "fp32", "standard")


def count_preset(preset: str, folder: Path) -> Iterator[Products]:
    """Yield the products of every graph of a preset that runs on images; folder: for random weights."""
    config = load_config(preset, method_of=method_class)
    for request in graph_requests(config):
        if request.on_demand:
            continue
        spec, rows = config.specs[request.network], row_count(request, 1)
        path = folder / f"{spec.checkpoint}.safetensors"
        if not path.exists():
            write_random(spec.checkpoint, path)
        flops, weights = count_products(read_builder(path, plain_options(spec, request)), rows)
        yield Products(preset, request.network, request.graph, spec.checkpoint, rows, flops, weights)


def read_products() -> dict[tuple[str, str, str], Products]:
    """Return what is kept, by preset, network and graph."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    found = (Products(**json.loads(line)) for line in lines)
    return {(each.preset, each.network, each.graph): each for each in found}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        counted = [each for preset in preset_names() for each in count_preset(preset, Path(folder))]
    for each in counted:
        print(f"{each.preset:<10} {each.network:<8} {each.graph:<16} {each.flops_per_row / 1e12:8.4f} TFLOP per row")
    FILE.write_text("".join(json.dumps(each.__dict__) + "\n" for each in counted), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

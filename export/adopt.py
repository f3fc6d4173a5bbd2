"""Adopts graphs that are published ready-made: verified, cut to the output that is wanted, under zsad's names."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .agreement import Array, run_graph
from .isnet_graph import check_isnet_options
from .options import IsnetOptions, Preprocessing, Shape
from .state_dict import CheckpointError, load_model

DOMAINS = ("", "ai.onnx", "com.microsoft")  # of operators: ONNX's own, under both names, and ONNX Runtime's
OLDEST_OPSET = 11  # the first that enlarges an image between the centres of pixels
PREFIX = "ready."  # of all names within: none is one of ours
OUTPUT = "foreground"


@dataclass(frozen=True, eq=False)
class ReadyGraph:
    """A graph of IS-Net that somebody else has written, its first output the finest one.

    It stays in the types in which it was published, whatever precision is asked for.
    """

    path: Path
    model: onnx.ModelProto
    options: IsnetOptions
    preprocessing: Preprocessing = "isnet"

    @property
    def inputs(self) -> Mapping[str, Shape]:
        """The shapes of the graph's inputs."""
        return {"images": (None, 3, self.options.image_size, self.options.image_size)}

    def check(self) -> None:
        """Raise CheckpointError where what is wanted of the graph breaks ONNX's rules or an option does not fit."""
        check_isnet_options(self.options)
        try:
            onnx.checker.check_model(self.build((), {}), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
            raise CheckpointError(f"it breaks the rules of ONNX ({error}); take another file") from None

    def build(self, exact: Collection[str], metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Build the graph with `images` [B, 3, S, S] and `foreground` [B, S, S]; all else goes."""
        size = self.options.image_size
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        _rename(model.graph)
        given, wanted = _inputs(model.graph)[0].name, model.graph.output[0].name
        nodes = _needed_nodes(model.graph, wanted)
        read = {name for node in nodes for name in _reads(node)}
        shape = numpy_helper.from_array(np.array([0, size, size]), "shape")
        graph = helper.make_graph(
            [
                helper.make_node("Identity", ["images"], [given], name="images"),
                *nodes,
                helper.make_node("Reshape", [wanted, shape.name], [OUTPUT], name=OUTPUT),
            ],
            "isnet",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", size, size])],
            [shape, *(tensor for tensor in model.graph.initializer if tensor.name in read)],
            sparse_initializer=[each for each in model.graph.sparse_initializer if each.values.name in read],
        )
        used = {_domain(node.domain) for part in _graphs(graph) for node in part.node}
        opsets = [opset for opset in model.opset_import if _domain(opset.domain) in used]
        adopted = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version, producer_name="zsad")
        facts = {"architecture": "isnet", "image_size": str(size), "precision": "as published", "adopted": "true"}
        helper.set_model_props(adopted, {**facts, **metadata})
        return adopted

    def choices(self) -> Iterable[tuple[str, ...]]:
        """There is nothing to choose: one graph."""
        return [()]

    def expected(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """Return what the file as it came gives for each image by itself.

        Raises CheckpointError where that is no foreground: not finite, outside [0, 1] or the same everywhere.
        """
        given, wanted = _inputs(self.model.graph)[0].name, self.model.graph.output[0].name
        found = np.concatenate([run_graph(self.path, {given: image[None]})[wanted][:, 0] for image in inputs["images"]])
        if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1 and np.ptp(found) > 0):
            raise CheckpointError(
                f"its output {wanted} has values from {found.min()} to {found.max()}, no foreground in [0, 1]; take "
                "a graph whose first output is the finest one, behind the sigmoid"
            )
        return {OUTPUT: found}


def read_ready_graph(path: Path, options: IsnetOptions) -> ReadyGraph:
    """Read a ready graph of IS-Net from an .onnx file.

    Its input must be [1 or B, 3, S, S] fp32, its first output [1 or B, 1, S, S] fp32. Raises CheckpointError where the
    file is damaged, keeps tensors in other files or has operators that are neither ONNX's nor ONNX Runtime's own.
    """
    try:
        model = load_model(path, external_data=False)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged or no ONNX file ({error}); put a whole copy in its place") from error
    graph, size = model.graph, options.image_size
    opset = {_domain(entry.domain): entry.version for entry in model.opset_import}.get("", 0)
    foreign = sorted({node.domain for part in _graphs(graph) for node in part.node} - set(DOMAINS))
    if problem := _problem(graph, size):
        raise CheckpointError(f"{path}: {problem}")
    if foreign or model.functions:
        named = foreign[0] if foreign else f"function {model.functions[0].name}"
        raise CheckpointError(f"{path}: has operators of its own ({named}), which nothing here can verify")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(graph)):
        raise CheckpointError(
            f"{path}: keeps tensors in other files, which its digest says nothing of; write them into one: "
            f"python -c \"import onnx; onnx.save(onnx.load('{path}'), 'whole.onnx')\""
        )
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise CheckpointError(f"{path}: has operators of ONNX's set {opset}; sets {OLDEST_OPSET} to {newest} are known")
    return ReadyGraph(path, model, options)


def _problem(graph: onnx.GraphProto, size: int) -> str | None:
    """Say what keeps a graph from taking images [B, 3, S, S] and giving a foreground [B, 1, S, S]."""
    inputs = _inputs(graph)
    if len(inputs) != 1 or not graph.output:
        names = ", ".join(value.name for value in inputs)
        return f"has {len(inputs)} inputs ({names}) and {len(graph.output)} outputs; IS-Net has one input and an output"
    for what, value, channels in (("input", inputs[0], 3), ("first output", graph.output[0], 1)):
        kind = value.type.tensor_type
        shape = [axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim]
        expected = (1, channels, size, size)
        fits = len(shape) == 4 and all(isinstance(a, str) or a == b for a, b in zip(shape, expected, strict=True))
        if kind.elem_type != TensorProto.FLOAT or not fits:
            element = {number: name for name, number in TensorProto.DataType.items()}.get(
                kind.elem_type, "of no known type"
            )
            side = shape[-1] if shape else size
            other = isinstance(side, int) and side != size and shape[1:] == [channels, side, side]
            hint = f"; use --image-size {side}" if other else ""
            return f"its {what} {value.name} is {element} {shape} instead of FLOAT {list(expected)}{hint}"
    return None


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no weights; older files list those as well."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those within its loops and branches."""
    yield graph
    for node in graph.node:
        for inner in _bodies(node):
            yield from _graphs(inner)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors that a graph holds."""
    for part in _graphs(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors, attribute.sparse_tensor.values)


def _rename(graph: onnx.GraphProto) -> None:
    """Put the prefix before all names of a graph; what is noted of types between its nodes goes."""
    for part in _graphs(graph):
        part.ClearField("value_info")
        for named in (*part.input, *part.output, *part.initializer, *(each.values for each in part.sparse_initializer)):
            named.name = PREFIX + named.name
        for node in part.node:
            node.name = node.name and PREFIX + node.name
            for names in (node.input, node.output):
                names[:] = [name and PREFIX + name for name in names]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, those within its loops and branches among them."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        yield from (value.name for value in body.output)


def _needed_nodes(graph: onnx.GraphProto, wanted: str) -> list[onnx.NodeProto]:
    """Return the nodes that an output needs, each behind those that it reads from: files need not have them so."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    if wanted not in makers:
        raise CheckpointError(f"nothing in it makes its output {wanted}; take another file")
    reads = [sorted({makers[name] for name in _reads(node) if name in makers}) for node in graph.node]
    order: list[int] = []
    entered, done, waiting = set(), set(), [makers[wanted]]
    while waiting:
        index = waiting[-1]
        missing = [other for other in reads[index] if other not in done]
        if index in done or not missing:
            waiting.pop()
            order += [] if index in done else [index]
            done.add(index)
        elif index in entered:
            raise CheckpointError(f"its node {graph.node[index].name} waits for its own output; take another file")
        else:
            entered.add(index)
            waiting += missing
    return [graph.node[index] for index in order]

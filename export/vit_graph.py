"""Writes a vision transformer's ONNX graph straight from its weights: no tracing, no PyTorch.

The builder decides every type. Half precision: linear layers, attention products and activations in fp16; residual
stream, LayerNorm, softmax and the image embedding in fp32, as under PyTorch's autocast.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .options import ACTIVATIONS, ATTENTIONS, IMAGE_OUTPUTS, PRECISIONS, ExportOptions
from .state_dict import CheckpointError
from .vision_transformer import Affine, Block, VisionTransformer

Array = NDArray[np.float32]

# Part of every cache key: raise it whenever the graph changes.
BUILDER_VERSION = 5
OPSET = 20
IR_VERSION = 10

LINEAR_LAYERS = ("qkv", "proj", "fc1", "fc2")  # of every block
PADDING = 16  # columns
IN_FP32 = "take fp32: zsad-export --precision fp32, zsad-infer --network-precision fp32"


def bicubic_matrix(source: int, target: int, scale: float, antialias: bool = False) -> NDArray[np.float64]:
    """Return the weights [target, source] of a bicubic resize with half-pixel centres.

    scale: target over source length as the coordinates use it. Plain: a = −0.75, samples outside are taken from the
    border. antialias: a = −0.5, the kernel as wide as a target pixel when shrinking, samples outside left out (Pillow's
    filter, `antialias=True` in PyTorch).
    """
    a = -0.5 if antialias else -0.75
    width = max(1.0, 1 / scale) if antialias else 1.0
    centre = (np.arange(target) + 0.5) / scale - 0.5
    left = np.floor(centre).astype(int)
    reach = math.ceil(2 * width)
    weights: NDArray[np.float64] = np.zeros((target, source))
    for tap in range(1 - reach, reach + 1):
        distance = np.abs(centre - (left + tap)) / width
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        value = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        if antialias:
            value = np.where((left + tap >= 0) & (left + tap < source), value, 0)
        np.add.at(weights, (np.arange(target), np.clip(left + tap, 0, source - 1)), value)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def resize_positions(vit: VisionTransformer, grid: int, antialias: bool | None = None) -> Array:
    """Return the position embedding for a grid × grid image, [1 + grid², C], class token first.

    antialias overrides the architecture's own way.
    """
    stored = math.isqrt(len(vit.positions) - 1)
    if stored == grid:
        return vit.positions
    smooth = vit.architecture.antialias if antialias is None else antialias
    matrix = bicubic_matrix(stored, grid, (grid + vit.architecture.position_offset) / stored, smooth)
    maps = vit.positions[1:].reshape(stored, stored, -1)  # [G, G, C]
    resized = np.einsum("yi,xj,ijc->yxc", matrix, matrix, maps, optimize=True)
    return np.concatenate([vit.positions[:1], resized.reshape(grid * grid, -1)]).astype(np.float32)


class _Graph:
    """Collects nodes and initializers; every method returns the name of its result.

    Names that `narrow` returns carry the type of the linear layers; everything else is fp32. exact: names of linear
    layers (`block0.fc1`) that stay in fp32 where the others are int8.
    """

    def __init__(self, precision: str, fused: bool, exact: Collection[str] = ()) -> None:
        self.precision, self.fused, self.exact = precision, fused, exact
        self.dtype = np.float16 if precision == "fp16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.domains = {""}
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, value: Any, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def shared(self, value: Any, name: str) -> str:
        """A constant that several nodes read."""
        known = any(tensor.name == name for tensor in self.initializers)
        return name if known else self.constant(value, name)

    def weight(self, value: Array, name: str) -> str:
        if np.abs(value).max(initial=0) > np.finfo(self.dtype).max:
            raise CheckpointError(f"{name} holds values beyond the range of {self.precision}; {IN_FP32}")
        return self.constant(np.ascontiguousarray(value.astype(self.dtype)), name)

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.domains.add(domain)
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def cast(self, x: str, to: int, name: str) -> str:
        return self.node("Cast", [x], name, to=to) if self.precision == "fp16" else x

    def narrow(self, x: str) -> str:
        """fp32 → the type of the linear layers."""
        return self.cast(x, TensorProto.FLOAT16, x + ".half")

    def widen(self, x: str) -> str:
        """The type of the linear layers → fp32."""
        return self.cast(x, TensorProto.FLOAT, x + ".float")

    def embed(self, images: str, vit: VisionTransformer, grid: int, antialias: bool | None) -> str:
        """The residual stream [B, T, C] in front of the first block."""
        patch_inputs = [self.narrow(images), self.weight(vit.patch_weight, "patch.weight")]
        if vit.patch_bias is not None:
            patch_inputs.append(self.weight(vit.patch_bias, "patch.bias"))
        size = [vit.patch_size] * 2
        x = self.node("Conv", patch_inputs, "patch.conv", kernel_shape=size, strides=size)
        x = self.node("Reshape", [x, self.constant(np.array([0, vit.width, grid * grid]), "patch.shape")], "patch.flat")
        x = self.widen(self.node("Transpose", [x], "patch", perm=[0, 2, 1]))
        # Zero rows in front receive class token and registers together with the positions: no Expand, any batch.
        positions = resize_positions(vit, grid, antialias)
        front = np.concatenate([vit.class_token[None] + positions[:1], vit.registers])
        x = self.node("Pad", [x, self.constant(np.array([0, len(front), 0, 0, 0, 0]), "front.pads")], "front")
        x = self.node("Add", [x, self.constant(np.concatenate([front, positions[1:]])[None], "positions")], "embedded")
        return x if vit.pre_norm is None else self.layer_norm(x, vit.pre_norm, vit.architecture.norm_eps, "pre_norm")

    def linear(self, x: str, affine: Affine, name: str) -> str:
        if self.precision == "int8" and name not in self.exact:
            return self.quantised_linear(x, affine, name)
        if self.fused and self.precision != "fp16":
            return self.padded_linear(x, affine, name)
        weight, bias = affine
        product = self.node("MatMul", [x, self.weight(weight.T, name + ".weight")], name + ".product")
        return self.node("Add", [product, self.weight(bias, name + ".bias")], name)

    def padded_linear(self, x: str, affine: Affine, name: str) -> str:
        """A product whose input gains columns of ones; the first of them multiplies the bias.

        ONNX Runtime's CPU product reads a dozen rows of its left side at a time. Rows of 1024 or 4096 floats start at
        multiples of 4096 bytes and so fall into one set of the first-level cache: 66 GFLOP/s on a core of an EPYC with
        AVX-512, with the additional columns 93. And the bias costs no pass over the output.
        """
        weight, bias = affine
        columns = np.zeros((len(bias), PADDING), np.float32)
        columns[:, 0] = bias
        widths, one = self.shared(np.array([0, 0, 0, 0, 0, PADDING]), "padding"), self.shared(np.float32(1), "one")
        padded = self.node("Pad", [x, widths, one], name + ".input")
        return self.node("MatMul", [padded, self.weight(np.hstack([weight, columns]).T, name + ".weight")], name)

    def quantised_linear(self, x: str, affine: Affine, name: str) -> str:
        """A product in 8 bits: weights with a scale per output, activations with one that is found as they come.

        One scale for all weights of a layer is no faster, and tokens of DINOv2 ViT-S/14 fall to a cosine of 0.96.
        MatMulNBits (a scale for every 32 inputs) errs a tenth as much but takes 2.5 times as long with AVX-512 VNNI,
        unsigned weights 2.3 times. Layers that one scale for all activations would spoil belong in `exact`, and so do
        those in which the 16-bit sums of a processor without VNNI overflow.
        """
        weight, bias = affine
        scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny) / np.float32(127)
        levels = np.ascontiguousarray(np.rint(weight / scale[:, None]).T.astype(np.int8))
        inputs = [
            x,
            self.constant(levels, name + ".weight"),
            self.constant(scale, name + ".scale"),
            "",
            self.constant(bias, name + ".bias"),
        ]
        return self.node("DynamicQuantizeMatMul", inputs, name, "com.microsoft")

    def layer_norm(self, x: str, affine: Affine, eps: float, name: str) -> str:
        weight, bias = affine
        inputs = [x, self.constant(weight, name + ".weight"), self.constant(bias, name + ".bias")]
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=eps)

    def activation(self, x: str, kind: str, name: str) -> str:
        if kind == "gelu":
            return self.node("Gelu", [x], name)
        slope = self.constant(self.dtype(1.702), name + ".slope")
        return self.node(
            "Mul", [x, self.node("Sigmoid", [self.node("Mul", [x, slope], name + ".scaled")], name + ".gate")], name
        )

    def split(self, x: str, parts: Sequence[str], name: str) -> list[str]:
        """Cut the channels of x [B, T, C] into equal parts."""
        outputs = [f"{name}.{part}" for part in parts]
        self.nodes.append(
            helper.make_node("Split", [x], outputs, name=name + ".split", axis=2, num_outputs=len(outputs))
        )
        return outputs

    def attention(self, x: str, qkv: Affine, heads: int, name: str) -> str:
        """Self-attention of x [B, T, C] up to the concatenated heads."""
        weight, bias = qkv
        width = len(bias) // 3
        if not self.fused:
            # Queries are scaled in the weights, as TensorRT's fusion wants it: before the first product.
            scale = np.repeat(np.array([(width // heads) ** -0.5, 1, 1], np.float32), width)
            weight, bias = weight * scale[:, None], bias * scale
        packed = self.linear(x, (weight, bias), name + ".qkv")
        name += ".attention"
        parts = self.split(packed, ("query", "key", "value"), name)
        if self.fused:
            return self.node("MultiHeadAttention", parts, name, "com.microsoft", num_heads=heads)
        shape = self.constant(np.array([0, 0, heads, width // heads]), name + ".heads")
        query, key, value = (
            self.node("Transpose", [self.node("Reshape", [part, shape], part + ".split")], part + ".heads", perm=perm)
            for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        logits = self.widen(self.node("MatMul", [query, key], name + ".logits"))
        weights = self.narrow(self.node("Softmax", [logits], name + ".softmax", axis=-1))
        mixed = self.node("MatMul", [weights, value], name + ".mixed")
        merged = self.node("Transpose", [mixed], name + ".merged", perm=[0, 2, 1, 3])
        return self.node("Reshape", [merged, self.constant(np.array([0, 0, width]), name + ".width")], name)

    def feed_forward(self, x: str, block: Block, kind: str, name: str) -> str:
        """Two linear layers around the activation, or around the gate of a SwiGLU."""
        y = self.linear(x, block.fc1, name + ".fc1")
        if len(block.fc1[1]) == 2 * block.fc2[0].shape[1]:
            gate, value = self.split(y, ("gate", "value"), name + ".swiglu")
            silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], name + ".sigmoid")], name + ".silu")
            y = self.node("Mul", [silu, value], name + ".activation")
        else:
            y = self.activation(y, kind, name + ".activation")
        return self.linear(y, block.fc2, name + ".fc2")

    def block(self, x: str, block: Block, heads: int, kind: str, eps: float, name: str) -> str:
        """A whole block on the residual stream x [B, T, C]."""
        y = self.narrow(self.layer_norm(x, block.norm1, eps, name + ".norm1"))
        y = self.attention(y, block.qkv, heads, name)
        y = self.widen(self.linear(y, block.proj, name + ".proj"))
        x = self.node("Add", [x, y], name + ".residual")
        y = self.narrow(self.layer_norm(x, block.norm2, eps, name + ".norm2"))
        y = self.widen(self.feed_forward(y, block, kind, name))
        return self.node("Add", [x, y], name)

    def tap_norm(self, x: str, vit: VisionTransformer, name: str) -> str:
        """The residual stream as a tap shows it."""
        if not vit.architecture.normed_taps:
            return x
        return self.layer_norm(x, vit.norm, vit.architecture.norm_eps, name + ".norm")

    def patch_range(self, vit: VisionTransformer, patches: int) -> list[str]:
        """Start, end and axis of the patches, which stand behind class token and registers."""
        front = 1 + len(vit.registers)
        start, axis = self.constant(np.array([front]), "tap.start"), self.constant(np.array([1]), "tap.axis")
        return [start, self.constant(np.array([front + patches]), "tap.end"), axis]

    def patch_tokens(self, x: str, vit: VisionTransformer, patches: list[str], name: str) -> str:
        """What a tap gives of the residual stream [B, T, C]: [B, 1, P, C]."""
        y = self.narrow(self.node("Slice", [self.tap_norm(x, vit, name), *patches], name + ".patches"))
        return self.node("Unsqueeze", [y, patches[-1]], name)

    def class_embedding(self, x: str, vit: VisionTransformer, output: str) -> None:
        """The normed class token, projected to unit length where there is a projection: [B, D]."""
        zero = self.constant(np.array(0), "class.index")
        y = self.node("Gather", [x, zero], "class", axis=1)
        y = self.layer_norm(y, vit.norm, vit.architecture.norm_eps, "class.norm")
        if vit.projection is None:
            self.node("Identity", [y], output)
        else:
            y = self.node("MatMul", [y, self.constant(vit.projection, "projection")], "class.projected")
            self.node("LpNormalization", [y], output, axis=-1, p=2)


def build_vit_graph(
    vit: VisionTransformer,
    options: ExportOptions,
    exact: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Build the graph of an image tower.

    Input `images` [B, 3, S, S] fp32. Outputs, those of them that the options name: `tokens` [B, L, P, C] (after each
    block of `taps`; through the final norm where the architecture has them so; class and register tokens dropped; fp16
    if the precision is) and `embedding` [B, D] fp32 (DINOv2: normed class token; CLIP: projected class token of unit
    length). Without the embedding, blocks behind the last tap go.

    exact: linear layers of an int8 graph that stay in fp32 (`block0.fc1`), see `layers_in_fp32`. metadata: facts that
    are noted in the graph beside the options.

    Raises CheckpointError when taps, outputs, image size, activation, heads or precision do not fit the checkpoint.
    """
    heads = check_options(vit, options)
    size, grid = options.image_size, options.image_size // vit.patch_size
    graph = _Graph(options.precision, options.attention == "fused", exact)
    within = "image." if options.precision == "int8" else ""  # the loop over the batch, see `_take_images_singly`
    x = graph.embed(within + "images", vit, grid, options.antialias)
    patches = graph.patch_range(vit, grid * grid) if options.taps else []
    tapped = []
    last = len(vit.blocks) - 1 if options.embedding else options.taps[-1]
    for index, block in enumerate(vit.blocks[: last + 1]):
        x = graph.block(x, block, heads, options.activation, vit.architecture.norm_eps, f"block{index}")
        if index in options.taps:
            tapped.append(graph.patch_tokens(x, vit, patches, f"tap{index}"))

    outputs = []
    if tapped:
        graph.node("Concat", tapped, within + "tokens", axis=1)
        element = helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype))
        shape: list[str | int | None] = ["batch", len(tapped), grid * grid, vit.width]
        outputs.append(helper.make_tensor_value_info("tokens", element, shape))
    if options.embedding:
        graph.class_embedding(x, vit, within + "embedding")
        dimension = vit.width if vit.projection is None else vit.projection.shape[1]
        outputs.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", dimension]))

    if options.precision == "int8":
        _take_images_singly(graph, outputs, size)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])
    model = _model(graph, vit.architecture.name, [images], outputs)
    facts = {
        "architecture": vit.architecture.name,
        "taps": ",".join(map(str, options.taps)),
        "activation": options.activation,
        "image_size": str(size),
        "grid": str(grid),
        "precision": options.precision,
        "attention": options.attention,
        **({"exact": ",".join(exact)} if options.precision == "int8" else {}),
        **(metadata or {}),
    }
    helper.set_model_props(model, facts)
    return model


def build_stem_graph(vit: VisionTransformer, image_size: int, antialias: bool | None) -> onnx.ModelProto:
    """Build the fp32 graph in front of the blocks: `images` [B, 3, S, S] to the residual stream `x` [B, T, C]."""
    graph = _Graph("fp32", fused=True)
    graph.node("Identity", [graph.embed("images", vit, image_size // vit.patch_size, antialias)], "x")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, image_size, image_size])
    return _model(graph, "stem", [images], [_stream("x", vit)])


def build_block_graph(
    vit: VisionTransformer, index: int, activation: str, heads: int, exact: Collection[str]
) -> onnx.ModelProto:
    """Build one block in int8: the residual stream `x` [B, T, C] to `y` behind it and `tap` [B, T, C].

    exact: the linear layers that stay in fp32. The tap holds all tokens.
    """
    graph = _Graph("int8", fused=True, exact=exact)
    y = graph.block("x", vit.blocks[index], heads, activation, vit.architecture.norm_eps, f"block{index}")
    graph.node("Identity", [y], "y")
    graph.node("Identity", [graph.tap_norm(y, vit, "tap")], "tap")
    return _model(graph, "block", [_stream("x", vit)], [_stream("y", vit), _stream("tap", vit)])


def _stream(name: str, vit: VisionTransformer) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", vit.width])


def _model(
    graph: _Graph, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(graph.nodes, name, inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid(domain, 1 if domain else OPSET) for domain in sorted(graph.domains)],
        ir_version=IR_VERSION,
        producer_name="zsad",
    )


def _take_images_singly(graph: _Graph, outputs: list[onnx.ValueInfoProto], image_size: int) -> None:
    """Put the nodes of a graph, which compute `image.tokens` from `image.images`, into a loop over the batch.

    All activations in front of an int8 layer share one scale: an image must not be rounded by its neighbours' range.
    """
    axis = graph.constant(np.array([0]), "image.axis")
    singles = []
    for output in outputs:
        single = graph.node("Squeeze", [f"image.{output.name}", axis], f"image.{output.name}.single")
        kind = output.type.tensor_type
        singles.append(
            helper.make_tensor_value_info(single, kind.elem_type, [size.dim_value for size in kind.shape.dim[1:]])
        )
    unsqueeze = helper.make_node("Unsqueeze", ["image", axis], ["image.images"])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [3, image_size, image_size])
    body = helper.make_graph([unsqueeze, *graph.nodes], "image", [image], singles)
    names = [output.name for output in outputs]
    graph.nodes = [helper.make_node("Scan", ["images"], names, name="images", body=body, num_scan_inputs=1)]


def check_options(vit: VisionTransformer, options: ExportOptions) -> int:
    """Return the number of attention heads; raises CheckpointError when an option does not fit the checkpoint."""
    taps, outputs, depth, size = list(options.taps), options.outputs, len(vit.blocks), options.image_size
    if not outputs or not set(outputs) <= set(IMAGE_OUTPUTS):
        raise CheckpointError(
            f"an image tower gives {' and '.join(IMAGE_OUTPUTS)}, not {', '.join(outputs) or 'nothing'}"
        )
    if "tokens" not in outputs and taps:
        raise CheckpointError(f"taps {taps} give tokens, which are not wanted; leave them out")
    if "tokens" in outputs and (not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth):
        raise CheckpointError(f"taps {taps} must be increasing block numbers from 0 to {depth - 1}")
    if size <= 0 or size % vit.patch_size:
        nearest = max(1, round(size / vit.patch_size)) * vit.patch_size
        raise CheckpointError(
            f"image size {size} is no multiple of the patch size {vit.patch_size}; use --image-size {nearest}"
        )
    for value, known in (
        (options.activation, ACTIVATIONS),
        (options.precision, PRECISIONS),
        (options.attention, ATTENTIONS),
    ):
        if value not in known:
            raise CheckpointError(f"{value!r} must be one of {', '.join(known)}")
    return vit.architecture.attention_heads(vit.width, options.heads)

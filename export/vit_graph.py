"""Writes a vision transformer's ONNX graph straight from its weights: no tracing, no PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .state_dict import Affine, CheckpointError, VisionTransformer

Array = NDArray[np.float32]

# Part of every cache key: raise it whenever the graph changes.
BUILDER_VERSION = 1
OPSET = 20
IR_VERSION = 10

ACTIVATIONS = ("gelu", "quick_gelu")
HEAD_WIDTH = 64  # in every published DINOv2 and CLIP image tower


def bicubic_matrix(source: int, target: int, scale: float) -> NDArray[np.float64]:
    """Return the weights [target, source] of a bicubic resize without antialiasing (half-pixel centres, a = −0.75).

    scale: target over source length as the coordinates use it; samples outside are taken from the border.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) / scale - 0.5
    left = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        distance = np.abs(centre - (left + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(weights, (np.arange(target), np.clip(left + tap, 0, source - 1)), np.where(distance <= 1, near, far))
    return weights


def resize_positions(vit: VisionTransformer, grid: int) -> Array:
    """Return the position embedding for a grid × grid image, [1 + grid², C], class token first.

    DINOv2 offsets the scale by 0.1 patches as its own code does; CLIP uses the plain ratio.
    """
    stored = math.isqrt(len(vit.positions) - 1)
    if stored == grid:
        return vit.positions
    scale = (grid + 0.1) / stored if vit.architecture == "dinov2" else grid / stored
    matrix = bicubic_matrix(stored, grid, scale)
    maps = vit.positions[1:].reshape(stored, stored, -1)  # [G, G, C]
    resized = np.einsum("yi,xj,ijc->yxc", matrix, matrix, maps, optimize=True)
    return np.concatenate([vit.positions[:1], resized.reshape(grid * grid, -1)]).astype(np.float32)


class _Graph:
    """Collects nodes and initializers; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, value: Any, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def linear(self, x: str, affine: Affine, name: str) -> str:
        weight, bias = affine
        product = self.node(
            "MatMul", [x, self.constant(np.ascontiguousarray(weight.T), name + ".weight")], name + ".product"
        )
        return self.node("Add", [product, self.constant(bias, name + ".bias")], name)

    def layer_norm(self, x: str, affine: Affine, eps: float, name: str) -> str:
        weight, bias = affine
        inputs = [x, self.constant(weight, name + ".weight"), self.constant(bias, name + ".bias")]
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=eps)

    def activation(self, x: str, kind: str, name: str) -> str:
        if kind == "gelu":
            return self.node("Gelu", [x], name)
        scaled = self.node("Mul", [x, self.constant(np.float32(1.702), name + ".slope")], name + ".scaled")
        return self.node("Mul", [x, self.node("Sigmoid", [scaled], name + ".gate")], name)

    def attention(self, x: str, qkv: Affine, heads: int, name: str) -> str:
        packed = self.linear(x, qkv, name + ".qkv")
        parts = [name + suffix for suffix in (".query", ".key", ".value")]
        self.nodes.append(helper.make_node("Split", [packed], parts, name=name + ".split", axis=2, num_outputs=3))
        return self.node("MultiHeadAttention", parts, name, "com.microsoft", num_heads=heads)


def build_vit_graph(
    vit: VisionTransformer,
    taps: Sequence[int],
    image_size: int,
    activation: str = "gelu",
    heads: int | None = None,
    embedding: bool = True,
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """Build the fp32 graph that ONNX Runtime runs with fused attention.

    Input `images` [B, 3, S, S]; outputs `tokens` [B, L, P, C] (after each block of `taps`, 0-based; through the final
    norm for DINOv2, raw for CLIP; class and register tokens dropped) and, if `embedding`, `embedding` [B, D] (DINOv2:
    normed class token; CLIP: projected class token of unit length). Without it, blocks behind the last tap go.

    Raises CheckpointError when taps, image size, activation or heads do not fit the checkpoint.
    """
    taps = list(taps)
    depth = len(vit.blocks)
    if not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth:
        raise CheckpointError(f"taps {taps} must be increasing block numbers from 0 to {depth - 1}")
    if image_size <= 0 or image_size % vit.patch_size:
        nearest = max(1, round(image_size / vit.patch_size)) * vit.patch_size
        raise CheckpointError(
            f"image size {image_size} is no multiple of the patch size {vit.patch_size}; use --image-size {nearest}"
        )
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    heads = heads if heads is not None else vit.width // HEAD_WIDTH
    if heads < 1 or vit.width % heads:
        raise CheckpointError(
            f"{heads} attention heads do not divide a width of {vit.width}; name the number with `heads`"
        )

    grid = image_size // vit.patch_size
    extra = 1 + len(vit.registers)  # class token and registers stand before the patches
    graph = _Graph()

    patch_inputs = ["images", graph.constant(vit.patch_weight, "patch.weight")]
    if vit.patch_bias is not None:
        patch_inputs.append(graph.constant(vit.patch_bias, "patch.bias"))
    size = [vit.patch_size] * 2
    x = graph.node("Conv", patch_inputs, "patch.conv", kernel_shape=size, strides=size)
    x = graph.node("Reshape", [x, graph.constant(np.array([0, vit.width, grid * grid]), "patch.shape")], "patch.flat")
    x = graph.node("Transpose", [x], "patch", perm=[0, 2, 1])
    # Zero rows in front receive the class token and the registers together with the positions: no Expand, any batch.
    positions = resize_positions(vit, grid)
    front = np.concatenate([vit.class_token[None] + positions[:1], vit.registers])
    x = graph.node("Pad", [x, graph.constant(np.array([0, extra, 0, 0, 0, 0]), "front.pads")], "front")
    x = graph.node("Add", [x, graph.constant(np.concatenate([front, positions[1:]])[None], "positions")], "embedded")
    if vit.pre_norm is not None:
        x = graph.layer_norm(x, vit.pre_norm, vit.norm_eps, "pre_norm")

    starts, axis = graph.constant(np.array([extra]), "tap.start"), graph.constant(np.array([1]), "tap.axis")
    ends = graph.constant(np.array([extra + grid * grid]), "tap.end")
    tapped = []
    last = depth - 1 if embedding else taps[-1]
    for index, block in enumerate(vit.blocks[: last + 1]):
        name = f"block{index}"
        y = graph.layer_norm(x, block.norm1, vit.norm_eps, name + ".norm1")
        y = graph.attention(y, block.qkv, heads, name + ".attention")
        x = graph.node("Add", [x, graph.linear(y, block.proj, name + ".proj")], name + ".residual")
        y = graph.layer_norm(x, block.norm2, vit.norm_eps, name + ".norm2")
        y = graph.activation(graph.linear(y, block.fc1, name + ".fc1"), activation, name + ".activation")
        x = graph.node("Add", [x, graph.linear(y, block.fc2, name + ".fc2")], name)
        if index in taps:
            tap = f"tap{index}"
            y = graph.layer_norm(x, vit.norm, vit.norm_eps, tap + ".norm") if vit.architecture == "dinov2" else x
            y = graph.node("Slice", [y, starts, ends, axis], tap + ".patches")
            tapped.append(graph.node("Unsqueeze", [y, axis], tap))
    graph.node("Concat", tapped, "tokens", axis=1)
    outputs = [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", len(taps), grid * grid, vit.width])]

    if embedding:
        zero = graph.constant(np.array(0), "class.index")
        y = graph.layer_norm(graph.node("Gather", [x, zero], "class", axis=1), vit.norm, vit.norm_eps, "class.norm")
        if vit.projection is None:
            graph.node("Identity", [y], "embedding")
        else:
            y = graph.node("MatMul", [y, graph.constant(vit.projection, "projection")], "class.projected")
            graph.node("LpNormalization", [y], "embedding", axis=-1, p=2)
        dimension = vit.width if vit.projection is None else vit.projection.shape[1]
        outputs.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", dimension]))

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, image_size, image_size])
    model = helper.make_model(
        helper.make_graph(graph.nodes, vit.architecture, [images], outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=IR_VERSION,
        producer_name="zsad",
    )
    facts = {
        "architecture": vit.architecture,
        "taps": ",".join(map(str, taps)),
        "activation": activation,
        "image_size": str(image_size),
        "grid": str(grid),
        **(metadata or {}),
    }
    helper.set_model_props(model, facts)
    return model

"""Image towers that zsad's own native code runs on a CPU: their weights as that wants them, in an ONNX file.

The file holds a single node of a domain that no library knows. What it holds besides are the graph's usual inputs,
outputs and facts.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from zsad.kernels.cpu.arrays import aligned_empty
from zsad.kernels.cpu.native import _cpu
from zsad.kernels.machine import available_cores

from .options import NATIVE_OUTPUTS, ExportOptions
from .state_dict import CheckpointError
from .transformer import Affine, Array, Block
from .transformer_graph import IR_VERSION, LINEAR_LAYERS, OPSET, weight_codes
from .vision_transformer import VisionTransformer
from .vit_graph import check_options, resize_positions

COLUMNS, FILL = 16, 64  # what outputs and inputs of layers are filled up to, as the native code has them
DOMAIN, OPERATOR = "zsad", "ImageTower"
Packed = dict[str, NDArray[Any]]


def pack_floats(affine: Affine, name: str) -> Packed:
    """Return a linear layer [N, K] in panels of 16 outputs, filled up with zeros: weights [N / 16, K, 16], bias."""
    weight, bias = _filled(affine)
    panels = weight.reshape(-1, COLUMNS, weight.shape[1]).transpose(0, 2, 1)
    return {name + ".weight": np.ascontiguousarray(panels), name + ".bias": bias}


def pack_codes(affine: Affine, name: str) -> Packed:
    """Return a linear layer [N, K] as 8-bit codes [N / 16, K / 4, 16, 4] and a scale per output, with zeros behind."""
    weight, bias = _filled(affine)
    codes, scales = weight_codes(weight)
    sums = scales * codes.sum(axis=1, dtype=np.int32)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % FILL)))
    panels = codes.reshape(-1, COLUMNS, codes.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return {
        name + ".codes": np.ascontiguousarray(panels),
        name + ".scales": scales,
        name + ".sums": sums.astype(np.float32),
        name + ".bias": bias,
    }


def _filled(affine: Affine) -> Affine:
    weight, bias = affine
    missing = -len(bias) % COLUMNS
    return np.pad(weight, ((0, missing), (0, 0))), np.pad(bias, (0, missing))


def tower_arrays(vit: VisionTransformer, options: ExportOptions, exact: Collection[str]) -> Packed:
    """Return what the native code reads of a tower's weights; exact: as for `build_native_graph`."""
    grid = options.image_size // vit.patch_size
    positions = resize_positions(vit, grid, options.antialias)
    front = np.concatenate([vit.class_token[None] + positions[:1], vit.registers])
    rest = positions[1:] if vit.patch_bias is None else positions[1:] + vit.patch_bias
    patches = vit.patch_weight.reshape(vit.width, -1)
    arrays = pack_floats((patches, np.zeros(vit.width, np.float32)), "patches")
    arrays["positions"] = np.concatenate([front, rest]).astype(np.float32)
    for name, norm in (("norm", vit.norm), ("pre_norm", vit.pre_norm)):
        if norm is not None:
            arrays |= _norm(norm, name)
    arrays |= {f"class_{name}": array for name, array in _norm(vit.class_norm, "norm").items()}
    if vit.projection is not None:
        arrays["projection"] = vit.projection
    if vit.architecture.rotary:
        angles = vit.angles(vit.attention_heads(options.heads), grid)
        arrays |= {"cosine": np.cos(angles).astype(np.float32), "sine": np.sin(angles).astype(np.float32)}
    for index, block in enumerate(vit.blocks[: options.depth(len(vit.blocks))]):
        arrays |= _block(block, f"block{index}", options.precision == "int8", exact)
    return arrays


def _norm(norm: Affine, name: str) -> Packed:
    return {name + ".weight": norm[0], name + ".bias": norm[1]}


def _block(block: Block, name: str, int8: bool, exact: Collection[str]) -> Packed:
    arrays = {**_norm(block.norm1, name + ".norm1"), **_norm(block.norm2, name + ".norm2")}
    arrays[name + ".hidden"] = np.array([block.fc2[0].shape[1]], np.int32)
    for layer in LINEAR_LAYERS:
        own, affine = f"{name}.{layer}", getattr(block, layer)
        arrays |= pack_codes(affine, own) if int8 and own not in exact else pack_floats(affine, own)
    return arrays


def check_native_options(vit: VisionTransformer, options: ExportOptions) -> None:
    """Raise CheckpointError where an option fits neither the checkpoint nor what the native code can do."""
    heads = check_options(vit, options)
    if foreign := set(options.outputs) - set(NATIVE_OUTPUTS):
        raise CheckpointError(f"{', '.join(sorted(foreign))} are not to be had natively; use --attention fused")
    if _cpu is None:
        raise CheckpointError("zsad was installed without a compiler: there is no native code; use --attention fused")
    if options.precision == "fp16" or vit.width // heads > _cpu.WIDEST_HEAD:
        raise CheckpointError(
            f"natively there are fp32 and int8 with heads up to {_cpu.WIDEST_HEAD} wide; use --attention fused"
        )


def build_native_graph(
    vit: VisionTransformer, options: ExportOptions, exact: Collection[str], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Build the file of an image tower, with inputs and outputs as those of `build_vit_graph`.

    exact: linear layers of an int8 tower that stay in fp32 (`block0.fc1`).
    """
    depth, last = options.depth(len(vit.blocks)), len(vit.blocks) - 1
    gated = len(vit.blocks[0].fc1[1]) == 2 * vit.blocks[0].fc2[0].shape[1]
    size, grid = options.image_size, options.image_size // vit.patch_size
    arrays = tower_arrays(vit, options, exact)
    outputs: dict[str, list[str | int | None]] = {
        "tokens": ["batch", len(options.taps), grid * grid, vit.width],
        "embedding": ["batch", vit.width if vit.projection is None else vit.projection.shape[1]],
        "patches": ["batch", grid * grid, vit.width],
    }
    wanted = [name for name in NATIVE_OUTPUTS if name in options.outputs]
    node = helper.make_node(
        OPERATOR,
        ["images", *arrays],
        wanted,
        domain=DOMAIN,
        width_and_heads=[vit.width, vit.attention_heads(options.heads)],
        patch_and_grid=[vit.patch_size, grid],
        front=1 + len(vit.registers),
        eps=vit.architecture.norm_eps,
        activation="swiglu" if gated else options.activation,
        int8=int(options.precision == "int8"),
        depth=depth,
        only_first=int(depth == last + 1 and last not in options.taps and "patches" not in options.outputs),
        normed=int(vit.architecture.normed_taps),
    )
    node.attribute.append(helper.make_attribute("taps", options.taps, attr_type=onnx.AttributeProto.INTS))
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, outputs[name]) for name in wanted]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = helper.make_model(
        helper.make_graph([node], vit.architecture.name, inputs, given, initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="zsad",
    )
    helper.set_model_props(model, {"precision": options.precision, "exact": ",".join(exact), **metadata})
    return model


class NativeTower:
    """An image tower, ready to run. inputs, outputs: their shapes, without the batch."""

    def __init__(self, path: Path, threads: int | None = None, instruction_set: str = "") -> None:
        """threads: as many as there are cores, if not given. instruction_set: the best that there is."""
        model = onnx.load(str(path))
        [node] = model.graph.node
        facts = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        arrays = {tensor.name: _aligned(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
        self.inputs, self.outputs = (
            {value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim[1:]) for value in values}
            for values in (model.graph.input, model.graph.output)
        )
        self._norm = arrays["class_norm.weight"], arrays["class_norm.bias"]
        self._projection: Array | None = arrays.get("projection")
        self._eps, self._width = facts["eps"], facts["width_and_heads"][0]
        blocks = facts["depth"]
        sizes = {name: int(array[0]) for name, array in arrays.items() if name.endswith(".hidden")}
        self._tower = _cpu.ImageTower(
            tuple(facts["width_and_heads"]),
            tuple(facts["patch_and_grid"]),
            facts["front"],
            facts["eps"],
            facts["activation"].decode(),
            bool(facts["int8"]),
            blocks,
            {**arrays, **sizes},
        )
        self._how = (blocks, bool(facts["only_first"]), threads or available_cores(), instruction_set)
        self._taps, self._normed = list(facts["taps"]), bool(facts["normed"])

    def run(self, images: Array) -> dict[str, Array]:
        """Return the outputs for images [B, 3, S, S]."""
        images = np.ascontiguousarray(images, np.float32)
        outputs = {
            name: np.empty((len(images), *shape), np.float32)
            for name, shape in self.outputs.items()
            if name != "embedding"
        }
        grid_tokens = outputs.get("tokens")
        if grid_tokens is None:
            size = self._tower.patches
            grid_tokens = np.empty((len(images), 0, size, self._width), np.float32)
        classes = np.empty((len(images), self._width), np.float32) if "embedding" in self.outputs else None
        self._tower.forward(images, self._taps, self._normed, grid_tokens, outputs.get("patches"), classes, *self._how)
        if classes is not None:
            outputs["embedding"] = self._embedding(classes)
        return {name: outputs[name] for name in self.outputs}

    def _embedding(self, classes: Array) -> Array:
        """The class tokens [B, C] normed, projected to unit length where there is a projection: [B, D]."""
        centred = classes - classes.mean(axis=1, keepdims=True)
        weight, bias = self._norm
        deviation = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(self._eps))
        normed: Array = centred / deviation * weight + bias
        if self._projection is None:
            return normed
        projected: Array = normed @ self._projection
        return np.asarray(projected / np.linalg.norm(projected, axis=1, keepdims=True), np.float32)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy

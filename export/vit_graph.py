"""Writes the ONNX graph of an image tower, a vision transformer."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .options import IMAGE_OUTPUTS, NATIVE, WINDOWS, ExportOptions
from .state_dict import CheckpointError
from .transformer import Affine, Array
from .transformer_graph import LINEAR_LAYERS, TransformerGraph, check_choices, finished_model, weight_codes
from .vision_transformer import VisionTransformer

# Tokens of windows that go through the blocks at once on a CPU. With all of an image's, 980 and 1690 for WinCLIP, fp32
# takes 4 % more time and int8 45 %; with 150 at once fp32 takes 8 % more.
WINDOW_TOKENS = 600


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

    Zeros where positions are rotary. antialias overrides the architecture's own way.
    """
    if vit.architecture.rotary:
        return np.zeros((1 + grid * grid, vit.width), np.float32)
    stored = math.isqrt(len(vit.positions) - 1)
    if stored == grid:
        return vit.positions
    smooth = vit.architecture.antialias if antialias is None else antialias
    matrix = bicubic_matrix(stored, grid, (grid + vit.architecture.position_offset) / stored, smooth)
    maps = vit.positions[1:].reshape(stored, stored, -1)  # [G, G, C]
    resized = np.einsum("yi,xj,ijc->yxc", matrix, matrix, maps, optimize=True)
    return np.concatenate([vit.positions[:1], resized.reshape(grid * grid, -1)]).astype(np.float32)


class ImageTowerGraph(TransformerGraph):
    """The graph of an image tower."""

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

    def tap_norm(self, x: str, vit: VisionTransformer, name: str) -> str:
        """The residual stream as a tap shows it."""
        if not vit.architecture.normed_taps:
            return x
        return self.layer_norm(x, vit.norm, vit.architecture.norm_eps, name + ".norm")

    def patches(self, x: str, vit: VisionTransformer, patches: int, name: str) -> str:
        """The patches [B, P, C] of a stream [B, T, C], where they stand behind class token and registers."""
        front = 1 + len(vit.registers)
        return self.narrow(self.cut(x, front, front + patches, name))

    def patch_tokens(self, x: str, vit: VisionTransformer, patches: int, name: str) -> str:
        """What a tap gives of the residual stream [B, T, C]: [B, 1, P, C]."""
        y = self.patches(self.tap_norm(x, vit, name), vit, patches, name + ".patches")
        return self.node("Unsqueeze", [y, self.constant(np.array([1]), "at.1")], name)

    def trunk(
        self, x: str, packed: str, vit: VisionTransformer, options: ExportOptions, depth: int, whole: bool
    ) -> Iterator[str]:
        """Yield the residual stream behind each of the first `depth` blocks.

        packed: what the first block makes of x (see `packed`). whole: of the tower's last block all tokens are wanted,
        not only the class token, for which a third of the products will do.
        """
        heads, last = vit.attention_heads(options.heads), len(vit.blocks) - 1
        for index, block in enumerate(vit.blocks[:depth]):
            only_first = index == last and not whole
            eps, name = vit.architecture.norm_eps, f"block{index}"
            x = self.block(x, block, heads, options.activation, eps, name, "" if index else packed, only_first)
            yield x

    def class_vector(self, x: str, vit: VisionTransformer) -> str:
        """The normed class token, projected where there is a projection: [B, D]."""
        zero = self.constant(np.array(0), "class.index")
        y = self.node("Gather", [x, zero], "class", axis=1)
        y = self.layer_norm(y, vit.class_norm, vit.architecture.norm_eps, "class.norm")
        if vit.projection is None:
            return y
        return self.node("MatMul", [y, self.constant(vit.projection, "projection")], "class.projected")

    def class_embedding(self, x: str, vit: VisionTransformer, output: str) -> None:
        """The class token's vector, of unit length where it is projected: [B, D]."""
        y = self.class_vector(x, vit)
        if vit.projection is None:
            self.node("Identity", [y], output)
        else:
            self.node("LpNormalization", [y], output, axis=-1, p=2)

    def windows(self, x: str, rows: str, size: Sequence[int], name: str) -> str:
        """What an image has of its tokens, [B, T, width], as what its windows have of theirs: [-1, *size].

        rows: the tokens of each window, [W, T']. size: ends with T' and width.
        """
        y = self.node("Gather", [x, rows], name + ".gathered", axis=1)
        return self.node("Reshape", [y, self.constant(np.array([-1, *size]), "x".join(map(str, size)))], name)


class NativelyRoundedGraph(ImageTowerGraph):
    """The graph of an image tower whose int8 layers round as the native code does, before products in fp32."""

    def quantised_linear(self, x: str, affine: Affine, name: str) -> str:
        """Weights with a scale per output, activations with a scale and an offset per token."""
        weight, bias = affine
        codes, scale = weight_codes(weight)
        axis, levels = self.constant(np.array([-1]), "channels"), self.constant(np.float32(255), "levels")
        least, most = (self.node(f"Reduce{end}", [x, axis], f"{name}.{end}", keepdims=1) for end in ("Min", "Max"))
        step = self.node("Div", [self.node("Sub", [most, least], name + ".range"), levels], name + ".step")
        step = self.node("Max", [step, self.constant(np.finfo(np.float32).tiny, "tiny")], name + ".positive")
        code = self.node("Div", [self.node("Sub", [x, least], name + ".above"), step], name + ".exact")
        code = self.node("Mul", [self.node("Round", [code], name + ".code"), step], name + ".steps")
        rounded = self.node("Add", [code, least], name + ".rounded")
        return self.plain_linear(rounded, (codes * scale[:, None], bias), name)


class WatchedGraph(ImageTowerGraph):
    """The fp32 graph of an image tower that hands out what its linear layers are applied to."""

    def linear(self, x: str, affine: Affine, name: str) -> str:
        self.node("Identity", [x], name + ".watched")
        return super().linear(x, affine, name)


def window_tokens(grid: int, side: int, front: int) -> NDArray[np.int64]:
    """Return which tokens of an image each side × side window of its patches holds: [W, front + side²].

    Windows and their patches in rows from the top left, one patch apart; front: tokens before the first patch, which
    are in every window.
    """
    corners = np.arange(grid - side + 1)
    starts = (corners[:, None] * grid + corners).reshape(-1, 1)  # [W, 1]
    within = (np.arange(side)[:, None] * grid + np.arange(side)).reshape(1, -1)
    every = np.broadcast_to(np.arange(front), (len(starts), front))
    return np.concatenate([every, front + starts + within], axis=1)


def build_vit_graph(
    vit: VisionTransformer,
    options: ExportOptions,
    exact: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Build the graph of an image tower.

    Input `images` [B, 3, S, S] fp32. Outputs, those of them that the options name: `tokens` [B, L, P, C] (after each
    block of `taps`; through the final norm where the architecture has them so; class and register tokens dropped; fp16
    if the precision is), `embedding` [B, D] fp32 (DINOv2: normed class token; CLIP: projected class token of unit
    length), `patches` [B, P, C] (the last block's tokens through the final norm, else as `tokens`), and `windows_2` and
    `windows_3` [B, W, D] fp32: for each window of 2 × 2 or 3 × 3 patches, W = (G - side + 1)² in rows, what `embedding`
    is of an image that has no other patches, before it is brought to unit length. Windows go through the same blocks as
    so many short images. Blocks that no output needs go.

    exact: linear layers of an int8 graph that stay in fp32 (`block0.fc1`), see `layers_in_fp32`. metadata: facts that
    are noted in the graph beside the options.

    Raises CheckpointError when taps, outputs, image size, activation, heads or precision do not fit the checkpoint.
    """
    heads = check_options(vit, options)
    size, grid = options.image_size, options.image_size // vit.patch_size
    angles = vit.angles(heads, grid) if vit.architecture.rotary else None
    graph = ImageTowerGraph(options.precision, options.attention == "fused", exact, angles=angles)
    singly = options.precision == "int8" and graph.fused
    within = "image." if singly else ""  # the loop over the batch, see `_take_images_singly`
    embedded = graph.embed(within + "images", vit, grid, options.antialias)
    # One token's queries, keys and values are the same in the image and in all windows that hold it.
    packed = graph.packed(embedded, vit.blocks[0], heads, vit.architecture.norm_eps, "block0")
    outputs, streams = _add_image(graph, (embedded, packed), vit, options, within), (embedded, packed)
    windows = [name for name in WINDOWS if name in options.outputs]
    if singly:
        kept = []
        if windows:  # outside the loop, for one of their own
            streams, tokens = ("stream", "stream.packed"), 1 + len(vit.registers) + grid * grid
            kept = [
                _floats(stream, ["batch", tokens, width])
                for stream, width in zip(streams, (vit.width, 3 * vit.width), strict=True)
            ]
            for own, stream in zip((embedded, packed), streams, strict=True):
                graph.node("Identity", [own], within + stream)
        _take_images_singly(graph, [*outputs, *kept], size)
    outputs += [_add_windows(graph, streams, vit, options, name) for name in windows]

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])
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
    return finished_model(graph, vit.architecture.name, [images], outputs, facts)


def _add_windows(
    graph: ImageTowerGraph, embedded: tuple[str, str], vit: VisionTransformer, options: ExportOptions, name: str
) -> onnx.ValueInfoProto:
    """Add the output `name` that the windows of one size have; the rest as for `_add_image`.

    On a CPU they go through the blocks part by part, in a loop over the parts of all images.
    """
    rows = window_tokens(options.image_size // vit.patch_size, WINDOWS[name], 1 + len(vit.registers))
    windows, length = rows.shape
    in_parts = graph.fused and options.precision != "fp16"
    parts = -(-rows.size // WINDOW_TOKENS) if in_parts else 1
    count = -(-windows // parts)
    # Where parts do not come out even, the last window is there several times.
    tokens = graph.constant(rows[np.minimum(np.arange(parts * count), windows - 1)], name + ".tokens")
    sizes = [[count] * in_parts + [length, width] for width in (vit.width, 3 * vit.width)]
    with graph.scope(name + "."):
        streams = [graph.windows(x, tokens, size, f"own.{size[-1]}") for x, size in zip(embedded, sizes, strict=True)]
        outside, inputs = graph.nodes, streams
        if in_parts:
            graph.nodes, inputs = [], [f"{stream}.part" for stream in streams]
        *_, x = graph.trunk(inputs[0], inputs[1], vit, options, len(vit.blocks), whole=False)
        x = graph.class_vector(x, vit)
        if in_parts:
            given = _floats(x, [count, _dimension(vit)])
            body = helper.make_graph(graph.nodes, name, list(map(_floats, inputs, sizes)), [given])
            graph.nodes = outside
            x = graph.node("Scan", streams, "parts", body=body, num_scan_inputs=2)
        shape = graph.constant(np.array([-1, parts * count, _dimension(vit)]), name + ".shape")
        x = graph.cut(graph.node("Reshape", [x, shape], "every"), 0, windows, "wanted")
    graph.node("Identity", [x], name)
    return _floats(name, ["batch", windows, _dimension(vit)])


def _add_image(
    graph: ImageTowerGraph, embedded: tuple[str, str], vit: VisionTransformer, options: ExportOptions, within: str
) -> list[onnx.ValueInfoProto]:
    """Add the outputs that the image as a whole has.

    embedded: its tokens [B, T, C] in front of the first block, and their queries, keys and values [B, T, 3C]. within:
    before the names of outputs.
    """
    patches = (options.image_size // vit.patch_size) ** 2
    element = helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype))
    tapped, outputs = [], []
    depth, last = options.depth(len(vit.blocks)), len(vit.blocks) - 1
    whole = last in options.taps or "patches" in options.outputs
    for index, x in enumerate(graph.trunk(*embedded, vit, options, depth, whole)):
        if index in options.taps:
            tapped.append(graph.patch_tokens(x, vit, patches, f"tap{index}"))
    if tapped:
        graph.node("Concat", tapped, within + "tokens", axis=1)
        shape: list[str | int | None] = ["batch", len(tapped), patches, vit.width]
        outputs.append(helper.make_tensor_value_info("tokens", element, shape))
    if "embedding" in options.outputs:
        graph.class_embedding(x, vit, within + "embedding")
        outputs.append(_floats("embedding", ["batch", _dimension(vit)]))
    if "patches" in options.outputs:
        normed = graph.layer_norm(x, vit.norm, vit.architecture.norm_eps, "patches.norm")
        graph.node("Identity", [graph.patches(normed, vit, patches, "patches.cut")], within + "patches")
        outputs.append(helper.make_tensor_value_info("patches", element, ["batch", patches, vit.width]))
    return outputs


def _dimension(vit: VisionTransformer) -> int:
    """The width of an embedding."""
    return vit.width if vit.projection is None else vit.projection.shape[1]


def build_stem_graph(vit: VisionTransformer, image_size: int, antialias: bool | None) -> onnx.ModelProto:
    """Build the fp32 graph in front of the blocks: `images` [B, 3, S, S] to the residual stream `x` [B, T, C]."""
    graph = ImageTowerGraph("fp32", fused=True)
    graph.node("Identity", [graph.embed("images", vit, image_size // vit.patch_size, antialias)], "x")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, image_size, image_size])
    return finished_model(graph, "stem", [images], [_stream("x", vit)])


def build_block_graph(
    vit: VisionTransformer, index: int, options: ExportOptions, grid: int, exact: Collection[str]
) -> onnx.ModelProto:
    """Build one block in int8: the residual stream `x` [B, T, C] to `y` behind it and `tap` [B, T, C].

    grid: patches per side, which rotary positions depend on. exact: the linear layers that stay in fp32. The tap holds
    all tokens.
    """
    heads, activation = vit.attention_heads(options.heads), options.activation
    angles = vit.angles(heads, grid) if vit.architecture.rotary else None
    kind = NativelyRoundedGraph if options.attention == NATIVE else ImageTowerGraph
    graph = kind("int8", options.attention != "standard", exact, angles=angles)
    y = graph.block("x", vit.blocks[index], heads, activation, vit.architecture.norm_eps, f"block{index}")
    graph.node("Identity", [y], "y")
    graph.node("Identity", [graph.tap_norm(y, vit, "tap")], "tap")
    return finished_model(graph, "block", [_stream("x", vit)], [_stream("y", vit), _stream("tap", vit)])


def build_watched_block_graph(vit: VisionTransformer, index: int, options: ExportOptions, grid: int) -> onnx.ModelProto:
    """Build one block in fp32: the residual stream `x` [B, T, C] to `y` behind it and each layer's input [B, T, K]."""
    heads, name = vit.attention_heads(options.heads), f"block{index}"
    angles = vit.angles(heads, grid) if vit.architecture.rotary else None
    graph = WatchedGraph("fp32", fused=True, angles=angles)
    y = graph.block("x", vit.blocks[index], heads, options.activation, vit.architecture.norm_eps, name)
    graph.node("Identity", [y], "y")
    inputs = [
        _floats(f"{name}.{layer}.watched", ["batch", "tokens", getattr(vit.blocks[index], layer)[0].shape[1]])
        for layer in LINEAR_LAYERS
    ]
    return finished_model(graph, "block", [_stream("x", vit)], [_stream("y", vit), *inputs])


def _stream(name: str, vit: VisionTransformer) -> onnx.ValueInfoProto:
    return _floats(name, ["batch", "tokens", vit.width])


def _floats(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _take_images_singly(graph: ImageTowerGraph, outputs: list[onnx.ValueInfoProto], image_size: int) -> None:
    """Put the nodes of a graph, which compute `image.tokens` from `image.images`, into a loop over the batch.

    All activations in front of an int8 layer of ONNX Runtime share one scale: an image must not be rounded by its
    neighbours' range.
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
        raise CheckpointError(f"an image tower gives {', '.join(IMAGE_OUTPUTS)}, not {', '.join(outputs) or 'nothing'}")
    if "tokens" not in outputs and taps:
        raise CheckpointError(f"taps {taps} give tokens, which are not wanted; leave them out")
    if "tokens" in outputs and (not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth):
        raise CheckpointError(f"taps {taps} must be increasing block numbers from 0 to {depth - 1}")
    if size <= 0 or size % vit.patch_size:
        nearest = max(1, round(size / vit.patch_size)) * vit.patch_size
        raise CheckpointError(
            f"image size {size} is no multiple of the patch size {vit.patch_size}; use --image-size {nearest}"
        )
    sides = [side for name, side in WINDOWS.items() if name in outputs]
    if sides and max(sides) * vit.patch_size > size:
        raise CheckpointError(
            f"an image of {size} pixels has no windows of {max(sides)} × {max(sides)} patches; use --image-size "
            f"{max(sides) * vit.patch_size} or more"
        )
    if sides and vit.architecture.rotary:
        raise CheckpointError(
            "windows are of towers that add positions to the tokens, not of rotary ones; leave them out"
        )
    if options.antialias is not None and vit.architecture.rotary:
        raise CheckpointError("antialias is of positions that are resized, and rotary ones are not; leave it out")
    check_choices(replace(options, attention="fused") if options.attention == NATIVE else options)
    return vit.attention_heads(options.heads)

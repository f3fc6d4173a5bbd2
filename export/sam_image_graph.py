"""Writes the ONNX graph of an image encoder of SAM or MobileSAM: images in, what the mask decoder reads out.

Tokens stay in rows of the whole grid. Windows are gathered from them behind queries, keys and values, so that linear
layers see no padding but one token that stands for all of it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from .options import SamImageOptions
from .sam import (
    CHANNEL_EPS,
    TINY_EPS,
    Convolution,
    Neck,
    SamBlock,
    SamEncoder,
    TinyBlock,
    TinyEncoder,
    relative_table,
    window_biases,
    window_places,
)
from .state_dict import CheckpointError
from .transformer import Affine, Block
from .transformer_graph import TransformerGraph, check_choices, finished_model

DOWN = 16  # pixels per token of the embedding, on a side
NAMES = {SamEncoder: "sam-image", TinyEncoder: "mobile-sam-image"}


class _Graph(TransformerGraph):
    """The graph of an image encoder."""

    def windows(self, packed: str, grid: int, side: int, width: int, name: str) -> str:
        """Queries, keys and values [B, grid² (+ 1), 3C] of windows: [-1, side², 3C]; the last token is the padding."""
        if side == grid:
            return packed
        places = self.constant(window_places(grid, side)[0], f"windows.{grid}.{side}")
        gathered = self.node("Gather", [packed, places], name + ".windows", axis=1)
        return self.reshape(gathered, (-1, side * side, 3 * width), name + ".qkv.windows")

    def grid(self, x: str, grid: int, side: int, width: int, name: str) -> str:
        """What windows have become, [-1, side², C], in rows of the grid: [B, grid², C]."""
        if side == grid:
            return x
        places, back = window_places(grid, side)
        together = self.reshape(x, (-1, len(places), width), name + ".together")
        return self.node("Gather", [together, self.constant(back, f"grid.{grid}.{side}")], name + ".grid", axis=1)

    def padding_token(self, x: str, grid: int, side: int, name: str) -> str:
        """Append the token of zeros that stands beyond the grid, where windows reach there: [B, grid² + 1, C]."""
        if grid % side == 0:
            return x
        return self.node("Pad", [x, self.constant(np.array([0, 0, 0, 0, 1, 0]), "one.token")], name + ".padded")

    def mix(self, logits: str, value: str, side: int, heads: int, width: int, name: str) -> str:
        """Softmax and the second product of attention in standard operators; value: [-1, side², C]."""
        tokens = side * side
        weights = self.narrow(self.node("Softmax", [self.widen(logits)], name + ".softmax", axis=-1))
        value = self.reshape(value, (-1, tokens, heads, width // heads), name + ".value.split")
        value = self.node("Transpose", [value], name + ".value.heads", perm=[0, 2, 1, 3])
        mixed = self.node("MatMul", [weights, value], name + ".mixed")
        merged = self.node("Transpose", [mixed], name + ".merged", perm=[0, 2, 1, 3])
        return self.reshape(merged, (-1, tokens, width), name + ".attention")

    def logits(self, query: str, key: str, side: int, heads: int, width: int, name: str) -> str:
        """The first product of attention in standard operators: [-1, heads, side², side²]."""
        shape = (-1, side * side, heads, width // heads)
        query, key = (
            self.node("Transpose", [self.reshape(part, shape, part + ".split")], part + ".heads", perm=perm)
            for part, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]))
        )
        return self.node("MatMul", [query, key], name + ".logits")

    def stream(self, x: str, mixed: str, block: Block, name: str) -> str:
        """The residual stream behind the attention, whose heads come in."""
        return self.node("Add", [x, self.widen(self.linear(mixed, block.proj, name + ".proj"))], name + ".residual")

    def fed_forward(self, x: str, block: Block, eps: float, name: str) -> str:
        """The residual stream behind both linear layers."""
        y = self.narrow(self.layer_norm(x, block.norm2, eps, name + ".norm2"))
        return self.node("Add", [x, self.widen(self.feed_forward(y, block, "gelu", name))], name)

    def channel_norm(self, x: str, affine: Affine, name: str) -> str:
        return self.layer_norm(self.widen(x), affine, CHANNEL_EPS, name)

    def neck(self, x: str, neck: Neck, grid: int) -> None:
        """The output `embedding` of tokens [B, grid², C]."""
        y = self.node("MatMul", [self.narrow(x), self.weight(neck.narrow.T, "neck.weight")], "neck")
        y = self.narrow(self.channel_norm(y, neck.norm1, "neck.norm1"))
        y = self.node("Transpose", [y], "neck.channels", perm=[0, 2, 1])
        y = self.reshape(y, (-1, len(neck.narrow), grid, grid), "neck.map")
        inputs = [y, self.weight(neck.smooth, "neck.smooth.weight")]
        y = self.node("Conv", inputs, "neck.smooth", kernel_shape=[3, 3], pads=[1] * 4)
        y = self.node("Transpose", [y], "neck.smooth.last", perm=[0, 2, 3, 1])
        y = self.channel_norm(y, neck.norm2, "neck.norm2")
        self.node("Transpose", [y], "embedding", perm=[0, 3, 1, 2])


class _SamGraph(_Graph):
    """The graph of SAM's vision transformer."""

    def encode(self, encoder: SamEncoder) -> None:
        patch, (grid, _, width) = encoder.patch_weight.shape[-1], encoder.positions.shape
        inputs = [self.narrow("images")]
        inputs += [self.weight(encoder.patch_weight, "patch.weight"), self.weight(encoder.patch_bias, "patch.bias")]
        x = self.node("Conv", inputs, "patch.conv", kernel_shape=[patch] * 2, strides=[patch] * 2)
        x = self.node("Transpose", [self.reshape(x, (0, width, grid * grid), "patch.flat")], "patch", perm=[0, 2, 1])
        positions = self.constant(encoder.positions.reshape(1, grid * grid, width), "positions")
        x = self.node("Add", [self.widen(x), positions], "embedded")
        for index, block in enumerate(encoder.blocks):
            x = self.sam_block(x, block, grid, f"block{index}")
        self.neck(x, encoder.neck, grid)

    def sam_block(self, x: str, sam: SamBlock, grid: int, name: str) -> str:
        """A block on the residual stream x [B, grid², C]."""
        block, side, width = sam.block, sam.side, len(sam.block.proj[1])
        y = self.narrow(self.layer_norm(x, block.norm1, CHANNEL_EPS, name + ".norm1"))
        y = self.padding_token(y, grid, side, name)
        weight, bias = block.qkv
        if not self.fused:  # keys carry the scale, since relative positions are read by the queries as they are
            scale = np.repeat(np.array([1, sam.rows.shape[-1] ** -0.5, 1], np.float32), width)
            weight, bias = weight * scale[:, None], bias * scale
        packed = self.windows(self.linear(y, (weight, bias), name + ".qkv"), grid, side, width, name)
        query, key, value = self.split(packed, ("query", "key", "value"), name)
        attend = self.folded_attention if self.fused else self.plain_attention
        mixed = attend(query, key, value, sam, name)
        x = self.stream(x, self.grid(mixed, grid, side, width, name), block, name)
        return self.fed_forward(x, block, CHANNEL_EPS, name)

    def relative(self, query: str, sam: SamBlock, scale: float, name: str) -> tuple[str, str]:
        """What each query reads from the rows and from the columns of its window: [-1, side², heads, side] both."""
        side, head, heads = sam.side, sam.rows.shape[-1], sam.heads
        found = []
        # Queries in [rows, columns · heads], and in [columns, heads]: one table for each row, or each column.
        for part, table, shape in (
            ("rows", sam.rows, (-1, side, side * heads, head)),
            ("columns", sam.columns, (-1, side, heads, head)),
        ):
            tables = self.weight(relative_table(table).swapaxes(1, 2) * np.float32(scale), f"{name}.{part}.weight")
            product = self.node(
                "MatMul", [self.reshape(query, shape, f"{name}.{part}.query"), tables], f"{name}.{part}"
            )
            found.append(self.reshape(product, (-1, side * side, heads, side), f"{name}.{part}.split"))
        return found[0], found[1]

    def folded_attention(self, query: str, key: str, value: str, sam: SamBlock, name: str) -> str:
        """Attention by ONNX Runtime's operator, with the relative positions as further channels of queries and keys.

        Queries gain what they read from each row and column, keys a one at their own: no logits are ever kept, of
        which 4096 tokens would have 64 MiB for each head.
        """
        side, head, heads = sam.side, sam.rows.shape[-1], sam.heads
        tokens, wide = side * side, head + 2 * side
        split = (-1, tokens, heads, head)
        rows, columns = self.relative(query, sam, head**0.5, name)
        query = self.reshape(query, split, name + ".query.split")
        query = self.node("Concat", [query, rows, columns], name + ".query.wide", axis=3)
        pads = self.constant(np.array([0, 0, 0, 0, 0, 0, 0, 2 * side]), f"pads.{side}")
        key = self.node("Pad", [self.reshape(key, split, name + ".key.split"), pads], name + ".key.padded")
        own = np.zeros((1, tokens, 1, wide), np.float32)
        every = np.arange(tokens)
        own[0, every, 0, head + every // side] = own[0, every, 0, head + side + every % side] = 1
        key = self.node("Add", [key, self.weight(own, f"places.{side}.{head}")], name + ".key.wide")
        merged = (-1, tokens, heads * wide)
        inputs = [self.reshape(query, merged, name + ".query.merged"), self.reshape(key, merged, name + ".key.merged")]
        return self.node(
            "MultiHeadAttention",
            [*inputs, value],
            name + ".attention",
            "com.microsoft",
            num_heads=heads,
            scale=head**-0.5,
        )

    def plain_attention(self, query: str, key: str, value: str, sam: SamBlock, name: str) -> str:
        """Attention in standard operators, relative positions added to the logits."""
        side, heads, width = sam.side, sam.heads, len(sam.block.proj[1])
        logits = self.logits(query, key, side, heads, width, name)
        shaped = self.reshape(logits, (-1, heads * side * side, side, side), name + ".logits.grid")
        for part, relative, shape in zip(
            ("rows", "columns"), self.relative(query, sam, 1, name), ((side, 1), (1, side)), strict=True
        ):
            by_head = self.node("Transpose", [relative], f"{name}.{part}.heads", perm=[0, 2, 1, 3])
            by_head = self.reshape(by_head, (-1, heads * side * side, *shape), f"{name}.{part}.grid")
            shaped = self.node("Add", [shaped, by_head], f"{name}.{part}.added")
        logits = self.reshape(shaped, (-1, heads, side * side, side * side), name + ".logits.placed")
        return self.mix(logits, value, side, heads, width, name)


class _TinyGraph(_Graph):
    """The graph of MobileSAM's TinyViT."""

    def encode(self, encoder: TinyEncoder, image_size: int) -> None:
        x, grid = self.narrow("images"), image_size // 4
        for index, convolution in enumerate(encoder.stem):
            x = self.gelu(x) if index else x
            x = self.convolution(x, convolution, f"stem{index}", stride=2)
        for index, row in enumerate(encoder.inverted):
            y = self.bottleneck(x, row, f"inverted{index}")
            x = self.gelu(self.node("Add", [x, y], f"inverted{index}"))
        for stage, (row, blocks) in enumerate(zip(encoder.downsamplings, encoder.stages, strict=True), 1):
            stride = 1 if stage == len(encoder.stages) else 2
            grid //= stride
            x = self.bottleneck(x, row, f"down{stage}", stride)
            width = len(row[-1].bias)
            x = self.widen(self.tokens(x, grid, width, f"stage{stage}"))
            for index, block in enumerate(blocks):
                x = self.tiny_block(x, block, grid, f"stage{stage}.block{index}")
            if stage < len(encoder.stages):
                x = self.map(self.narrow(x), grid, width, f"stage{stage}.map")
        self.neck(x, encoder.neck, grid)

    def gelu(self, x: str) -> str:
        return self.node("Gelu", [x], x + ".gelu")

    def convolution(self, x: str, convolution: Convolution, name: str, stride: int = 1) -> str:
        out, within, side, _ = convolution.weight.shape
        inputs = [x, self.weight(convolution.weight, name + ".weight"), self.weight(convolution.bias, name + ".bias")]
        group = out if within == 1 else 1
        strides, pads = [stride] * 2, [side // 2] * 4
        return self.node(
            "Conv", inputs, name + ".conv", group=group, kernel_shape=[side, side], strides=strides, pads=pads
        )

    def bottleneck(self, x: str, row: Sequence[Convolution], name: str, stride: int = 1) -> str:
        """1×1, depthwise 3×3 with the stride, 1×1; an activation between them."""
        for index, convolution in enumerate(row):
            x = self.gelu(x) if index else x
            x = self.convolution(x, convolution, f"{name}.{index}", stride if index == 1 else 1)
        return x

    def tokens(self, x: str, grid: int, width: int, name: str) -> str:
        """[B, C, grid, grid] → [B, grid², C]."""
        flat = self.reshape(x, (-1, width, grid * grid), name + ".flat")
        return self.node("Transpose", [flat], name + ".tokens", perm=[0, 2, 1])

    def map(self, x: str, grid: int, width: int, name: str) -> str:
        """[B, grid², C] → [B, C, grid, grid]."""
        turned = self.node("Transpose", [x], name + ".turned", perm=[0, 2, 1])
        return self.reshape(turned, (-1, width, grid, grid), name)

    def tiny_block(self, x: str, tiny: TinyBlock, grid: int, name: str) -> str:
        """A block on the residual stream x [B, grid², C]. The padding is normalised like other tokens."""
        block, side, heads, width = tiny.block, tiny.side, tiny.heads, len(tiny.block.proj[1])
        y = self.layer_norm(self.padding_token(x, grid, side, name), block.norm1, TINY_EPS, name + ".norm1")
        weight, bias = block.qkv
        if not self.fused:
            scale = np.repeat(np.array([(width // heads) ** -0.5, 1, 1], np.float32), width)
            weight, bias = weight * scale[:, None], bias * scale
        packed = self.linear(self.narrow(y), (weight, bias), name + ".qkv")
        packed = self.windows(packed, grid, side, width, name)
        query, key, value = self.split(packed, ("query", "key", "value"), name)
        biases = self.weight(window_biases(tiny)[None], name + ".biases")
        if self.fused:
            inputs = [query, key, value, "", "", biases]
            mixed = self.node("MultiHeadAttention", inputs, name + ".attention", "com.microsoft", num_heads=heads)
        else:
            logits = self.logits(query, key, side, heads, width, name)
            logits = self.node("Add", [logits, biases], name + ".logits.placed")
            mixed = self.mix(logits, value, side, heads, width, name)
        x = self.stream(x, self.grid(mixed, grid, side, width, name), block, name)
        near = self.convolution(self.map(self.narrow(x), grid, width, name + ".map"), tiny.local, name + ".local")
        x = self.widen(self.tokens(near, grid, width, name + ".local"))
        return self.fed_forward(x, block, TINY_EPS, name)


def build_sam_image_graph(
    encoder: SamEncoder | TinyEncoder, options: SamImageOptions, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Build the graph of an image encoder.

    Input `images` [B, 3, S, S] fp32: the longer side resized to S, normalised, then padded with zeros on the right and
    at the bottom. Output `embedding` [B, D, S / 16, S / 16] fp32, D = 256 in the published ones. metadata: facts that
    are noted in the graph beside the options.

    Raises CheckpointError when an option does not fit the checkpoint.
    """
    check_sam_image_options(encoder, options)
    size, grid = options.image_size, options.image_size // DOWN
    graph: _SamGraph | _TinyGraph
    if isinstance(encoder, TinyEncoder):
        graph = _TinyGraph(options.precision, options.attention == "fused")
        graph.encode(encoder, size)
    else:
        graph = _SamGraph(options.precision, options.attention == "fused")
        graph.encode(encoder)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])
    shape: list[str | int | None] = ["batch", len(encoder.neck.narrow), grid, grid]
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)
    name = NAMES[type(encoder)]
    facts = {
        "architecture": name,
        "image_size": str(size),
        "precision": options.precision,
        "attention": options.attention,
        **(metadata or {}),
    }
    return finished_model(graph, name, [images], [embedding], facts)


def check_sam_image_options(encoder: SamEncoder | TinyEncoder, options: SamImageOptions) -> None:
    """Raise CheckpointError when an option does not fit the checkpoint."""
    check_choices(options)
    if options.precision == "int8":
        raise CheckpointError("an image encoder of SAM is exported in fp32 or fp16 (--precision), not in int8")
    size = options.image_size
    if isinstance(encoder, SamEncoder):
        if encoder.patch_weight.shape[-1] != DOWN:
            raise CheckpointError(f"its patches have {encoder.patch_weight.shape[-1]} pixels a side, SAM's have {DOWN}")
        if size != encoder.image_size:
            raise CheckpointError(
                f"it was trained at {encoder.image_size} pixels; use --image-size {encoder.image_size}"
            )
    elif size <= 0 or size % DOWN:
        raise CheckpointError(
            f"image size {size} is no multiple of {DOWN}; use --image-size {max(1, round(size / DOWN)) * DOWN}"
        )

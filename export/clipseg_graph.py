"""Writes the ONNX graphs of CLIPSeg: its image tower, once per image, and its decoder, once per prompt."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from .clipseg import LAYERS, NORM_EPS, ClipSegDecoder
from .options import ClipSegDecoderOptions, ClipSegImageOptions, Shape
from .state_dict import CheckpointError
from .transformer import Affine, Block, attention_heads
from .transformer_graph import TransformerGraph, check_choices, finished_model
from .vision_transformer import CLIP, VisionTransformer
from .vit_graph import ImageTowerGraph, check_options

BLOCKS = 12  # of the image tower


def build_clipseg_image_graph(
    vit: VisionTransformer, options: ClipSegImageOptions, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Build the graph of CLIPSeg's image tower.

    Input `images` [B, 3, S, S] fp32. Output `activations` [B, L, T, C] fp32: the residual stream behind each block of
    `taps`, the class token first; no block behind the last of them is computed. metadata: facts that are noted in the
    graph beside the options.

    Raises CheckpointError when an option does not fit the checkpoint.
    """
    check_clipseg_image_options(vit, options)
    tower, grid = options.tower, options.image_size // vit.patch_size
    graph = ImageTowerGraph(options.precision, options.attention == "fused")
    embedded = graph.embed("images", vit, grid, tower.antialias)
    axis, tapped = graph.constant(np.array([1]), "at.1"), []
    for index, x in enumerate(graph.trunk(embedded, "", vit, tower, tower.depth(len(vit.blocks)), whole=True)):
        if index in options.taps:
            tapped.append(graph.node("Unsqueeze", [x, axis], f"tap{index}"))
    graph.node("Concat", tapped, "activations", axis=1)
    size, tokens = options.image_size, 1 + grid * grid
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])
    activations = helper.make_tensor_value_info(
        "activations", TensorProto.FLOAT, ["batch", len(tapped), tokens, vit.width]
    )
    facts = {
        "architecture": "clipseg-image",
        "taps": ",".join(map(str, options.taps)),
        "activation": options.activation,
        "image_size": str(size),
        "precision": options.precision,
        "attention": options.attention,
        **(metadata or {}),
    }
    return finished_model(graph, "clipseg-image", [images], [activations], facts)


def check_clipseg_image_options(vit: VisionTransformer, options: ClipSegImageOptions) -> None:
    """Raise CheckpointError where an option does not fit the checkpoint."""
    _check_precision(options)
    if vit.architecture != CLIP:
        raise CheckpointError(f"an image tower of {vit.architecture.name}; CLIPSeg's is CLIP's ViT-B/16")
    if len(vit.blocks) < BLOCKS:
        raise CheckpointError(
            f"an image tower of {len(vit.blocks)} blocks; CLIPSeg's is CLIP's ViT-B/16, with {BLOCKS}"
        )
    check_options(vit, options.tower)


class _Graph(TransformerGraph):
    """The graph of the decoder."""

    def padded_linear(self, x: str, affine: Affine, name: str) -> str:
        """See `TransformerGraph`; an input wider than the output is not copied, which takes longer than a sum.

        The hidden layers are 32 times as wide as the others: their copies take up to a third of the time.
        """
        outputs, inputs = affine[0].shape
        return super().padded_linear(x, affine, name) if inputs <= outputs else self.plain_linear(x, affine, name)

    def reduced(self, activations: str, decoder: ClipSegDecoder) -> list[str]:
        """What the decoder's blocks see of the tokens [L, T, C] of an image: for each [T, R]."""
        weights, biases = zip(*reversed(decoder.reduces), strict=True)  # in the order of the tokens
        weight = self.weight(np.stack(weights).transpose(0, 2, 1), "reduce.weight")
        y = self.node("MatMul", [self.narrow(activations), weight], "reduce.product")
        y = self.widen(self.node("Add", [y, self.weight(np.stack(biases)[:, None], "reduce.bias")], "reduce"))
        rows = [self.constant(np.array(index), f"reduce.{index}.index") for index in range(LAYERS)]
        return [self.node("Gather", [y, row], f"reduce.{index}", axis=0) for index, row in enumerate(rows)][::-1]

    def film(self, conditions: str, decoder: ClipSegDecoder) -> list[str]:
        """By how much a prompt's vector [B, D] multiplies the tokens and what it adds: twice [B, 1, R]."""
        weights, biases = zip(decoder.film_mul, decoder.film_add, strict=True)
        y = self.node(
            "MatMul", [conditions, self.constant(np.concatenate(weights).T.copy(), "film.weight")], "film.product"
        )
        y = self.node("Add", [y, self.constant(np.concatenate(biases), "film.bias")], "film")
        y = self.node("Unsqueeze", [y, self.constant(np.array([1]), "at.1")], "film.row")
        return self.split(y, ("mul", "add"), "film")

    def post_norm_block(self, x: str, block: Block, heads: int, name: str) -> str:
        """A whole block on x [B, T, R], with its norms behind the residuals."""
        packed = self.projected(self.narrow(x), block, heads, name)
        y = self.attention(packed, len(block.proj[1]), heads, name, only_first=False)
        y = self.widen(self.linear(y, block.proj, name + ".proj"))
        x = self.layer_norm(self.node("Add", [x, y], name + ".residual"), block.norm1, NORM_EPS, name + ".norm1")
        y = self.widen(self.feed_forward(self.narrow(x), block, "relu", name))
        return self.layer_norm(self.node("Add", [x, y], name), block.norm2, NORM_EPS, name + ".norm2")

    def upsample(self, x: str, decoder: ClipSegDecoder, grid: int, output: str) -> None:
        """Logits [B, S, S] of patches [B, G², R]."""
        x = self.node("Transpose", [self.narrow(x)], "head.channels", perm=[0, 2, 1])
        x = self._reshape(x, [0, decoder.width, grid, grid], "head.map")
        weight, bias = decoder.convolution
        inputs = [x, self.weight(weight, "head.weight"), self.weight(bias, "head.bias")]
        x = self.node("Conv", inputs, "head.convolution", kernel_shape=[3, 3], pads=[1] * 4)
        x = self.node("Relu", [x], "head.relu")
        if self.fused:
            self._by_products(x, decoder, grid, output)
        else:
            self._by_convolutions(x, decoder, output)

    def _by_convolutions(self, x: str, decoder: ClipSegDecoder, output: str) -> None:
        """Two transposed convolutions."""
        for index, (weight, bias) in enumerate(decoder.upsampling):
            name, size = f"upsampling{index}", list(weight.shape[2:])
            x = self.node("Relu", [x], name + ".relu") if index else x
            inputs = [x, self.weight(weight, name + ".weight"), self.weight(bias, name + ".bias")]
            x = self.node("ConvTranspose", inputs, name, kernel_shape=size, strides=size)
        self.node("Squeeze", [self.widen(x), self.constant(np.array([1]), "at.1")], output)

    def _by_products(self, x: str, decoder: ClipSegDecoder, grid: int, output: str) -> None:
        """The same without columns that are added up into images: no pixel is in two of them.

        Every pixel's channels become those of the k × k pixels in its place, which are put in order at the very end.
        """
        x = self._reshape(x, [0, decoder.width, grid * grid], "head.flat")
        x = self.node("Transpose", [x], "head.patches", perm=[0, 2, 1])
        sides, count = [], grid * grid
        for index, (weight, bias) in enumerate(decoder.upsampling):
            name, (own, channels, side, _) = f"upsampling{index}", weight.shape
            x = self._reshape(self.node("Relu", [x], name + ".relu"), [0, count, own], name + ".pixels") if index else x
            rows = weight.transpose(2, 3, 1, 0).reshape(side * side * channels, own)
            x = self.linear(x, (rows, np.tile(bias, side * side)), name)
            sides.append(side)
            count *= side * side
        outer, inner = sides
        x = self._reshape(x, [0, grid, grid, outer, outer, inner, inner], "upsampled.parts")
        x = self.widen(self.node("Transpose", [x], "upsampled.rows", perm=[0, 1, 3, 5, 2, 4, 6]))
        self._reshape(x, [0, grid * outer * inner, grid * outer * inner], output)

    def _reshape(self, x: str, shape: list[int], name: str) -> str:
        return self.node("Reshape", [x, self.constant(np.array(shape), name + ".shape")], name)


def build_clipseg_decoder_graph(
    decoder: ClipSegDecoder, options: ClipSegDecoderOptions, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Build the graph of CLIPSeg's decoder.

    Inputs: `activations` [3, T, C] fp32, of one image, as the image tower's graph gives them, and `conditions` [B, D]
    fp32, the vectors of prompts, not of unit length. Output `logits` [B, S, S] fp32, one map for each prompt.
    metadata: facts that are noted in the graph beside the options.

    Raises CheckpointError when an option does not fit the checkpoint.
    """
    heads = check_clipseg_decoder_options(decoder, options)
    size, grid = options.image_size, options.image_size // decoder.patch_size
    graph = _Graph(options.precision, options.attention == "fused")
    mul, add = graph.film("conditions", decoder)
    x = ""
    for index, own in enumerate(graph.reduced("activations", decoder)):
        if index:
            x = graph.node("Add", [x, own], f"state{index}")
        else:
            x = graph.node("Add", [graph.node("Mul", [mul, own], "state0.scaled"), add], "state0")
        x = graph.post_norm_block(x, decoder.blocks[index], heads, f"block{index}")
    graph.upsample(graph.cut(x, 1, 1 + grid * grid, "patches"), decoder, grid, "logits")
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch" if side is None else side for side in shape])
        for name, shape in clipseg_decoder_inputs(decoder, options).items()
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", size, size])
    facts = {
        "architecture": "clipseg-decoder",
        "image_size": str(size),
        "precision": options.precision,
        "attention": options.attention,
        **(metadata or {}),
    }
    return finished_model(graph, "clipseg-decoder", inputs, [logits], facts)


def clipseg_decoder_inputs(decoder: ClipSegDecoder, options: ClipSegDecoderOptions) -> dict[str, Shape]:
    """Return the shapes of the graph's inputs."""
    tokens = 1 + (options.image_size // decoder.patch_size) ** 2
    return {"activations": (3, tokens, decoder.token_width), "conditions": (None, decoder.dimension)}


def check_clipseg_decoder_options(decoder: ClipSegDecoder, options: ClipSegDecoderOptions) -> int:
    """Return the number of attention heads; raises CheckpointError when an option does not fit the checkpoint."""
    _check_precision(options)
    size, patch = options.image_size, decoder.patch_size
    if size <= 0 or size % patch:
        raise CheckpointError(
            f"image size {size} is no multiple of the patch size {patch}; use --image-size "
            f"{max(1, round(size / patch)) * patch}"
        )
    check_choices(options)
    return attention_heads(decoder.width, options.heads, None)


def _check_precision(options: ClipSegImageOptions | ClipSegDecoderOptions) -> None:
    if options.precision == "int8":
        raise CheckpointError("CLIPSeg is exported in fp32 or fp16 (--precision), not in int8")

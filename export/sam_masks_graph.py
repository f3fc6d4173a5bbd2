"""Writes the ONNX graph of SAM's prompt encoder and mask decoder: an embedding and points in, masks of each point out.

Three things make it cheaper than the published form and change nothing: what the embedding alone decides is computed
once for all points; queries and keys of the few tokens go into the weights that the thousands of places of the image
would be multiplied with (`folded`), so that places are never brought into heads; and the enlargement stays in
rows of channels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from .options import SamMasksOptions, Shape
from .sam import CHANNEL_EPS, MASKS, Attention, MaskDecoder, TwoWayBlock, dense_encoding
from .state_dict import CheckpointError
from .transformer import Affine, Array, attention_heads
from .transformer_graph import TransformerGraph, check_choices, finished_model

TOKENS = 2 + MASKS + 2  # quality, masks, the point and the missing second prompt
NORM_EPS = 1e-5


class _Graph(TransformerGraph):
    """The graph of prompt encoder and mask decoder. places: P = grid², the cells of the embedding."""

    def __init__(self, decoder: MaskDecoder, options: SamMasksOptions, folded: bool) -> None:
        super().__init__(options.precision, fused=False)
        self.decoder, self.folded, self.heads = decoder, folded, options.heads
        self.grid = options.image_size // 16
        self.places, self.size = self.grid**2, options.image_size

    def turned(self, x: str, perm: Sequence[int], name: str) -> str:
        return self.node("Transpose", [x], name, perm=perm)

    def added(self, x: str, y: str, name: str) -> str:
        return self.node("Add", [x, y], name)

    def product(self, x: str, y: str, name: str) -> str:
        return self.node("MatMul", [x, y], name)

    def norm(self, x: str, y: str, affine: Affine, name: str) -> str:
        """The norm of a sum, in fp32, for the linear layers."""
        total = self.widen(self.added(y, x, name + ".sum") if y else x)
        return self.narrow(self.layer_norm(total, affine, NORM_EPS, name))

    def probabilities(self, logits: str, name: str) -> str:
        return self.narrow(self.node("Softmax", [self.widen(logits)], name, axis=-1))

    def prompt(self) -> str:
        """The first tokens of each point: [B, TOKENS, D]."""
        decoder, width = self.decoder, self.decoder.width
        # In fp32: sines of large numbers. Centres of pixels, over the image's side, from −1 to 1.
        scale = np.float32(2) / np.float32(self.size)
        unit = self.node("Mul", ["points", self.constant(scale, "points.scale")], "points.scaled")
        unit = self.added(unit, self.constant(scale / np.float32(2) - np.float32(1), "points.shift"), "points.unit")
        frequencies = self.constant((2 * np.pi * decoder.frequencies).astype(np.float32), "frequencies")
        angles = self.product(unit, frequencies, "angles")
        waves = [self.node(wave, [angles], wave.lower()) for wave in ("Sin", "Cos")]
        point = self.node("Concat", waves, "point.position", axis=1)
        point = self.narrow(self.added(point, self.constant(decoder.point, "point.kind"), "point"))
        # Zeros at the places of the other tokens, which are added: no Expand, any batch.
        before = len(decoder.tokens) * width
        padded = self.node("Pad", [point, self.constant(np.array([0, before, 0, width]), "prompt.pads")], "prompt.pad")
        fixed = np.concatenate([decoder.tokens, np.zeros((1, width), np.float32), decoder.no_point[None]])
        return self.added(
            self.reshape(padded, (-1, TOKENS, width), "prompt.split"), self.weight(fixed[None], "tokens"), "prompt"
        )

    def in_heads(self, x: str, length: int, width: int, perm: Sequence[int], name: str) -> str:
        """[-1, length, width] → [-1, length, heads, width / heads] → `perm`."""
        return self.turned(
            self.reshape(x, (-1, length, self.heads, width // self.heads), name + ".split"), perm, name + ".heads"
        )

    def attend(
        self, inputs: Sequence[str], lengths: tuple[int, int], attention: Attention, name: str, shared: bool = False
    ) -> str:
        """Plain attention with its last layer: [B, length, D].

        inputs: of queries, keys and values. lengths: of queries and of keys. shared: there is one sequence of keys and
        values for all rows, [1, length, D]; the queries of all rows then are one sequence.
        """
        inner, layers = len(attention.query[1]), (attention.query, attention.key, attention.value)
        scale = np.float32((inner // self.heads) ** -0.5)
        query, key, value = (
            self.linear(x, (layer[0] * factor, layer[1] * factor), f"{name}.{part}")
            for x, layer, factor, part in zip(
                inputs, layers, (scale, np.float32(1), np.float32(1)), ("query", "key", "value"), strict=True
            )
        )
        length, others = lengths
        if shared:
            query = self.reshape(query, (1, -1, inner), name + ".query.row")
            query = self.reshape(query, (1, -1, self.heads, inner // self.heads), name + ".query.split")
            query = self.turned(query, (0, 2, 1, 3), name + ".query.heads")
        else:
            query = self.in_heads(query, length, inner, (0, 2, 1, 3), name + ".query")
        key = self.in_heads(key, others, inner, (0, 2, 3, 1), name + ".key")
        value = self.in_heads(value, others, inner, (0, 2, 1, 3), name + ".value")
        weights = self.probabilities(self.product(query, key, name + ".logits"), name + ".softmax")
        mixed = self.turned(self.product(weights, value, name + ".mixed"), (0, 2, 1, 3), name + ".turned")
        merged = self.reshape(mixed, (-1, length, inner), name + ".merged")
        return self.linear(merged, attention.out, name + ".out")

    def by_head(self, tokens: str, inner: int, name: str) -> str:
        """Tokens [B, TOKENS, inner] as a matrix [B, inner, heads · TOKENS] that keeps heads apart.

        Column (h, t) holds the channels of head h of token t, and zeros at those of the other heads.
        """
        turned = self.turned(tokens, (0, 2, 1), name + ".turned")
        repeated = self.node("Concat", [turned] * self.heads, name + ".repeated", axis=2)
        own: Array = np.kron(np.eye(self.heads), np.ones((inner // self.heads, TOKENS))).astype(np.float32)
        return self.node("Mul", [repeated, self.weight(own[None], f"own.{inner}")], name + ".own")

    def folded_to_image(self, tokens: str, keyed: str, keys: str, attention: Attention, name: str) -> str:
        """What tokens read from the image, with the last layer: [B, TOKENS, D].

        keyed: keys with the encoding of their places. The bias of the keys is the same for all places of a query, which
        a softmax does not see; that of the values passes through, since weights add up to 1.
        """
        inner, width = len(attention.query[1]), self.decoder.width
        scale = np.float32((inner // self.heads) ** -0.5)
        query = self.linear(tokens, (attention.query[0] * scale, attention.query[1] * scale), name + ".query")
        matrix = self.product(
            self.weight(attention.key[0].T, name + ".key.weight"), self.by_head(query, inner, name), name + ".key"
        )  # [B, D, heads · TOKENS]
        logits = self.turned(self.product(keyed, matrix, name + ".logits"), (0, 2, 1), name + ".logits.turned")
        read = self.product(self.probabilities(logits, name + ".softmax"), keys, name + ".read")
        read = self.reshape(read, (-1, self.heads, TOKENS, width), name + ".read.heads")
        by_head = attention.value[0].reshape(self.heads, -1, width).swapaxes(1, 2)  # [heads, D, inner / heads]
        value = self.product(read, self.weight(by_head, name + ".value.weight"), name + ".value")
        value = self.turned(value, (0, 2, 1, 3), name + ".value.turned")
        value = self.reshape(value, (-1, TOKENS, inner), name + ".value.merged")
        value = self.added(value, self.weight(attention.value[1], name + ".value.bias"), name + ".value.all")
        return self.linear(value, attention.out, name + ".out")

    def folded_from_image(self, keyed: str, tokens: Sequence[str], attention: Attention, name: str, once: bool) -> str:
        """What the image reads from tokens, with the last layer: [B, P, D].

        tokens: those of keys and of values. once: `keyed` is the same for all points, [1, P, D].
        """
        inner = len(attention.query[1])
        scale = np.float32((inner // self.heads) ** -0.5)
        weight, bias = attention.query[0] * scale, attention.query[1] * scale
        keys = self.by_head(self.linear(tokens[0], attention.key, name + ".key"), inner, name + ".key")
        if once:
            logits = self.product(self.linear(keyed, (weight, bias), name + ".query"), keys, name + ".logits")
        else:
            matrix = self.product(self.weight(weight.T, name + ".query.weight"), keys, name + ".query")
            offset = self.product(self.weight(bias[None], name + ".query.bias"), keys, name + ".query.offset")
            logits = self.added(self.product(keyed, matrix, name + ".product"), offset, name + ".logits")
        logits = self.reshape(logits, (-1, self.places, self.heads, TOKENS), name + ".logits.heads")
        weights = self.probabilities(logits, name + ".softmax")
        weights = self.reshape(weights, (-1, self.places, self.heads * TOKENS), name + ".weights")
        values = self.by_head(self.linear(tokens[1], attention.value, name + ".value"), inner, name + ".value")
        values = self.turned(values, (0, 2, 1), name + ".values")
        out = self.weight(attention.out[0].T, name + ".out.weight")
        matrix = self.product(values, out, name + ".out.product")  # [B, heads · TOKENS, D]
        # The weights of a place add up to the number of heads, and so do the shares of the bias.
        share = self.weight(attention.out[1] / np.float32(self.heads), name + ".out.bias")
        return self.product(weights, self.added(matrix, share, name + ".out"), name)

    def to_image(self, tokens: str, keyed: str, keys: str, attention: Attention, name: str, once: bool) -> str:
        if self.folded and not once:
            return self.folded_to_image(tokens, keyed, keys, attention, name)
        lengths = (TOKENS, self.places)
        return self.attend([tokens, keyed, keys], lengths, attention, name, shared=once and self.folded)

    def from_image(self, keyed: str, tokens: Sequence[str], attention: Attention, name: str, once: bool) -> str:
        if self.folded:
            return self.folded_from_image(keyed, tokens, attention, name, once)
        return self.attend([keyed, *tokens], (self.places, TOKENS), attention, name)

    def two_way_block(
        self, tokens: str, keys: str, prompt: str, encoding: str, block: TwoWayBlock, first: bool, name: str
    ) -> tuple[str, str]:
        """Tokens [B, TOKENS, D] and keys [B, P, D] behind a block; in front of the first keys are [1, P, D]."""
        lengths = (TOKENS, TOKENS)
        if first:
            y = self.attend([tokens] * 3, lengths, block.self_attention, name + ".self")
            tokens = self.norm(y, "", block.norm1, name + ".norm1")
        else:
            placed = self.added(tokens, prompt, name + ".self.placed")
            y = self.attend([placed, placed, tokens], lengths, block.self_attention, name + ".self")
            tokens = self.norm(tokens, y, block.norm1, name + ".norm1")
        keyed = self.added(keys, encoding, name + ".keyed")
        placed = self.added(tokens, prompt, name + ".to_image.placed")
        y = self.to_image(placed, keyed, keys, block.to_image, name + ".to_image", first)
        tokens = self.norm(tokens, y, block.norm2, name + ".norm2")
        y = self.node("Relu", [self.linear(tokens, block.fc1, name + ".fc1")], name + ".relu")
        tokens = self.norm(tokens, self.linear(y, block.fc2, name + ".fc2"), block.norm3, name + ".norm3")
        placed = self.added(tokens, prompt, name + ".from_image.placed")
        y = self.from_image(keyed, [placed, tokens], block.from_image, name + ".from_image", first)
        return tokens, self.norm(keys, y, block.norm4, name + ".norm4")

    def layers(self, x: str, layers: Sequence[tuple[Array, Array]], name: str) -> str:
        """Linear layers with ReLU between them, the weights as right operands: [..., in, out], [..., 1, out]."""
        for index, (weight, bias) in enumerate(layers):
            x = self.node("Relu", [x], f"{name}{index}.relu") if index else x
            x = self.product(x, self.weight(weight, f"{name}{index}.weight"), f"{name}{index}.product")
            x = self.added(x, self.weight(bias, f"{name}{index}.bias"), f"{name}{index}")
        return x

    def quality(self, tokens: str) -> None:
        """The output `iou` [B, MASKS]: the first token's, without that of the mask that is left out."""
        first = self.reshape(self.cut(tokens, 0, 1, "quality.token"), (-1, self.decoder.width), "quality.row")
        *layers, (weight, bias) = self.decoder.quality
        all_layers = [(weight.T, bias) for weight, bias in (*layers, (weight[1:], bias[1:]))]
        self.node("Identity", [self.widen(self.layers(first, all_layers, "quality"))], "iou")

    def hyper(self, tokens: str) -> str:
        """What the channels of each mask are multiplied with: [B, MASKS, D / 8]."""
        own = self.turned(
            self.cut(tokens, 2, 2 + MASKS, "mask.tokens"), (1, 0, 2), "mask.tokens.first"
        )  # [MASKS, B, D]
        layers = [
            (np.stack([weight.T for weight, _ in same]), np.stack([bias[None] for _, bias in same]))
            for same in zip(*self.decoder.hyper, strict=True)
        ]
        return self.turned(self.layers(own, layers, "hyper"), (1, 0, 2), "hyper")

    def channel_norm(self, x: str) -> str:
        normed = self.layer_norm(self.widen(x), self.decoder.enlarge_norm, CHANNEL_EPS, "enlarged1.norm")
        return self.node("Gelu", [self.narrow(normed)], "enlarged1.gelu")

    def masks(self, keys: str, hyper: str) -> None:
        """The output `logits` [B, MASKS, 4 · grid, 4 · grid] of keys [B, P, D] and hyper [B, MASKS, D / 8].

        A transposed convolution whose stride is its side is a linear layer to all pixels of a place.
        """
        if not self.folded:
            self.plain_masks(keys, hyper)
            return
        grid, x = self.grid, keys
        for index, (weight, bias) in enumerate((self.decoder.enlarge1, self.decoder.enlarge2), 1):
            name, out = f"enlarged{index}", len(bias)
            x = self.linear(x, (weight.transpose(2, 3, 1, 0).reshape(4 * out, -1), np.tile(bias, 4)), name)
            if index == 2:  # behind the bias at once, which is one pass for both
                x = self.node("Gelu", [x], name + ".gelu")
            x = self.reshape(x, (-1, 4**index * self.places, out), name + ".pixels")
            x = self.channel_norm(x) if index == 1 else x
        hyper = self.turned(hyper, (0, 2, 1), "hyper.turned")
        x = self.widen(self.product(x, hyper, "logits.product"))  # [B, 16 · P, MASKS]
        x = self.reshape(x, (-1, grid, grid, 2, 2, 2, 2, MASKS), "logits.split")
        x = self.turned(x, (0, 7, 1, 3, 5, 2, 4, 6), "logits.turned")
        self.node("Reshape", [x, self.constant(np.array([-1, MASKS, 4 * grid, 4 * grid]), "logits.shape")], "logits")

    def plain_masks(self, keys: str, hyper: str) -> None:
        """As `masks`, by transposed convolutions."""
        width, grid = self.decoder.width, self.grid
        x = self.reshape(self.turned(keys, (0, 2, 1), "keys.turned"), (-1, width, grid, grid), "keys.map")
        for index, affine in enumerate((self.decoder.enlarge1, self.decoder.enlarge2), 1):
            name = f"enlarged{index}"
            inputs = [x, *(self.weight(value, f"{name}.{part}") for value, part in zip(affine, "wb", strict=True))]
            x = self.node("ConvTranspose", inputs, name, kernel_shape=[2, 2], strides=[2, 2])
            if index == 1:
                x = self.channel_norm(self.turned(x, (0, 2, 3, 1), name + ".last"))
                x = self.turned(x, (0, 3, 1, 2), name + ".first")
            else:
                x = self.node("Gelu", [x], name + ".gelu")
        x = self.reshape(x, (-1, width // 8, 16 * self.places), "pixels")
        x = self.widen(self.product(hyper, x, "logits.product"))
        self.node("Reshape", [x, self.constant(np.array([-1, MASKS, 4 * grid, 4 * grid]), "logits.shape")], "logits")

    def decode(self) -> None:
        decoder, width = self.decoder, self.decoder.width
        prompt = self.prompt()
        embedding = self.reshape("embedding", (1, width, self.places), "embedding.flat")
        embedding = self.turned(embedding, (0, 2, 1), "embedding.places")
        no_mask = self.constant(decoder.no_mask, "no_mask")
        keys = self.narrow(self.added(embedding, no_mask, "embedding.no_mask"))
        encoding = self.weight(dense_encoding(decoder, self.grid)[None], "encoding")
        tokens = prompt
        for index, block in enumerate(decoder.blocks):
            tokens, keys = self.two_way_block(tokens, keys, prompt, encoding, block, index == 0, f"block{index}")
        placed = self.added(tokens, prompt, "last.placed")
        keyed = self.added(keys, encoding, "last.keyed")
        y = self.to_image(placed, keyed, keys, decoder.to_image, "last", False)
        tokens = self.norm(tokens, y, decoder.norm, "norm")
        self.quality(tokens)
        self.masks(keys, self.hyper(tokens))


def build_sam_masks_graph(
    decoder: MaskDecoder, options: SamMasksOptions, metadata: Mapping[str, str] | None = None, folded: bool = True
) -> onnx.ModelProto:
    """Build the graph of prompt encoder and mask decoder.

    Inputs `embedding` [1, D, g, g] fp32, of one image (g = S / 16), and `points` [B, 2] fp32: x and y of a point on an
    object, in pixels of the resized image; the half pixel that SAM adds is added here. Outputs `logits` [B, 3, 4g, 4g]
    fp32, of three masks of each point, above 0 on the object, and `iou` [B, 3] fp32, how good the network takes them to
    be. metadata: facts that are noted in the graph beside the options. folded: see above; otherwise it computes the
    same in the published way.

    Raises CheckpointError when an option does not fit the checkpoint.
    """
    check_sam_masks_options(decoder, options)
    graph = _Graph(decoder, options, folded)
    graph.decode()
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch" if n is None else n for n in shape])
        for name, shape in sam_masks_inputs(decoder, options).items()
    ]
    side = 4 * graph.grid
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", MASKS, side, side]),
        helper.make_tensor_value_info("iou", TensorProto.FLOAT, ["batch", MASKS]),
    ]
    facts = {
        "architecture": "sam-masks",
        "image_size": str(options.image_size),
        "precision": options.precision,
        **(metadata or {}),
    }
    return finished_model(graph, "sam-masks", inputs, outputs, facts)


def sam_masks_inputs(decoder: MaskDecoder, options: SamMasksOptions) -> dict[str, Shape]:
    """Return the shapes of the graph's inputs."""
    grid = options.image_size // 16
    return {"embedding": (1, decoder.width, grid, grid), "points": (None, 2)}


def check_sam_masks_options(decoder: MaskDecoder, options: SamMasksOptions) -> None:
    """Raise CheckpointError when an option does not fit the checkpoint."""
    check_choices(options)
    if options.precision == "int8":
        raise CheckpointError("a mask decoder is exported in fp32 or fp16 (--precision), not in int8")
    if options.image_size <= 0 or options.image_size % 16:
        nearest = max(1, round(options.image_size / 16)) * 16
        raise CheckpointError(f"image size {options.image_size} is no multiple of 16; use --image-size {nearest}")
    for attention in (decoder.to_image, *(block.self_attention for block in decoder.blocks)):
        attention_heads(len(attention.query[1]), options.heads, None)

"""Segment Anything (Kirillov et al., 2023): image encoders and mask decoder, read from the published checkpoints.

SAM has a vision transformer with windows, MobileSAM (Zhang et al., 2023) a TinyViT; prompts and masks are the same.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .transformer import (
    Affine,
    Array,
    Block,
    Layouts,
    Named,
    Tensors,
    check_tensors,
    count_blocks,
    named_affine,
    named_blocks,
    read_affine,
    read_tower,
)

FAMILIES = "SAM or MobileSAM"
CHANNEL_EPS = 1e-6  # of the norms over channels, in necks and mask decoder, and of SAM's blocks
TINY_EPS = 1e-5  # of TinyViT's other norms
STAGES = 3  # of transformer blocks in TinyViT
MASKS = 3  # of one point: the whole, a part, a part of that; a fourth one, for several points, is left out


@dataclass(frozen=True)
class Neck:
    """From an encoder's tokens to an embedding: 1×1 and 3×3 convolution, each with a norm over channels."""

    narrow: Array  # [D, C]
    norm1: Affine
    smooth: Array  # [D, D, 3, 3]
    norm2: Affine


@dataclass(frozen=True)
class SamBlock:
    """A transformer block of SAM's encoder with relative positions, on all of the grid or in windows of it."""

    block: Block
    rows: Array  # [2·side − 1, head width]; Δ = query − key + side − 1
    columns: Array

    @property
    def side(self) -> int:
        """Of the square of tokens that see each other."""
        return (len(self.rows) + 1) // 2

    @property
    def heads(self) -> int:
        return len(self.block.proj[1]) // int(self.rows.shape[-1])


@dataclass(frozen=True)
class SamEncoder:
    """SAM's image encoder."""

    patch_weight: Array  # [C, 3, patch, patch]
    patch_bias: Array
    positions: Array  # [grid, grid, C]
    blocks: list[SamBlock]
    neck: Neck

    @property
    def image_size(self) -> int:
        return int(self.positions.shape[0] * self.patch_weight.shape[-1])


@dataclass(frozen=True)
class Convolution:
    """A convolution with the batch norm behind it folded into it."""

    weight: Array  # [out, in / groups, k, k]
    bias: Array


@dataclass(frozen=True)
class TinyBlock:
    """A block of TinyViT: attention in windows, a depthwise 3×3 convolution, two linear layers."""

    block: Block
    biases: Array  # [heads, side²], by |Δrow|·side + |Δcolumn|
    local: Convolution

    @property
    def side(self) -> int:
        return math.isqrt(self.biases.shape[-1])

    @property
    def heads(self) -> int:
        return len(self.biases)


@dataclass(frozen=True)
class TinyEncoder:
    """MobileSAM's image encoder, a TinyViT.

    A downsampling's middle convolution halves the grid, except the last one.
    """

    stem: list[Convolution]  # two, each of which halves the grid
    inverted: list[list[Convolution]]  # the first stage: 1×1, depthwise 3×3, 1×1 around a sum
    downsamplings: list[list[Convolution]]  # behind each stage but the last: 1×1, depthwise 3×3, 1×1
    stages: list[list[TinyBlock]]
    neck: Neck


@dataclass(frozen=True)
class Attention:
    """Four linear layers; queries, keys and values may be narrower than what they come from."""

    query: Affine  # [A, D], [A]
    key: Affine
    value: Affine
    out: Affine  # [D, A], [D]


@dataclass(frozen=True)
class TwoWayBlock:
    """A block of the mask decoder: tokens see each other, then the image; then the image sees the tokens."""

    self_attention: Attention
    norm1: Affine
    to_image: Attention
    norm2: Affine
    fc1: Affine
    fc2: Affine
    norm3: Affine
    from_image: Attention
    norm4: Affine


@dataclass(frozen=True)
class MaskDecoder:
    """Prompt encoder, for a point on an object, and mask decoder."""

    frequencies: Array  # [2, D / 2], of the positions' sines and cosines; x first
    point: Array  # [D], added to the encoding of a point on an object
    no_point: Array  # [D], stands for a second prompt that there is not
    no_mask: Array  # [D], added to the embedding where no mask is given
    tokens: Array  # [1 + 1 + MASKS, D]: of the masks' quality, and of the masks
    blocks: list[TwoWayBlock]
    to_image: Attention
    norm: Affine
    enlarge1: Affine  # transposed convolution 2×2: [D, D / 4, 2, 2]
    enlarge_norm: Affine
    enlarge2: Affine  # [D / 4, D / 8, 2, 2]
    hyper: list[list[Affine]]  # of each of MASKS masks three linear layers, to [D / 8]
    quality: list[Affine]  # three linear layers, to [1 + MASKS]

    @property
    def width(self) -> int:
        return int(self.tokens.shape[-1])


def read_sam_encoder(path: Path) -> SamEncoder | TinyEncoder:
    """Read the image encoder of a checkpoint as float32; raises CheckpointError, see `read_tower`."""
    return read_tower(path, ENCODERS, _check_encoder, "image encoder", FAMILIES)


def read_mask_decoder(path: Path) -> MaskDecoder:
    """Read prompt encoder and mask decoder of a checkpoint likewise."""
    return read_tower(path, DECODERS, _check_decoder, "mask decoder", FAMILIES)


def _read_neck(state: Tensors) -> Neck:
    neck = "image_encoder.neck."
    return Neck(
        narrow=_pointwise(state[neck + "0.weight"]),
        norm1=read_affine(state, neck + "1"),
        smooth=state[neck + "2.weight"],
        norm2=read_affine(state, neck + "3"),
    )


def _pointwise(weight: Array) -> Array:
    """Return the weight of a 1×1 convolution as that of a linear layer."""
    if weight.ndim != 4 or weight.shape[2:] != (1, 1):
        raise ValueError(f"a convolution {weight.shape} is not 1×1")
    return weight[:, :, 0, 0]


def _read_sam(state: Tensors) -> SamEncoder:
    blocks = []
    for index in range(count_blocks(state, "image_encoder.blocks.")):
        name = f"image_encoder.blocks.{index}."
        block = Block(
            norm1=read_affine(state, name + "norm1"),
            qkv=read_affine(state, name + "attn.qkv"),
            proj=read_affine(state, name + "attn.proj"),
            norm2=read_affine(state, name + "norm2"),
            fc1=read_affine(state, name + "mlp.lin1"),
            fc2=read_affine(state, name + "mlp.lin2"),
        )
        blocks.append(SamBlock(block, state[name + "attn.rel_pos_h"], state[name + "attn.rel_pos_w"]))
    weight, bias = read_affine(state, "image_encoder.patch_embed.proj")
    positions = state["image_encoder.pos_embed"]
    return SamEncoder(weight, bias, positions.reshape(positions.shape[-3:]), blocks, _read_neck(state))


def _read_convolution(state: Tensors, name: str) -> Convolution:
    """Read a convolution without bias and the batch norm behind it."""
    weight, gamma = state[name + ".c.weight"], state[name + ".bn.weight"]
    bias, mean, variance = (state[f"{name}.bn.{part}"] for part in ("bias", "running_mean", "running_var"))
    if len({gamma.shape, bias.shape, mean.shape, variance.shape, weight.shape[:1]}) > 1:
        raise ValueError(f"the batch norm of {name} does not fit weights {weight.shape}")
    scale = gamma / np.sqrt(variance + np.float32(1e-5))
    return Convolution(weight * scale[:, None, None, None], bias - mean * scale)


def _read_convolutions(state: Tensors, names: list[str]) -> list[Convolution]:
    return [_read_convolution(state, name) for name in names]


def _read_tiny_block(state: Tensors, name: str) -> TinyBlock:
    """Read a block; in its tensor queries, keys and values of each head follow each other, in `Block` those of all."""
    biases, qkv = state[name + "attn.attention_biases"], read_affine(state, name + "attn.qkv")
    width = len(qkv[1]) // 3
    if biases.ndim != 2 or width % len(biases):
        raise ValueError(f"{name}attn: biases {biases.shape} do not fit {len(qkv[1])} queries, keys and values")
    order = np.arange(len(qkv[1])).reshape(len(biases), 3, -1).swapaxes(0, 1).ravel()
    block = Block(
        norm1=read_affine(state, name + "attn.norm"),
        qkv=(qkv[0][order], qkv[1][order]),
        proj=read_affine(state, name + "attn.proj"),
        norm2=read_affine(state, name + "mlp.norm"),
        fc1=read_affine(state, name + "mlp.fc1"),
        fc2=read_affine(state, name + "mlp.fc2"),
    )
    return TinyBlock(block, biases, _read_convolution(state, name + "local_conv"))


def _read_tiny(state: Tensors) -> TinyEncoder:
    layers = "image_encoder.layers."
    inverted = range(count_blocks(state, layers + "0.blocks."))
    count, parts = count_blocks(state, layers), ("conv1", "conv2", "conv3")
    stages = [(stage, count_blocks(state, f"{layers}{stage}.blocks.")) for stage in range(1, count)]
    return TinyEncoder(
        stem=_read_convolutions(state, [f"image_encoder.patch_embed.seq.{index}" for index in (0, 2)]),
        inverted=[_read_convolutions(state, [f"{layers}0.blocks.{i}.{part}" for part in parts]) for i in inverted],
        downsamplings=[
            _read_convolutions(state, [f"{layers}{stage}.downsample.{part}" for part in parts])
            for stage in range(count - 1)
        ],
        stages=[
            [_read_tiny_block(state, f"{layers}{stage}.blocks.{index}.") for index in range(blocks)]
            for stage, blocks in stages
        ],
        neck=_read_neck(state),
    )


def _read_attention(state: Tensors, name: str) -> Attention:
    return Attention(*(read_affine(state, f"{name}.{part}_proj") for part in ("q", "k", "v", "out")))


def _read_decoder(state: Tensors) -> MaskDecoder:
    prompt, decoder = "prompt_encoder.", "mask_decoder."
    blocks = []
    for index in range(count_blocks(state, decoder + "transformer.layers.")):
        name = f"{decoder}transformer.layers.{index}."
        blocks.append(
            TwoWayBlock(
                self_attention=_read_attention(state, name + "self_attn"),
                norm1=read_affine(state, name + "norm1"),
                to_image=_read_attention(state, name + "cross_attn_token_to_image"),
                norm2=read_affine(state, name + "norm2"),
                fc1=read_affine(state, name + "mlp.lin1"),
                fc2=read_affine(state, name + "mlp.lin2"),
                norm3=read_affine(state, name + "norm3"),
                from_image=_read_attention(state, name + "cross_attn_image_to_token"),
                norm4=read_affine(state, name + "norm4"),
            )
        )
    return MaskDecoder(
        frequencies=state[prompt + "pe_layer.positional_encoding_gaussian_matrix"],
        point=state[prompt + "point_embeddings.1.weight"].reshape(-1),
        no_point=state[prompt + "not_a_point_embed.weight"].reshape(-1),
        no_mask=state[prompt + "no_mask_embed.weight"].reshape(-1),
        tokens=np.concatenate([state[decoder + "iou_token.weight"], state[decoder + "mask_tokens.weight"]]),
        blocks=blocks,
        to_image=_read_attention(state, decoder + "transformer.final_attn_token_to_image"),
        norm=read_affine(state, decoder + "transformer.norm_final_attn"),
        enlarge1=read_affine(state, decoder + "output_upscaling.0"),
        enlarge_norm=read_affine(state, decoder + "output_upscaling.1"),
        enlarge2=read_affine(state, decoder + "output_upscaling.3"),
        hyper=[
            [read_affine(state, f"{decoder}output_hypernetworks_mlps.{mask}.layers.{layer}") for layer in range(3)]
            for mask in range(1, 1 + MASKS)
        ],
        quality=[read_affine(state, f"{decoder}iou_prediction_head.layers.{layer}") for layer in range(3)],
    )


# Beside one half of the network stands the other, and what prompts other than points, or several, take.
_OTHER_HALF = r"(prompt_encoder|mask_decoder)\..*|pixel_(mean|std)"
ENCODERS: Layouts[SamEncoder | TinyEncoder] = {
    "image_encoder.pos_embed": (_read_sam, _OTHER_HALF),
    "image_encoder.patch_embed.seq.0.c.weight": (
        _read_tiny,  # its head for classes is not used, the rest of the pattern are counters and tables of indices
        _OTHER_HALF + r"|image_encoder\.(norm_head|head)\..*|.*\.(num_batches_tracked|attention_bias_idxs)",
    ),
}
DECODERS: Layouts[MaskDecoder] = {
    "mask_decoder.iou_token.weight": (
        _read_decoder,
        r"image_encoder\..*|pixel_(mean|std)|prompt_encoder\.(mask_downscaling\..*|point_embeddings\.[023]\.weight)"
        r"|mask_decoder\.output_hypernetworks_mlps\.0\..*",
    )
}


def _check_encoder(encoder: SamEncoder | TinyEncoder) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    check_tensors(_named_tiny(encoder) if isinstance(encoder, TinyEncoder) else _named_sam(encoder))


def _named_neck(neck: Neck, width: int) -> list[Named]:
    out = len(neck.narrow)
    return [
        ("neck", neck.narrow, (out, width)),
        *named_affine("neck norm 1", neck.norm1, (out,)),
        ("neck 3×3", neck.smooth, (out, out, 3, 3)),
        *named_affine("neck norm 2", neck.norm2, (out,)),
    ]


def _named_sam(encoder: SamEncoder) -> list[Named]:
    grid, width = encoder.positions.shape[0], encoder.positions.shape[-1]
    patch = encoder.patch_weight.shape[-1]
    tensors: list[Named] = [
        ("patch", encoder.patch_weight, (width, 3, patch, patch)),
        ("patch bias", encoder.patch_bias, (width,)),
        ("positions", encoder.positions, (grid, grid, width)),
        *named_blocks([block.block for block in encoder.blocks], width),
        *_named_neck(encoder.neck, width),
    ]
    for index, block in enumerate(encoder.blocks):
        head = block.rows.shape[-1]
        if not 0 < block.side <= grid or not head or width % head:
            raise ValueError(
                f"block {index} has relative positions {block.rows.shape}: no window of a grid of {grid} × {grid} "
                f"tokens with {width} channels"
            )
        for name, table in (("rows", block.rows), ("columns", block.columns)):
            tensors.append((f"block {index} relative {name}", table, (2 * block.side - 1, head)))
    return tensors


def _named_convolutions(
    name: str, convolutions: list[Convolution], width: int, shapes: tuple[tuple[int, bool], ...]
) -> tuple[list[Named], int]:
    """Return the tensors of a row of convolutions from `width` channels, and how many come out.

    shapes: of each its side, and whether it is depthwise.
    """
    tensors: list[Named] = []
    for index, (convolution, (side, depthwise)) in enumerate(zip(convolutions, shapes, strict=True)):
        out = width if depthwise else len(convolution.bias)
        tensors += named_affine(
            f"{name} convolution {index}",
            (convolution.weight, convolution.bias),
            (out, 1 if depthwise else width, side, side),
        )
        width = out
    return tensors, width


def _named_tiny(encoder: TinyEncoder) -> list[Named]:
    if len(encoder.stages) != STAGES:
        raise ValueError(f"it has {len(encoder.stages)} stages of transformer blocks, MobileSAM's has {STAGES}")
    bottleneck = ((1, False), (3, True), (1, False))
    tensors, width = _named_convolutions("stem", encoder.stem, 3, ((3, False), (3, False)))
    for index, row in enumerate(encoder.inverted):
        own, out = _named_convolutions(f"first stage {index}", row, width, bottleneck)
        if out != width:
            raise ValueError(f"first stage {index} gives {out} channels instead of {width}")
        tensors += own
    for stage, (downsampling, blocks) in enumerate(zip(encoder.downsamplings, encoder.stages, strict=True), 1):
        own, width = _named_convolutions(f"downsampling to stage {stage}", downsampling, width, bottleneck)
        tensors += own + named_blocks([block.block for block in blocks], width)
        for index, block in enumerate(blocks):
            name = f"stage {stage} block {index}"
            if width % block.heads:
                raise ValueError(f"{name}: {block.heads} attention heads do not divide a width of {width}")
            tensors.append((f"{name} attention biases", block.biases, (block.heads, block.side**2)))
            own, _ = _named_convolutions(name, [block.local], width, ((3, True),))
            tensors += own
    return tensors + _named_neck(encoder.neck, width)


def _named_attention(name: str, attention: Attention, width: int) -> list[Named]:
    inner = len(attention.query[1])
    tensors: list[Named] = []
    for part in ("query", "key", "value"):
        tensors += named_affine(f"{name} {part}", getattr(attention, part), (inner, width))
    return tensors + named_affine(f"{name} out", attention.out, (width, inner))


def _named_layers(name: str, layers: list[Affine], width: int, out: int) -> list[Named]:
    """Return the tensors of linear layers behind each other, from `width` to `out` channels."""
    tensors: list[Named] = []
    for index, layer in enumerate(layers):
        wide = out if index == len(layers) - 1 else len(layer[1])
        tensors += named_affine(f"{name} {index}", layer, (wide, width))
        width = wide
    return tensors


def _check_decoder(decoder: MaskDecoder) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width = decoder.width
    if not decoder.blocks or width % 8:
        raise ValueError(f"{len(decoder.blocks)} blocks of {width} channels are no mask decoder")
    tensors: list[Named] = [
        ("frequencies of positions", decoder.frequencies, (2, width // 2)),
        *((name.replace("_", " "), getattr(decoder, name), (width,)) for name in ("point", "no_point", "no_mask")),
        ("tokens", decoder.tokens, (2 + MASKS, width)),
        *_named_attention("last attention", decoder.to_image, width),
        *named_affine("norm", decoder.norm, (width,)),
        ("enlargement 1", decoder.enlarge1[0], (width, width // 4, 2, 2)),
        ("enlargement 1 bias", decoder.enlarge1[1], (width // 4,)),
        *named_affine("enlargement norm", decoder.enlarge_norm, (width // 4,)),
        ("enlargement 2", decoder.enlarge2[0], (width // 4, width // 8, 2, 2)),
        ("enlargement 2 bias", decoder.enlarge2[1], (width // 8,)),
        *_named_layers("quality", decoder.quality, width, 1 + MASKS),
    ]
    for mask, layers in enumerate(decoder.hyper, 1):
        tensors += _named_layers(f"mask {mask}", layers, width, width // 8)
    for index, block in enumerate(decoder.blocks):
        name = f"block {index}"
        for part in ("self_attention", "to_image", "from_image"):
            tensors += _named_attention(f"{name} {part.replace('_', ' ')}", getattr(block, part), width)
        for norm in ("norm1", "norm2", "norm3", "norm4"):
            tensors += named_affine(f"{name} {norm}", getattr(block, norm), (width,))
        tensors += _named_layers(f"{name} fc", [block.fc1, block.fc2], width, width)
    check_tensors(tensors)


def relative_table(table: Array) -> Array:
    """Return relative positions [2·side − 1, d] for every query and key of a row of tokens: [side, side, d]."""
    side = (len(table) + 1) // 2
    found: Array = table[np.arange(side)[:, None] - np.arange(side) + side - 1]
    return found


def window_biases(block: TinyBlock) -> Array:
    """Return what TinyViT adds to the logits of a window: [heads, side², side²]."""
    distance = np.abs(np.arange(block.side)[:, None] - np.arange(block.side))
    places = distance[:, None, :, None] * block.side + distance[None, :, None, :]  # [row, column, row', column']
    found: Array = block.biases[:, places.reshape(block.side**2, -1)]
    return found


def dense_encoding(decoder: MaskDecoder, grid: int) -> Array:
    """Return the encoding of the centres of a grid's cells, in rows: [grid², D]."""
    centres = (2 * (np.arange(grid, dtype=np.float32) + np.float32(0.5)) / np.float32(grid)) - np.float32(1)
    x, y = np.meshgrid(centres, centres)
    angles = 2 * np.pi * (np.stack([x.ravel(), y.ravel()], axis=1) @ decoder.frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def window_places(grid: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which token each place of the windows holds, [windows · side²], and where each token went, [grid²].

    Windows in rows from the top left, without gaps; beyond the grid stands token number grid².
    """
    count = -(-grid // side)
    padded = np.full((count * side, count * side), grid * grid)
    padded[:grid, :grid] = np.arange(grid * grid).reshape(grid, grid)
    places = padded.reshape(count, side, count, side).swapaxes(1, 2).ravel()
    back = np.empty(grid * grid + 1, np.int64)
    back[places] = np.arange(len(places))
    return places, back[:-1]

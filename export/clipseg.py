"""CLIPSeg's decoder, read from any of the names under which it is published; its towers are CLIP's."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    rename_hugging_face_blocks,
)

LAYERS = 3  # blocks of the image tower that the decoder sees, and blocks of its own
NORM_EPS = 1e-5


@dataclass(frozen=True)
class ClipSegDecoder:
    """The refined decoder: tokens of the image tower and a prompt's vector in, logits out.

    R is its width, C that of the tokens, D that of the vector.
    """

    reduces: list[Affine]  # [R, C], in the order of its blocks: for the last of the tapped blocks first
    film_mul: Affine  # [R, D]
    film_add: Affine
    blocks: list[Block]  # `norm1` follows the attention with its residual, `norm2` the feed-forward with its own
    convolution: Affine  # [R, R, 3, 3]
    upsampling: list[Affine]  # two transposed convolutions without overlap: [R, M, k, k] and [M, 1, l, l]

    @property
    def width(self) -> int:
        return len(self.film_mul[1])

    @property
    def token_width(self) -> int:
        return int(self.reduces[0][0].shape[-1])

    @property
    def dimension(self) -> int:
        return int(self.film_mul[0].shape[-1])

    @property
    def patch_size(self) -> int:
        """How many pixels of logits a patch becomes on a side."""
        return int(np.prod([weight.shape[-1] for weight, _ in self.upsampling]))


def read_clipseg_decoder(path: Path) -> ClipSegDecoder:
    """Read the refined decoder of CLIPSeg as float32, in Hugging Face's names or in those of the original file.

    Raises CheckpointError, see `read_tower`; also for a decoder that is not refined.
    """
    return read_tower(path, LAYOUTS, _check, "decoder", "CLIPSeg")


def _check(decoder: ClipSegDecoder) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width = decoder.width
    if not len(decoder.blocks) == len(decoder.reduces) == LAYERS:
        raise ValueError(
            f"it has {len(decoder.blocks)} blocks for {len(decoder.reduces)} of the image tower, CLIPSeg's has {LAYERS}"
        )
    tensors: list[Named] = []
    for index, reduce in enumerate(decoder.reduces):
        tensors += named_affine(f"reduce {index}", reduce, (width, decoder.token_width))
    tensors += named_affine("film_mul", decoder.film_mul, (width, decoder.dimension))
    tensors += named_affine("film_add", decoder.film_add, (width, decoder.dimension))
    tensors += named_blocks(decoder.blocks, width)
    tensors += named_affine("convolution", decoder.convolution, (width, width, 3, 3))
    for index, block in enumerate(decoder.blocks):
        if len(block.fc1[1]) != block.fc2[0].shape[-1]:
            raise ValueError(f"block {index} fc1 is gated, which CLIPSeg's is not")
    inner = len(decoder.upsampling[0][1])
    for index, (own, channels) in enumerate(((width, inner), (inner, 1))):
        weight, bias = decoder.upsampling[index]
        side = weight.shape[-1]
        tensors.append((f"upsampling {index}", weight, (own, channels, side, side)))
        tensors.append((f"upsampling {index} bias", bias, (channels,)))
    check_tensors(tensors)


def _read(state: Tensors) -> ClipSegDecoder:
    """Either names: those of the Hugging Face port are renamed to the original ones."""
    if any(f"{head}.weight" in state for head in ("transposed_convolution", "trans_conv")):
        raise ValueError("it is not the refined one, which ends with three convolutions; this one has a single one")
    return _read_original(_rename_hugging_face(state) if "transposed_convolution.0.weight" in state else state)


def _read_original(state: Tensors) -> ClipSegDecoder:
    """The names of the original file."""
    blocks = []
    for index in range(count_blocks(state, "blocks.")):
        block = f"blocks.{index}."
        blocks.append(
            Block(
                norm1=read_affine(state, block + "norm1"),
                qkv=(state[block + "self_attn.in_proj_weight"], state[block + "self_attn.in_proj_bias"]),
                proj=read_affine(state, block + "self_attn.out_proj"),
                norm2=read_affine(state, block + "norm2"),
                fc1=read_affine(state, block + "linear1"),
                fc2=read_affine(state, block + "linear2"),
            )
        )
    return ClipSegDecoder(
        reduces=[read_affine(state, f"reduces.{index}") for index in range(count_blocks(state, "reduces."))],
        film_mul=read_affine(state, "film_mul"),
        film_add=read_affine(state, "film_add"),
        blocks=blocks,
        convolution=read_affine(state, "trans_conv.0"),
        upsampling=[read_affine(state, f"trans_conv.{index}") for index in (2, 4)],
    )


def _rename_hugging_face(state: Tensors) -> dict[str, Array]:
    of_block = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    renamed = rename_hugging_face_blocks(state, "layers.", "blocks.", "self_attn", of_block)
    both = {name: name for name in ("film_mul", "film_add")}
    both |= {f"reduces.{index}": f"reduces.{index}" for index in range(count_blocks(state, "reduces."))}
    both |= {f"transposed_convolution.{index}": f"trans_conv.{index}" for index in (0, 2, 4)}
    for theirs, ours in both.items():
        renamed[ours + ".weight"], renamed[ours + ".bias"] = read_affine(state, theirs)
    return renamed


# The original file has one more layer, which the network does not use.
LAYOUTS: Layouts[ClipSegDecoder] = {"film_mul.weight": (_read, r"reduce\.(weight|bias)")}

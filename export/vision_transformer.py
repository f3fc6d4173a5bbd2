"""A vision transformer's weights, read from any of the names under which DINOv2, DINOv3 and CLIP are published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.files import remembered_fact

from .dinov3 import read_dinov3_blocks, rename_hugging_face_dinov3, rename_timm_dinov3
from .options import Preprocessing
from .state_dict import CheckpointError
from .transformer import (
    HEAD_WIDTH,
    Affine,
    Array,
    Block,
    Layouts,
    Named,
    Tensors,
    attention_heads,
    check_tensors,
    count_blocks,
    named_affine,
    named_blocks,
    read_affine,
    read_clip_blocks,
    read_tower,
    rename_hugging_face_clip,
    scaled,
)

# Attention heads of image towers wider than ViT-L: ViT-H, ViT-g of CLIP and of DINOv2, ViT-bigG, ViT-e.
WIDE_HEADS = {1280: 16, 1408: 16, 1536: 24, 1664: 16, 1792: 16}
LONGEST_PERIOD = 100.0  # of rotary positions, in half sides of an image; the shortest is 1


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one kind of image tower from another and is in no tensor's shape."""

    name: str
    normed_taps: bool  # taps show the residual stream through the final norm, otherwise raw
    norm_eps: float
    position_offset: float  # patches that are added to the new grid where positions are resized
    antialias: bool  # of that resize
    preprocessing: Preprocessing  # what its images are normalised with unless told otherwise
    rotary: bool = False  # positions turn queries and keys of the patches; nothing is added to the tokens
    wide_heads: Mapping[int, int] = field(default_factory=lambda: WIDE_HEADS, hash=False)

    def attention_heads(self, width: int, heads: int | None) -> int:
        """Return the number of attention heads, see the function of this name."""
        known = width // HEAD_WIDTH if width <= 1024 and width % HEAD_WIDTH == 0 else self.wide_heads.get(width)
        return attention_heads(width, heads, known)


# DINOv2's `interpolate_pos_encoding` offsets the scale by 0.1 patches; with registers it antialiases instead.
DINOV2 = Architecture(
    "dinov2", normed_taps=True, norm_eps=1e-6, position_offset=0.1, antialias=False, preprocessing="imagenet"
)
DINOV2_REGISTERS = replace(DINOV2, position_offset=0.0, antialias=True)
DINOV3 = replace(
    DINOV2, name="dinov3", norm_eps=1e-5, position_offset=0.0, rotary=True, wide_heads={1280: 20, 4096: 32}
)
CLIP = Architecture(
    "clip", normed_taps=False, norm_eps=1e-5, position_offset=0.0, antialias=False, preprocessing="clip"
)


@dataclass(frozen=True)
class VisionTransformer:
    """The image tower of DINOv2, DINOv3 or CLIP."""

    architecture: Architecture
    patch_weight: Array  # [C, 3, patch, patch]
    patch_bias: Array | None  # [C]
    class_token: Array  # [C]
    registers: Array  # [number of registers, C]
    positions: Array  # [1 + G·G, C], class token first; of rotary ones there are none, [0, C]
    pre_norm: Affine | None  # CLIP only
    blocks: list[Block]
    norm: Affine  # DINOv2's and DINOv3's final norm, CLIP's ln_post
    projection: Array | None  # [C, D], CLIP only
    own_class_norm: Affine | None = None  # of the class token, where it does not share `norm`: DINOv3 only
    periods: Array | None = None  # [head width / 4], of rotary positions, where the file has them

    @property
    def width(self) -> int:
        return len(self.class_token)

    @property
    def patch_size(self) -> int:
        return int(self.patch_weight.shape[-1])

    @property
    def class_norm(self) -> Affine:
        """The final norm of the class token."""
        return self.norm if self.own_class_norm is None else self.own_class_norm

    def attention_heads(self, heads: int | None) -> int:
        """Return the number of attention heads: that which the file tells, else see `Architecture`."""
        if self.periods is None:
            found = self.architecture.attention_heads(self.width, heads)
            if self.architecture.rotary and self.width // found % 4:
                raise CheckpointError(f"{found} heads are {self.width // found} wide, which rotary positions quarter")
            return found
        told = self.width // (4 * len(self.periods))
        if heads not in (None, told):
            raise CheckpointError(
                f"its rotary positions are those of {told} attention heads; leave out --heads {heads}"
            )
        return told

    def angles(self, heads: int, grid: int) -> NDArray[np.float64]:
        """Return by how much rotary positions turn the tokens' channel pairs, alike in all heads: [T, C / heads / 2].

        Class token and registers are not turned; a patch is by its centre's y, then x, in [-1, 1], over each period.
        """
        count = self.width // heads // 4
        periods = LONGEST_PERIOD ** (np.arange(count) / count) if self.periods is None else self.periods
        centres = (2 * np.arange(grid) + 1) / grid - 1
        turns = 2 * np.pi * centres[:, None] / periods  # [grid, count]
        rows, columns = np.repeat(turns, grid, axis=0), np.tile(turns, (grid, 1))
        still = np.zeros((1 + len(self.registers), 2 * count))
        return np.concatenate([still, np.concatenate([rows, columns], axis=1)])


def read_vision_transformer(path: Path) -> VisionTransformer:
    """Read the image tower of a checkpoint as float32.

    DINOv2 and DINOv3 in their official, timm's or Hugging Face's names; CLIP in OpenAI's (also open_clip's), timm's or
    Hugging Face's.
    Pooling leaves no trace in names: the class token is assumed. Raises CheckpointError, see `read_tower`.
    """
    return read_tower(path, LAYOUTS, _check, "image tower", "DINOv2, DINOv3 or CLIP")


def read_patch_size(path: Path) -> int:
    """Return the side in pixels of the patches that a checkpoint's image tower cuts images into, see above."""
    return int(remembered_fact(path, "patch", lambda path: str(read_vision_transformer(path).patch_size)))


def _check(vit: VisionTransformer) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width, patches = vit.width, len(vit.positions) - 1
    if not vit.architecture.rotary and (patches < 1 or math.isqrt(patches) ** 2 != patches):
        raise ValueError(f"{len(vit.positions)} positions are no class token and a square grid")
    blocks = named_blocks(vit.blocks, width)
    tensors: list[Named] = [
        ("patch", vit.patch_weight, (width, 3, vit.patch_size, vit.patch_size)),
        ("class token", vit.class_token, (width,)),
        ("registers", vit.registers, (len(vit.registers), width)),
        ("positions", vit.positions, (1 + patches, width)),
    ]
    if vit.patch_bias is not None:
        tensors.append(("patch bias", vit.patch_bias, (width,)))
    if vit.projection is not None:
        tensors.append(("projection", vit.projection, (width, vit.projection.shape[-1])))
    tensors += named_affine("norm", vit.norm, (width,))
    if vit.pre_norm is not None:
        tensors += named_affine("pre_norm", vit.pre_norm, (width,))
    if vit.own_class_norm is not None:
        tensors += named_affine("class norm", vit.own_class_norm, (width,))
    if vit.periods is not None:
        if not vit.periods.size or width % (4 * vit.periods.size) or not (vit.periods > 0).all():
            raise ValueError(
                f"{vit.periods.size} periods above 0 of rotary positions fit no heads of a width of {width}"
            )
        tensors.append(("periods", vit.periods, (vit.periods.size,)))
    check_tensors([*tensors, *blocks])


def _rows(tensor: Array) -> Array:
    """Return the vectors of a tensor, whose further axes are of length 1 or count them: [n, C]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _read_blocks(state: Tensors) -> VisionTransformer:
    """DINOv2's official names, which timm shares and also gives to CLIP's image tower; DINOv3's are similar."""
    if "rope_embed.periods" in state:
        return _read_dinov3(state)
    if "reg_token" in state and "pos_embed" not in state:
        return _read_dinov3(rename_timm_dinov3(state))
    clip = "norm_pre.weight" in state
    class_token, positions = state["cls_token"].reshape(-1), _rows(state["pos_embed"])
    registers = state.get("register_tokens", np.empty((0, len(class_token)), np.float32))
    if "reg_token" in state:
        # timm's register models keep the class token's position inside the token itself.
        registers = state["reg_token"]
        positions = np.concatenate([np.zeros_like(positions[:1]), positions])
    if clip and np.any(state.get("head.bias", 0)):  # of timm's CLIP towers it is zero
        raise ValueError("head.bias belongs to a classifier; zsad needs CLIP's projection, which has none")
    blocks = []
    for index in range(count_blocks(state, "blocks.")):
        block = f"blocks.{index}."
        fc1, fc2 = ("w12", "w3") if block + "mlp.w12.weight" in state else ("fc1", "fc2")
        blocks.append(
            Block(
                norm1=read_affine(state, block + "norm1"),
                qkv=read_affine(state, block + "attn.qkv"),
                proj=scaled(read_affine(state, block + "attn.proj"), state.get(block + "ls1.gamma")),
                norm2=read_affine(state, block + "norm2"),
                fc1=read_affine(state, f"{block}mlp.{fc1}"),
                fc2=scaled(read_affine(state, f"{block}mlp.{fc2}"), state.get(block + "ls2.gamma")),
            )
        )
    own = DINOV2_REGISTERS if len(_rows(registers)) else DINOV2
    return VisionTransformer(
        architecture=CLIP if clip else own,
        patch_weight=state["patch_embed.proj.weight"],
        patch_bias=state.get("patch_embed.proj.bias"),
        class_token=class_token,
        registers=_rows(registers),
        positions=positions,
        pre_norm=read_affine(state, "norm_pre") if clip else None,
        blocks=blocks,
        norm=read_affine(state, "norm"),
        projection=state["head.weight"].T if clip else None,
    )


def _read_hugging_face_dinov2(state: Tensors) -> VisionTransformer:
    """Names of the Hugging Face port: rename to the official ones and read those."""
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    if "embeddings.register_tokens" in state:
        renamed["register_tokens"] = state["embeddings.register_tokens"]
    for index in range(count_blocks(state, "encoder.layer.")):
        source, target = f"encoder.layer.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            parts = [state[f"{source}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{target}attn.qkv.{kind}"] = np.concatenate(parts)
            renamed[f"{target}attn.proj.{kind}"] = state[f"{source}attention.output.dense.{kind}"]
            gated = f"{source}mlp.weights_in.{kind}" in state
            for theirs, ours in (
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("mlp.weights_in" if gated else "mlp.fc1", "mlp.fc1"),
                ("mlp.weights_out" if gated else "mlp.fc2", "mlp.fc2"),
            ):
                renamed[f"{target}{ours}.{kind}"] = state[f"{source}{theirs}.{kind}"]
        renamed[target + "ls1.gamma"] = state[source + "layer_scale1.lambda1"]
        renamed[target + "ls2.gamma"] = state[source + "layer_scale2.lambda1"]
    return _read_blocks(renamed)


def _read_dinov3(state: Tensors) -> VisionTransformer:
    """DINOv3's official names."""
    class_token = state["cls_token"].reshape(-1)
    width = len(class_token)
    return VisionTransformer(
        architecture=DINOV3,
        patch_weight=state["patch_embed.proj.weight"],
        patch_bias=state["patch_embed.proj.bias"],
        class_token=class_token,
        registers=_rows(state.get("storage_tokens", np.empty((0, width), np.float32))),
        positions=np.empty((0, width), np.float32),
        pre_norm=None,
        blocks=read_dinov3_blocks(state, width),
        norm=read_affine(state, "norm"),
        projection=None,
        own_class_norm=read_affine(state, "cls_norm") if "cls_norm.weight" in state else None,
        periods=state.get("rope_embed.periods"),
    )


def _refuse_convnext(state: Tensors) -> NoReturn:
    """Of DINOv3 there are convolutional networks too."""
    raise ValueError(
        "a ConvNeXt, as of DINOv3, has no tokens; take one of DINOv3's vision transformers, ViT-S/16 or larger"
    )


def _read_clip(state: Tensors) -> VisionTransformer:
    """OpenAI's names, which open_clip shares."""
    class_token = state["class_embedding"]
    return VisionTransformer(
        architecture=CLIP,
        patch_weight=state["conv1.weight"],
        patch_bias=None,
        class_token=class_token,
        registers=np.empty((0, len(class_token)), np.float32),
        positions=state["positional_embedding"],
        pre_norm=read_affine(state, "ln_pre"),
        blocks=read_clip_blocks(state),
        norm=read_affine(state, "ln_post"),
        projection=state["proj"],
    )


def _read_hugging_face_clip(state: Tensors) -> VisionTransformer:
    """Names of the Hugging Face port: rename to OpenAI's and read those."""
    embeddings = "vision_model.embeddings."
    renamed = {
        "class_embedding": state[embeddings + "class_embedding"],
        "conv1.weight": state[embeddings + "patch_embedding.weight"],
        "positional_embedding": state[embeddings + "position_embedding.weight"],
        "proj": state["visual_projection.weight"].T,
    }
    norms = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    return _read_clip({**renamed, **rename_hugging_face_clip(state, "vision_model.", norms)})


LAYOUTS: Layouts[VisionTransformer] = {
    # What DINOv3 calls local_cls_norm norms the class tokens of its training's small crops.
    "patch_embed.proj.weight": (_read_blocks, r"mask_token|head\.(weight|bias)|local_cls_norm\.(weight|bias)"),
    "embeddings.patch_embeddings.projection.weight": (_read_hugging_face_dinov2, r"embeddings\.mask_token"),
    "embeddings.patch_embeddings.weight": (
        lambda state: _read_dinov3(rename_hugging_face_dinov3(state)),
        r"embeddings\.mask_token",
    ),
    "downsample_layers.0.0.weight": (_refuse_convnext, ""),
    "stages.0.layers.0.depthwise_conv.weight": (_refuse_convnext, ""),
    "ln_pre.weight": (_read_clip, ""),
    "vision_model.pre_layrnorm.weight": (
        _read_hugging_face_clip,
        r"(text_model|text_projection|logit_scale)(\..*)?|vision_model\.embeddings\.position_ids",
    ),
}

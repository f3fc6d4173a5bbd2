"""A vision transformer's weights, read from any of the names under which DINOv2 and CLIP are published."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .options import Preprocessing
from .state_dict import CheckpointError, StateDict, read_state_dict

Array = NDArray[np.float32]
Tensors = Mapping[str, Array]
Affine = tuple[Array, Array]  # weight and bias

AVERAGED = re.compile(r"(^|[._])(teacher|ema)[._]")  # in names of towers that average others over the training


HEAD_WIDTH = 64  # in every published DINOv2 and CLIP image tower up to ViT-L, 1024 channels wide
# Attention heads of the wider ones: ViT-H, ViT-g of CLIP and of DINOv2, ViT-bigG, ViT-e.
WIDE_HEADS = {1280: 16, 1408: 16, 1536: 24, 1664: 16, 1792: 16}


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one kind of image tower from another and is in no tensor's shape."""

    name: str
    normed_taps: bool  # taps show the residual stream through the final norm, otherwise raw
    norm_eps: float
    position_offset: float  # patches that are added to the new grid where positions are resized
    antialias: bool  # of that resize
    preprocessing: Preprocessing  # what its images are normalised with unless told otherwise

    def attention_heads(self, width: int, heads: int | None) -> int:
        """Return the number of attention heads: the one asked for, else that of the published tower of this width.

        No tensor tells it. Raises CheckpointError when it does not divide the width or there is no such tower.
        """
        known = width // HEAD_WIDTH if width <= 1024 and width % HEAD_WIDTH == 0 else WIDE_HEADS.get(width)
        heads = known if heads is None else heads
        if heads is None:
            problem = f"how many attention heads a tower {width} wide has is not known"
        elif heads < 1 or width % heads:
            problem = f"{heads} attention heads do not divide a width of {width}"
        else:
            return heads
        raise CheckpointError(
            f"{problem}; name the number with --heads (or `heads` of the network in the configuration)"
        )


# DINOv2's `interpolate_pos_encoding` offsets the scale by 0.1 patches; with registers it antialiases instead.
DINOV2 = Architecture(
    "dinov2", normed_taps=True, norm_eps=1e-6, position_offset=0.1, antialias=False, preprocessing="imagenet"
)
DINOV2_REGISTERS = replace(DINOV2, position_offset=0.0, antialias=True)
CLIP = Architecture(
    "clip", normed_taps=False, norm_eps=1e-5, position_offset=0.0, antialias=False, preprocessing="clip"
)


@dataclass(frozen=True)
class Block:
    """One transformer block; linear weights are [out, in], layer scale is folded into `proj` and `fc2`.

    Where `fc1` is twice as wide as `fc2` reads, its halves are gate and value of a SwiGLU (DINOv2 ViT-g/14).
    """

    norm1: Affine
    qkv: Affine  # [3C, C], [3C]
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True)
class VisionTransformer:
    """The image tower of DINOv2 or CLIP."""

    architecture: Architecture
    patch_weight: Array  # [C, 3, patch, patch]
    patch_bias: Array | None  # [C]
    class_token: Array  # [C]
    registers: Array  # [number of registers, C]
    positions: Array  # [1 + G·G, C], class token first
    pre_norm: Affine | None  # CLIP only
    blocks: list[Block]
    norm: Affine  # DINOv2's final norm, CLIP's ln_post
    projection: Array | None  # [C, D], CLIP only

    @property
    def width(self) -> int:
        return len(self.class_token)

    @property
    def patch_size(self) -> int:
        return int(self.patch_weight.shape[-1])


def read_vision_transformer(path: Path) -> VisionTransformer:
    """Read the image tower of a checkpoint as float32.

    DINOv2 in its official, timm or Hugging Face names; CLIP in OpenAI's (also open_clip's), timm's or Hugging Face's.
    From a training checkpoint with several towers comes the averaged one: `teacher` before `student`, `ema` before its
    model. Pooling leaves no trace in names: the class token is assumed.

    Raises CheckpointError when the file is unreadable, incomplete or of another architecture; a tensor of the tower
    that would not be used means another architecture.
    """
    state = read_state_dict(path)
    towers = [
        (marker, key.removesuffix(marker))
        for marker in LAYOUTS
        for key in state
        if key == marker or key.endswith("." + marker)
    ]
    if not towers:
        raise CheckpointError(
            f"{path}: none of its {len(state)} tensors is named as in a DINOv2 or CLIP image tower "
            f"(looked for {', '.join(LAYOUTS)})"
        )
    towers = [tower for tower in towers if AVERAGED.search(tower[1])] or towers
    if len(towers) > 1:
        prefixes = ", ".join(repr(prefix) for _, prefix in towers)
        raise CheckpointError(f"{path}: holds several image towers ({prefixes}); save the one that is meant alone")
    (marker, prefix), *_ = towers
    layout, unused = LAYOUTS[marker]
    try:
        tower = _Tower(state, prefix)
        transformer = layout(tower)
        _check(transformer)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: lacks the tensor {prefix}{error.args[0]}: it is incomplete or of an architecture that zsad "
            "does not know"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: unusable as an image tower: {error}") from error
    foreign = [prefix + name for name in tower.unread() if not re.fullmatch(unused, name)]
    around = prefix.removesuffix("trunk.")  # open_clip's name for a tower of timm, which it projects by itself
    foreign += [name for name in state if name.startswith(around) and not name.startswith(prefix)]
    if foreign:
        raise CheckpointError(f"{path}: holds {foreign[0]}, which belongs to an architecture that zsad does not know")
    return transformer


class _Tower(Tensors):
    """The tensors below a prefix as float32 with at least one axis; remembers which have been read."""

    def __init__(self, state: StateDict, prefix: str) -> None:
        below = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        # DINOv2's training groups its blocks: `blocks.<group>.<block>.`, where blocks are numbered through.
        self._stored = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): below[name] for name in below}
        if len(self._stored) < len(below):
            raise ValueError("the blocks of every group are numbered from 0, which is no layout of DINOv2's")
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        tensor = np.atleast_1d(np.asarray(self._stored[name], np.float32))
        self._read.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def unread(self) -> list[str]:
        return [name for name in self._stored if name not in self._read]


def _check(vit: VisionTransformer) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width, patches = vit.width, len(vit.positions) - 1
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{len(vit.positions)} positions are no class token and a square grid")
    if not vit.blocks:
        raise ValueError("there are no blocks")
    tensors: list[tuple[str, Array, tuple[int, ...]]] = [
        ("patch", vit.patch_weight, (width, 3, vit.patch_size, vit.patch_size)),
        ("class token", vit.class_token, (width,)),
        ("registers", vit.registers, (len(vit.registers), width)),
        ("positions", vit.positions, (1 + patches, width)),
    ]
    if vit.patch_bias is not None:
        tensors.append(("patch bias", vit.patch_bias, (width,)))
    if vit.projection is not None:
        tensors.append(("projection", vit.projection, (width, vit.projection.shape[-1])))
    affines: dict[str, tuple[Affine, tuple[int, ...]]] = {"norm": (vit.norm, (width,))}
    if vit.pre_norm is not None:
        affines["pre_norm"] = (vit.pre_norm, (width,))
    for index, block in enumerate(vit.blocks):
        hidden = block.fc2[0].shape[-1]
        wide = 2 * hidden if len(block.fc1[1]) == 2 * hidden else hidden
        shapes: dict[str, tuple[int, ...]] = {
            "norm1": (width,),
            "qkv": (3 * width, width),
            "proj": (width, width),
            "norm2": (width,),
            "fc1": (wide, width),
            "fc2": (width, hidden),
        }
        affines |= {f"block {index} {name}": (getattr(block, name), shape) for name, shape in shapes.items()}
    for name, ((weight, bias), shape) in affines.items():
        tensors += [(name, weight, shape), (name + " bias", bias, shape[:1])]
    for name, tensor, expected in tensors:
        if tensor.shape != expected or 0 in expected[1:]:
            raise ValueError(f"{name} is {tensor.shape} instead of {expected}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values: damaged; put a whole copy in its place")


def _affine(state: Tensors, name: str) -> Affine:
    return state[name + ".weight"], state[name + ".bias"]


def _scaled(affine: Affine, gamma: Array | None) -> Affine:
    """Fold a layer scale into the linear layer before it."""
    weight, bias = affine
    if gamma is None:
        return weight, bias
    if gamma.shape != bias.shape or gamma.shape != weight.shape[:1]:
        raise ValueError(f"a layer scale {gamma.shape} does not fit weights {weight.shape}")
    return (weight.T * gamma).T, bias * gamma


def _rows(tensor: Array) -> Array:
    """Return the vectors of a tensor, whose further axes are of length 1 or count them: [n, C]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _count_blocks(state: Tensors, prefix: str) -> int:
    return 1 + max((int(name.split(".")[prefix.count(".")]) for name in state if name.startswith(prefix)), default=-1)


def _read_blocks(state: Tensors) -> VisionTransformer:
    """DINOv2's official names, which timm shares and also gives to CLIP's image tower."""
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
    for index in range(_count_blocks(state, "blocks.")):
        block = f"blocks.{index}."
        fc1, fc2 = ("w12", "w3") if block + "mlp.w12.weight" in state else ("fc1", "fc2")
        blocks.append(
            Block(
                norm1=_affine(state, block + "norm1"),
                qkv=_affine(state, block + "attn.qkv"),
                proj=_scaled(_affine(state, block + "attn.proj"), state.get(block + "ls1.gamma")),
                norm2=_affine(state, block + "norm2"),
                fc1=_affine(state, f"{block}mlp.{fc1}"),
                fc2=_scaled(_affine(state, f"{block}mlp.{fc2}"), state.get(block + "ls2.gamma")),
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
        pre_norm=_affine(state, "norm_pre") if clip else None,
        blocks=blocks,
        norm=_affine(state, "norm"),
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
    for index in range(_count_blocks(state, "encoder.layer.")):
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


def _read_clip(state: Tensors) -> VisionTransformer:
    """OpenAI's names, which open_clip shares; it knows layer scales besides."""
    class_token = state["class_embedding"]
    blocks = []
    for index in range(_count_blocks(state, "transformer.resblocks.")):
        block = f"transformer.resblocks.{index}."
        blocks.append(
            Block(
                norm1=_affine(state, block + "ln_1"),
                qkv=(state[block + "attn.in_proj_weight"], state[block + "attn.in_proj_bias"]),
                proj=_scaled(_affine(state, block + "attn.out_proj"), state.get(block + "ls_1.gamma")),
                norm2=_affine(state, block + "ln_2"),
                fc1=_affine(state, block + "mlp.c_fc"),
                fc2=_scaled(_affine(state, block + "mlp.c_proj"), state.get(block + "ls_2.gamma")),
            )
        )
    return VisionTransformer(
        architecture=CLIP,
        patch_weight=state["conv1.weight"],
        patch_bias=None,
        class_token=class_token,
        registers=np.empty((0, len(class_token)), np.float32),
        positions=state["positional_embedding"],
        pre_norm=_affine(state, "ln_pre"),
        blocks=blocks,
        norm=_affine(state, "ln_post"),
        projection=state["proj"],
    )


def _read_hugging_face_clip(state: Tensors) -> VisionTransformer:
    """Names of the Hugging Face port: rename to OpenAI's and read those."""
    tower = "vision_model."
    renamed = {
        "class_embedding": state[tower + "embeddings.class_embedding"],
        "conv1.weight": state[tower + "embeddings.patch_embedding.weight"],
        "positional_embedding": state[tower + "embeddings.position_embedding.weight"],
        "proj": state["visual_projection.weight"].T,
    }
    layers = [(tower + "pre_layrnorm", "ln_pre"), (tower + "post_layernorm", "ln_post")]
    for index in range(_count_blocks(state, tower + "encoder.layers.")):
        source, target = f"{tower}encoder.layers.{index}.", f"transformer.resblocks.{index}."
        layers += [(source + "layer_norm1", target + "ln_1"), (source + "layer_norm2", target + "ln_2")]
        layers += [(source + "mlp.fc1", target + "mlp.c_fc"), (source + "mlp.fc2", target + "mlp.c_proj")]
        layers += [(source + "self_attn.out_proj", target + "attn.out_proj")]
        for kind in ("weight", "bias"):
            parts = [state[f"{source}self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            renamed[f"{target}attn.in_proj_{kind}"] = np.concatenate(parts)
    for theirs, ours in layers:
        renamed[ours + ".weight"], renamed[ours + ".bias"] = _affine(state, theirs)
    return _read_clip(renamed)


# A tensor that only this layout has → its reader, and which tensors beside the tower's own change nothing.
LAYOUTS: dict[str, tuple[Callable[[Tensors], VisionTransformer], str]] = {
    "patch_embed.proj.weight": (_read_blocks, r"mask_token|head\.(weight|bias)"),
    "embeddings.patch_embeddings.projection.weight": (_read_hugging_face_dinov2, r"embeddings\.mask_token"),
    "ln_pre.weight": (_read_clip, ""),
    "vision_model.pre_layrnorm.weight": (
        _read_hugging_face_clip,
        r"(text_model|text_projection|logit_scale)(\..*)?|vision_model\.embeddings\.position_ids",
    ),
}

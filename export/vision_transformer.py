"""A vision transformer's weights, read from any of the names under which DINOv2 and CLIP are published."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .state_dict import CheckpointError, StateDict, read_state_dict

Array = NDArray[np.float32]
Tensors = dict[str, Array]
Affine = tuple[Array, Array]  # weight and bias


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

    architecture: str  # "dinov2" or "clip"
    patch_weight: Array  # [C, 3, patch, patch]
    patch_bias: Array | None  # [C]
    class_token: Array  # [C]
    registers: Array  # [number of registers, C]
    positions: Array  # [1 + G·G, C], class token first
    pre_norm: Affine | None  # CLIP only
    blocks: list[Block]
    norm: Affine  # DINOv2's final norm, CLIP's ln_post
    projection: Array | None  # [C, D], CLIP only
    norm_eps: float

    @property
    def width(self) -> int:
        return len(self.class_token)

    @property
    def patch_size(self) -> int:
        return int(self.patch_weight.shape[-1])


def read_vision_transformer(path: Path) -> VisionTransformer:
    """Read the image tower of a checkpoint as float32.

    DINOv2 in its official, timm or Hugging Face names; CLIP in OpenAI's (also open_clip's), timm's or Hugging Face's.
    Raises CheckpointError when the file is unreadable, incomplete or of another architecture.
    """
    state = read_state_dict(path)
    for marker, layout in LAYOUTS.items():
        for key in state:
            if key == marker or key.endswith("." + marker):
                try:
                    transformer = layout(_below(state, key.removesuffix(marker)))
                    _check_shapes(transformer)
                    return transformer
                except KeyError as error:
                    raise CheckpointError(
                        f"{path}: the checkpoint lacks the tensor {error}; fetch the file again"
                    ) from None
                except ValueError as error:
                    raise CheckpointError(f"{path}: its tensors do not fit together ({error})") from error
    raise CheckpointError(
        f"{path}: none of its {len(state)} tensors is named as in a DINOv2 or CLIP image tower "
        f"(looked for {', '.join(LAYOUTS)})"
    )


def _below(state: StateDict, prefix: str) -> Tensors:
    return {
        name[len(prefix) :]: np.asarray(tensor, np.float32) for name, tensor in state.items() if name.startswith(prefix)
    }


def _check_shapes(vit: VisionTransformer) -> None:
    """Raise ValueError where a tensor does not fit the others."""
    width, patches = vit.width, len(vit.positions) - 1
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{patches} positions are no square grid")
    found = {"patch": vit.patch_weight.shape, "positions": vit.positions.shape, "norm": vit.norm[0].shape}
    expected: dict[str, tuple[int, ...]] = {
        "patch": (width, 3, vit.patch_size, vit.patch_size),
        "positions": (1 + patches, width),
        "norm": (width,),
    }
    if not vit.blocks:
        raise ValueError("there are no blocks")
    for index, block in enumerate(vit.blocks):
        hidden = block.fc2[0].shape[1]
        wide = 2 * hidden if len(block.fc1[1]) == 2 * hidden else hidden
        for name, out, inputs in (
            ("qkv", 3 * width, width),
            ("proj", width, width),
            ("fc1", wide, width),
            ("fc2", width, hidden),
        ):
            weight, bias = getattr(block, name)
            found |= {f"block {index} {name}": weight.shape, f"block {index} {name} bias": bias.shape}
            expected |= {f"block {index} {name}": (out, inputs), f"block {index} {name} bias": (out,)}
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} is {found[name]} instead of {shape}")


def _affine(state: Tensors, name: str) -> Affine:
    return state[name + ".weight"], state[name + ".bias"]


def _scaled(affine: Affine, gamma: Array | None) -> Affine:
    """Fold a layer scale into the linear layer before it."""
    weight, bias = affine
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


def _count_blocks(state: Tensors, prefix: str) -> int:
    return 1 + max((int(name.split(".")[prefix.count(".")]) for name in state if name.startswith(prefix)), default=-1)


def _read_blocks(state: Tensors) -> VisionTransformer:
    """DINOv2's official names, which timm shares and also gives to CLIP's image tower."""
    clip = "norm_pre.weight" in state
    width = state["cls_token"].shape[-1]
    positions = state["pos_embed"].reshape(-1, width)
    registers = state.get("register_tokens", state.get("reg_token", np.empty((0, width), np.float32)))
    if math.isqrt(len(positions)) ** 2 == len(positions):
        # timm's register models keep the class token's position inside the token itself.
        positions = np.concatenate([np.zeros((1, width), np.float32), positions])
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
    return VisionTransformer(
        architecture="clip" if clip else "dinov2",
        patch_weight=state["patch_embed.proj.weight"],
        patch_bias=state.get("patch_embed.proj.bias"),
        class_token=state["cls_token"].reshape(-1),
        registers=registers.reshape(-1, width),
        positions=positions,
        pre_norm=_affine(state, "norm_pre") if clip else None,
        blocks=blocks,
        norm=_affine(state, "norm"),
        projection=state["head.weight"].T if clip else None,
        norm_eps=1e-5 if clip else 1e-6,
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
    """OpenAI's names, which open_clip shares."""
    width = state["class_embedding"].shape[0]
    blocks = []
    for index in range(_count_blocks(state, "transformer.resblocks.")):
        block = f"transformer.resblocks.{index}."
        blocks.append(
            Block(
                norm1=_affine(state, block + "ln_1"),
                qkv=(state[block + "attn.in_proj_weight"], state[block + "attn.in_proj_bias"]),
                proj=_affine(state, block + "attn.out_proj"),
                norm2=_affine(state, block + "ln_2"),
                fc1=_affine(state, block + "mlp.c_fc"),
                fc2=_affine(state, block + "mlp.c_proj"),
            )
        )
    return VisionTransformer(
        architecture="clip",
        patch_weight=state["conv1.weight"],
        patch_bias=None,
        class_token=state["class_embedding"],
        registers=np.empty((0, width), np.float32),
        positions=state["positional_embedding"],
        pre_norm=_affine(state, "ln_pre"),
        blocks=blocks,
        norm=_affine(state, "ln_post"),
        projection=state["proj"],
        norm_eps=1e-5,
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


# A tensor that only this layout has → its reader.
LAYOUTS: dict[str, Callable[[Tensors], VisionTransformer]] = {
    "patch_embed.proj.weight": _read_blocks,
    "embeddings.patch_embeddings.projection.weight": _read_hugging_face_dinov2,
    "ln_pre.weight": _read_clip,
    "vision_model.pre_layrnorm.weight": _read_hugging_face_clip,
}

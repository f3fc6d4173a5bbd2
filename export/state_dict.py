"""Reads a vision transformer's weights from any supported file into one description."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load_file

Array = NDArray[np.float32]
StateDict = Mapping[str, Array]
Affine = tuple[Array, Array]  # weight and bias


class CheckpointError(Exception):
    """A checkpoint that cannot be had or cannot be used; the message says how to mend it."""


@dataclass(frozen=True)
class Block:
    """One transformer block; linear weights are [out, in], layer scale is folded into `proj` and `fc2`."""

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
    """Read a checkpoint: DINOv2 in its official, timm or Hugging Face names, or CLIP in OpenAI's names.

    Raises CheckpointError when the file is unreadable, incomplete or of another architecture.
    """
    state = read_state_dict(path)
    try:
        for marker, layout in LAYOUTS.items():
            for key in state:
                if key == marker or key.endswith("." + marker):
                    return layout(_without_prefix(state, key[: -len(marker)]))
    except KeyError as error:
        raise CheckpointError(f"{path}: the checkpoint lacks the tensor {error}; fetch the file again") from None
    raise CheckpointError(
        f"{path}: none of its {len(state)} tensors is named as in a DINOv2 or CLIP image tower "
        f"(looked for {', '.join(LAYOUTS)})"
    )


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a .safetensors, .onnx, .pth or .pt file as float32, running no code from it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file")
    suffix = path.suffix.lower()
    tensors: Mapping[str, NDArray[Any]]
    try:
        if suffix == ".safetensors":
            tensors = load_file(path)
        elif suffix == ".onnx":
            tensors = _read_onnx_initializers(path)
        elif suffix in (".pth", ".pt"):
            tensors = _read_torch(path)
        else:
            raise CheckpointError(f"{path}: a checkpoint must be .safetensors, .pth, .pt or .onnx, not {suffix!r}")
    except (SafetensorError, onnx.onnx_cpp2py_export.checker.ValidationError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged or not what its name says ({error}); fetch the file again") from error
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def _read_torch(path: Path) -> StateDict:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: reading PyTorch files needs PyTorch, which is not installed; run: pip install 'zsad[export]'"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own kind
        raise CheckpointError(f"{path}: damaged, or not a plain file of weights ({error})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    return {name: tensor.float().numpy() for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def _read_onnx_initializers(path: Path) -> StateDict:
    """Recover parameter names from a PyTorch export, where constant folding has made some anonymous.

    Linear weights appear transposed as the right operand of a MatMul whose node is named after its module; the position
    embedding was cut into the class token's row and the patches' rows.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf raises its own DecodeError
        raise ValueError(str(error)) from error
    raw = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in raw.items() if "::" not in name}
    positions = {}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".")
        for index, name in enumerate(node.input):
            if "::" not in name or name not in raw:
                continue
            if node.op_type == "MatMul" and index == 1:
                named[module.removesuffix(".MatMul") + ".weight"] = raw[name].T
            elif ".embeddings." in f".{module}." and raw[name].ndim == 3:
                prefix = module[: module.index("embeddings")]
                positions["class" if raw[name].shape[1] == 1 else "patches"] = (prefix, raw[name])
    if len(positions) == 2:
        prefix = positions["patches"][0]
        named[prefix + "embeddings.position_embeddings"] = np.concatenate(
            [positions["class"][1], positions["patches"][1]], axis=1
        )
    return named


def _without_prefix(state: StateDict, prefix: str) -> StateDict:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _affine(state: StateDict, name: str) -> Affine:
    return state[name + ".weight"], state[name + ".bias"]


def _scaled(affine: Affine, gamma: Array | None) -> Affine:
    """Fold a layer scale into the linear layer before it."""
    weight, bias = affine
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


def _count_blocks(state: StateDict, prefix: str) -> int:
    return 1 + max((int(name.split(".")[prefix.count(".")]) for name in state if name.startswith(prefix)), default=-1)


def _read_dinov2(state: StateDict) -> VisionTransformer:
    """Official and timm names."""
    if any(".mlp.w12." in name for name in state):
        raise CheckpointError("SwiGLU feed-forward layers (DINOv2 ViT-g/14) are not supported")
    width = state["cls_token"].shape[-1]
    positions = state["pos_embed"].reshape(-1, width)
    registers = state.get("register_tokens", state.get("reg_token", np.empty((0, width), np.float32)))
    if state["pos_embed"].shape[1] == _square_below(state["pos_embed"].shape[1]):
        # timm's register models keep the class token's position inside the token itself.
        positions = np.concatenate([np.zeros((1, width), np.float32), positions])
    blocks = []
    for index in range(_count_blocks(state, "blocks.")):
        block = f"blocks.{index}."
        blocks.append(
            Block(
                norm1=_affine(state, block + "norm1"),
                qkv=_affine(state, block + "attn.qkv"),
                proj=_scaled(_affine(state, block + "attn.proj"), state.get(block + "ls1.gamma")),
                norm2=_affine(state, block + "norm2"),
                fc1=_affine(state, block + "mlp.fc1"),
                fc2=_scaled(_affine(state, block + "mlp.fc2"), state.get(block + "ls2.gamma")),
            )
        )
    return VisionTransformer(
        architecture="dinov2",
        patch_weight=state["patch_embed.proj.weight"],
        patch_bias=state["patch_embed.proj.bias"],
        class_token=state["cls_token"].reshape(-1),
        registers=registers.reshape(-1, width),
        positions=positions,
        pre_norm=None,
        blocks=blocks,
        norm=_affine(state, "norm"),
        projection=None,
        norm_eps=1e-6,
    )


def _read_dinov2_hugging_face(state: StateDict) -> VisionTransformer:
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
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{target}{name}.{kind}"] = state[f"{source}{name}.{kind}"]
        renamed[target + "ls1.gamma"] = state[source + "layer_scale1.lambda1"]
        renamed[target + "ls2.gamma"] = state[source + "layer_scale2.lambda1"]
    return _read_dinov2(renamed)


def _read_clip(state: StateDict) -> VisionTransformer:
    """OpenAI's names, also open_clip's."""
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


def _square_below(n: int) -> int:
    return int(np.sqrt(n)) ** 2


# A tensor that only this layout has → its reader.
LAYOUTS: dict[str, Callable[[StateDict], VisionTransformer]] = {
    "patch_embed.proj.weight": _read_dinov2,
    "embeddings.patch_embeddings.projection.weight": _read_dinov2_hugging_face,
    "ln_pre.weight": _read_clip,
}

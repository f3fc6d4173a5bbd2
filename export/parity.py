"""Compares an exported graph with PyTorch, or with the fp32 graph in the other form of attention."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .state_dict import CheckpointError
from .vision_transformer import Affine, VisionTransformer

Array = NDArray[np.float32]

LARGEST_ERROR = 1e-4  # fp32: relative, in the norm over all tokens
SMALLEST_COSINE = {"fp16": 0.999, "int8": 0.998}  # per token


def sample_images(image_size: int) -> Array:
    """Return one normalised random image [1, 3, S, S], the same in every run."""
    return np.random.default_rng(0).normal(size=(1, 3, image_size, image_size)).astype(np.float32)


def run_graph(path: Path, images: Array) -> list[Array]:
    """Return the outputs of an ONNX file on the CPU as fp32; raises CheckpointError where ONNX Runtime is too old."""
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen kinds with no base of their own
        raise CheckpointError(
            f"ONNX Runtime {ort.__version__} cannot run the graph: {error}\nRun: pip install --upgrade onnxruntime"
        ) from error
    return [np.asarray(output, np.float32) for output in session.run(None, {"images": images})]


def run_torch(
    vit: VisionTransformer,
    images: Array,
    taps: tuple[int, ...],
    activation: str,
    heads: int,
    embedding: bool,
    antialias: bool | None,
) -> list[Array]:
    """Return what PyTorch computes from the same weights: tokens [B, L, P, C] and, if `embedding`, that [B, D]."""
    import torch
    from torch.nn import functional

    def tensor(array: Array) -> Any:
        return torch.from_numpy(np.array(array))

    def linear(x: Any, affine: Affine) -> Any:
        return functional.linear(x, tensor(affine[0]), tensor(affine[1]))

    def norm(x: Any, affine: Affine) -> Any:
        return functional.layer_norm(x, x.shape[-1:], tensor(affine[0]), tensor(affine[1]), vit.norm_eps)

    def act(x: Any) -> Any:
        return functional.gelu(x) if activation == "gelu" else x * torch.sigmoid(1.702 * x)

    def feed_forward(x: Any, fc1: Affine, fc2: Affine) -> Any:
        hidden = linear(x, fc1)
        if hidden.shape[-1] == fc2[0].shape[1]:
            return linear(act(hidden), fc2)
        gate, value = hidden.chunk(2, dim=-1)
        return linear(functional.silu(gate) * value, fc2)

    def attention(x: Any, qkv: Affine, proj: Affine) -> Any:
        batch, count, width = x.shape
        parts = linear(x, qkv).reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return linear(mixed.transpose(1, 2).reshape(batch, count, width), proj)

    def positions(grid: int) -> Any:
        stored = math.isqrt(len(vit.positions) - 1)
        if stored == grid:
            return tensor(vit.positions)
        smooth = len(vit.registers) > 0 if antialias is None else antialias
        own_offset = vit.architecture == "dinov2" and not len(vit.registers)
        # A scale factor is kept as the coordinates' scale; a size would recompute it.
        where: dict[str, Any] = {"scale_factor": (grid + 0.1) / stored} if own_offset else {"size": (grid, grid)}
        maps = tensor(vit.positions[1:]).reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        maps = functional.interpolate(maps, mode="bicubic", antialias=smooth, **where)
        return torch.cat([tensor(vit.positions[:1]), maps.flatten(2)[0].T])

    with torch.inference_mode():
        bias = None if vit.patch_bias is None else tensor(vit.patch_bias)
        x = functional.conv2d(tensor(images), tensor(vit.patch_weight), bias, stride=vit.patch_size)
        grid = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([tensor(vit.class_token).expand(len(x), 1, -1), x], dim=1) + positions(grid)
        registers = tensor(vit.registers).expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        x = x if vit.pre_norm is None else norm(x, vit.pre_norm)
        tapped = []
        for index, block in enumerate(vit.blocks):
            x = x + attention(norm(x, block.norm1), block.qkv, block.proj)
            x = x + feed_forward(norm(x, block.norm2), block.fc1, block.fc2)
            if index in taps:
                y = norm(x, vit.norm) if vit.architecture == "dinov2" else x
                tapped.append(y[:, 1 + len(vit.registers) :])
        outputs = [torch.stack(tapped, dim=1)]
        if embedding:
            y = norm(x[:, 0], vit.norm)
            outputs.append(y if vit.projection is None else functional.normalize(y @ tensor(vit.projection), dim=-1))
        return [output.numpy() for output in outputs]


def check_agreement(found: list[Array], expected: list[Array], precision: str, oracle: str) -> str:
    """Return one line on how close two lists of outputs are; raises CheckpointError when that is not close enough."""
    errors, cosines = [], []
    for a, b in zip(found, expected, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines.append(float(((a * b).sum(axis=-1) / lengths).min()))
    line = f"{precision} against {oracle}: relative error {max(errors):.1e}, token cosine at least {min(cosines):.7f}"
    # Written so that a NaN fails.
    fine = max(errors) <= LARGEST_ERROR if precision == "fp32" else min(cosines) >= SMALLEST_COSINE[precision]
    if not fine:
        limit = f"error {LARGEST_ERROR}" if precision == "fp32" else f"cosine {SMALLEST_COSINE[precision]}"
        hint = "please report this" if precision == "fp32" else "this checkpoint needs --precision fp32"
        raise CheckpointError(f"the exported graph computes something else (limit: {limit}): {line}; {hint}")
    return line

"""Shapes of the published image towers, and random checkpoints where real ones are absent."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from zsad.export.linear_heads import KEY as HEADS
from zsad.export.transformer import HEAD_WIDTH
from zsad.export.vision_transformer import CLIP, DINOV2, DINOV2_REGISTERS, DINOV3, LONGEST_PERIOD, Architecture


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of an image tower's weights."""

    architecture: Architecture
    width: int
    depth: int
    patch_size: int = 14
    stored_grid: int = 37  # patches per side of the stored position embedding
    projection: int = 0  # clip: width of the embedding
    gated: bool = False  # SwiGLU
    registers: int = 0
    head_width: int = HEAD_WIDTH  # which rotary positions tell

    @property
    def hidden(self) -> int:
        """Width between the two linear layers of a block."""
        # DINOv2's SwiGLU keeps the arithmetic of a factor of four with three matrices, in multiples of eight.
        narrower = self.gated and self.architecture != DINOV3
        return (int(4 * self.width * 2 / 3) + 7) // 8 * 8 if narrower else 4 * self.width


# By the manifest's names.
SHAPES = {
    "dinov2-vits14": Shape(DINOV2, 384, 12),
    "dinov2-vitb14": Shape(DINOV2, 768, 12),
    "dinov2-vitl14": Shape(DINOV2, 1024, 24),
    "dinov2-vitg14": Shape(DINOV2, 1536, 40, gated=True),
    "dinov3-vits16": Shape(DINOV3, 384, 12, patch_size=16, registers=4),
    "dinov3-vits16plus": Shape(DINOV3, 384, 12, patch_size=16, registers=4, gated=True),
    "dinov3-vitb16": Shape(DINOV3, 768, 12, patch_size=16, registers=4),
    "dinov3-vitl16": Shape(DINOV3, 1024, 24, patch_size=16, registers=4),
    "dinov3-vith16plus": Shape(DINOV3, 1280, 32, patch_size=16, registers=4, gated=True),
    "clip-vitl14-336": Shape(CLIP, 1024, 24, stored_grid=24, projection=768),
    "clip-vitl14": Shape(CLIP, 1024, 24, stored_grid=16, projection=768),
    "clip-vitb16": Shape(CLIP, 768, 12, patch_size=16, stored_grid=14, projection=512),
    "clip-vitb16plus-240-e31": Shape(CLIP, 896, 12, patch_size=16, stored_grid=15, projection=640),
}
SHAPES |= {
    f"{name}-reg": replace(shape, architecture=DINOV2_REGISTERS, registers=4)
    for name, shape in SHAPES.items()
    if shape.architecture == DINOV2
}


def write_random_heads(layers: int, width: int, dimension: int, path: Path) -> None:
    """Write linear layers of APRIL-GAN."""
    rng = np.random.default_rng(0)
    shapes = {"weight": (dimension, width), "bias": (dimension,)}
    state = {
        f"{HEADS}.fc.{layer}.{kind}": rng.standard_normal(shape, np.float32) * np.float32(0.02)
        for layer in range(layers)
        for kind, shape in shapes.items()
    }
    save_file(state, path)


def write_random_checkpoint(shape: Shape, path: Path, deviation: float = 0.02, seed: int = 0) -> None:
    """Write the tensors of an image tower as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tower_state(shape, deviation, seed), path)


def tower_state(shape: Shape, deviation: float = 0.02, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return an image tower; norms and layer scales lie near 1, everything else is normal around 0."""
    rng = np.random.default_rng(seed)
    state: dict[str, NDArray[np.float32]] = {}

    def normal(name: str, *size: int, around: float = 0.0) -> None:
        state[name] = rng.standard_normal(size, np.float32) * np.float32(deviation) + np.float32(around)

    def affine(name: str, *size: int, around: float = 0.0) -> None:
        normal(f"{name}.weight", *size, around=around)
        normal(f"{name}.bias", size[0])

    patch = (shape.width, 3, shape.patch_size, shape.patch_size)
    width, hidden, positions = shape.width, shape.hidden, 1 + shape.stored_grid**2
    if shape.architecture != CLIP:
        rotary = shape.architecture == DINOV3
        first, second = ("w12", "w3") if shape.gated else ("fc1", "fc2")
        normal("cls_token", 1, 1, width)
        if rotary:
            quarter = shape.head_width // 4
            state["rope_embed.periods"] = (LONGEST_PERIOD ** (np.arange(quarter) / quarter)).astype(np.float32)
        else:
            normal("pos_embed", 1, positions, width)
        if shape.registers:
            normal("storage_tokens" if rotary else "register_tokens", 1, shape.registers, width)
        affine("patch_embed.proj", *patch)
        affine("norm", width, around=1)
        for block in (f"blocks.{index}." for index in range(shape.depth)):
            affine(f"{block}norm1", width, around=1)
            affine(f"{block}attn.qkv", 3 * width, width)
            if rotary:
                state[f"{block}attn.qkv.bias_mask"] = np.repeat(np.array([1, 0, 1], np.float32), width)
            affine(f"{block}attn.proj", width, width)
            affine(f"{block}norm2", width, around=1)
            if rotary and shape.gated:
                affine(f"{block}mlp.w1", hidden, width)
                affine(f"{block}mlp.w2", hidden, width)
            else:
                affine(f"{block}mlp.{first}", (2 if shape.gated else 1) * hidden, width)
            affine(f"{block}mlp.{second}", width, hidden)
            normal(f"{block}ls1.gamma", width, around=1)
            normal(f"{block}ls2.gamma", width, around=1)
    else:
        normal("visual.class_embedding", width)
        normal("visual.positional_embedding", positions, width)
        normal("visual.conv1.weight", *patch)
        affine("visual.ln_pre", width, around=1)
        affine("visual.ln_post", width, around=1)
        normal("visual.proj", width, shape.projection)
        for block in (f"visual.transformer.resblocks.{index}." for index in range(shape.depth)):
            affine(f"{block}ln_1", width, around=1)
            normal(f"{block}attn.in_proj_weight", 3 * width, width)
            normal(f"{block}attn.in_proj_bias", 3 * width)
            affine(f"{block}attn.out_proj", width, width)
            affine(f"{block}ln_2", width, around=1)
            affine(f"{block}mlp.c_fc", hidden, width)
            affine(f"{block}mlp.c_proj", width, hidden)
    return state

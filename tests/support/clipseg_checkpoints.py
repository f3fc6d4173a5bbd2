"""Checkpoint files of CLIPSeg: the tiny one of the golden arrays in other names, and a random decoder."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

State = dict[str, np.ndarray]

TOWER = {
    "embeddings.patch_embedding": "conv1",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
DECODER = {
    "transposed_convolution": "trans_conv",
    "layers": "blocks",
    "layer_norm": "norm",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}


def openai_image_tower(state: Mapping[str, np.ndarray]) -> State:
    """Return the image tower of a file in Hugging Face's names in OpenAI's."""
    tower = _renamed(state, "clip.vision_model.", TOWER)
    tower["proj"] = state["clip.visual_projection.weight"].T.copy()
    return {f"visual.{name}": tensor for name, tensor in tower.items()}


def original_decoder(state: Mapping[str, np.ndarray]) -> State:
    """Return the decoder of a file in Hugging Face's names in those of the original file, which has one layer more."""
    decoder = _renamed(state, "decoder.", DECODER)
    return decoder | {f"reduce.{kind}": 2 * decoder[f"reduces.0.{kind}"] for kind in ("weight", "bias")}


def _renamed(state: Mapping[str, np.ndarray], prefix: str, parts: Mapping[str, str]) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        ours = name.removeprefix(prefix)
        for theirs, other in parts.items():
            ours = ours.replace(theirs, other)
        if part := re.fullmatch(r"(.*)q_proj\.(weight|bias)", ours):
            rows = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            renamed[f"{part[1]}in_proj_{part[2]}"] = np.concatenate(rows)
        elif not re.search(r"[kv]_proj", ours):
            renamed[ours] = tensor
    return renamed


def write_random_decoder(path: Path) -> Path:
    """Write a decoder of the published shape in the names of the original file, that keeps numbers of ordinary size."""
    rng, state = np.random.default_rng(0), {}

    def affine(name: str, *size: int, inputs: int, outputs: int) -> None:
        state[name + ".weight"] = (rng.standard_normal(size) / inputs**0.5).astype(np.float32)
        state[name + ".bias"] = (rng.standard_normal(outputs) / 4).astype(np.float32)

    for index in range(3):
        block = f"blocks.{index}."
        affine(f"reduces.{index}", 64, 768, inputs=768, outputs=64)
        affine(block + "self_attn.in_proj", 192, 64, inputs=64, outputs=192)
        for kind in ("weight", "bias"):
            state[f"{block}self_attn.in_proj_{kind}"] = state.pop(f"{block}self_attn.in_proj.{kind}")
        affine(block + "self_attn.out_proj", 64, 64, inputs=64, outputs=64)
        affine(block + "linear1", 2048, 64, inputs=64, outputs=2048)
        affine(block + "linear2", 64, 2048, inputs=2048, outputs=64)
        for norm in ("norm1", "norm2"):
            affine(block + norm, 64, inputs=64, outputs=64)
            state[f"{block}{norm}.weight"] += 1
    affine("film_mul", 64, 512, inputs=512, outputs=64)
    affine("film_add", 64, 512, inputs=512, outputs=64)
    affine("trans_conv.0", 64, 64, 3, 3, inputs=9 * 64, outputs=64)
    affine("trans_conv.2", 64, 32, 4, 4, inputs=64, outputs=32)
    affine("trans_conv.4", 32, 1, 4, 4, inputs=32, outputs=1)
    save_file(state, path)
    return path

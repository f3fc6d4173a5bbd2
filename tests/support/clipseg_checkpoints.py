"""The tiny checkpoint of CLIPSeg of the golden arrays in other names."""

import re
from collections.abc import Mapping

import numpy as np

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

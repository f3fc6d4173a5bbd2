"""DINOv3's blocks in their official names, and what brings those of ports there."""

import numpy as np

from .transformer import Array, Block, Tensors, count_blocks, read_affine, scaled


def read_dinov3_blocks(state: Tensors, width: int) -> list[Block]:
    """Read the blocks of a tower that is `width` channels wide."""
    zeros = np.zeros(3 * width, np.float32)
    biased = "blocks.0.attn.qkv.bias" in state  # of all but the largest, where a mask takes those of the keys away
    blocks = []
    for index in range(count_blocks(state, "blocks.")):
        block = f"blocks.{index}."
        bias = state[block + "attn.qkv.bias"] * state.get(block + "attn.qkv.bias_mask", 1) if biased else zeros
        if block + "mlp.w1.weight" in state:  # gate and value of a SwiGLU
            gate, value = (read_affine(state, f"{block}mlp.{part}") for part in ("w1", "w2"))
            fc1, fc2 = (np.concatenate([gate[0], value[0]]), np.concatenate([gate[1], value[1]])), "w3"
        else:
            fc1, fc2 = read_affine(state, block + "mlp.fc1"), "fc2"
        blocks.append(
            Block(
                norm1=read_affine(state, block + "norm1"),
                qkv=(state[block + "attn.qkv.weight"], bias),
                proj=scaled(read_affine(state, block + "attn.proj"), state.get(block + "ls1.gamma")),
                norm2=read_affine(state, block + "norm2"),
                fc1=fc1,
                fc2=scaled(read_affine(state, f"{block}mlp.{fc2}"), state.get(block + "ls2.gamma")),
            )
        )
    return blocks


def rename_timm_dinov3(state: Tensors) -> dict[str, Array]:
    """Return a DINOv3 in timm's names in the official ones."""
    layers = {"patch_embed.proj": "patch_embed.proj", "norm": "norm"}  # theirs → ours
    if "blocks.0.mlp.fc1_g.weight" in state:
        mlp = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    else:
        mlp = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    own = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attn.proj", **mlp}
    renamed = {"cls_token": state["cls_token"], "storage_tokens": state["reg_token"]}
    biased = "blocks.0.attn.q_bias" in state
    for block in (f"blocks.{index}." for index in range(count_blocks(state, "blocks."))):
        renamed[block + "attn.qkv.weight"] = state[block + "attn.qkv.weight"]
        if biased:
            queries, values = (state[f"{block}attn.{part}_bias"] for part in "qv")
            renamed[block + "attn.qkv.bias"] = np.concatenate([queries, np.zeros_like(queries), values])
        for number in "12":
            renamed[f"{block}ls{number}.gamma"] = state[f"{block}gamma_{number}"]
        layers |= {block + theirs: block + ours for theirs, ours in own.items()}
    for theirs, ours in layers.items():
        renamed[ours + ".weight"], renamed[ours + ".bias"] = read_affine(state, theirs)
    return renamed


def rename_hugging_face_dinov3(state: Tensors) -> dict[str, Array]:
    """Return a DINOv3 in Hugging Face's names, the files' or those within transformers 5, in the official ones."""
    renamed = {"cls_token": state["embeddings.cls_token"], "storage_tokens": state["embeddings.register_tokens"]}
    for theirs, ours in (("embeddings.patch_embeddings", "patch_embed.proj"), ("norm", "norm")):
        renamed[ours + ".weight"], renamed[ours + ".bias"] = read_affine(state, theirs)
    within = "model.layer." if any(name.startswith("model.layer.") for name in state) else "layer."
    biased = [part for part in "qkv" if f"{within}0.attention.{part}_proj.bias" in state]
    layers = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj"}
    gated = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
    plain = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    for index in range(count_blocks(state, within)):
        source, target = f"{within}{index}.", f"blocks.{index}."
        weights = [state[f"{source}attention.{part}_proj.weight"] for part in "qkv"]
        biases = [
            state[f"{source}attention.{part}_proj.bias"] if part in biased else np.zeros(len(weight), np.float32)
            for part, weight in zip("qkv", weights, strict=True)
        ]
        renamed[target + "attn.qkv.weight"] = np.concatenate(weights)
        renamed[target + "attn.qkv.bias"] = np.concatenate(biases)
        for theirs, ours in {**layers, **(gated if source + "mlp.gate_proj.weight" in state else plain)}.items():
            renamed[f"{target}{ours}.weight"], renamed[f"{target}{ours}.bias"] = read_affine(state, source + theirs)
        for number in "12":
            renamed[f"{target}ls{number}.gamma"] = state[f"{source}layer_scale{number}.lambda1"]
    return renamed

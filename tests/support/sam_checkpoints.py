"""Checkpoints of SAM and MobileSAM with random weights, in the published names and of any size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

State = dict[str, np.ndarray]
Layer = tuple[str, Sequence[int]]  # name and shape of a weight


def _fill(layers: Sequence[Layer], seed: int) -> State:
    """Return random weights with biases; norms around one, the rest so that values keep their size."""
    rng = np.random.default_rng(seed)
    state: State = {}
    for name, shape in layers:
        if len(shape) == 1:
            state[name + ".weight"] = 1 + 0.1 * rng.standard_normal(shape, np.float32)
        else:
            size = np.prod(shape[1:]) if len(shape) > 1 else 1
            state[name + ".weight"] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(size))
        state[name + ".bias"] = 0.1 * rng.standard_normal(shape[0], np.float32)
    return state


def _neck(width: int, out: int, seed: int) -> State:
    neck = "image_encoder.neck."
    layers: list[Layer] = [
        (neck + "0", (out, width, 1, 1)),
        (neck + "1", (out,)),
        (neck + "2", (out, out, 3, 3)),
        (neck + "3", (out,)),
    ]
    return {
        name: value for name, value in _fill(layers, seed).items() if name not in (neck + "0.bias", neck + "2.bias")
    }


def sam_encoder_state(
    width: int, sides: Sequence[int], head: int, grid: int, out: int = 256, hidden: int | None = None
) -> State:
    """Return SAM's image encoder; sides: of each block's windows, those of `grid` tokens see all of it."""
    rng = np.random.default_rng(0)
    layers: list[Layer] = [("image_encoder.patch_embed.proj", (width, 3, 16, 16))]
    state: State = {"image_encoder.pos_embed": 0.5 * rng.standard_normal((1, grid, grid, width), np.float32)}
    hidden = 4 * width if hidden is None else hidden
    for index, side in enumerate(sides):
        name = f"image_encoder.blocks.{index}."
        layers += [(name + "norm1", (width,)), (name + "norm2", (width,))]
        layers += [(name + "attn.qkv", (3 * width, width)), (name + "attn.proj", (width, width))]
        layers += [(name + "mlp.lin1", (hidden, width)), (name + "mlp.lin2", (width, hidden))]
        for table in ("rel_pos_h", "rel_pos_w"):
            state[f"{name}attn.{table}"] = 0.3 * rng.standard_normal((2 * side - 1, head), np.float32)
    return {**state, **_fill(layers, 1), **_neck(width, out, 2)}


def decoder_state(width: int = 256, hidden: int = 2048, quality: int = 256) -> State:
    """Return SAM's prompt encoder and mask decoder."""
    rng = np.random.default_rng(3)
    prompt, decoder = "prompt_encoder.", "mask_decoder."
    shapes: Mapping[str, Sequence[int]] = {
        **{f"{prompt}point_embeddings.{kind}.weight": (1, width) for kind in range(4)},
        prompt + "not_a_point_embed.weight": (1, width),
        prompt + "no_mask_embed.weight": (1, width),
        prompt + "pe_layer.positional_encoding_gaussian_matrix": (2, width // 2),
        decoder + "iou_token.weight": (1, width),
        decoder + "mask_tokens.weight": (4, width),
    }
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    downscaling: list[tuple[str, Sequence[int]]] = [
        ("0", (4, 1, 2, 2)),
        ("1", (4,)),
        ("3", (16, 4, 2, 2)),
        ("4", (16,)),
    ]
    layers: list[Layer] = [(f"{prompt}mask_downscaling.{name}", shape) for name, shape in downscaling]
    layers += [(prompt + "mask_downscaling.6", (width, 16, 1, 1))]

    def attention(name: str, inner: int) -> list[Layer]:
        inputs: list[Layer] = [(f"{name}.{part}_proj", (inner, width)) for part in "qkv"]
        return [*inputs, (name + ".out_proj", (width, inner))]

    transformer = decoder + "transformer."
    for index in range(2):
        block = f"{transformer}layers.{index}."
        layers += attention(block + "self_attn", width)
        layers += attention(block + "cross_attn_token_to_image", width // 2)
        layers += attention(block + "cross_attn_image_to_token", width // 2)
        layers += [(block + "mlp.lin1", (hidden, width)), (block + "mlp.lin2", (width, hidden))]
        layers += [(f"{block}norm{norm}", (width,)) for norm in range(1, 5)]
    layers += attention(transformer + "final_attn_token_to_image", width // 2)
    layers += [(transformer + "norm_final_attn", (width,))]
    mlps = [(f"output_hypernetworks_mlps.{mask}", width, width // 8) for mask in range(4)]
    for name, inner, out in [*mlps, ("iou_prediction_head", quality, 4)]:
        for layer, shape in enumerate([(inner, width), (inner, inner), (out, inner)]):
            layers.append((f"{decoder}{name}.layers.{layer}", shape))
    layers += [(decoder + "output_upscaling.1", (width // 4,))]
    state |= _fill(layers, 4)
    for index, shape in ((0, (width, width // 4, 2, 2)), (3, (width // 4, width // 8, 2, 2))):
        name = f"{decoder}output_upscaling.{index}"
        state[name + ".weight"] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
        state[name + ".bias"] = 0.1 * rng.standard_normal(shape[1], np.float32)
    return state


def tiny_encoder_state(
    widths: Sequence[int] = (64, 128, 160, 320),
    depths: Sequence[int] = (2, 2, 6, 2),
    sides: Sequence[int] = (7, 14, 7),
    head: int = 32,
    out: int = 256,
) -> State:
    """Return MobileSAM's image encoder, a TinyViT, with the head for classes that it does not use."""
    rng = np.random.default_rng(5)
    root = "image_encoder."
    convolutions: list[Layer] = [
        (root + "patch_embed.seq.0", (widths[0] // 2, 3, 3, 3)),
        (root + "patch_embed.seq.2", (widths[0], widths[0] // 2, 3, 3)),
    ]
    layers: list[Layer] = []
    state: State = {}
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            name = f"{root}layers.{stage}.blocks.{index}."
            if stage == 0:
                shapes = [(4 * width, width, 1, 1), (4 * width, 1, 3, 3), (width, 4 * width, 1, 1)]
                convolutions += [(f"{name}conv{part}", shape) for part, shape in enumerate(shapes, 1)]
                continue
            layers += [(name + "attn.norm", (width,)), (name + "attn.qkv", (3 * width, width))]
            layers += [(name + "attn.proj", (width, width)), (name + "mlp.norm", (width,))]
            layers += [(name + "mlp.fc1", (4 * width, width)), (name + "mlp.fc2", (width, 4 * width))]
            convolutions += [(name + "local_conv", (width, 1, 3, 3))]
            shape = (width // head, sides[stage - 1] ** 2)
            state[name + "attn.attention_biases"] = rng.standard_normal(shape, np.float32)
        if stage + 1 < len(widths):
            name, wide = f"{root}layers.{stage}.downsample.", widths[stage + 1]
            shapes = [(wide, width, 1, 1), (wide, 1, 3, 3), (wide, wide, 1, 1)]
            convolutions += [(f"{name}conv{part}", shape) for part, shape in enumerate(shapes, 1)]
    for name, shape in convolutions:
        filled = _fill([(name, shape)], len(state))
        state[name + ".c.weight"] = filled[name + ".weight"]
        count = shape[0]
        state[name + ".bn.weight"] = 1 + 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.bias"] = 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.running_mean"] = 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.running_var"] = rng.uniform(0.5, 1.5, count).astype(np.float32)
        state[name + ".bn.num_batches_tracked"] = np.array(7)
    layers += [(root + "norm_head", (widths[-1],)), (root + "head", (5, widths[-1]))]
    return {**state, **_fill(layers, 6), **_neck(widths[-1], out, 7)}


def write(folder: Path, name: str, *states: State) -> Path:
    """Write states as `folder`/NAME.safetensors and return the file."""
    path = folder / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(value) for state in states for key, value in state.items()}, path)
    return path

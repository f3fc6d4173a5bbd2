"""Random weights in the published names, of the published shapes and of smaller ones, where real ones are absent.

    python -m zsad.bench.random_weights --preset vvv FOLDER

writes those of all networks of a preset and a configuration that names them, for `zsad-export --preset vvv --config
FOLDER/vvv.toml --target tensorrt-rtx`, say.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.engine.presets.names import preset_names
from zsad.engine.text.tokenizer import CONTEXT
from zsad.export.isnet import DECODER, ENCODER
from zsad.export.text_transformer import VOCABULARY
from zsad.export.vision_transformer import CLIP

from .towers import SHAPES, tower_state

State = dict[str, NDArray[Any]]
Layer = tuple[str, Sequence[int]]  # name and shape of a weight; one of a single axis is a norm's

# IS-Net's stage → channels inside and of its output.
ISNET = {
    **{"stage1": (32, 64), "stage2": (32, 128), "stage3": (64, 256), "stage4": (128, 512), "stage5": (256, 512)},
    **{"stage6": (256, 512), "stage5d": (256, 512), "stage4d": (128, 256), "stage3d": (64, 128)},
    **{"stage2d": (32, 64), "stage1d": (16, 64)},
}


def write_random(name: str, path: Path) -> None:
    """Write a safetensors file of the shape that a name of the manifest has published; raises KeyError."""
    if name not in SHAPES:
        write_states(path, STATES[name]())
        return
    shape = SHAPES[name]
    write_states(path, tower_state(shape), text_state(shape.projection) if shape.architecture == CLIP else {})


def write_states(path: Path, *states: Mapping[str, NDArray[Any]]) -> Path:
    """Write states as one safetensors file and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for state in states for key, value in state.items()}, path)
    return path


def _fill(layers: Sequence[Layer], seed: int, transposed: bool = False) -> State:
    """Return random weights with biases; norms around one, the rest so that values keep their size.

    transposed: weights of convolutions that enlarge, whose first axis is that of the inputs.
    """
    rng = np.random.default_rng(seed)
    state: State = {}
    for name, shape in layers:
        if len(shape) == 1:
            state[name + ".weight"] = 1 + 0.1 * rng.standard_normal(shape, np.float32)
        else:
            inputs = shape[0] if transposed else np.prod(shape[1:])
            state[name + ".weight"] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(inputs))
        state[name + ".bias"] = 0.1 * rng.standard_normal(shape[1 if transposed else 0], np.float32)
    return state


def isnet_state(divisor: int = 1) -> State:
    """Return IS-Net with the names of its class ISNetDIS and so many times fewer channels."""
    rng = np.random.default_rng(0)
    tensors: State = {}

    def convolution(name: str, outputs: int, inputs: int) -> None:
        deviation = (2 / (9 * inputs)) ** 0.5  # what a ReLU behind it keeps
        tensors[name + ".weight"] = rng.normal(0, deviation, (outputs, inputs, 3, 3))
        tensors[name + ".bias"] = rng.normal(0, 0.1, outputs)

    def unit(name: str, outputs: int, inputs: int) -> None:
        convolution(name + ".conv_s1", outputs, inputs)
        norm = name + ".bn_s1."
        tensors[norm + "weight"], tensors[norm + "bias"] = rng.uniform(0.8, 1.2, outputs), rng.normal(0, 0.1, outputs)
        tensors[norm + "running_mean"] = rng.normal(0, 0.1, outputs)
        tensors[norm + "running_var"] = rng.uniform(0.8, 1.2, outputs)
        tensors[norm + "num_batches_tracked"] = np.array(7)

    width = ISNET["stage1"][1] // divisor
    convolution("conv_in", width, 3)
    beside = [ISNET[stage][1] // divisor for stage in ENCODER][:-1]
    for stage, depth in {**ENCODER, **DECODER}.items():
        inside, outside = (channels // divisor for channels in ISNET[stage])
        name = stage + ".rebnconv"
        unit(name + "in", outside, width + (beside.pop() if stage in DECODER else 0))
        for number in range(1, depth + 1):
            unit(name + str(number), inside, outside if number == 1 else inside)
        for number in range(1, depth):
            unit(f"{name}{number}d", outside if number == 1 else inside, 2 * inside)
        width = outside
    for number, stage in enumerate((*reversed(DECODER), "stage6"), 1):
        convolution(f"side{number}", 1, ISNET[stage][1] // divisor)
    return {name: tensor if tensor.ndim == 0 else np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


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


def _attention(name: str, inner: int, width: int) -> Iterator[Layer]:
    """Yield the layers of an attention in the mask decoder."""
    for part in "qkv":
        yield f"{name}.{part}_proj", (inner, width)
    yield name + ".out_proj", (width, inner)


def mask_decoder_state(width: int = 256, hidden: int = 2048, quality: int = 256) -> State:
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
    state: State = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    downscaling: list[Layer] = [("0", (4, 1, 2, 2)), ("1", (4,)), ("3", (16, 4, 2, 2)), ("4", (16,))]
    layers: list[Layer] = [(f"{prompt}mask_downscaling.{name}", shape) for name, shape in downscaling]
    layers += [(prompt + "mask_downscaling.6", (width, 16, 1, 1))]
    transformer = decoder + "transformer."
    for index in range(2):
        block = f"{transformer}layers.{index}."
        layers += _attention(block + "self_attn", width, width)
        layers += _attention(block + "cross_attn_token_to_image", width // 2, width)
        layers += _attention(block + "cross_attn_image_to_token", width // 2, width)
        layers += [(block + "mlp.lin1", (hidden, width)), (block + "mlp.lin2", (width, hidden))]
        layers += [(f"{block}norm{norm}", (width,)) for norm in range(1, 5)]
    layers += _attention(transformer + "final_attn_token_to_image", width // 2, width)
    layers += [(transformer + "norm_final_attn", (width,))]
    mlps = [(f"output_hypernetworks_mlps.{mask}", width, width // 8) for mask in range(4)]
    for name, inner, out in [*mlps, ("iou_prediction_head", quality, 4)]:
        for layer, shape in enumerate([(inner, width), (inner, inner), (out, inner)]):
            layers.append((f"{decoder}{name}.layers.{layer}", shape))
    layers += [(decoder + "output_upscaling.1", (width // 4,))]
    enlarging: list[Layer] = [
        (decoder + "output_upscaling.0", (width, width // 4, 2, 2)),
        (decoder + "output_upscaling.3", (width // 4, width // 8, 2, 2)),
    ]
    return {**state, **_fill(layers, 4), **_fill(enlarging, 8, transposed=True)}


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
            biases = (width // head, sides[stage - 1] ** 2)
            state[name + "attn.attention_biases"] = rng.standard_normal(biases, np.float32)
        if stage + 1 < len(widths):
            name, wide = f"{root}layers.{stage}.downsample.", widths[stage + 1]
            shapes = [(wide, width, 1, 1), (wide, 1, 3, 3), (wide, wide, 1, 1)]
            convolutions += [(f"{name}conv{part}", shape) for part, shape in enumerate(shapes, 1)]
    for name, shape in convolutions:
        state[name + ".c.weight"] = _fill([(name, shape)], len(state))[name + ".weight"]
        count = shape[0]
        state[name + ".bn.weight"] = 1 + 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.bias"] = 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.running_mean"] = 0.1 * rng.standard_normal(count, np.float32)
        state[name + ".bn.running_var"] = rng.uniform(0.5, 1.5, count).astype(np.float32)
        state[name + ".bn.num_batches_tracked"] = np.array(7)
    layers += [(root + "norm_head", (widths[-1],)), (root + "head", (5, widths[-1]))]
    return {**state, **_fill(layers, 6), **_neck(widths[-1], out, 7)}


def sam_state() -> State:
    """Return SAM with its smallest encoder, ViT-B: windows of 14 tokens but in every third block."""
    sides = [64 if index % 3 == 2 else 14 for index in range(12)]
    return {**sam_encoder_state(768, sides, head=64, grid=64), **mask_decoder_state()}


def mobile_sam_state() -> State:
    """Return MobileSAM."""
    return {**tiny_encoder_state(), **mask_decoder_state()}


def text_state(width: int) -> State:
    """Return the text tower of a CLIP in OpenAI's names; its published ones are as wide as their vectors."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embedding.weight": (VOCABULARY, width),
        "positional_embedding": (CONTEXT, width),
        "text_projection": (width, width),
    }
    state: State = {name: 0.03 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    layers: list[Layer] = [("ln_final", (width,))]
    for index in range(12):
        name = f"transformer.resblocks.{index}."
        layers += [(name + "ln_1", (width,)), (name + "ln_2", (width,)), (name + "attn.out_proj", (width, width))]
        layers += [(name + "mlp.c_fc", (4 * width, width)), (name + "mlp.c_proj", (width, 4 * width))]
        packed = _fill([("qkv", (3 * width, width))], index)
        state |= {f"{name}attn.in_proj_{kind}": packed[f"qkv.{kind}"] for kind in ("weight", "bias")}
    return {**state, **_fill(layers, 1)}


def _port_block(name: str, width: int, hidden: int) -> Iterator[Layer]:
    """Yield the layers of a transformer block in Hugging Face's names for CLIP."""
    for part in ("q", "k", "v", "out"):
        yield f"{name}.self_attn.{part}_proj", (width, width)
    yield name + ".mlp.fc1", (hidden, width)
    yield name + ".mlp.fc2", (width, hidden)
    for norm in ("1", "2"):
        yield f"{name}.layer_norm{norm}", (width,)


def clipseg_state(width: int = 768, dimension: int = 512, own: int = 64) -> State:
    """Return CLIPSeg in Hugging Face's names: the towers of a ViT-B/16, the texts' as wide as their vectors.

    own: width of its refined decoder.
    """
    rng = np.random.default_rng(0)
    tower, texts = "clip.vision_model.", "clip.text_model."
    shapes = {
        tower + "embeddings.class_embedding": (width,),
        tower + "embeddings.patch_embedding.weight": (width, 3, 16, 16),
        tower + "embeddings.position_embedding.weight": (1 + 14**2, width),
        "clip.visual_projection.weight": (dimension, width),
        texts + "embeddings.token_embedding.weight": (VOCABULARY, dimension),
        texts + "embeddings.position_embedding.weight": (CONTEXT, dimension),
        "clip.text_projection.weight": (dimension, dimension),
    }
    state: State = {name: 0.03 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    layers: list[Layer] = [(tower + norm, (width,)) for norm in ("pre_layrnorm", "post_layernorm")]
    layers += [(texts + "final_layer_norm", (dimension,))]
    for index in range(12):
        layers += _port_block(f"{tower}encoder.layers.{index}", width, 4 * width)
        layers += _port_block(f"{texts}encoder.layers.{index}", dimension, 4 * dimension)
    for index in range(3):
        layers += [(f"decoder.reduces.{index}", (own, width))]
        layers += _port_block(f"decoder.layers.{index}", own, 32 * own)
    layers += [(f"decoder.{name}", (own, dimension)) for name in ("film_mul", "film_add")]
    layers += [("decoder.transposed_convolution.0", (own, own, 3, 3))]
    enlarging: list[Layer] = [
        ("decoder.transposed_convolution.2", (own, own // 2, 4, 4)),
        ("decoder.transposed_convolution.4", (own // 2, 1, 4, 4)),
    ]
    return {**state, **_fill(layers, 1), **_fill(enlarging, 2, transposed=True)}


# By the manifest's names, beside SHAPES.
STATES: Mapping[str, Callable[[], State]] = {
    "clipseg-rd64-refined": clipseg_state,
    "isnet-general-use": isnet_state,
    "mobile-sam": mobile_sam_state,
    "sam-vitb": sam_state,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.random_weights", description="Writes random weights.")
    parser.add_argument("--preset", required=True, choices=preset_names())
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.preset, method_of=method_class)
    tables = []
    for name, spec in config.specs.items():
        path = (arguments.folder / f"{spec.checkpoint}-random.safetensors").resolve()
        write_random(spec.checkpoint, path)
        table = "networks" if name in config.networks else "stages"
        size = json.dumps(spec.image_size)  # a number, or "auto"
        tables.append(f'[{table}.{name}]\ncheckpoint = "{path.as_posix()}"\nimage_size = {size}\n')
    settings = arguments.folder / f"{arguments.preset}.toml"
    settings.write_text("".join(tables), encoding="utf-8")
    print(settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

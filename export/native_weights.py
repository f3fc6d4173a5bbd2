"""Weights of image towers as zsad's own native code for CPUs wants them, in a safetensors file.

Its header is filled up so that arrays begin on cache lines: they are used where they are mapped into memory.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from zsad.kernels.cpu.arrays import CACHE_LINE
from zsad.kernels.cpu.native import _cpu

from .options import IMAGE_OUTPUTS, WINDOWS, ExportOptions
from .state_dict import CheckpointError
from .transformer import Affine, Block
from .transformer_graph import LINEAR_LAYERS, weight_codes
from .vision_transformer import VisionTransformer
from .vit_graph import check_options, resize_positions, window_tokens

COLUMNS, FILL = 16, 64  # what outputs and inputs of layers are filled up to, as the native code has them
Packed = dict[str, NDArray[Any]]
Codes = NDArray[np.int8]


def pack_floats(affine: Affine, name: str) -> Packed:
    """Return a linear layer [N, K] in panels of 16 outputs, filled up with zeros: weights [N / 16, K, 16], bias."""
    weight, bias = _filled(affine)
    panels = weight.reshape(-1, COLUMNS, weight.shape[1]).transpose(0, 2, 1)
    return {name + ".weight": np.ascontiguousarray(panels), name + ".bias": bias}


def pack_codes(affine: Affine, name: str, chosen: Codes | None = None) -> Packed:
    """Return a linear layer [N, K] as 8-bit codes [N / 16, K / 4, 16, 4] and a scale per output, with zeros behind.

    chosen: the codes [N, K], if they are not the nearest ones.
    """
    weight, bias = _filled(affine)
    codes, scales = weight_codes(weight)
    if chosen is not None:
        codes[: len(chosen)] = chosen
    sums = scales * codes.sum(axis=1, dtype=np.int32)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % FILL)))
    panels = codes.reshape(-1, COLUMNS, codes.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return {
        name + ".codes": np.ascontiguousarray(panels),
        name + ".scales": scales,
        name + ".sums": sums.astype(np.float32),
        name + ".bias": bias,
    }


def _filled(affine: Affine) -> Affine:
    weight, bias = affine
    missing = -len(bias) % COLUMNS
    return np.pad(weight, ((0, missing), (0, 0))), np.pad(bias, (0, missing))


def tower_arrays(
    vit: VisionTransformer, options: ExportOptions, exact: Collection[str], codes: Mapping[str, Codes]
) -> Packed:
    """Return what the native code reads of a tower's weights; exact, codes: as for `save_native_tower`."""
    grid = options.image_size // vit.patch_size
    positions = resize_positions(vit, grid, options.antialias)
    front = np.concatenate([vit.class_token[None] + positions[:1], vit.registers])
    rest = positions[1:] if vit.patch_bias is None else positions[1:] + vit.patch_bias
    patches = vit.patch_weight.reshape(vit.width, -1)
    arrays = pack_floats((patches, np.zeros(vit.width, np.float32)), "patches")
    arrays["positions"] = np.concatenate([front, rest]).astype(np.float32)
    for name, norm in (("norm", vit.norm), ("pre_norm", vit.pre_norm)):
        if norm is not None:
            arrays |= _norm(norm, name)
    arrays |= {f"class_{name}": array for name, array in _norm(vit.class_norm, "norm").items()}
    if vit.projection is not None:
        arrays["projection"] = vit.projection
    if vit.architecture.rotary:
        angles = vit.angles(vit.attention_heads(options.heads), grid)
        arrays |= {"cosine": np.cos(angles).astype(np.float32), "sine": np.sin(angles).astype(np.float32)}
    for output, rows in _windows(vit, options).items():
        arrays[output + ".tokens"] = rows.astype(np.int32)
    for index, block in enumerate(needed_blocks(vit, options)):
        arrays |= _block(block, f"block{index}", options.precision == "int8", exact, codes)
    return arrays


def _windows(vit: VisionTransformer, options: ExportOptions) -> dict[str, NDArray[np.int64]]:
    """The tokens of an image's windows, of the sizes that are wanted."""
    grid, front = options.image_size // vit.patch_size, 1 + len(vit.registers)
    return {name: window_tokens(grid, side, front) for name, side in WINDOWS.items() if name in options.outputs}


def needed_blocks(vit: VisionTransformer, options: ExportOptions) -> Sequence[Block]:
    """Those that something is wanted of: windows are read behind the last."""
    return vit.blocks if _windows(vit, options) else vit.blocks[: options.depth(len(vit.blocks))]


def _norm(norm: Affine, name: str) -> Packed:
    return {name + ".weight": norm[0], name + ".bias": norm[1]}


def _block(block: Block, name: str, int8: bool, exact: Collection[str], codes: Mapping[str, Codes]) -> Packed:
    arrays = {**_norm(block.norm1, name + ".norm1"), **_norm(block.norm2, name + ".norm2")}
    for layer in LINEAR_LAYERS:
        own, affine = f"{name}.{layer}", getattr(block, layer)
        arrays |= pack_codes(affine, own, codes.get(own)) if int8 and own not in exact else pack_floats(affine, own)
    return arrays


def check_native_options(vit: VisionTransformer, options: ExportOptions) -> None:
    """Raise CheckpointError where an option fits neither the checkpoint nor what the native code can do."""
    heads = check_options(vit, options)
    if _cpu is None:
        raise CheckpointError("zsad was installed without a compiler: there is no native code; use --attention fused")
    if options.precision == "fp16" or vit.width // heads > _cpu.WIDEST_HEAD:
        raise CheckpointError(
            f"natively there are fp32 and int8 with heads up to {_cpu.WIDEST_HEAD} wide; use --attention fused"
        )


def save_native_tower(
    path: Path,
    vit: VisionTransformer,
    options: ExportOptions,
    exact: Collection[str],
    metadata: Mapping[str, str],
    codes: Mapping[str, Codes] = MappingProxyType({}),
) -> None:
    """Write the file of an image tower, with inputs and outputs as those of `build_vit_graph`.

    exact: linear layers of an int8 tower that stay in fp32 (`block0.fc1`). codes: of weights that are not to be rounded
    to the nearest ones, as `fitted_codes` has them.
    """
    depth, last = options.depth(len(vit.blocks)), len(vit.blocks) - 1
    gated = len(vit.blocks[0].fc1[1]) == 2 * vit.blocks[0].fc2[0].shape[1]
    size, grid = options.image_size, options.image_size // vit.patch_size
    dimension = vit.width if vit.projection is None else vit.projection.shape[1]
    arrays = {name: np.ascontiguousarray(array) for name, array in tower_arrays(vit, options, exact, codes).items()}
    outputs = {
        "tokens": [len(options.taps), grid * grid, vit.width],
        "embedding": [dimension],
        "patches": [grid * grid, vit.width],
        **{name: [len(arrays[name + ".tokens"]), dimension] for name in WINDOWS if name in options.outputs},
    }
    facts = {
        "inputs": {"images": [3, size, size]},
        "outputs": {name: outputs[name] for name in IMAGE_OUTPUTS if name in options.outputs},
        "width_and_heads": [vit.width, vit.attention_heads(options.heads)],
        "patch_and_grid": [vit.patch_size, grid],
        "front": 1 + len(vit.registers),
        "eps": vit.architecture.norm_eps,
        "activation": "swiglu" if gated else options.activation,
        "int8": options.precision == "int8",
        "hidden": [block.fc2[0].shape[1] for block in needed_blocks(vit, options)],
        "depth": depth,
        "only_first": depth == last + 1 and last not in options.taps and "patches" not in options.outputs,
        "normed": vit.architecture.normed_taps,
        "taps": list(options.taps),
        "exact": list(exact),
    }
    content = save(arrays, metadata={**metadata, "tower": json.dumps(facts)})
    start = 8 + int.from_bytes(content[:8], "little")  # the header's length, the header, the arrays
    fill = -start % CACHE_LINE
    header = (start - 8 + fill).to_bytes(8, "little") + content[8:start] + b" " * fill
    path.write_bytes(header + content[start:])  # with the usual rights

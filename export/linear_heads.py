"""Reads the linear layers that APRIL-GAN has trained on the tokens of CLIP."""

import re
from pathlib import Path

import numpy as np

from .state_dict import CheckpointError, read_state_dict
from .transformer import Affine

KEY = "trainable_linearlayer"  # the only one of the file


def read_linear_heads(path: Path, layers: int, width: int, dimension: int) -> list[Affine]:
    """Return the linear layer of each tap, weight [D, C] and bias [D] in fp32, of a `.pth` file of APRIL-GAN.

    layers: the number of taps; width: C, of their tokens; dimension: D, of the embedding. Raises CheckpointError where
    the file is unreadable or was made for another network.
    """
    tensors = dict(read_state_dict(path))
    foreign = [name for name in tensors if not re.fullmatch(rf"{KEY}\.fc\.\d+\.(weight|bias)", name)]
    if foreign or not tensors:
        raise CheckpointError(
            f"{path}: holds {foreign[0] if foreign else 'no tensors'}; a file of APRIL-GAN holds {KEY} with "
            "fc.N.weight and fc.N.bias alone"
        )
    found = sorted({int(name.split(".")[-2]) for name in tensors})
    if found != list(range(layers)):
        raise CheckpointError(
            f"{path}: has linear layers {', '.join(map(str, found))}, but there are {layers} taps; name as many taps "
            "as it was trained with, or another file"
        )
    lacking = [name for layer in found for kind in ("weight", "bias") if (name := _name(layer, kind)) not in tensors]
    if lacking:
        raise CheckpointError(f"{path}: lacks the tensor {lacking[0]}: it is incomplete; put a whole copy in its place")
    heads = []
    for layer in range(layers):
        weight, bias = (np.asarray(tensors[_name(layer, kind)], np.float32) for kind in ("weight", "bias"))
        if weight.shape != (dimension, width) or bias.shape != (dimension,):
            raise CheckpointError(
                f"{path}: fc.{layer} is {weight.shape} with a bias {bias.shape}, but tokens of {width} and embeddings "
                f"of {dimension} channels need {(dimension, width)} with {(dimension,)}: it was trained with another "
                "network"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise CheckpointError(f"{path}: fc.{layer} holds NaN or infinite values: damaged; put a whole copy there")
        heads.append((weight, bias))
    return heads


def _name(layer: int, kind: str) -> str:
    return f"{KEY}.fc.{layer}.{kind}"

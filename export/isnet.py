"""IS-Net, which finds the foreground of an image, read from the state dict of its class ISNetDIS."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .transformer import Affine, Array, Layouts, Named, Tensors, check_tensors, named_affine, read_affine, read_tower

NORM_EPS = 1e-5
# Convolutions downwards in each stage of the encoder, and in each stage of the decoder, from the deepest one on.
ENCODER = {"stage1": 7, "stage2": 6, "stage3": 5, "stage4": 4, "stage5": 4, "stage6": 4}
DECODER = {"stage5d": 4, "stage4d": 4, "stage3d": 5, "stage2d": 6, "stage1d": 7}
FLAT = ("stage5", "stage6", "stage5d")  # widen their convolutions where others halve the image; no tensor tells it
HALVINGS = 6  # of the image up to the lowest place: its side must be a multiple of 2 to the power of this


@dataclass(frozen=True)
class Convolution:
    """A 3 × 3 convolution, the norm of its outputs by statistics of the training, and a ReLU."""

    weight: Array  # [out, in, 3, 3]
    bias: Array  # [out]
    scale: Array  # [out], of the norm, as the following
    shift: Array
    mean: Array
    variance: Array

    def folded(self) -> Affine:
        """Return weight and bias of the convolution that computes the norm as well."""
        factor = self.scale / np.sqrt(self.variance.astype(np.float64) + NORM_EPS)
        weight = self.weight * factor[:, None, None, None]
        bias = (self.bias - self.mean) * factor + self.shift
        return weight.astype(np.float32), bias.astype(np.float32)


@dataclass(frozen=True)
class Stage:
    """A small U-shaped network, whose output its first convolution's is added to.

    The image is halved behind each convolution downwards but the last two, and doubled again on the way up. In a flat
    stage the distance between the nine weights of a convolution is doubled and halved instead.
    """

    name: str
    entry: Convolution
    down: list[Convolution]
    up: list[Convolution]  # the deepest first; each reads what comes from below and what its sibling has made
    flat: bool


@dataclass(frozen=True)
class ISNet:
    """IS-Net up to its first side output, the finest one; the five others only serve its training."""

    first: Affine  # [C, 3, 3, 3], which halves the image
    encoder: list[Stage]
    decoder: list[Stage]  # the deepest first
    side: Affine  # [1, C, 3, 3]


def read_isnet(path: Path) -> ISNet:
    """Read IS-Net as float32 from a checkpoint with the names of its class ISNetDIS.

    Raises CheckpointError, see `read_tower`.
    """
    return read_tower(path, LAYOUTS, _check, "foreground network", "DIS")


def _read_isnet(state: Tensors) -> ISNet:
    return ISNet(
        first=read_affine(state, "conv_in"),
        encoder=[_read_stage(state, name, depth) for name, depth in ENCODER.items()],
        decoder=[_read_stage(state, name, depth) for name, depth in DECODER.items()],
        side=read_affine(state, "side1"),
    )


def _read_stage(state: Tensors, name: str, depth: int) -> Stage:
    def read(part: str) -> Convolution:
        convolution, norm = (f"{name}.rebnconv{part}.{kind}_s1" for kind in ("conv", "bn"))
        statistics = state[norm + ".running_mean"], state[norm + ".running_var"]
        return Convolution(*read_affine(state, convolution), *read_affine(state, norm), *statistics)

    return Stage(
        name=name,
        entry=read("in"),
        down=[read(str(number)) for number in range(1, depth + 1)],
        up=[read(f"{number}d") for number in range(depth - 1, 0, -1)],
        flat=name in FLAT,
    )


def _check(isnet: ISNet) -> None:
    """Raise ValueError where a tensor does not fit the others or holds no numbers."""
    width = len(isnet.first[0])
    tensors = named_affine("conv_in", isnet.first, (width, 3, 3, 3))
    widths = []
    for stage in isnet.encoder:
        tensors += _named_stage(stage, width)
        width = len(stage.entry.weight)
        widths.append(width)
    widths.pop()  # nothing stands beside the deepest stage
    for stage in isnet.decoder:
        tensors += _named_stage(stage, width + widths.pop())
        width = len(stage.entry.weight)
    tensors += named_affine("side1", isnet.side, (1, width, 3, 3))
    check_tensors(tensors)
    for stage in (*isnet.encoder, *isnet.decoder):
        for convolution in (stage.entry, *stage.down, *stage.up):
            if convolution.variance.min() < 0:
                raise ValueError(f"{stage.name} has a variance below 0: damaged; put a whole copy in its place")


def _named_stage(stage: Stage, width: int) -> list[Named]:
    """Return the tensors of a stage that reads `width` channels, for `check_tensors`."""
    outside, inside = len(stage.entry.weight), len(stage.down[0].weight)
    parts = [("in", stage.entry, outside, width), ("1", stage.down[0], inside, outside)]
    parts += [(str(number), part, inside, inside) for number, part in enumerate(stage.down[1:], 2)]
    for number, part in zip(range(len(stage.up), 0, -1), stage.up, strict=True):
        parts.append((f"{number}d", part, inside if number > 1 else outside, 2 * inside))
    named: list[Named] = []
    for suffix, convolution, outputs, inputs in parts:
        name = f"{stage.name}.rebnconv{suffix}"
        named += named_affine(name, (convolution.weight, convolution.bias), (outputs, inputs, 3, 3))
        for kind in ("scale", "shift", "mean", "variance"):
            named.append((f"{name} {kind}", getattr(convolution, kind), (outputs,)))
    return named


LAYOUTS: Layouts[ISNet] = {
    "stage1.rebnconvin.conv_s1.weight": (_read_isnet, r"side[2-6]\.(weight|bias)|.*\.num_batches_tracked"),
}

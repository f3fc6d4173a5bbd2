"""Random checkpoints of IS-Net with the names of its class ISNetDIS."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from zsad.export.isnet import DECODER, ENCODER

# Stage → channels inside and of its output, as published.
PUBLISHED = {
    **{"stage1": (32, 64), "stage2": (32, 128), "stage3": (64, 256), "stage4": (128, 512), "stage5": (256, 512)},
    **{"stage6": (256, 512), "stage5d": (256, 512), "stage4d": (128, 256), "stage3d": (64, 128)},
    **{"stage2d": (32, 64), "stage1d": (16, 64)},
}


def isnet_tensors(divisor: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors of the published network with so many times fewer channels."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

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

    width = PUBLISHED["stage1"][1] // divisor
    convolution("conv_in", width, 3)
    beside = [PUBLISHED[stage][1] // divisor for stage in ENCODER][:-1]
    for stage, depth in {**ENCODER, **DECODER}.items():
        inside, outside = (channels // divisor for channels in PUBLISHED[stage])
        name = stage + ".rebnconv"
        unit(name + "in", outside, width + (beside.pop() if stage in DECODER else 0))
        for number in range(1, depth + 1):
            unit(name + str(number), inside, outside if number == 1 else inside)
        for number in range(1, depth):
            unit(f"{name}{number}d", outside if number == 1 else inside, 2 * inside)
        width = outside
    for number, stage in enumerate((*reversed(DECODER), "stage6"), 1):
        convolution(f"side{number}", 1, PUBLISHED[stage][1] // divisor)
    return {name: tensor if tensor.ndim == 0 else np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def write_isnet(path: Path, divisor: int = 1) -> Path:
    """Write a random checkpoint and return its file."""
    save_file(isnet_tensors(divisor), path)
    return path

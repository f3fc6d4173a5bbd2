"""Finds the linear layers of a vision transformer that do not bear 8 bits."""

from collections.abc import Collection

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from .parity import SMALLEST_COSINE, sample_images, sample_object, token_cosines
from .vision_transformer import VisionTransformer
from .vit_graph import LINEAR_LAYERS, build_block_graph, build_stem_graph

Array = NDArray[np.float32]

LARGEST_SHARE = 1 / 20  # of the deviation that an int8 graph may have
GRID = 16  # patches per side of the images it is measured on


def sensitive_layers(
    vit: VisionTransformer, depth: int, image_size: int, activation: str, heads: int, antialias: bool | None
) -> tuple[str, ...]:
    """Return the linear layers (`block0.fc1`) of the first `depth` blocks that alone turn a token too far in int8.

    One layer at a time is put into int8, and the tokens are compared as a tap right behind its block would show them;
    1 - cosine may reach `LARGEST_SHARE` of what `SMALLEST_COSINE` allows the whole graph. A few layers make most of
    the error: in DINOv2 ViT-S/14 fc1 of block 0, whose input has outlier channels, fc2 of block 2, where massive
    activations begin, and some ten more. With all 48 in int8, tokens of photographs fall to a cosine of 0.993 at
    blocks 5 and 8; with the 13 found ones in fp32 they stay above 0.998. Moving the outliers' scale into the weights
    (SmoothQuant, Xiao et al. 2023, section 4) gained nothing on top of that.

    Measured at 16 x 16 patches, where a block takes a fifth of its time at 37 x 37 and errs alike; and measured on this
    machine: without VNNI other layers suffer, so a graph is to be exported where it is to run.
    """
    side = min(image_size, GRID * vit.patch_size)
    limit = LARGEST_SHARE * (1 - SMALLEST_COSINE["int8"])
    stem = _session(build_stem_graph(vit, side, antialias))
    samples = (sample_images(side), sample_object(side))
    streams = [stem.run(None, {"images": images})[0] for images in samples]  # [1, T, C] each
    found = []
    for index in range(depth):
        layers = [f"block{index}.{layer}" for layer in LINEAR_LAYERS]
        expected = _run_block(vit, index, activation, heads, layers, streams)
        for layer in layers:
            taps = _run_block(vit, index, activation, heads, set(layers) - {layer}, streams)
            cosine = min(token_cosines(a[1], b[1]).min() for a, b in zip(taps, expected, strict=True))
            if not cosine >= 1 - limit:  # a NaN is sensitive too
                found.append(layer)
        streams = [y for y, _ in expected]
    return tuple(found)


def _run_block(
    vit: VisionTransformer, index: int, activation: str, heads: int, exact: Collection[str], streams: list[Array]
) -> list[list[Array]]:
    """Return the residual stream and the tap [1, T, C] behind a block for each of several streams in front of it."""
    session = _session(build_block_graph(vit, index, activation, heads, exact))
    return [session.run(None, {"x": x}) for x in streams]


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

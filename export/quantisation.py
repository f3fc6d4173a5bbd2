"""Finds the linear layers of a vision transformer that do not bear 8 bits."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .agreement import SMALLEST_COSINE, sample_batch, token_cosines
from .libraries import import_onnxruntime
from .options import NATIVE, ExportOptions
from .transformer_graph import LINEAR_LAYERS
from .vision_transformer import VisionTransformer
from .vit_graph import build_block_graph, build_stem_graph, check_options

Array = NDArray[np.float32]

GRID = 8  # patches per side of the images that errors are measured on
ALLOWED = 1 - SMALLEST_COSINE["int8"]
TIGHTER = 0.7  # from one choice of layers to the next
LOOSEST = {"fused": 1.0, NATIVE: TIGHTER}  # the share of what is allowed that the first choice may take


def int8_errors(vit: VisionTransformer, options: ExportOptions) -> dict[str, NDArray[np.float64]]:
    """Return what each linear layer (`block0.fc1`) alone in int8 does to the tokens: the largest 1 - cosine [taps].

    Embedding, patches and windows count as a tap behind the last block. Errors are followed to the taps because they
    grow on their way: those of block 4's proj in DINOv2 ViT-S/14, at the worst token of photographs, elevenfold up to
    block 11.

    Measured at 8 x 8 patches, which rank the layers as 16 x 16 do; and measured on this machine: without VNNI other
    layers suffer in ONNX Runtime, so a graph is to be exported where it is to run. The native code rounds alike
    everywhere, which is measured by its roundings before products in fp32, each weight by the nearest code:
    `weight_rounding.py` finds better ones.
    """
    check_options(vit, options)
    others = set(options.outputs) - {"tokens"}
    taps = sorted({*options.taps, len(vit.blocks) - 1} if others else options.taps)
    side = min(options.image_size, GRID * vit.patch_size)
    grid = side // vit.patch_size
    stem = cpu_session(build_stem_graph(vit, side, options.antialias))
    streams = [stem.run(None, {"images": image[None]})[0] for image in sample_batch(side)]  # [1, T, C] each
    altered: dict[str, list[Array]] = {}  # the same streams behind one layer in int8
    errors: dict[str, list[float]] = {}
    for index in range(max(taps) + 1):
        layers = [f"block{index}.{layer}" for layer in LINEAR_LAYERS]
        exact = cpu_session(build_block_graph(vit, index, options, grid, layers))
        expected = _run(exact, streams)
        found = {layer: _run(exact, altered[layer]) for layer in altered}
        for layer in layers:
            rest = set(layers) - {layer}
            found[layer] = _run(cpu_session(build_block_graph(vit, index, options, grid, rest)), streams)
        if index in taps:
            for layer, outputs in found.items():
                cosines = [token_cosines(a[1], b[1]).min() for a, b in zip(outputs, expected, strict=True)]
                errors.setdefault(layer, []).append(float(1 - np.min(cosines)))
        altered = {layer: [y for y, _ in outputs] for layer, outputs in found.items()}
        streams = [y for y, _ in expected]
    # A NaN is as bad as can be; taps in front of a layer see nothing of it.
    return {layer: np.nan_to_num([0.0] * (len(taps) - len(seen)) + seen, nan=np.inf) for layer, seen in errors.items()}


def layers_in_fp32(errors: Mapping[str, NDArray[np.float64]], share: float = 1.0) -> Iterator[tuple[str, ...]]:
    """Yield ever more layers to keep in fp32, until they are all; what is enough, only the whole graph can tell.

    errors: of `int8_errors`. The errors of the layers in int8 add up at every tap to at most a share of what
    `SMALLEST_COSINE` allows, first to `share`; where they do not, the layer with most at the worst tap goes to fp32.

    DINOv2 ViT-S/14 with taps behind blocks 5 and 8 takes 7 of 36 layers at 518 px and 16 at 280 px, 24 and 56 % of the
    products. Among them are fc1 of block 0, whose input has outlier channels, and fc2 of block 2, where massive
    activations begin. The tokens of 48 photographs then keep 0.998. Behind the last block single tokens of photographs
    do not, unless nearly all layers are in fp32: little decides there whether a token becomes one of the massive
    ones, and what little that is, the samples cannot tell. In 12 photographs at 518 px they fell to 0.982.
    """
    quantised, before = dict(errors), -1
    while before < len(errors):
        while quantised and (total := np.sum(list(quantised.values()), axis=0)).max() > share * ALLOWED:
            tap = total.argmax()
            del quantised[max(quantised, key=lambda layer: quantised[layer][tap])]
        if len(errors) - len(quantised) > before:
            yield tuple(layer for layer in errors if layer not in quantised)
        before, share = len(errors) - len(quantised), TIGHTER * share


def _run(session: Any, streams: list[Array]) -> list[list[Array]]:
    """Return the residual stream and the tap [1, T, C] behind a block for each of several streams in front of it."""
    return [session.run(None, {"x": x}) for x in streams]


def cpu_session(model: onnx.ModelProto) -> Any:
    """Return what runs a graph in ONNX Runtime on the CPU."""
    ort = import_onnxruntime()
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

"""Chooses the 8-bit codes of an image tower's weights by what its layers are applied to.

A weight that is rounded up or down moves a layer's outputs by its error times its input; inputs that come together can
make up for each other's errors. So weights are rounded one input after the other, each to make up for the errors of
those before as the inputs' second moments say, and nothing takes more time when the tower runs. (Frantar et al. 2023,
"GPTQ", by a triangular factor instead of an inverse, as in Chee et al. 2023, "QuIP".)
"""

import numpy as np
from numpy.typing import NDArray

from .agreement import sample_batch
from .native_weights import Codes, needed_blocks
from .options import ExportOptions
from .quantisation import cpu_session
from .transformer_graph import LINEAR_LAYERS, weight_codes
from .vision_transformer import VisionTransformer
from .vit_graph import build_stem_graph, build_watched_block_graph

Array = NDArray[np.float32]

# Patches per side of the images that inputs are measured on: with 8 they say so little that photographs gain nothing,
# with 37 no more than with 16.
GRID = 16
DAMPING = 0.1  # of the mean second moment: what the samples do not show
TOGETHER = 64  # inputs whose errors reach the ones behind them at once


def fitted_codes(vit: VisionTransformer, options: ExportOptions) -> dict[str, Codes]:
    """Return codes [N, K] for each linear layer (`block0.fc1`), with the scales of `weight_codes`."""
    side = min(options.image_size, GRID * vit.patch_size)
    stem = cpu_session(build_stem_graph(vit, side, options.antialias))
    streams = [stem.run(None, {"images": image[None]})[0] for image in sample_batch(side)]  # [1, T, C] each
    codes = {}
    for index in range(len(needed_blocks(vit, options))):
        block = cpu_session(build_watched_block_graph(vit, index, options, side // vit.patch_size))
        found = [block.run(None, {"x": stream}) for stream in streams]
        streams = [outputs[0] for outputs in found]
        for number, layer in enumerate(LINEAR_LAYERS, 1):
            inputs = np.concatenate([outputs[number][0] for outputs in found])  # [4 T, K]
            weight, _ = getattr(vit.blocks[index], layer)
            codes[f"block{index}.{layer}"] = fitted(weight, inputs.T @ inputs / len(inputs))
    return codes


def fitted(weight: Array, moments: Array) -> Codes:
    """Return codes [N, K] of weights, with the scales of `weight_codes`; moments: of the inputs, [K, K].

    In float64: else how a machine adds would decide on one code in a thousand.
    """
    nearest, scales = weight_codes(weight)
    if not np.isfinite(moments).all() or not moments.any():
        return nearest
    order = np.argsort(-np.diag(moments), kind="stable")  # the largest first: all others make up for their errors
    damped = moments[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(moments).mean()
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # times its transpose: the damped moments
    spread = upper / np.diag(upper)  # [K, K]: how much of the error of a row's input the column's makes up for
    errors = weight.T[order].astype(np.float64) / scales  # [K, N], in codes: weights, less codes that are chosen
    codes = np.empty_like(nearest)
    for start in range(0, len(order), TOGETHER):
        end = min(start + TOGETHER, len(order))
        before = spread[:start, start:end].T @ errors[:start]
        for i in range(start, end):
            wanted = errors[i] + before[i - start] + spread[start:i, i] @ errors[start:i]
            codes[:, order[i]] = code = np.clip(np.rint(wanted), -127, 127)
            errors[i] -= code
    return codes

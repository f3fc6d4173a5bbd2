"""Compares the outputs of an exported graph with what they should be."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .state_dict import CheckpointError
from .vit_graph import IN_FP32

Array = NDArray[np.float32]

LARGEST_ERROR = 1e-4  # fp32: relative, in the norm over all tokens
SMALLEST_COSINE = {"fp16": 0.999, "int8": 0.998}  # per token


def sample_images(image_size: int) -> Array:
    """Return one normalised random image [1, 3, S, S], the same in every run."""
    return np.random.default_rng(0).normal(size=(1, 3, image_size, image_size)).astype(np.float32)


def sample_object(image_size: int) -> Array:
    """Return one normalised image [1, 3, S, S] as a product photo is built: a textured disc on plain ground.

    The texture is 1/f noise, the spectrum of natural images (Field 1987).
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(image_size)[:, None], np.fft.rfftfreq(image_size))
    frequency[0, 0] = 1 / image_size
    noise = np.fft.rfft2(rng.normal(size=(3, image_size, image_size)))
    texture = np.fft.irfft2(noise / frequency, s=(image_size, image_size))
    texture = (texture - texture.mean(axis=(1, 2), keepdims=True)) / texture.std(axis=(1, 2), keepdims=True)
    y, x = np.mgrid[:image_size, :image_size] / image_size - 0.5
    image = np.where(np.hypot(x, y) < 0.3, texture, 0.02 * texture - 1.5)
    return np.asarray(image[None], np.float32)


def token_cosines(found: Array, expected: Array) -> NDArray[np.float64]:
    """Return the cosine of every token [..., C] to the expected one: [...]."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=-1) / lengths
    return cosines


def run_graph(path: Path, images: Array) -> list[Array]:
    """Return the outputs of an ONNX file on the CPU as fp32; raises CheckpointError where ONNX Runtime is too old."""
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a dozen kinds with no base of their own
        raise CheckpointError(
            f"ONNX Runtime {ort.__version__} cannot run the graph: {error}\nRun: pip install --upgrade onnxruntime"
        ) from error
    return [np.asarray(output, np.float32) for output in session.run(None, {"images": images})]


def check_agreement(found: list[Array], expected: list[Array], precision: str, oracle: str) -> str:
    """Return one line on how close two lists of outputs are; raises CheckpointError when that is not close enough."""
    errors, cosines = [], []
    for a, b in zip(found, expected, strict=True):
        errors.append(float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))))
        cosines.append(float(token_cosines(a, b).min()))
    line = f"{precision} against {oracle}: relative error {max(errors):.1e}, token cosine at least {min(cosines):.7f}"
    # Written so that a NaN fails.
    fine = max(errors) <= LARGEST_ERROR if precision == "fp32" else min(cosines) >= SMALLEST_COSINE[precision]
    if not fine:
        limit = f"error {LARGEST_ERROR}" if precision == "fp32" else f"cosine {SMALLEST_COSINE[precision]}"
        hint = "please report this" if precision == "fp32" else IN_FP32
        raise CheckpointError(f"the exported graph computes something else (limit: {limit}): {line}; {hint}")
    return line

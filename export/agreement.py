"""Compares the outputs of an exported graph with what they should be, by Polygraphy's comparator."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER
from polygraphy.util import array as polygraphy_arrays

from .libraries import import_onnxruntime, install_command
from .options import Shape
from .state_dict import CheckpointError
from .text_transformer import VOCABULARY
from .transformer_graph import IN_FP32

Array = NDArray[np.float32]

BATCH = 4  # rows that graphs and engines are compared on
LARGEST_ERROR = 1e-4  # fp32: relative, in the norm over all tokens
SMALLEST_COSINE = {"fp16": 0.999, "bf16": 0.998, "int8": 0.998}  # per token
LARGE_IMAGE = 1000  # pixels per side from which on networks are compared on two images: more would take gigabytes
# Outputs in [0, 1], and how far from the expected ones their values may be, root mean square: at steep edges single
# values in half precision are further away.
SHARES = ("foreground",)
LARGEST_DEVIATION = {"fp32": 1e-4, "fp16": 1e-2}

# Polygraphy asks whether arrays are PyTorch's, and would import it for that where it is installed, which takes seconds.
polygraphy_arrays.is_torch = lambda _: False


def sample_images(image_size: int) -> Array:
    """Return one normalised random image [1, 3, S, S], the same in every run."""
    return np.random.default_rng(0).normal(size=(1, 3, image_size, image_size)).astype(np.float32)


def sample_objects(image_size: int) -> Array:
    """Return three normalised grey images [3, 3, S, S]: rectangles on a plain ground, as product photos are built.

    Their textures have spectra of natural images: 1/f (Field 1987), the ground's falls twice as fast. Even faces, edges
    and corners between them make what noise or a textured disc does not: tokens of DINOv2 ViT-S/14 whose
    errors the last blocks multiply, as they do in photographs.
    """
    frequency = np.hypot(np.fft.fftfreq(image_size)[:, None], np.fft.rfftfreq(image_size))
    frequency[0, 0] = 1 / image_size
    y, x = np.mgrid[:image_size, :image_size] / image_size - 0.5
    images = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        noise = np.fft.rfft2(rng.normal(size=(2, image_size, image_size)))
        textures = np.fft.irfft2(noise / np.stack([frequency**2, frequency]), s=x.shape)
        textures -= textures.mean(axis=(1, 2), keepdims=True)
        coarse, fine = textures / textures.std(axis=(1, 2), keepdims=True)
        image = 0.2 * coarse
        for _ in range(12):
            column, row = rng.uniform(-0.5, 0.5, 2)
            angle = rng.uniform(0, np.pi)
            along = (x - column) * np.cos(angle) + (y - row) * np.sin(angle)
            across = (y - row) * np.cos(angle) - (x - column) * np.sin(angle)
            inside = (np.abs(along) < rng.uniform(0.02, 0.3)) & (np.abs(across) < rng.uniform(0.02, 0.2))
            image = np.where(inside, rng.uniform(-1.5, 1.5) + rng.uniform(0, 0.5) * fine, image)
        images.append(np.repeat(image[None], 3, axis=0))
    return np.asarray(images, np.float32)


def sample_batch(image_size: int) -> Array:
    """Return the images [4, 3, S, S] that graphs and engines are compared on; of large ones two."""
    return np.concatenate([sample_images(image_size), sample_objects(image_size)])[
        : 2 if image_size >= LARGE_IMAGE else 4
    ]


def sample_texts(context: int) -> NDArray[np.int32]:
    """Return the ids [4, T] of four texts of random tokens: of all lengths, one with two ends."""
    rng = np.random.default_rng(0)
    texts = np.zeros((4, context), np.int32)
    for text, share in zip(texts, (1, 0.5, 0.25, 0.75), strict=True):
        length = max(1, round(share * context))
        text[:length] = rng.integers(VOCABULARY - 2, size=length)
        text[0], text[length - 1] = VOCABULARY - 2, VOCABULARY - 1
    texts[-1, context // 3] = VOCABULARY - 1
    return texts


def sample_inputs(inputs: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    """Return what graphs and engines are compared on; inputs: their shapes."""
    samples: dict[str, Callable[..., NDArray[Any]]] = {
        "images": lambda _, height, __: sample_batch(height),
        "ids": sample_texts,
        "points": lambda _: sample_points(),
    }
    return {
        name: samples[name](*shape[1:]) if name in samples else sample_numbers(shape) for name, shape in inputs.items()
    }


def sample_rows(inputs: Mapping[str, Shape], rows: int) -> dict[str, NDArray[Any]]:
    """Return inputs of a graph with so many rows; those without a batch are whole."""
    samples = sample_inputs(inputs)
    return {
        name: array if inputs[name][0] is not None else np.resize(array, (rows, *array.shape[1:]))
        for name, array in samples.items()
    }


def sample_points() -> Array:
    """Return points [4, 2] of an image of the ordinary 1024 pixels, x and y."""
    return np.random.default_rng(0).uniform(0, 1024, (BATCH, 2)).astype(np.float32)


def sample_numbers(shape: Shape) -> Array:
    """Return random numbers, normally distributed, for an input that nothing more is known of."""
    return (
        np.random.default_rng(0)
        .normal(size=[BATCH if length is None else length for length in shape])
        .astype(np.float32)
    )


def token_cosines(found: Array, expected: Array) -> NDArray[np.float64]:
    """Return the cosine of every token [..., C] to the expected one: [...]."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=-1) / lengths
    return cosines


def run_graph(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
    """Return the outputs of an ONNX file on the CPU as fp32.

    Raises EngineError without ONNX Runtime, CheckpointError where it is too old, MemoryError where the inputs do not
    fit.
    """
    ort = import_onnxruntime()
    runner = OnnxrtRunner(SessionFromOnnx(str(path), providers=["CPUExecutionProvider"]))
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            [(_, [outputs])] = Comparator.run([runner], data_loader=[dict(inputs)])
    except Exception as error:  # ONNX Runtime has a dozen kinds with no base of their own
        if isinstance(error, MemoryError) or "alloc" in str(error):  # nor one where memory runs out
            raise MemoryError(str(error)) from error
        package = "onnxruntime-gpu" if "CUDAExecutionProvider" in ort.get_available_providers() else "onnxruntime"
        raise CheckpointError(
            f"ONNX Runtime {ort.__version__} cannot run the graph: {error}\n"
            f"Run: {install_command(f'--upgrade {package}')}"
        ) from error
    return {name: np.asarray(output, np.float32) for name, output in outputs.items()}


class TokenAgreement:
    """Polygraphy's question whether two results match, asked of every token; keeps the largest deviations.

    Of outputs in [0, 1] it is asked of the mean deviation.
    """

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._error, self._cosine = np.float64(0), np.float64(1)
        self._deviation: np.float64 | None = None  # of outputs in [0, 1], where there are any

    def __call__(self, found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, bool]:
        """Return for every output [..., C] whether it is close enough."""
        return {
            name: (self._close_shares if name in SHARES else self._close)(found[name], array)
            for name, array in expected.items()
        }

    def __str__(self) -> str:
        if self._deviation is not None:
            return f"mean deviation {self._deviation:.1e}"
        return f"relative error {self._error:.1e}, token cosine at least {self._cosine:.7f}"

    def limit(self) -> str:
        """Say what is close enough."""
        if self._deviation is not None:
            return f"mean deviation {LARGEST_DEVIATION[self._precision]}"
        return f"error {LARGEST_ERROR}" if self._precision == "fp32" else f"cosine {SMALLEST_COSINE[self._precision]}"

    def _close_shares(self, found: Array, expected: Array) -> bool:
        deviation = np.sqrt(np.square(found - expected, dtype=np.float64).mean())
        self._deviation = np.maximum(self._deviation or np.float64(0), deviation)
        return bool(deviation <= LARGEST_DEVIATION[self._precision])

    def _close(self, found: Array, expected: Array) -> bool:
        error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
        cosine = token_cosines(found, expected).min()
        # NumPy's maximum and minimum keep a NaN, with which every comparison fails.
        self._error, self._cosine = np.maximum(self._error, error), np.minimum(self._cosine, cosine)
        if self._precision == "fp32":
            return bool(error <= LARGEST_ERROR)
        return bool(cosine >= SMALLEST_COSINE[self._precision])


def check_agreement(found: Mapping[str, Array], expected: Mapping[str, Array], precision: str, oracle: str) -> str:
    """Return one line on how close outputs are to expected ones; raises CheckpointError when not close enough."""
    runs, agreement = RunResults(), TokenAgreement(precision)
    for name, outputs in ((precision, found), (oracle, expected)):
        runs.add([dict(outputs)], runner_name=name)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        fine = bool(Comparator.compare_accuracy(runs, compare_func=agreement))
    line = f"{precision} against {oracle}: {agreement}"
    if not fine:
        hint = "please report this" if precision == "fp32" else IN_FP32
        raise CheckpointError(f"it computes something else (limit: {agreement.limit()}): {line}; {hint}")
    return line

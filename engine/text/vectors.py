"""Text vectors of prompts, kept in the cache: with them at hand the text tower is not loaded, and never stays."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zsad.engine.networks.network import Graph, Network, run_in_parts
from zsad.export.options import BUILDER_VERSION
from zsad.kernels.files import find_sealed, write_sealed
from zsad.kernels.machine import cache_places, cache_to_write

from .tokenizer import TOKENIZER_VERSION, load_tokenizer

log = logging.getLogger("zsad")

TextMean = Literal["raw", "unit", "unit_norenorm"]  # see `class_vector`


class TextVectors:
    """Runs the text towers of a configuration's networks, each loaded when it is needed and dropped again.

    Loading takes about a second, once for each object; a tower takes half a gigabyte for as long as it is there.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        arithmetic: str,
        load: Callable[[str], Graph],
        to_network: Callable[[NDArray[Any]], Any],
        fetch: Callable[[Any], NDArray[Any]],
    ) -> None:
        """arithmetic: what decides the digits. load: loads a text tower. to_network, fetch: arrays to it and back."""
        self.networks, self._arithmetic = networks, arithmetic
        self._load, self._to_network, self._fetch = load, to_network, fetch

    def of(self, network: str, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors [M, D] of prompts, as the tower projects them: of any length.

        Raises CheckpointError where the weights have no text tower, or the vocabulary cannot be had.
        """
        used = self.networks[network]
        facts = [used.sha256, used.spec.activation, self._arithmetic, BUILDER_VERSION, TOKENIZER_VERSION, list(prompts)]
        name = f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.npy"
        for folder in cache_places("text"):
            if (known := find_sealed(folder / name)) is not None:
                with suppress(OSError):
                    kept: NDArray[np.float32] = np.load(known, allow_pickle=False)
                    return kept
        vectors = self._computed(network, prompts)
        content = BytesIO()
        np.save(content, vectors)
        try:
            write_sealed(cache_to_write("text") / name, content.getvalue())
        except OSError as error:  # they are at hand all the same
            log.warning("text vectors are not kept: %s", error)
        return vectors

    def _computed(self, network: str, prompts: Sequence[str]) -> NDArray[np.float32]:
        graph = self._load(network)
        (context,) = graph.inputs["ids"].shape
        ids = load_tokenizer(context).encode(prompts).astype(graph.inputs["ids"].dtype)  # [M, context]
        log.debug("running the text tower of %s over %d prompts", network, len(prompts))
        parts = run_in_parts(graph, {"ids": self._to_network(ids)})
        return np.concatenate([np.asarray(self._fetch(outputs["embedding"]), np.float32) for _, outputs in parts])


def class_vector(vectors: NDArray[np.float32], mean: TextMean) -> NDArray[np.float64]:
    """Return the vector [D] that stands for the prompts of a class, from their vectors [M, D].

    mean: of vectors as they are, at unit length then (`raw`, WinCLIP), of unit vectors, at unit length then (`unit`,
    APRIL-GAN), or as it is (`unit_norenorm`, VVV): a cosine with it is the mean of the cosines with the prompts.
    """
    values = vectors.astype(np.float64)
    if mean != "raw":
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    vector: NDArray[np.float64] = values.mean(axis=0)
    return vector if mean == "unit_norenorm" else vector / np.linalg.norm(vector)


def abnormal_probability(vectors: NDArray[Any], classes: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """Return the softmax entry [...] of the abnormal class for image vectors [..., D] of any length.

    classes: vectors [2, D], normal and abnormal: unit vectors, or means of unit vectors, with which the product is the
    mean cosine. tau: what cosines are divided by.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    cosines = vectors @ classes.T / np.maximum(lengths, np.finfo(np.float32).tiny)  # [..., 2]
    return sigmoid((cosines[..., 1] - cosines[..., 0]) / tau)


def sigmoid(difference: NDArray[Any]) -> NDArray[Any]:
    """Return the softmax entry of the second of two classes from the difference of their logits."""
    small = np.exp(-np.abs(difference))  # never too large
    values: NDArray[Any] = np.where(difference >= 0, 1, small) / (1 + small)
    return values

"""Inputs and outputs of the graph that the fixture `model` exports, on any runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.networks.network import TensorSpec

INPUTS = {"images": TensorSpec((3, 70, 70), np.dtype(np.float32))}
OUTPUTS = {
    "tokens": TensorSpec((2, 25, 64), np.dtype(np.float16)),
    "embedding": TensorSpec((64,), np.dtype(np.float32)),
}


def check_equal(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    assert list(found) == list(expected) == list(OUTPUTS)
    for name, output in found.items():
        assert output.shape[1:] == OUTPUTS[name].shape
        np.testing.assert_array_equal(output, expected[name])


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).normal(size=(count, 3, 70, 70)).astype(np.float32)

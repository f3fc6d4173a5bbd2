"""Codes of weights that make up for each other's errors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zsad.export.options import NATIVE, ExportOptions
from zsad.export.transformer_graph import LINEAR_LAYERS, weight_codes
from zsad.export.vision_transformer import read_vision_transformer
from zsad.export.weight_rounding import fitted, fitted_codes

OPTIONS = ExportOptions(taps=(0,), image_size=70, outputs=("tokens",), precision="int8", attention=NATIVE)


def samples(seed: int) -> np.ndarray:
    """Inputs [2000, 96] that come together, and 16 more that are never there."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(2000, 24)) @ np.random.default_rng(0).normal(size=(24, 80))
    return np.pad(mixed + 0.1 * rng.normal(size=mixed.shape), ((0, 0), (0, 16))).astype(np.float32)


def test_outputs_err_less_than_with_the_nearest_codes() -> None:
    weight = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    inputs, others = samples(2), samples(3)
    nearest, scales = weight_codes(weight)
    found = fitted(weight, inputs.T @ inputs / len(inputs))
    assert found.dtype == np.int8
    assert np.abs(found.astype(int)).max() <= 127
    error, usual = (np.linalg.norm(others @ (scales[:, None] * codes - weight).T) for codes in (found, nearest))
    assert error < 0.7 * usual


@pytest.mark.parametrize("moment", [0.0, np.inf, np.nan])
def test_inputs_that_say_nothing_leave_the_nearest_codes(moment: float) -> None:
    weight = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(fitted(weight, np.full((8, 8), moment, np.float32)), weight_codes(weight)[0])


def test_every_layer_that_is_needed_has_codes(random_dinov2: Callable[..., Path]) -> None:
    vit = read_vision_transformer(random_dinov2())
    codes = fitted_codes(vit, OPTIONS)
    assert list(codes) == [f"block0.{layer}" for layer in LINEAR_LAYERS]
    whole = fitted_codes(vit, replace(OPTIONS, outputs=("tokens", "embedding")))
    assert len(whole) == len(LINEAR_LAYERS) * len(vit.blocks)
    for layer in LINEAR_LAYERS:
        weight, _ = getattr(vit.blocks[0], layer)
        own = codes[f"block0.{layer}"]
        np.testing.assert_array_equal(own, whole[f"block0.{layer}"])
        assert own.shape == weight.shape
        assert 0 < np.abs(own - weight_codes(weight)[0].astype(int)).max() <= 12

"""Neighbourhoods averaged by similarity against the float64 reference."""

import numpy as np
import pytest

from zsad.kernels import reference
from zsad.kernels.snamd import similarity_pooled


@pytest.mark.parametrize("grid", [(5, 6), (1, 7), (2, 2)])
@pytest.mark.parametrize("degrees", [(1, 3, 5), (3,), (1, 7), (3, 3)])
def test_is_the_reference(grid: tuple[int, int], degrees: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 3, grid[0] * grid[1], 8)).astype(np.float32) * 0.5
    pooled = similarity_pooled(tokens, grid, degrees)
    for image, own in zip(tokens, pooled, strict=True):
        for layer, of_layer in zip(image, own, strict=True):
            np.testing.assert_allclose(of_layer, reference.snamd(layer, grid, degrees), atol=2e-6)


def test_neighbours_that_differ_have_no_weight() -> None:
    tokens = np.zeros((1, 9, 4), np.float32)
    tokens[0, :, 0] = 1
    tokens[0, 4] = [0, 100, 0, 0]
    pooled = similarity_pooled(tokens, (3, 3), (3,))
    np.testing.assert_allclose(pooled[0, 4], [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(pooled[0, :4], [[1, 0, 0, 0]] * 4, atol=1e-6)


def test_zero_tokens_stay_zero() -> None:
    assert not similarity_pooled(np.zeros((9, 4), np.float32), (3, 3), (1, 3)).any()

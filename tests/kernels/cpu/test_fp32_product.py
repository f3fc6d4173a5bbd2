"""Products of floats by tiles, against float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zsad.kernels.cpu.arrays import HAS_TILES, multiply, product_bytes

pytestmark = pytest.mark.skipif(not HAS_TILES, reason="the processor has no tiles, or the native code is not there")

if HAS_TILES:
    from zsad.kernels.cpu import _cpu

LEFT_OUT = 2.0**-20  # of the sum of the absolute products, beside what adding them up in fp32 rounds away
ROUNDED = 2.0**-24


def rows(seed: int, count: int, channels: int) -> NDArray[np.float32]:
    """Rows [n, C] of very different sizes, inside a wider array."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, channels + 5)) * 2.0 ** rng.integers(-20, 20, (count, 1))
    return values.astype(np.float32)[:, 3 : 3 + channels]


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 100))
def test_products_are_those_of_floats(count: int, columns: int, channels: int) -> None:
    check(rows(0, count, channels), rows(1, columns, channels))


@pytest.mark.parametrize("shape", [(700, 1030, 96), (40, 33, 1025), (33, 1100, 2048)])
def test_products_that_are_split_in_several_turns(shape: tuple[int, int, int]) -> None:
    check(rows(0, shape[0], shape[2]), rows(1, shape[1], shape[2]))


def check(left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    room = np.full((len(left), len(right) + 9), np.nan, np.float32)
    found = room[:, 4 : 4 + len(right)]
    _cpu.fp32_product(left, right, found)
    exact = left.astype(np.float64) @ right.T.astype(np.float64)
    size = np.abs(left).astype(np.float64) @ np.abs(right).T.astype(np.float64)
    assert (np.abs(found - exact) <= size * (LEFT_OUT + left.shape[1] * ROUNDED)).all()
    assert np.isnan(room[:, :4]).all()
    assert np.isnan(room[:, 4 + len(right) :]).all()


def test_they_are_as_exact_as_those_of_a_library() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(n, 768)).astype(np.float32) for n in (300, 400))
    exact = left.astype(np.float64) @ right.T.astype(np.float64)
    found = np.empty(exact.shape, np.float32)
    multiply(left, right, found)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 2 * np.sqrt(np.mean((left @ right.T - exact) ** 2))


def test_a_product_is_the_same_wherever_it_lies() -> None:
    left, right = rows(0, 250, 384), rows(1, 1300, 384)
    whole, part = np.empty((250, 1300), np.float32), np.empty((57, 140), np.float32)
    multiply(left, right, whole)
    multiply(left[131:188], right[1001:1141], part)
    np.testing.assert_array_equal(part, whole[131:188, 1001:1141])


def test_what_a_thread_keeps_is_bounded() -> None:
    assert 0 < product_bytes(25, 25, 48) < 1 << 16
    assert product_bytes(10**6, 10**6, 2048) < 8 << 20


def test_shapes_that_do_not_fit_are_refused() -> None:
    left, right, out = rows(0, 40, 8), rows(1, 50, 8), np.empty((40, 50), np.float32)
    with pytest.raises(ValueError, match=r"\[P, C\], \[Q, C\] and \[P, Q\]"):
        _cpu.fp32_product(left, right[:, :7], out)
    with pytest.raises(ValueError, match="contiguous"):
        _cpu.fp32_product(left, right, np.empty((50, 40), np.float32).T)

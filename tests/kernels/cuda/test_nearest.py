"""Nearest neighbours on a device: the pass and the whole search, as host code and on a GPU."""

from __future__ import annotations

from typing import Any

import host_build
import kernel_checks as checks
import numpy as np
import pytest
from host_build import HostDevice

from zsad.kernels import nearest as nearest_module
from zsad.kernels import reference
from zsad.kernels.cuda import nearest as cuda
from zsad.kernels.cuda.device import Device
from zsad.kernels.nearest import Nearest

emulated = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

TOLERANCE = 1e-3  # of a cosine of fp16 unit vectors


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """A device on the host, and chunks so small that there are several."""
    device = HostDevice()
    monkeypatch.setattr(nearest_module, "open_device", lambda name: device)
    monkeypatch.setattr(cuda, "QUERY_ROWS", 6)
    monkeypatch.setattr(cuda, "BANK_ROWS", 40)
    return device


def vectors(seed: int, count: int, channels: int) -> np.ndarray:
    rng = checks.rng(seed)
    return (rng.normal(size=(count, channels)) * 10.0 ** rng.uniform(-9, 9, (count, 1))).astype(np.float32)


def check(found: tuple[np.ndarray, np.ndarray], queries: np.ndarray, bank: np.ndarray, k: int) -> None:
    cosines, indices = found
    assert cosines.dtype == np.float32
    assert indices.dtype == np.int64
    everything, order = reference.nearest(queries, bank, len(bank))
    np.testing.assert_allclose(cosines, everything[:, :k], atol=TOLERANCE)
    ranks = np.argsort(order, axis=1)
    np.testing.assert_allclose(
        np.take_along_axis(everything, np.take_along_axis(ranks, indices, axis=1), axis=1), cosines, atol=TOLERANCE
    )


def run(kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
    HostDevice().launch(kernel, grid, threads, arguments, shared_bytes)


@pytest.mark.slow
@emulated
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (5, 128), (2, 300)])
@pytest.mark.parametrize("kept", [1, 3, 16])
def test_running_top(rows: int, columns: int, kept: int) -> None:
    checks.check_running_top(run, host_build.copied, rows, columns, kept)


@emulated
@pytest.mark.parametrize(
    ("queries", "bank", "channels", "k"), [(1, 1, 1, 1), (5, 40, 8, 1), (13, 97, 20, 16), (6, 130, 33, 4)]
)
def test_neighbours_equal_the_reference(device: HostDevice, queries: int, bank: int, channels: int, k: int) -> None:
    x, y = vectors(1, queries, channels), vectors(2, bank, channels)
    search = Nearest(y, k, device="cuda")
    assert search.precision == "fp16"
    check(search.search(x), x, y, k)


@emulated
def test_a_bank_that_is_streamed_gives_the_same(device: HostDevice) -> None:
    x, y = vectors(3, 9, 24), vectors(4, 130, 24)
    expected = Nearest(y, 3, device="cuda").search(x)
    held = sum(device.allocated)
    limit = Nearest.needed(130, 24, 3, device="cuda", resident=True)
    streamed = Nearest(y, 3, device="cuda", memory_limit=limit - 1)
    for got, want in zip(streamed.search(x), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert held <= limit
    assert sum(device.allocated) - held <= Nearest.needed(130, 24, 3, device="cuda")


@emulated
def test_of_duplicates_the_lower_indices_come_first(device: HostDevice) -> None:
    y = np.tile(vectors(5, 9, 32), (14, 1))
    _, indices = Nearest(y, 10, device="cuda").search(y[:9])
    np.testing.assert_array_equal(indices, np.arange(9)[:, None] + 9 * np.arange(10))


@emulated
def test_zero_vectors_have_cosine_zero(device: HostDevice) -> None:
    x, y = np.abs(vectors(6, 3, 16)), -np.abs(vectors(7, 50, 16))
    x[0] = y[44] = 0
    cosines, indices = Nearest(y, 1, device="cuda").search(x)
    assert (cosines == 0).all()
    np.testing.assert_array_equal(indices[:, 0], [0, 44, 44])


def test_what_a_device_does_not_have(device: HostDevice) -> None:
    y = vectors(8, 50, 16)
    with pytest.raises(ValueError, match="use precision fp16"):
        Nearest(y, precision="int8", device="cuda")
    with pytest.raises(MemoryError, match="raise memory_limit"):
        Nearest(y, device="cuda", memory_limit=Nearest.needed(50, 16, device="cuda") - 1)
    y[44, 3] = np.nan
    with pytest.raises(ValueError, match="vector 44 is not finite"):
        Nearest(y, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 9])
def test_a_gpu_finds_what_the_reference_finds(gpu: Device, k: int) -> None:
    checks.check_running_top(gpu.launch, gpu.to_device, 9, 1000, k, get=gpu.to_host)
    x, y = vectors(9, 3000, 384), vectors(10, 20000, 384)
    check(Nearest(y, k, device="cuda").search(x), x, y, k)
    limit = Nearest.needed(20000, 384, k, device="cuda")
    for got, want in zip(
        Nearest(y, k, device="cuda", memory_limit=limit).search(x),
        Nearest(y, k, device="cuda").search(x),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)

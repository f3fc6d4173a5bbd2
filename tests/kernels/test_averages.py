"""Averages over the images that are kept, against the float64 reference."""

import numpy as np
import pytest
from host_build import COMPILER, MISSING_COMPILER, HostDevice

from zsad.kernels import averages, reference
from zsad.kernels.averages import kept_averages
from zsad.kernels.cuda.device import DeviceMemoryError

INTERVALS = [(0.0, 0.3), (0.0, 1.0), (0.2, 0.6), (1, 3), (0, 1)]


@pytest.fixture(params=["native", "numpy", "device"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    if request.param == "numpy":
        monkeypatch.setattr(averages.cpu, "_cpu", None)
    elif request.param == "native" and averages.cpu._cpu is None:
        pytest.skip("installed without a compiler: the native kernels are not there")
    elif request.param == "device" and COMPILER is None:
        pytest.skip(MISSING_COMPILER)
    return [HostDevice()] if request.param == "device" else []


def make_minima(images: int, patches: int, others: int, ties: bool = False) -> np.ndarray:
    """Distances [M, P, N] of the first images, infinite to themselves."""
    minima = np.random.default_rng(images).uniform(0, 2, (images, patches, others)).astype(np.float32)
    if ties:
        minima = np.round(minima * 2) / np.float32(2)
    minima[range(images), :, range(images)] = np.inf
    return minima


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(("images", "others", "ties"), [(2, 2, False), (9, 9, True), (20, 20, False), (3, 8, True)])
def test_averages_equal_the_reference(
    devices: list[HostDevice], images: int, others: int, ties: bool, interval: tuple[float, float]
) -> None:
    minima = make_minima(images, 19, others, ties)
    for kept in (np.ones(others, bool), np.arange(others) % 3 != 2, np.arange(others) >= others - 2):
        expected = reference.kept_average(minima, kept, interval)
        np.testing.assert_allclose(kept_averages(minima, kept, interval, devices), expected, rtol=1e-12)


def test_the_order_of_the_images_changes_nothing(devices: list[HostDevice]) -> None:
    minima, kept = make_minima(12, 7, 12, ties=True), np.arange(12) % 2 == 0
    order = np.random.default_rng(1).permutation(12)
    again = kept_averages(minima[order][..., order], kept[order], (0.0, 0.3), devices)
    np.testing.assert_array_equal(again, kept_averages(minima, kept, (0.0, 0.3), devices)[order])


def test_a_device_takes_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    if COMPILER is None:
        pytest.skip(MISSING_COMPILER)
    minima, kept, device = make_minima(7, 5, 7), np.arange(7) != 3, HostDevice()
    monkeypatch.setattr("zsad.kernels.cuda.averages.STAGED_BYTES", 3 * 4 * 5 * 7)
    found = kept_averages(minima, kept, (0.0, 0.5), [device])
    np.testing.assert_allclose(found, reference.kept_average(minima, kept, (0.0, 0.5)), rtol=1e-12)
    assert max(device.allocated) == 3 * 4 * 5 * 7


@pytest.mark.parametrize("held", [0, 1, 3])
def test_a_device_with_little_memory_takes_fewer_images_or_leaves_all_to_the_cpu(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if COMPILER is None:
        pytest.skip(MISSING_COMPILER)
    device = HostDevice()
    minima, kept, empty, launched = make_minima(7, 5, 7), np.arange(7) != 3, device.empty, list[str]()

    def limited(shape: tuple[int, ...], dtype: object) -> np.ndarray:
        if shape[0] > held:
            raise DeviceMemoryError
        return empty(shape, dtype)

    monkeypatch.setattr(device, "empty", limited)
    launch = device.launch
    monkeypatch.setattr(device, "launch", lambda name, *rest: (launched.append(name), launch(name, *rest)))
    found = kept_averages(minima, kept, (0.0, 0.5), [device])
    np.testing.assert_allclose(found, reference.kept_average(minima, kept, (0.0, 0.5)), rtol=1e-12)
    assert len(launched) == {0: 0, 1: 7, 3: 3}[held]


def test_something_must_be_kept_for_every_image() -> None:
    minima = make_minima(3, 4, 3)
    with pytest.raises(ValueError, match="no other that is kept"):
        kept_averages(minima, np.array([True, False, False]), (0.0, 0.3))
    with pytest.raises(ValueError, match=r"kept must be \[3\]"):
        kept_averages(minima, np.ones(4, bool), (0.0, 0.3))

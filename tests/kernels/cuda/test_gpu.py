"""The same checks on a real device, and the whole of mutual scoring against the reference."""

from __future__ import annotations

from typing import Any

import kernel_checks as checks
import numpy as np
import pytest
from device_scores import device_scores
from variant_checks import VARIANTS

from zsad.kernels import reference
from zsad.kernels.cuda.device import Device, DeviceError, DeviceMemoryError, open_devices
from zsad.kernels.cuda.plan import Plan

pytestmark = pytest.mark.gpu


class OnDevice:
    """Runs a check's kernel on the device and copies the outputs back into the check's own arrays."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(self, kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
        copies = [self.device.to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self.device.launch(kernel, grid, threads, copies, shared_bytes)
        for argument, copy in zip(arguments, copies, strict=True):
            if isinstance(argument, np.ndarray):
                argument[...] = self.device.to_host(copy)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layer_norm(gpu: Device, dtype: Any) -> None:
    checks.check_layer_norm(OnDevice(gpu), np.array, 3, 1369 * 64 + 5, dtype, threads=256)


@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (37, 37)])
def test_pooled_norms(gpu: Device, grid: tuple[int, int]) -> None:
    checks.check_pooled_norms(OnDevice(gpu), np.array, grid, 1024, (1, 3, 5), zeros=grid == (7, 7))


@pytest.mark.parametrize("degrees", [(1,), (1, 3), (1, 3, 5), (3, 7), (1, 9)])
@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (16, 16), (37, 37), (45, 40)])
def test_filter_max(gpu: Device, grid: tuple[int, int], degrees: tuple[int, ...]) -> None:
    checks.check_filter_max(OnDevice(gpu), np.array, grid, degrees, pairs=2)
    checks.check_filter_max(OnDevice(gpu), np.array, grid, degrees, pairs=1, negative=True)
    checks.check_filter_max(OnDevice(gpu), np.array, grid, degrees, pairs=2, window=2)


@pytest.mark.parametrize("case", ["plain", "zeros", "ties"])
def test_interval_average(gpu: Device, case: str) -> None:
    checks.check_interval_average(
        OnDevice(gpu), np.array, 60, 1369, (3, 18), zeros=case == "zeros", ties=case == "ties", image_first=50
    )


@pytest.mark.parametrize("ties", [False, True])
def test_kept_sums(gpu: Device, ties: bool) -> None:
    checks.check_kept_sums(OnDevice(gpu), np.array, 5, 60, 1369, ties)


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", [(700, 900), (900, 700), (300, 1000), (1024, 1024)])
def test_resize_equals_pillow(gpu: Device, source: tuple[int, int], resampling: str) -> None:
    checks.check_resize(gpu, source, 518, resampling)


@pytest.mark.parametrize("source", [(700, 900), (900, 700), (300, 1000)])
def test_the_middle_square_equals_the_host_s(gpu: Device, source: tuple[int, int]) -> None:
    checks.check_middle_square(gpu, source, 518)


@pytest.mark.parametrize(
    ("images", "layers", "grid", "channels", "degrees"),
    [
        (2, 1, (1, 1), 8, (1,)),
        (9, 2, (7, 7), 100, (1, 3, 5)),
        (20, 2, (16, 16), 384, (1, 3)),
        (6, 1, (37, 37), 1024, (1, 3, 5)),
    ],
)
def test_mutual_scores_equal_the_reference(
    gpu: Device, images: int, layers: int, grid: tuple[int, int], channels: int, degrees: tuple[int, ...]
) -> None:
    x = checks.rng(images).normal(size=(images, layers, grid[0] * grid[1], channels)).astype(np.float32)
    expected = reference.mutual_scores(x, grid, degrees)
    for options in VARIANTS.values():
        scores = device_scores(x, grid, degrees, device=gpu, **options)
        np.testing.assert_allclose(scores, expected, atol=2e-3)
        np.testing.assert_array_equal(scores, device_scores(x, grid, degrees, device=gpu, **options))


def test_tokens_on_the_device_and_a_small_memory_limit_change_nothing(gpu: Device) -> None:
    x = checks.rng(1).normal(size=(30, 2, 256, 384)).astype(np.float32)
    plans: list[Plan] = []
    expected = device_scores(x, device=gpu, on_plan=plans.append)
    limit = plans[0].peak_bytes * 2 // 3
    in_chunks = device_scores(x, device=gpu, memory_limit=limit, on_plan=plans.append)
    assert plans[1].rows < 30
    np.testing.assert_allclose(in_chunks, expected, rtol=1e-5)
    np.testing.assert_array_equal(device_scores(gpu.to_device(x), device=gpu), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_features_give_the_same_scores(gpu: Device, variant: str) -> None:
    x = checks.rng(2).normal(size=(40, 2, 256, 384)).astype(np.float32)
    plans: list[Plan] = []
    options: Any = {"device": gpu, "pairs": 2, "on_plan": plans.append, "return_minima": True, **VARIANTS[variant]}
    expected, minima = device_scores(x, **options)
    for share, host_limit in ((0.8, 1 << 30), (0.5, 1 << 30), (0.5, 1 << 20)):
        limit = int(share * plans[0].peak_bytes)
        scores, streamed = device_scores(x, memory_limit=limit, host_memory_limit=minima.nbytes + host_limit, **options)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        np.testing.assert_allclose(streamed, minima, rtol=1e-5, atol=1e-5)
    assert [plan.features for plan in plans[1:]] == [*["in host memory"] * 2, "in a memory-mapped file"]
    assert plans[1].exchanges
    assert not plans[3].exchanges


@pytest.mark.parametrize("kind", [True, "each"])
def test_minima_equal_the_reference(gpu: Device, kind: Any) -> None:
    x = checks.rng(3).normal(size=(9, 2, 49, 100)).astype(np.float32)
    scores, minima = device_scores(x, device=gpu, return_minima=kind)
    expected = reference.patch_minima(x, (7, 7))
    np.testing.assert_allclose(minima, expected if kind == "each" else expected.mean(axis=(0, 1)), rtol=2e-3)
    np.testing.assert_array_equal(scores, device_scores(x, device=gpu))


def test_all_devices_share_the_work(gpu: Device) -> None:
    devices = open_devices("cuda:all")
    if len(devices) < 2:
        pytest.skip("there is one CUDA device only")
    x = checks.rng(4).normal(size=(31, 2, 256, 384)).astype(np.float32)
    scores = device_scores(x, device=devices)
    np.testing.assert_allclose(scores, device_scores(x, device=gpu), rtol=1e-5)


def test_what_is_not_there_is_named(gpu: Device) -> None:
    with pytest.raises(DeviceMemoryError):
        gpu.empty((1 << 45,), np.uint8)
    with pytest.raises(DeviceError, match="does not exist"):
        open_devices("cuda:0,9999")


def test_memory_in_use_counts_what_is_allocated(gpu: Device) -> None:
    array = gpu.empty((1 << 30,), np.uint8)
    assert gpu.used_bytes() >= array.nbytes

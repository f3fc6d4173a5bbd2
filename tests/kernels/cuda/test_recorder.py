"""Comparisons that are taken down once and queued again for every layer, on emulated devices and on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import host_build
import kernel_checks as checks
import numpy as np
import pytest
from device_scores import device_scores
from host_build import HostDevice, KernelError
from variant_checks import VARIANTS, products_of_a_pair

from zsad.kernels.cuda import recorder, scorer
from zsad.kernels.cuda.device import Device, DeviceMemoryError
from zsad.kernels.cuda.plan import Plan

compiled = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

DEGREES = (1, 3)


def tokens(images: int, layers: int = 2) -> Any:
    return checks.rng(images, 5).normal(size=(images, layers, 4, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "PART_LAUNCHES", 3)


def score(device: Any, images: int = 5, **options: Any) -> Any:
    return device_scores(tokens(images), degrees=DEGREES, device=device, references=1, pairs=2, **options)


@compiled
@pytest.mark.parametrize(
    ("variant", "devices"),
    [
        ("gram", 1),
        *(pytest.param(variant, 2, marks=pytest.mark.slow) for variant in VARIANTS),
        *(pytest.param(variant, 1, marks=pytest.mark.slow) for variant in VARIANTS if variant != "gram"),
    ],
)
def test_what_is_recorded_gives_the_same_scores(variant: str, devices: int) -> None:
    several = [HostDevice() for _ in range(devices)]
    plain, plans = HostDevice(), []
    expected = score(plain, recorded=False, **VARIANTS[variant])
    got = score(several, on_plan=plans.append, **VARIANTS[variant])
    np.testing.assert_array_equal(got, expected)
    assert plain.captures == plain.replays == 0
    for device in several:
        assert device.replays > device.captures > 0
    pairs = 2 * plans[0].comparisons()
    assert sum(device.products for device in several) == products_of_a_pair(variant, DEGREES) * pairs


@compiled
@pytest.mark.slow
def test_chunks_that_stream_are_recorded_too() -> None:
    plans: list[Plan] = []
    expected = score(HostDevice(), 13, on_plan=plans.append)
    device = HostDevice()
    limit = plans[0].peak_bytes * 2 // 3
    got = score(device, 13, memory_limit=limit, host_memory_limit=1 << 30, on_plan=plans.append)
    np.testing.assert_array_equal(got, expected)
    assert len(plans[1].rounds()) > 1
    assert device.replays > device.captures > 4


@compiled
@pytest.mark.slow
def test_a_single_layer_and_what_is_too_much_are_queued_launch_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    device_scores(tokens(5, layers=1), degrees=DEGREES, device=device, pairs=2)
    assert device.captures == 0
    monkeypatch.setattr(recorder, "MAX_LAUNCHES", 3)
    np.testing.assert_array_equal(score(device), score(HostDevice(), recorded=False))
    assert device.captures == 1


@compiled
@pytest.mark.parametrize(
    "refusal",
    [
        KernelError("not permitted while a stream is captured"),
        pytest.param(DeviceMemoryError(), marks=pytest.mark.slow),
    ],
)
def test_a_device_that_cannot_be_recorded_is_named_once(refusal: Exception, caplog: pytest.LogCaptureFixture) -> None:
    device = HostDevice()
    device.refusal = refusal
    expected = score(HostDevice(), recorded=False)
    with caplog.at_level(logging.WARNING, "zsad"):
        for _ in range(2):
            np.testing.assert_array_equal(score(device), expected)
    assert device.captures == device.replays == 0
    assert caplog.text.count("the host takes no CUDA graphs of mutual scoring") == 1


def test_the_emulation_runs_nothing_until_it_is_replayed() -> None:
    device = HostDevice()
    arrays = [device.to_device(np.zeros(3, np.int32)) for _ in range(2)]

    def queue() -> None:
        device.fill(arrays[0], value)
        device.copy(arrays[0], arrays[1])

    value = 1
    replay = device.capture(queue)
    assert not arrays[0].any()
    value = 2
    replay()
    assert (arrays[1] == 1).all()  # scalars are those of the recording
    with pytest.raises(AssertionError, match="cannot be recorded"):
        device.capture(device.synchronise)
    del arrays[0]
    with pytest.raises(KernelError, match="was freed"):
        replay()


def test_the_emulation_wants_products_joined_and_workspaces_read() -> None:
    device = HostDevice()
    features, grams = device.to_device(np.zeros((1, 2, 4), np.float16)), device.empty((1, 2, 32), np.float32)

    def multiply() -> None:
        with device.producing(0):
            device.product(features[0], features, grams)

    with pytest.raises(AssertionError, match="no pass has joined"):
        device.capture(multiply)

    def whole() -> None:
        multiply()
        with device.consuming(0):
            device.fill(grams, 3)

    replay = device.capture(whole)
    multiply()
    with pytest.raises(AssertionError, match="overwritten"):
        replay()
    with device.consuming(0):
        pass
    replay()
    assert (grams == 3).all()
    assert device.products == 2


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_on_a_gpu(gpu: Device, variant: str, caplog: pytest.LogCaptureFixture) -> None:
    x = checks.rng(6).normal(size=(40, 3, 256, 384)).astype(np.float32)
    options: Any = {"device": gpu, "pairs": 3, **VARIANTS[variant]}
    plans: list[Plan] = []
    expected = device_scores(x, recorded=False, on_plan=plans.append, **options)
    with caplog.at_level(logging.WARNING, "zsad"):
        for limit in (None, int(0.8 * plans[0].peak_bytes)):  # resident, and streamed
            np.testing.assert_allclose(device_scores(x, memory_limit=limit, **options), expected, rtol=1e-5)
    assert not caplog.text

"""Mutual scoring that does not fit on a device, or that several devices share, on emulated ones."""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections import Counter
from typing import Any

import host_build
import kernel_checks as checks
import numpy as np
import pytest
from device_scores import device_scores
from host_build import HostDevice
from variant_checks import VARIANTS, products_of_a_pair

from zsad.kernels import reference
from zsad.kernels.cuda import comparers
from zsad.kernels.cuda.card import Card
from zsad.kernels.cuda.comparers import Comparer, GramOnce, Int8ProductPerDegree
from zsad.kernels.cuda.device import DeviceError, DeviceMemoryError, open_device, open_devices
from zsad.kernels.cuda.plan import Plan, Sizes, plan_mutual_scoring
from zsad.kernels.cuda.scoring import Options
from zsad.kernels.cuda.scoring import Scoring as CudaScoring
from zsad.kernels.mutual_scoring import MutualScoring
from zsad.kernels.task import make_task

compiled = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

GIB = 2**30
GRID, DEGREES, CHANNELS = (3, 3), (1, 3), 16
PLENTY = GIB
COMPARERS: dict[str, type[Comparer]] = {**comparers.COMPARERS, "int8": Int8ProductPerDegree}


def tokens(images: int, layers: int = 2, channels: int = CHANNELS) -> Any:
    return checks.rng(images, 3).normal(size=(images, layers, 9, channels)).astype(np.float32)


@functools.cache
def unplanned(variant: str, images: int) -> Any:
    """The scores of `tokens(images, 1)` where everything is resident."""
    return device_scores(tokens(images, 1), GRID, DEGREES, device=HostDevice(), **VARIANTS[variant])


def planned(images: int, rows: int, devices: int = 1, exchanges: bool = False, references: int = 0) -> Plan:
    columns = 0 if devices == 1 and rows >= images else 2
    return Plan(images + references, rows, columns, 1, devices, "in host memory", exchanges, 0, 0, GramOnce, references)


def plan_of(
    images: int,
    patches: int,
    channels: int,
    degrees: int,
    limit: int,
    cache: int,
    *,
    devices: int = 1,
    comparer: type[Comparer] = GramOnce,
    returned_bytes: int = 0,
    **limits: Any,
) -> Plan:
    sizes = Sizes(images, patches, channels, degrees, devices, comparer, returned_bytes)
    return plan_mutual_scoring(sizes, limit, Card("8.9", 128, cache, 100 << 10), **limits)


def smallest_limit(images: int, **options: Any) -> int:
    """The smallest device memory that a plan fits in."""
    low, high = 0, PLENTY
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_of(images, 9, CHANNELS, len(DEGREES), middle, 1, **options)
            high = middle
        except MemoryError:
            low = middle
    return high


@pytest.mark.parametrize("references", [0, 1, 5])
@pytest.mark.parametrize("exchanges", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [4, 5, 9, 14])
def test_every_row_meets_every_other_image_once(images: int, devices: int, exchanges: bool, references: int) -> None:
    for rows in range(1, images + 1 - (devices == 1)):
        plan = planned(images, rows, devices, exchanges, references)
        met: Counter[tuple[int, int]] = Counter()
        compared = 0
        prepared = [image for chunks in plan.prepared() for chunk in chunks for image in chunk]
        assert sorted(prepared) == list(range(images + references))
        for chunk in plan.chunks():
            met.update((i, j) for i in chunk for j in chunk if i != j)
            compared += len(chunk) * (len(chunk) - 1) // 2
            for share in plan.shares(chunk).values():
                pairs = [(i, j) for i in share.own for j in share.others]
                compared += len(pairs)
                met.update(pairs)
                if share.sent:
                    met.update((j, i) for i, j in pairs)
        assert met == Counter((i, j) for i in range(images) for j in range(images + references) if i != j)
        assert plan.comparisons() == compared
        if exchanges:
            assert compared == images * (images - 1) // 2 + images * references


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_get_equal_parts_of_the_work(devices: int) -> None:
    plan = planned(60, 30, devices, exchanges=True)
    (chunks,) = plan.rounds()
    work = []
    for rows in chunks:
        shares = plan.shares(rows).values()
        work.append(len(rows) * (len(rows) - 1) // 2 + sum(len(s.own) * len(s.others) for s in shares))
    assert max(work) == min(work)


def test_what_was_sent_is_there_before_it_is_needed() -> None:
    plan = planned(11, 2, devices=2, exchanges=True)
    rounds = plan.rounds()
    for number, chunks in enumerate(rounds):
        for rows in filter(None, chunks):
            for to in plan.shares(rows):
                assert any(to in later for later in rounds[number:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("images", [2, 3, 7, 50, 200, 1000, 3000, 20000])
@pytest.mark.parametrize("limit", [2, 8, 24, 140])
@pytest.mark.parametrize("variant", COMPARERS)
def test_plans_fit(images: int, devices: int, limit: int, variant: str) -> None:
    options: dict[str, Any] = {"devices": devices, "host_limit": 64 * GIB, "comparer": COMPARERS[variant]}
    plan = plan_of(images, 1369, 1024, 3, limit * GIB, 72 << 20, **options)
    assert plan.peak_bytes <= limit * GIB
    assert plan.host_bytes <= 64 * GIB
    assert 1 <= plan.rows <= images
    assert plan.pairs >= 1
    assert plan.describe()
    more = plan_of(images, 1369, 1024, 3, 2 * limit * GIB, 72 << 20, **options)
    assert more.comparisons() <= plan.comparisons()


def test_what_plans_keep_where() -> None:
    def plan(images: int, **options: Any) -> Plan:
        return plan_of(images, 1369, 1024, 3, 24 * GIB, 72 << 20, **options)

    assert plan(200).columns == 0
    assert "all features of a layer resident" in plan(200).describe()
    streaming = plan(2000, host_limit=100 * GIB)
    assert streaming.features == "in host memory"
    assert streaming.exchanges
    assert streaming.comparisons() == 2000 * 1999 // 2
    assert not plan(2000, host_limit=10 * GIB).exchanges
    assert plan(2000, host_limit=GIB).features == "in a memory-mapped file"
    assert plan(200, devices=2, host_limit=100 * GIB).rows == 100
    assert plan(3, devices=8).devices == 3
    huge = plan(20000, host_limit=100 * GIB)
    assert huge.features == "in host memory"
    assert huge.rows >= 16


def test_fused_products_trade_grams_for_features() -> None:
    def plan(variant: str, images: int, patches: int = 1369, **options: Any) -> Plan:
        limit, comparer = 1000 * GIB, COMPARERS[variant]
        return plan_of(images, patches, 1024, 3, limit, 72 << 20, comparer=comparer, **options)

    gram, fused, tiled, int8 = (
        plan(variant, 200).peak_bytes - plan(variant, 199).peak_bytes - 4 * 1369 * (3 * 399 + 1) - 3 - 4
        for variant in COMPARERS
    )  # one more image, without its keys, score and flags
    lengths = 4 * 3 * 1369
    assert gram == tiled == 2 * 1369 * 1024 + lengths
    assert fused == 3 * 2 * 1369 * 1024 + lengths
    assert int8 == 3 * 3 * 1369 * 1024 + 2 * lengths
    assert plan("gram", 200, pairs=100).peak_bytes > plan("gram", 200, pairs=1).peak_bytes
    for variant in ("fused", "tiled", "int8"):
        assert plan(variant, 200, pairs=100).peak_bytes == plan(variant, 200, pairs=1).peak_bytes
        assert plan(variant, 200).pairs == 199
        assert plan(variant, 200, pairs=3).pairs == 3
        assert plan(variant, 100_000, 1).pairs == 65535  # what a launch takes


def test_a_limit_below_the_minimum_names_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match=r"at least .* MiB on the device.*--memory-limit"):
        plan_of(100, 1369, 1024, 3, 10 << 20, 1)
    assert not plan_of(100, 1369, 1024, 3, GIB, 1, returned_bytes=100 << 20, host_limit=50 << 20).returned_in_memory
    monkeypatch.setattr("zsad.kernels.cuda.plan.default_disk_limit", lambda: 99 << 20)
    with pytest.raises(MemoryError, match=r"at least .* MiB in host memory or on the disk.*--memory-limit"):
        plan_of(100, 1369, 1024, 3, GIB, 1, returned_bytes=100 << 20, host_limit=50 << 20)


@pytest.mark.long
@compiled
@pytest.mark.parametrize(
    ("variant", "images", "devices", "share"),
    [
        *[("gram", *how) for how in ((2, 2, 1.0), (7, 1, 1.3), (7, 3, 1.0), (12, 2, 1.3))],
        ("fused", 7, 1, 1.3),
        *[
            pytest.param("gram", images, devices, share, marks=pytest.mark.long)
            for images in (2, 7, 12)
            for devices in (1, 2, 3)
            for share in (1.0, 1.3)
            if (images, devices, share) not in ((2, 2, 1.0), (7, 1, 1.3), (7, 3, 1.0), (12, 2, 1.3))
        ],
        *[pytest.param("fused", 7, *how, marks=pytest.mark.long) for how in ((1, 1.0), (3, 1.0))],
        *[pytest.param("int8", 7, *how, marks=pytest.mark.long) for how in ((1, 1.0), (1, 1.3), (3, 1.0))],
        pytest.param("tiled", 7, 3, 1.3, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("host", ["much", pytest.param("little", marks=pytest.mark.long)])
def test_every_plan_gives_the_same_scores(variant: str, images: int, devices: int, host: str, share: float) -> None:
    plans: list[Plan] = []
    host_limit = PLENTY if host == "much" else 1
    fitting: Any = {"devices": devices, "host_limit": host_limit, "comparer": COMPARERS[variant]}
    limit = int(share * smallest_limit(images, **fitting))
    several = [HostDevice() for _ in range(devices)]
    how: Any = {"memory_limit": limit, "host_memory_limit": host_limit, "on_plan": plans.append, **VARIANTS[variant]}
    scores = device_scores(tokens(images, 1), GRID, DEGREES, device=several, **how)
    np.testing.assert_array_equal(scores, unplanned(variant, images))
    (plan,) = plans
    each = products_of_a_pair(variant, DEGREES)
    assert sum(device.products for device in several) == each * plan.comparisons()
    for device in several[: plan.devices]:
        assert sum(device.allocated) <= plan.peak_bytes <= limit
    if images == 12 or variant != "gram":
        assert plan.rows < images
        assert plan.features == ("in host memory" if host == "much" else "in a memory-mapped file")
    assert not (host == "little" and plan.exchanges)


@pytest.mark.long
@compiled
@pytest.mark.parametrize(
    ("variant", "images", "devices"),
    [
        *(("gram", 9, 2), ("fused", 2, 1), ("int8", 2, 2)),
        *(
            pytest.param(*how, marks=pytest.mark.long)
            for how in itertools.product(COMPARERS, (2, 3, 9), (1, 2, 3))
            if how not in (("gram", 9, 2), ("fused", 2, 1), ("int8", 2, 2))
        ),
    ],
)
def test_needed_is_the_least_that_works(variant: str, images: int, devices: int) -> None:
    how: dict[str, Any] = dict(VARIANTS[variant])
    several = [HostDevice() for _ in range(devices)]
    precision = how.get("precision", "auto")
    options = Options(how.get("products"))
    scoring = MutualScoring(GRID, 1, CHANNELS, DEGREES, (0.0, 0.3), precision, several, options)
    needed = scoring.needed(images)
    plans: list[Plan] = []
    scores = scoring.scores(tokens(images, 1), needed, on_plan=plans.append)
    np.testing.assert_array_equal(scores, unplanned(variant, images))
    assert plans[0].peak_bytes <= needed
    assert max(sum(device.allocated) for device in several) <= needed
    with pytest.raises(MemoryError, match="needs at least"):
        scoring.scores(tokens(images, 1), needed - 1)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize(
    ("variant", "images", "share", "devices"),
    [
        *[("gram", 13, 1.5, 2), ("fused", 9, 1.5, 1), ("int8", 9, 1.6, 2)],
        *[
            pytest.param(*how, marks=pytest.mark.slow)
            for how in (("gram", 13, 1.5, 1), ("fused", 9, 1.5, 2), ("int8", 9, 1.6, 1))
        ],
    ],
)
def test_chunks_of_one_device_exchange_too(devices: int, variant: str, images: int, share: float) -> None:
    fitting: Any = {"devices": devices, "host_limit": PLENTY, "comparer": COMPARERS[variant]}
    limit = int(share * smallest_limit(images, **fitting))
    plans: list[Plan] = []
    several = [HostDevice() for _ in range(devices)]
    how: Any = {"memory_limit": limit, "host_memory_limit": PLENTY, "on_plan": plans.append, **VARIANTS[variant]}
    scores = device_scores(tokens(images, 1), GRID, DEGREES, device=several, **how)
    np.testing.assert_array_equal(scores, unplanned(variant, images))
    assert plans[0].exchanges
    assert len(plans[0].rounds()) > 1
    assert plans[0].rows > 1
    pairs = images * (images - 1) // 2
    assert sum(device.products for device in several) == products_of_a_pair(variant, DEGREES) * pairs


@compiled
@pytest.mark.parametrize("images", [2, 3, 5, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("devices", [2, 3])
def test_devices_with_room_compare_every_pair_once(images: int, devices: int) -> None:
    x = tokens(images)
    several = [HostDevice(cache_bytes=1 << 20) for _ in range(devices)]
    seen: list[tuple[int, int]] = []
    scores = device_scores(x, GRID, DEGREES, device=several, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(scores, device_scores(x, GRID, DEGREES, device=HostDevice(cache_bytes=1 << 20)))
    assert sum(device.products for device in several) == images * (images - 1)  # in two layers
    assert seen[-1] == (images * (images - 1),) * 2


@compiled
@pytest.mark.parametrize(
    ("variant", "images", "references", "devices", "host"),
    [
        ("gram", 1, 4, 2, "much"),
        ("gram", 5, 3, 2, "much"),
        *(
            pytest.param(variant, *counts, devices, host, marks=pytest.mark.long)
            for variant in COMPARERS
            for counts, devices, host in (
                ((1, 1), 3, "much"),
                ((1, 6), 2, "little"),
                ((7, 2), 3, "little"),
                ((7, 2), 1, "much"),
                ((3, 9), 1, "little"),
                ((3, 9), 2, "much"),
            )
        ),
    ],
)
def test_references_have_no_scores(variant: str, images: int, references: int, devices: int, host: str) -> None:
    """Whatever the plan, scores and distances are those of the first images of all."""
    x, options = tokens(images + references, 1), VARIANTS[variant]
    joined: Any = {"return_minima": True, **options}
    expected = device_scores(x, GRID, DEGREES, device=HostDevice(), **joined)
    host_limit = PLENTY if host == "much" else 4 * images * (images + references) * 9
    precision = options.get("precision", "auto")
    how: Any = {"return_minima": True, "references": references, "host_memory_limit": host_limit, **options}
    needed = MutualScoring(
        GRID, 1, CHANNELS, DEGREES, (0.0, 0.3), precision, [HostDevice()] * devices, Options(options.get("products"))
    ).needed(images, references)
    several: list[HostDevice] = []
    plans: list[Plan] = []
    for limit in (needed + 4 * 9 * (images + references), int(1.3 * needed), PLENTY):
        several = [HostDevice() for _ in range(devices)]
        got = device_scores(x, GRID, DEGREES, device=several, memory_limit=limit, on_plan=plans.append, **how)
        for array, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(array, other[:images])
        plan, each = plans[-1], products_of_a_pair(variant, DEGREES)
        assert sum(device.products for device in several) == each * plan.comparisons()
        for device in several[: plan.devices]:
            assert sum(device.allocated) <= plan.peak_bytes <= limit
    if host == "much":  # with little, devices compare what lies between them twice
        assert plans[-1].comparisons() == images * (images - 1) // 2 + images * references
    assert (plans[-1].columns == 0) == (min(devices, images) == 1)


@pytest.mark.long
@compiled
@pytest.mark.parametrize(
    ("variant", "devices", "degrees"),
    [
        ("gram", 3, (3, 1, 3)),
        *[
            pytest.param("gram", *how, marks=pytest.mark.long)
            for how in ((1, (1, 3)), (1, (3, 1, 3)), (2, (1, 3)), (2, (3, 1, 3)), (3, (1, 3)))
        ],
        pytest.param("fused", 2, (3, 1, 3), marks=pytest.mark.long),
        pytest.param("int8", 1, (3, 1, 3), marks=pytest.mark.long),
        pytest.param("int8", 2, (1, 3), marks=pytest.mark.long),
    ],
)
def test_minima(variant: str, devices: int, degrees: tuple[int, ...]) -> None:
    x, options = tokens(7, channels=100 if variant == "int8" else CHANNELS), VARIANTS[variant]
    x[2, 0, 4] = x[2, 0].mean()  # no zero feature, but a flat one
    x[5] = 2.0  # only zero features
    several = [HostDevice() for _ in range(devices)]
    plain = device_scores(x, GRID, degrees, device=HostDevice(), **options)
    scores, each = device_scores(x, GRID, degrees, device=several, return_minima="each", **options)
    expected = reference.patch_minima(x, GRID, degrees)
    np.testing.assert_allclose(each, expected, rtol=3e-3, atol=1e-6)
    np.testing.assert_array_equal(scores, plain)
    np.testing.assert_allclose(reference.interval_average(each, (0.0, 0.3)).mean(axis=(0, 1)), scores, rtol=1e-5)
    scores, averaged = device_scores(x, GRID, degrees, device=several, return_minima=True, **options)
    np.testing.assert_allclose(averaged, each.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores, plain)
    assert averaged.dtype == each.dtype == np.float32
    _, both = device_scores(x, GRID, degrees, device=several, return_minima="smallest degree", **options)
    smallest = each[:, degrees.index(min(degrees))].mean(axis=0)
    np.testing.assert_allclose(both, [averaged, smallest], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@compiled
def test_minima_count_in_the_plan() -> None:
    x, plans = tokens(7), []
    for options in ({}, {"return_minima": True}, {"return_minima": "each"}):
        device_scores(x, GRID, DEGREES, device=HostDevice(), on_plan=plans.append, **options)
    assert plans[1].peak_bytes - plans[0].peak_bytes == 4 * 9 * 7
    assert [plan.host_bytes for plan in plans] == [0, 4 * 7 * 9 * 7, 4 * 4 * 7 * 9 * 7]
    device_scores(
        x, GRID, DEGREES, device=HostDevice(), on_plan=plans.append, return_minima=True, host_memory_limit=1000
    )
    assert not plans[3].returned_in_memory
    assert plans[3].host_bytes == 0
    assert "handed back in a memory-mapped file" in plans[3].describe()


@pytest.mark.long
@compiled
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("variant", "images", "failing"),
    [
        ("gram", 30, {3, 8}),
        ("gram", 30, {0}),
        ("fused", 14, {10}),
        ("int8", 14, {5}),
    ],
)
def test_a_failed_allocation_halves_the_budget(
    variant: str, images: int, devices: int, failing: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    x, how = tokens(images, 1), {"return_minima": True, **VARIANTS[variant]}
    expected = device_scores(x, GRID, DEGREES, device=HostDevice(), **how)
    several = [HostDevice() for _ in range(devices)]
    several[-1].fail_at = failing
    plans: list[Plan] = []
    with caplog.at_level(logging.WARNING, "zsad"):
        got = device_scores(x, GRID, DEGREES, device=several, on_plan=plans.append, **how)
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert len(plans) == len(failing) + 1
    for before, after in itertools.pairwise(plans):
        assert after.peak_bytes <= before.peak_bytes // 2
    assert caplog.text.count("out of memory") == len(failing)


@pytest.mark.slow
@compiled
def test_failing_allocations_end_in_the_usual_error() -> None:
    device = HostDevice()
    device.fail_at = set(range(1000))
    with pytest.raises(MemoryError, match="needs at least"):
        device_scores(tokens(9), GRID, device=device)


@compiled
def test_other_memory_serves_where_none_can_be_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HostDevice, shape: tuple[int, ...], dtype: Any) -> Any:
        raise DeviceMemoryError("no page can be locked")

    x = tokens(6)
    expected = device_scores(x, GRID, device=HostDevice())
    monkeypatch.setattr(HostDevice, "host_empty", refuse)
    np.testing.assert_array_equal(device_scores(x, GRID, device=[HostDevice(), HostDevice()]), expected)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("devices", [1, 3])
def test_what_one_device_meets_stops_all(devices: int) -> None:
    several = [HostDevice() for _ in range(devices)]
    x = tokens(9)
    x[8, 1, 3, 3] = np.inf
    with pytest.raises(ValueError, match="image 8 are not finite"):
        device_scores(x, GRID, device=several)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device_scores(tokens(9), GRID, device=several, progress=interrupt)


@pytest.mark.slow
@compiled
def test_pairs_per_launch_can_be_chosen() -> None:
    x, plans = tokens(6), []
    for pairs in (1, 3, 5):
        device_scores(x, GRID, device=HostDevice(), pairs=pairs, on_plan=plans.append)
    assert [plan.pairs for plan in plans] == [1, 3, 5]


def test_device_tokens_are_not_shared() -> None:
    class OnDevice:
        ndim, shape, dtype = 4, (4, 1, 9, 8), np.dtype(np.float32)

    with pytest.raises(ValueError, match="by that device alone"):
        device_scores(OnDevice(), GRID, device=[HostDevice(), HostDevice()])


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "cuda:0,", "cuda:0,x", "cuda:all,1", "cuda0"])
def test_bad_device_names(name: str) -> None:
    with pytest.raises(DeviceError, match="is not 'cuda'"):
        open_devices(name)
    with pytest.raises(DeviceError, match="is not 'cuda'"):
        open_device(name)


def test_a_device_is_not_named_twice() -> None:
    with pytest.raises(DeviceError, match="twice"):
        open_devices("cuda:0,0")


class OnDevice:
    """Tokens on a device, as far as they are looked at before they are scored."""

    def __init__(self, tokens: Any, device: int = 0) -> None:
        self.tokens, self.device = tokens, types.SimpleNamespace(id=device)
        self.shape, self.dtype, self.flags = tokens.shape, tokens.dtype, tokens.flags

    def __getitem__(self, key: Any) -> OnDevice:
        return OnDevice(self.tokens[key], self.device.id)


def test_tokens_that_the_kernels_would_misread_are_refused() -> None:
    scoring = CudaScoring(make_task(GRID, 2, CHANNELS, DEGREES, (0.0, 0.3)), "auto", [HostDevice()], Options())
    whole = tokens(3)  # [N, L, P, C]
    scoring.check(OnDevice(whole))
    scoring.check(OnDevice(np.zeros((3, 2, 10, CHANNELS), np.float32)[:, :, 1:]))  # without the class token
    with pytest.raises(ValueError, match="must lie together"):
        scoring.check(OnDevice(whole.swapaxes(2, 3)))
    with pytest.raises(ValueError, match="must lie together"):
        scoring.check(OnDevice(whole[..., ::2]))
    with pytest.raises(ValueError, match=r"lie on device 1 .* use cuda:1"):
        scoring.check(OnDevice(whole, device=1))
    with pytest.raises(ValueError, match="copy them to the host"):
        CudaScoring(scoring._task, "auto", [HostDevice(), HostDevice()], Options()).check(OnDevice(whole))

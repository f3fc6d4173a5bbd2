"""The CUDA sources, compiled for the host and run against float64 references; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import host_build
import kernel_checks as checks
import numpy as np
import pytest
from device_scores import device_scores
from host_build import HostDevice, KernelError
from minima_mutations import MUTATIONS
from mutations import found

from zsad.kernels import reference
from zsad.kernels.cuda.card import Card
from zsad.kernels.cuda.comparers import OWN_ROWS, degrees_mask, filter_max_shape, max_threads
from zsad.kernels.cuda.model import Filtered, best_pairs
from zsad.kernels.cuda.plan import Sizes, plan_mutual_scoring

pytestmark = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)

RTX_4090 = Card("8.9", 128, 72 << 20, 100 << 10)
ODD_GRIDS = [(1, 1), (7, 7), (16, 16), (5, 9), (1, 6), (6, 1), (9, 4)]


def run(kernel: str, grid: tuple[int, int], threads: int, arguments: Any, shared_bytes: int = 0) -> None:
    HostDevice().launch(kernel, grid, threads, arguments, shared_bytes)


@pytest.mark.slow
def test_emulated_half_is_ieee_half() -> None:
    (convert,) = host_build.probes(
        "const half_bits* h, float* f, const float* g, half_bits* back, int n",
        "for (int i = threadIdx.x; i < n; i += blockDim.x) {\n"
        "f[i] = half_to_float(h[i]); back[i] = float_to_half(g[i]); }",
        threads=64,
    )
    every = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    # Halfway between neighbours, a little beside it, and the far ends.
    finite = np.sort(every[np.isfinite(every)].astype(np.float32))
    middle = (finite[1:] + finite[:-1]) / 2
    floats = np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, -np.float32(9e9))])
    floats = np.concatenate([floats, finite, np.array([0, 65519.99, 65520, 1e9, -1e9, 1e-9, np.inf], np.float32)])[
        : 3 << 16
    ]
    halves = np.resize(every, floats.shape)
    f, back = host_build.fenced(floats.shape, np.float32), host_build.fenced(floats.shape, np.float16)
    convert(host_build.copied(halves), f, host_build.copied(floats), back, np.int32(floats.size))
    np.testing.assert_array_equal(f, halves.astype(np.float32))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(back, floats.astype(np.float16))


@pytest.mark.slow
def test_emulation_shows_a_missing_barrier() -> None:
    body = "ZSAD_SHARED(int, s); s[threadIdx.x] = threadIdx.x; {} out[threadIdx.x] = s[63 - threadIdx.x];"
    expected = np.arange(64)[::-1]
    bodies = [body.replace("{}", barrier) for barrier in ("__syncthreads();", "")]
    good, bad = host_build.probes("int* out", *bodies, threads=64)
    out = host_build.fenced((64,), np.int32)
    good(out, shared_bytes=256)
    np.testing.assert_array_equal(out, expected)
    bad(out, shared_bytes=256)
    assert (out != expected).any()


REFUSED = [
    ("if (threadIdx.x < 40) __syncthreads();\nout[0] = 1;", "returned before a barrier"),
    ("if (threadIdx.x < 40) __syncthreads(); else\n __syncthreads();", "different barriers"),
    ("if (threadIdx.x >= 40) return;\nout[0] = __reduce_max_sync(kFullWarp, 1);", "warp collective"),
    ("if (threadIdx.x == 0) __syncthreads(); else\nout[0] = __reduce_max_sync(kFullWarp, 1);", "warp collective"),
    ("ZSAD_SHARED(int, s); s[64 + threadIdx.x] = 1;", "past shared memory"),
    ("ZSAD_SHARED(int, s); s[-1] = 1;", "before shared memory"),
    ("out[4] = 1;", "outside an array"),
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_emulation_refuses(number: int) -> None:
    launch = host_build.probes("int* out", *(body for body, _ in REFUSED), threads=64)[number]
    with pytest.raises(KernelError, match=REFUSED[number][1]):
        launch(host_build.fenced((4,), np.int32), shared_bytes=256)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [1, 37, 49 * 20, 3 * 64 * 5 + 1])
def test_layer_norm(size: int, dtype: Any) -> None:
    checks.check_layer_norm(run, host_build.copied, 2, size, dtype)


@pytest.mark.parametrize("grid", [*ODD_GRIDS, (37, 37)])
def test_pooled_norms(grid: tuple[int, int]) -> None:
    channels = 8 if grid == (37, 37) else 70
    checks.check_pooled_norms(run, host_build.copied, grid, channels, (1, 3, 5), zeros=grid == (7, 7))


@pytest.mark.parametrize("degrees", [(3,), (1, 9), (1, 3, 5, 7, 9)])
def test_pooled_norms_of_other_degrees(degrees: tuple[int, ...]) -> None:
    checks.check_pooled_norms(run, host_build.copied, (6, 5), 33, degrees)


@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize("degrees", [(1,), (1, 3), (1, 3, 5)])
def test_filter_max(grid: tuple[int, int], degrees: tuple[int, ...]) -> None:
    checks.check_filter_max(run, host_build.copied, grid, degrees)


@pytest.mark.parametrize("grid", [(7, 7), (5, 9)])
def test_filter_max_where_every_product_is_negative(grid: tuple[int, int]) -> None:
    checks.check_filter_max(run, host_build.copied, grid, (1, 3, 5), negative=True)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [(5,), (3, 7), (1, 9)])
def test_filter_max_of_other_degrees(degrees: tuple[int, ...]) -> None:
    checks.check_filter_max(run, host_build.copied, (6, 5), degrees, pairs=1)


@pytest.mark.parametrize("band", [1, 3, 8])
@pytest.mark.parametrize("segment", [1, 4])
def test_filter_max_cut_into_bands_and_segments(band: int, segment: int) -> None:
    checks.check_filter_max(run, host_build.copied, (9, 6), (1, 3, 5), band=band, segment=segment)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 6), (7, 7), (5, 9), (14, 4)])
def test_filter_max_of_near_patches(grid: tuple[int, int], window: int) -> None:
    checks.check_filter_max(run, host_build.copied, grid, (1, 3), window=window)
    checks.check_filter_max(run, host_build.copied, grid, (1, 3), negative=True, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [(1, 3, 5), (5,), (1, 9)])
def test_filter_max_of_near_patches_and_other_degrees(degrees: tuple[int, ...]) -> None:
    checks.check_filter_max(run, host_build.copied, (9, 11), degrees, pairs=1, window=2)
    checks.check_filter_max(run, host_build.copied, (9, 6), degrees, pairs=1, window=2, band=2, segment=4)


@pytest.mark.parametrize("directions", [(True, False), (False, True)])
def test_filter_max_drops_a_direction(directions: tuple[bool, bool]) -> None:
    checks.check_filter_max(run, host_build.copied, (4, 5), (1, 3), directions=directions)


@pytest.mark.slow
def test_filter_max_at_full_size() -> None:
    checks.check_filter_max(run, host_build.copied, (37, 37), (1, 3, 5), pairs=1, negative=True)


def test_filter_max_shape_cuts_large_grids_into_bands() -> None:
    shape = filter_max_shape((64, 64), 0b111, 2, RTX_4090)
    assert shape.band < 64
    assert shape.threads <= max_threads(0b111)
    assert (shape.band + 4) * 64 <= OWN_ROWS * shape.threads
    assert shape.shared_bytes <= 99 * 1024
    for grid in ((4, 1000), (1, 385), (50, 193)):
        with pytest.raises(ValueError, match=f"{grid[1]} columns is too wide"):
            filter_max_shape(grid, 0b111, 1, RTX_4090)


def test_three_or_six_grams_fill_the_multiprocessors_better_than_five() -> None:
    steps = [filter_max_shape((37, 37), 0b111, grams, RTX_4090).steps / grams for grams in range(1, 7)]
    np.testing.assert_allclose(steps, [11, 8.5, 7.67, 8.5, 8.2, 6.83], atol=0.01)
    sizes = Sizes(200, 1369, 1024, 3, filtered=Filtered((37, 37), 0b111))
    cards = [replace(RTX_4090, cache_bytes=l2 << 20) for l2 in (72, 50, 120, 144)]
    assert [plan_mutual_scoring(sizes, 24 << 30, card, 1 << 40).pairs for card in cards] == [3, 3, 3, 6]


@pytest.mark.parametrize(
    ("card", "degrees", "pairs"),
    [
        (Card("8.0", 108, 40 << 20, 164 << 10), (1, 3, 5), 3),
        (Card("9.0", 132, 50 << 20, 228 << 10), (1, 3, 5), 3),
        (Card("9.0", 132, 120 << 20, 228 << 10), (1, 3, 5), 3),  # of five that stay in the cache
        (Card("12.0", 170, 96 << 20, 100 << 10), (1, 3, 5), 4),
        (Card("8.9", 128, 72 << 20, 100 << 10), (1, 3), 3),
    ],
)
def test_a_launch_has_the_pairs_that_fill_the_waves_best(card: Card, degrees: tuple[int, ...], pairs: int) -> None:
    filtered = Filtered((37, 37), degrees_mask(degrees))
    assert best_pairs(filtered, 1024, max(card.cache_bytes // 3 // (4 * 1369 * 1376), 3), card) == pairs


@pytest.mark.parametrize("window", [None, 0, 3, 60])
@pytest.mark.parametrize("mask", [0b1, 0b11, 0b111, 0b1111, 0b11111])
@pytest.mark.parametrize("grid", [(1408, 1), (1, 256), (37, 37), (12, 80), (100, 85)])
def test_filter_max_fits_every_device(grid: tuple[int, int], mask: int, window: int | None) -> None:
    shape = filter_max_shape(grid, mask, 4, RTX_4090, window)
    covered = min(shape.band + 2 * (mask.bit_length() - 1), grid[0])
    assert -(-covered // OWN_ROWS) * grid[1] <= shape.threads
    assert 32 <= shape.threads <= max_threads(mask, window is not None)
    assert shape.shared_bytes <= 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120


@pytest.mark.parametrize(
    ("images", "ranks"), [(2, (0, 1)), (7, (0, 2)), (7, (2, 5)), (13, (0, 12)), (13, (11, 12)), (67, (3, 20))]
)
@pytest.mark.parametrize("case", ["plain", "zeros", "ties"])
def test_interval_average(images: int, ranks: tuple[int, int], case: str) -> None:
    checks.check_interval_average(
        run, host_build.copied, images, 49, ranks, zeros=case == "zeros", ties=case == "ties", image_first=images // 3
    )


@pytest.mark.parametrize(("images", "others", "patches"), [(1, 9, 1), (4, 12, 49), (5, 40, 33)])
@pytest.mark.parametrize("ties", [False, True])
def test_kept_sums(images: int, others: int, patches: int, ties: bool) -> None:
    checks.check_kept_sums(run, host_build.copied, images, others, patches, ties)


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "size"),
    [((1, 1), 5), ((97, 133), 37), ((20, 31), 45), ((33, 33), 33), ((64, 7), 29), ((301, 8), 6), ((90, 70), 51)],
)
def test_resize_equals_pillow(source: tuple[int, int], size: int, resampling: str) -> None:
    checks.check_resize(HostDevice(), source, size, resampling)


@pytest.mark.parametrize("source", [(97, 133), (133, 97), (20, 31), (30, 30), (1, 90), (90, 1), (45, 37)])
def test_the_middle_square_equals_the_host_s(source: tuple[int, int]) -> None:
    checks.check_middle_square(HostDevice(), source, 37)


def tokens(images: int, layers: int, grid: tuple[int, int], channels: int) -> Any:
    return checks.rng(images).normal(size=(images, layers, grid[0] * grid[1], channels)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "grid", "channels", "degrees", "interval"),
    [
        (2, (3, 3), 16, (1, 3, 5), (0.0, 0.3)),
        (7, (5, 4), 40, (1, 3), (0.0, 0.5)),
        (9, (4, 4), 33, (5, 1, 1), (2, 5)),
        (3, (1, 1), 8, (3,), (0.0, 1.0)),
    ],
)
def test_mutual_scores_equal_the_reference(
    images: int, grid: tuple[int, int], channels: int, degrees: tuple[int, ...], interval: tuple[float, float]
) -> None:
    x = tokens(images, 2, grid, channels)
    seen: list[tuple[int, int]] = []
    timings: dict[str, float] = {}
    scores = device_scores(
        x,
        grid,
        degrees,
        interval,
        device=HostDevice(),
        progress=lambda done, total: seen.append((done, total)),
        timings=timings,
    )
    expected = np.mean([reference.mutual_scores(x, grid, [degree], interval) for degree in degrees], axis=0)
    np.testing.assert_allclose(scores, expected, rtol=3e-3)
    assert scores.dtype == np.float32
    assert seen[-1] == (images * (images - 1), images * (images - 1))
    assert set(timings) == {"normalise", "product, filter and max", "select"}


def test_mutual_scores_of_half_tokens_are_those_of_the_same_values() -> None:
    x = tokens(4, 1, (3, 4), 24).astype(np.float16)
    np.testing.assert_array_equal(
        device_scores(x, (3, 4), device=HostDevice()),
        device_scores(x.astype(np.float32), (3, 4), device=HostDevice()),
    )


def test_zero_features_follow_the_convention() -> None:
    x = tokens(5, 1, (4, 4), 12)
    x[1] = 3.0  # no variance: every feature of the image is zero
    x[4] = -1.0
    np.testing.assert_allclose(
        device_scores(x, (4, 4), device=HostDevice()), reference.mutual_scores(x, (4, 4)), rtol=3e-3, atol=1e-6
    )


@pytest.mark.parametrize("window", [0, 1, 2])
def test_windows_equal_the_reference(window: int) -> None:
    x = tokens(6, 2, (4, 6), 24)
    x -= x.mean(axis=(2, 3), keepdims=True)
    x[1, :, 12:] = -x[1, :, :12]  # no mean: what is zero stays so
    x[1, :, [7, 19]] = 0
    x[4] = 3.0  # no variance: every feature of the image is zero
    scores, minima = device_scores(
        x, (4, 6), (1, 3), device=HostDevice(), references=1, return_minima="each", window=window
    )
    expected = reference.patch_minima(x, (4, 6), (1, 3), references=1, window=window)
    np.testing.assert_allclose(minima, expected, rtol=3e-3, atol=1e-3)
    averages = reference.interval_average(expected, (0.0, 0.3)).mean(axis=(0, 1))
    np.testing.assert_allclose(scores, averages, rtol=3e-3, atol=1e-3)


def test_devices_that_share_the_work_have_windows() -> None:
    x = tokens(7, 1, (4, 5), 24)
    x[2] = 3.0
    alone = device_scores(x, (4, 5), (1, 3), device=HostDevice(), window=1)
    shared = device_scores(x, (4, 5), (1, 3), device=[HostDevice(), HostDevice()], window=1)
    np.testing.assert_array_equal(shared, alone)


@pytest.mark.slow
def test_a_window_as_large_as_the_grid_is_none() -> None:
    x = tokens(4, 1, (3, 5), 24)
    whole = device_scores(x, (3, 5), device=HostDevice())
    np.testing.assert_array_equal(device_scores(x, (3, 5), device=HostDevice(), window=4), whole)
    assert (device_scores(x, (3, 5), device=HostDevice(), window=1) >= whole - 1e-3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "int8"}, "int8"), ({"products": "fused"}, "gram"), ({"products": "tiled"}, "gram")],
)
def test_fused_products_have_no_windows(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"no position windows.*{message}|{message} has no position windows"):
        device_scores(tokens(4, 1, (3, 5), 24), (3, 5), device=HostDevice(), window=1, **options)


def test_identical_images_are_at_distance_zero() -> None:
    x = np.repeat(tokens(1, 1, (4, 4), 64), 3, axis=0)
    assert device_scores(x, (4, 4), device=HostDevice()).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((1, 1, 4, 3), np.float32)}, "only one"),
        ({"tokens": np.zeros((2, 1, 4, 3))}, "float32 or float16"),
        ({"tokens": np.full((2, 1, 4, 3), np.nan, np.float32)}, "image 0 are not finite"),
        ({"grid": (3, 3)}, r"\[N, 1, 9, 3\], not \[2, 1, 4, 3\]"),
        ({"degrees": (1, 11)}, "up to 9"),
        ({"interval": (0.5, 0.1)}, "low < high"),
        ({"precision": "fp32"}, "use precision fp16"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": tokens(2, 1, (2, 2), 3), "device": HostDevice(), **change}
    with pytest.raises(ValueError, match=message):
        device_scores(**arguments)


@pytest.mark.long
def test_planted_bugs_in_the_minima_are_found() -> None:
    unnoticed = [mutation.bug for mutation in MUTATIONS if found(mutation) is None]
    assert not unnoticed

"""Mutual scoring with int8 products against fp32 and the float64 reference."""

from functools import partial

import numpy as np
import pytest

from zsad.kernels import mutual_scores, reference
from zsad.kernels.cpu import comparers
from zsad.kernels.cpu.plan import Sizes, plan_mutual_scoring

INSTRUCTION_SETS = [] if comparers._cpu is None else comparers._cpu.instruction_sets("int8")
native = pytest.mark.skipif(comparers._cpu is None, reason="installed without a compiler: int8 needs the native kernel")


def vit_like_tokens(seed: int, images: int, layers: int, grid: tuple[int, int], channels: int) -> np.ndarray:
    """Tokens as a vision transformer makes them.

    A common mean, smooth parts that recur from image to image at slightly shifted places, a little noise of each patch,
    and a few channels that are six times larger than the rest.
    """
    rng = np.random.default_rng(seed)
    rows, columns = grid
    smooth = rng.normal(size=(rows + 4, columns + 4, layers, channels))
    for axis in (0, 1):
        smooth = (np.roll(smooth, 1, axis) + 2 * smooth + np.roll(smooth, -1, axis)) / 2.4
    tokens = np.empty((images, layers, rows * columns, channels))
    for image in range(images):
        y, x = rng.integers(0, 5, 2)
        view = smooth[y : y + rows, x : x + columns].reshape(rows * columns, layers, channels)
        tokens[image] = view.transpose(1, 0, 2) + rng.normal(scale=0.3, size=tokens.shape[1:])
    scale = np.where(np.arange(channels) % 97 == 5, 6.0, 1.0)
    return ((tokens + rng.normal(size=channels)) * scale).astype(np.float32)


@pytest.fixture(autouse=True, params=[False, True], ids=["gram once", "product per degree"])
def comparer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare in both ways, of which the processor has one taken."""
    monkeypatch.setattr(comparers, "HAS_TILES", request.param)
    monkeypatch.setattr(comparers, "FEW_PATCHES", 0)


SHAPES = [
    (8, 2, (9, 9), 384, (1, 3, 5)),
    (9, 2, (11, 8), 250, (1, 3, 5)),
    (6, 1, (7, 7), 1024, (1, 3, 5)),
    (5, 2, (1, 1), 64, (1,)),
    (7, 1, (3, 5), 131, (9, 7)),
]
INTERVALS: list[tuple[float, float]] = [(0.0, 0.3), (0.2, 0.7), (0.0, 1), (1, 50)]


@native
@pytest.mark.parametrize(
    ("images", "layers", "grid", "channels", "degrees", "interval"),
    [
        *((*shape, interval) for shape, interval in zip(SHAPES[1:], INTERVALS, strict=True)),
        *(pytest.param(*SHAPES[0], interval, marks=pytest.mark.long) for interval in INTERVALS),
    ],
)
def test_scores_equal_fp32(images: int, layers: int, grid, channels: int, degrees, interval) -> None:
    tokens = vit_like_tokens(1, images, layers, grid, channels)
    exact = mutual_scores(tokens, grid, degrees, interval)
    np.testing.assert_allclose(exact, reference.mutual_scores(tokens, grid, degrees, interval), atol=1e-4)
    scores = mutual_scores(tokens, grid, degrees, interval, precision="int8")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, exact, atol=2e-3)
    assert np.abs(scores - exact).mean() < 2e-4


@native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set_gives_the_same_scores(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = vit_like_tokens(2, 6, 1, (7, 8), 100)
    expected = mutual_scores(tokens, (7, 8), precision="int8")
    for name in ("int8_multiply", "int8_nearest"):
        kernel = partial(getattr(comparers._cpu, name), instruction_set=instruction_set)
        monkeypatch.setattr(comparers._cpu, name, kernel)
    np.testing.assert_allclose(mutual_scores(tokens, (7, 8), precision="int8"), expected, atol=5e-4)


@native
@pytest.mark.parametrize("size", [10, 100])
def test_huge_channels_that_all_tokens_share(size: float) -> None:
    tokens = vit_like_tokens(10, 8, 1, (9, 9), 384)
    huge = np.arange(384) % 151 == 7
    tokens[..., huge] += size * tokens.std() * np.sign(tokens[0, 0, 0, huge])
    exact = mutual_scores(tokens, degrees=(1, 3))
    difference = np.abs(mutual_scores(tokens, degrees=(1, 3), precision="int8") - exact)
    assert difference.max() < 2e-3
    assert difference.mean() < 2e-3 * exact.mean()


@native
def test_winners_that_are_right_are_measured_exactly() -> None:
    # Patches that lie far apart leave no doubt about the winner.
    rng = np.random.default_rng(3)
    corners = rng.normal(size=(1, 1, 49, 256))
    tokens = (corners + 0.2 * rng.normal(size=(8, 1, 49, 256))).astype(np.float32)
    everyone = (0, 7)  # with all ranks their choice, too, is beyond doubt
    scores = mutual_scores(tokens, interval=everyone, precision="int8")
    np.testing.assert_allclose(scores, mutual_scores(tokens, interval=everyone), atol=2e-6)


@native
def test_only_negative_cosines() -> None:
    # Two images, each constant up to a little noise, with opposite signs in every channel after normalisation.
    rng = np.random.default_rng(4)
    direction = rng.choice([-3.0, 3.0], size=64)
    direction -= direction.mean()
    tokens = np.stack([direction + 0.3 * rng.normal(size=(49, 64)), -direction + 0.3 * rng.normal(size=(49, 64))])
    tokens = tokens[:, None].astype(np.float32)
    scores = mutual_scores(tokens, precision="int8")
    assert scores.min() > np.sqrt(2)
    np.testing.assert_allclose(scores, reference.mutual_scores(tokens, (7, 7)), atol=2e-3)


@native
@pytest.mark.parametrize("zeros", [[(0, 3)], [(0, 3), (2, 3), (2, 4)], [(1, slice(None))]])
def test_zero_features_keep_their_convention(zeros) -> None:
    # The mean of an image is zero when its rows cancel in pairs; a zero token then stays zero after normalisation.
    rng = np.random.default_rng(5)
    half = rng.normal(size=(5, 1, 8, 32))
    tokens = np.concatenate([half, -half], axis=2).astype(np.float32)
    for image, patch in zeros:
        tokens[image, 0, patch] = 0
        tokens[image, 0, patch if isinstance(patch, slice) else patch + 8] = 0
    exact = mutual_scores(tokens, degrees=(1,))
    np.testing.assert_allclose(exact, reference.mutual_scores(tokens, (4, 4), (1,)), atol=1e-4)
    np.testing.assert_allclose(mutual_scores(tokens, degrees=(1,), precision="int8"), exact, atol=2e-3)


@pytest.mark.slow
@native
def test_every_plan_gives_the_same_scores() -> None:
    tokens = vit_like_tokens(6, 11, 2, (6, 6), 48)
    expected = mutual_scores(tokens, precision="int8")
    plans = []
    for limit in (70_000, 90_000, 200_000, 400_000):
        scores = mutual_scores(tokens, precision="int8", memory_limit=limit, on_plan=plans.append)
        np.testing.assert_array_equal(scores, expected)
    assert len({plan.chunk for plan in plans}) > 1
    assert any(not plan.minima_in_memory for plan in plans)


@native
def test_identical_images_have_distance_zero() -> None:
    tokens = np.repeat(vit_like_tokens(7, 1, 1, (5, 5), 64), 4, axis=0)
    np.testing.assert_allclose(mutual_scores(tokens, precision="int8"), 0, atol=1e-3)


@native
def test_timings_and_tokens() -> None:
    tokens = vit_like_tokens(8, 4, 1, (4, 4), 16)
    before, timings = tokens.copy(), {}
    mutual_scores(tokens, precision="int8", timings=timings)
    np.testing.assert_array_equal(tokens, before)
    assert set(timings) == {"normalise", "product", "filter and max", "select", "re-measure"}


def test_without_the_native_kernel_the_error_says_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparers, "_cpu", None)
    tokens = vit_like_tokens(9, 3, 1, (4, 4), 16)
    with pytest.raises(ValueError, match="install a C\\+\\+17 compiler"):
        mutual_scores(tokens, precision="int8")


@native
def test_degrees_beyond_the_native_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks a degree of \(11,\)"):
        mutual_scores(vit_like_tokens(9, 3, 1, (4, 4), 16), degrees=(11,), precision="int8")


@native
def test_more_patches_than_a_key_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="65536 patches"):
        comparers.choose_comparer("int8", [1], 257 * 256, 8)


@native
def test_a_product_per_degree_takes_tiles_and_short_tokens_without_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    short = comparers.Int8ProductPerDegree if comparers.HAS_TILES else comparers.Int8GramOnce
    assert comparers.choose_comparer("int8", [1, 3], 16, 384) is short
    assert comparers.choose_comparer("int8", [1, 3], 16, 1024) is comparers.Int8GramOnce
    assert comparers.choose_comparer("int8", [1, 3], 16, 384, window=2) is comparers.Int8GramOnce
    monkeypatch.setattr(comparers, "FEW_PATCHES", 16)
    assert comparers.choose_comparer("int8", [1, 3], 16, 1024) is comparers.Int8ProductPerDegree
    assert comparers.choose_comparer("int8", [1, 3], 17, 1024) is comparers.Int8GramOnce


def test_the_plan_counts_the_winners() -> None:
    exact = plan_mutual_scoring(Sizes(100, 1369, 1024, 3), 1 << 34)
    measured = plan_mutual_scoring(Sizes(100, 1369, 1024, 3, remeasured_ranks=29), 1 << 34)
    assert measured.peak_bytes - exact.peak_bytes >= 100 * 29 * 1369 * 12  # image, patch and cosine in 4 bytes each
    narrow = plan_mutual_scoring(Sizes(100, 1369, 1024, 3, neighbour_rows=5 * 37), 1 << 34)
    assert narrow.peak_bytes - exact.peak_bytes == exact.workers * 5 * 37 * 1369 * 2

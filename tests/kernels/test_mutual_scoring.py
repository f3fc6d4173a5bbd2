"""The public call against the float64 reference, the golden arrays, and the properties it promises."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zsad.kernels import mutual_scores, mutual_scoring, reference
from zsad.kernels.cpu import comparers
from zsad.kernels.cpu.arrays import box_sum, layer_normalise
from zsad.kernels.cpu.plan import Sizes, plan_mutual_scoring
from zsad.kernels.mutual_scoring import MutualScoring

RNG = np.random.default_rng(7)


def make_tokens(seed: int, images: int, layers: int, grid: tuple[int, int], channels: int) -> np.ndarray:
    """Tokens that share structure across images, as a network's do, with an offset and large outlier channels."""
    rng = np.random.default_rng(seed)
    patches = grid[0] * grid[1]
    shared = rng.normal(size=(1, layers, patches, channels))
    own = rng.normal(size=(images, layers, patches, channels))
    scale = np.exp(rng.normal(size=channels))
    return ((shared + 0.7 * own) * scale + 0.3).astype(np.float32)


def left_of_sums(tokens: np.ndarray, grid: tuple[int, int], degree: int) -> float:
    """Return the least that is left of neighbours' lengths in their sum; in fp32 a cosine loses its square's digits."""
    x = reference.spatial_layer_norm(tokens)
    lengths = reference.box_mean(np.linalg.norm(x, axis=-1, keepdims=True), grid, degree)[..., 0]
    return float((np.linalg.norm(reference.box_mean(x, grid, degree), axis=-1) / lengths).min())


@pytest.fixture(params=["native", "numpy"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the native pass and with NumPy alone."""
    if request.param == "numpy":
        monkeypatch.setattr(comparers, "_cpu", None)
    elif comparers._cpu is None:
        pytest.skip("installed without a compiler: the native pass is not there")
    return str(request.param)


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@pytest.mark.parametrize(
    ("name", "degrees", "interval", "side"), [("a", (1, 3, 5), (0, 0.3), 8), ("b", (1, 3), (0, 0.5), 6)]
)
def test_golden_patch_scores(golden: Path, kernel: str, name: str, degrees, interval, side: int) -> None:
    arrays = np.load(golden / f"mutual_scoring_{name}.npz")
    tokens = np.ascontiguousarray(arrays["tokens"][:, :, 1:])  # without the class token
    scores = mutual_scores(tokens, degrees=degrees, interval=interval)
    np.testing.assert_allclose(scores, arrays["patch_scores"], atol=1e-5)
    for degree in degrees:
        one = mutual_scores(tokens, degrees=(degree,), interval=interval)
        np.testing.assert_allclose(one, arrays[f"msm_r{degree}"].mean(axis=1), atol=1e-5)
        for layer in range(tokens.shape[1]):
            by_reference = reference.mutual_scores_per_degree(tokens[:, layer], (side, side), degree, interval)
            np.testing.assert_allclose(by_reference, arrays[f"msm_r{degree}"][:, layer], atol=1e-5)


@pytest.mark.parametrize(("name", "degrees", "side"), [("a", (1, 3, 5), 8), ("b", (1, 3), 6)])
def test_golden_aggregation(golden: Path, name: str, degrees, side: int) -> None:
    arrays = np.load(golden / f"mutual_scoring_{name}.npz")
    for degree in degrees:
        features = reference.lnamd(arrays["tokens"][:, :, 1:], (side, side), degree)
        np.testing.assert_allclose(features, arrays[f"lnamd_r{degree}"], atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(2, 9),
    layers=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.integers(2, 40),
    degrees=st.lists(st.sampled_from([1, 3, 5, 7, 9, 11]), min_size=1, max_size=3, unique=True),
    interval=st.sampled_from([(0.0, 0.3), (0.0, 0.5), (0.2, 0.9), (0.0, 1), (1, 3), (0.5, 0.6), (0.0, 50)]),
    limit=st.sampled_from([None, "least", "middling"]),
)
def test_equals_reference(seed, images, layers, grid, channels, degrees, interval, limit) -> None:
    tokens = make_tokens(seed, images, layers, grid, channels)
    assume(channels >= 4 or all(left_of_sums(tokens, grid, degree) > 0.1 for degree in degrees))
    expected = reference.mutual_scores(tokens, grid, degrees, interval)
    plans = []
    memory = {None: None, "least": smallest_limit(tokens, degrees), "middling": 3 * smallest_limit(tokens, degrees)}
    scores = mutual_scores(tokens, grid, degrees, interval, memory_limit=memory[limit], on_plan=plans.append)
    assert scores.dtype == np.float32
    # A single patch and few channels can make features nearly equal, where sqrt amplifies rounding.
    np.testing.assert_allclose(scores, expected, atol=5e-3 if channels < 4 or grid == (1, 1) else 1e-4)
    if limit == "least" and images > 2:
        assert plans[0].chunk < images
        assert not plans[0].minima_in_memory


def smallest_limit(tokens: np.ndarray, degrees) -> int:
    """The limit under which only one image per chunk stays resident."""
    images, _, patches, channels = tokens.shape
    comparer = comparers.choose_comparer("fp32", degrees, patches, channels)
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_mutual_scoring(Sizes(images, patches, channels, len(degrees), comparer), middle)
            high = middle
        except MemoryError:
            low = middle
    return high


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
def test_order_of_images_does_not_matter(kernel: str) -> None:
    tokens = make_tokens(3, 9, 2, (6, 5), 24)
    order = RNG.permutation(9)
    scores = mutual_scores(tokens, (6, 5))
    np.testing.assert_allclose(mutual_scores(tokens[order], (6, 5)), scores[order], atol=1e-6)


def test_native_and_numpy_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if comparers._cpu is None:
        pytest.skip("installed without a compiler: the native pass is not there")
    tokens = make_tokens(5, 6, 2, (9, 9), 64)
    native = mutual_scores(tokens)
    monkeypatch.setattr(comparers, "_cpu", None)
    with pytest.warns(RuntimeWarning, match="native kernel was not built"):
        alone = mutual_scores(tokens)
    np.testing.assert_allclose(native, alone, atol=1e-5)


def test_memory_map_and_chunks_give_the_same_scores(tmp_path: Path) -> None:
    tokens = make_tokens(11, 12, 2, (7, 7), 32)
    mapped = np.memmap(tmp_path / "tokens", np.float32, "w+", shape=tokens.shape)
    mapped[:] = tokens
    plain = mutual_scores(tokens)
    for factor in (1, 2, 5, 50):
        limit = factor * smallest_limit(tokens, (1, 3, 5))
        np.testing.assert_array_equal(mutual_scores(mapped, memory_limit=limit), plain)


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@pytest.mark.parametrize("images", [2, 3, 4])
def test_few_images_are_finite(kernel: str, images: int) -> None:
    assert np.isfinite(mutual_scores(make_tokens(1, images, 1, (4, 4), 16))).all()


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@pytest.mark.parametrize("case", ["identical", "constant", "zero", "one constant"])
def test_degenerate_images(kernel: str, case: str) -> None:
    tokens = make_tokens(2, 5, 2, (4, 4), 16)
    if case == "identical":
        tokens[:] = tokens[0]
    elif case == "constant":
        tokens[:] = 0.5
    elif case == "zero":
        tokens[:] = 0
    else:
        tokens[3] = 1.0
    scores = mutual_scores(tokens)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, reference.mutual_scores(tokens, (4, 4)), atol=2e-3)
    if case != "one constant":
        np.testing.assert_allclose(scores, 0, atol=2e-3)


def test_tokens_are_not_changed() -> None:
    tokens = make_tokens(2, 4, 1, (4, 4), 8)
    before = tokens.copy()
    mutual_scores(tokens)
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((1, 1, 4, 3), np.float32)}, "only one"),
        ({"references": 3}, "at least one is scored"),
        ({"references": -1}, "at least one is scored"),
        ({"tokens": np.zeros((3, 4, 3), np.float32)}, r"\[N, L, P, C\]"),
        ({"tokens": np.zeros((3, 1, 4, 3))}, "float32"),
        ({"tokens": np.zeros((3, 1, 5, 3), np.float32)}, "square grid"),
        ({"grid": (3, 2)}, "does not hold 4 patches"),
        ({"degrees": (2,)}, "odd"),
        ({"degrees": ()}, "odd"),
        ({"interval": (0.3, 0.3)}, "low < high"),
        ({"interval": (-0.1, 0.3)}, "low < high"),
        ({"interval": (0.0, np.inf)}, "low < high"),
        ({"interval": (0.0, np.nan)}, "low < high"),
        ({"interval": (0.0, 2.5)}, "must be whole"),
        ({"precision": "fp4"}, "precision"),
        ({"device": "tpu"}, "device"),
        ({"return_minima": "all"}, "return_minima"),
        ({"window": -1}, "0 cells"),
    ],
)
def test_bad_arguments(change, message: str) -> None:
    arguments = {"tokens": RNG.normal(size=(3, 1, 4, 3)).astype(np.float32), **change}
    with pytest.raises(ValueError, match=message):
        mutual_scores(**arguments)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("images", "references"), [(2, 0), (3, 0), (11, 0), (1, 1), (1, 9), (6, 5)])
@pytest.mark.parametrize("disk", [0, 1 << 40])
def test_needed_is_the_least_that_works(
    images: int, references: int, precision: str, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "int8" and comparers._cpu is None:
        pytest.skip("installed without a compiler: int8 needs the native kernel")
    monkeypatch.setattr("zsad.kernels.cpu.plan.default_disk_limit", lambda: disk)
    tokens = make_tokens(6, images + references, 2, (4, 5), 24)
    scoring = MutualScoring((4, 5), 2, 24, (1, 3), (0.0, 0.5), precision)
    plans: list[Any] = []
    needed = scoring.needed(images, references)
    scores = scoring.scores(tokens, needed, on_plan=plans.append, references=references)
    np.testing.assert_array_equal(scores, scoring.scores(tokens, references=references))
    assert plans[0].peak_bytes == needed
    with pytest.raises(MemoryError, match="needs at least"):
        scoring.scores(tokens, needed - 1, references=references)


# Windows


@pytest.fixture(params=["native", "numpy", "int8"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(comparers, "_cpu", None)
    elif comparers._cpu is None:
        pytest.skip("installed without a compiler: the native kernels are not there")
    return "int8" if request.param == "int8" else "fp32"


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 6), (8, 10), (17, 4)])
def test_windows_equal_the_reference(precision: str, grid: tuple[int, int], window: int) -> None:
    tokens, degrees = make_tokens(8, 4, 1, grid, 40), (3, 1)
    expected = reference.patch_minima(tokens, grid, degrees, references=1, window=window)
    scores, each = mutual_scores(
        tokens, grid, degrees, precision=precision, references=1, window=window, return_minima="each"
    )
    # Of a single patch nothing but noise is left, whose square root amplifies rounding.
    atol = 5e-3 if precision == "int8" or grid == (1, 1) else 1e-4
    np.testing.assert_allclose(each, expected, atol=atol)
    np.testing.assert_allclose(reference.interval_average(each, (0.0, 0.3)).mean(axis=(0, 1)), scores, rtol=1e-5)
    np.testing.assert_allclose(
        mutual_scores(tokens, grid, degrees, precision=precision, references=1, window=window), scores, atol=2e-3
    )


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
def test_a_window_as_large_as_the_grid_is_none(precision: str) -> None:
    tokens, grid = make_tokens(9, 4, 2, (4, 9), 24), (4, 9)
    whole = mutual_scores(tokens, grid, precision=precision)
    for window in (8, 9, 10**12):
        np.testing.assert_array_equal(mutual_scores(tokens, grid, precision=precision, window=window), whole)
    assert (mutual_scores(tokens, grid, precision=precision, window=7) != whole).any()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    degrees=st.lists(st.sampled_from([1, 3, 5, 11]), min_size=1, max_size=2, unique=True),
    windows=st.lists(st.integers(0, 8), min_size=2, max_size=3, unique=True).map(sorted),
)
def test_a_larger_window_never_raises_a_score(seed, grid, degrees, windows) -> None:
    tokens = make_tokens(seed, 4, 1, grid, 16)
    found = [mutual_scores(tokens, grid, degrees, window=window) for window in (*windows, None)]
    for smaller, larger in pairwise(found):
        # What is left of a zero feature has a direction that rounding decides.
        assert (larger <= smaller + (5e-3 if grid == (1, 1) else 1e-4)).all()


@pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")
def test_a_zero_feature_counts_in_the_windows_that_it_lies_in(precision: str) -> None:
    tokens = make_tokens(10, 4, 1, (4, 6), 24)
    tokens -= tokens.mean(axis=(2, 3), keepdims=True)
    tokens[1, :, 12:] = -tokens[1, :, :12]  # no mean: what is zero stays so
    tokens[1, :, [7, 19]] = 0
    tokens[2] = 0.5
    expected = reference.mutual_scores(tokens, (4, 6), (1, 3), (0.0, 1.0), window=1)
    scores = mutual_scores(tokens, (4, 6), (1, 3), (0.0, 1.0), precision=precision, window=1)
    np.testing.assert_allclose(scores, expected, atol=2e-3 if precision == "int8" else 1e-4)


def test_windows_in_chunks_give_the_same_scores() -> None:
    tokens, scoring = make_tokens(11, 9, 2, (6, 5), 32), MutualScoring((6, 5), 2, 32, (1, 3), (0.0, 0.5), window=2)
    tokens[1, :, :15], tokens[1, :, 15:] = 1, -1
    plans: list[Any] = []
    needed = scoring.needed(9)
    scores = scoring.scores(tokens, needed, on_plan=plans.append)
    np.testing.assert_array_equal(scores, scoring.scores(tokens))
    assert plans[0].peak_bytes == needed


def test_the_plan_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "zsad"):
        mutual_scores(make_tokens(7, 3, 1, (4, 4), 8))
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "mutual scoring of 3 images" in caplog.text


def test_tokens_of_another_shape_are_refused() -> None:
    scoring = MutualScoring((4, 4), 2, 8, (1,), (0.0, 0.3))
    assert scoring.precision == "fp32"
    for shape in ((3, 1, 16, 8), (3, 2, 15, 8), (3, 2, 16, 9)):
        with pytest.raises(ValueError, match=r"\[N, 2, 16, 8\]"):
            scoring.scores(np.zeros(shape, np.float32))


def test_tokens_that_are_not_finite_are_named() -> None:
    tokens = make_tokens(2, 4, 1, (4, 4), 8)
    tokens[2, 0, 3, 1] = np.nan
    with pytest.raises(ValueError, match="image 2"):
        mutual_scores(tokens)


def test_progress_and_timings() -> None:
    seen, timings = [], {}
    mutual_scores(
        make_tokens(2, 6, 2, (5, 5), 8), progress=lambda done, total: seen.append((done, total)), timings=timings
    )
    assert seen[-1] == (30, 30)  # 6 · 5 / 2 pairs in each of two layers
    assert set(timings) == {"normalise", "product", "filter and max", "select"}


def test_interval_ranks() -> None:
    assert reference.interval_ranks(99, (0.0, 0.3)) == (0, 29)
    assert reference.interval_ranks(3, (0.0, 0.3)) == (0, 1)  # at least one rank
    assert reference.interval_ranks(9, (2, 5)) == (2, 5)  # above 1 a bound is a count
    assert reference.interval_ranks(9, (0.5, 50)) == (4, 9)  # of as many as there are
    assert reference.interval_ranks(1, (0.9, 0.95)) == (0, 1)
    assert reference.interval_ranks(9, (0.0, 11.0)) == (0, 9)


def test_an_upper_bound_of_one_is_all_as_a_fraction_and_one_image_as_a_count() -> None:
    assert reference.interval_ranks(9, (0.0, 1.0)) == (0, 9)
    assert reference.interval_ranks(9, (0.5, np.float32(1))) == (4, 9)
    assert reference.interval_ranks(9, (0, 1)) == (0, 1)
    assert reference.interval_ranks(9, (1.0, 3.0)) == (1, 3)  # a lower bound of 1 is a count in either form
    tokens = make_tokens(4, 7, 2, (4, 5), 24)
    every = reference.patch_minima(tokens, (4, 5))
    every[~np.isfinite(every)] = np.nan
    np.testing.assert_allclose(
        mutual_scores(tokens, (4, 5), interval=(0.0, 1.0)), np.nanmean(every, axis=-1).mean(axis=(0, 1)), atol=1e-4
    )
    np.testing.assert_allclose(
        mutual_scores(tokens, (4, 5), interval=(0, 1)), np.nanmin(every, axis=-1).mean(axis=(0, 1)), atol=1e-4
    )


def test_box_sum_and_layer_norm_equal_the_reference() -> None:
    x = RNG.normal(size=(35, 6)).astype(np.float32)
    for degree in (1, 3, 5, 9, 15):
        np.testing.assert_allclose(
            box_sum(x, (5, 7), degree), degree**2 * reference.box_mean(x, (5, 7), degree), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(layer_normalise(x), reference.spatial_layer_norm(x), atol=1e-5)


def test_interrupt_stops_the_pool() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mutual_scores(make_tokens(2, 8, 2, (5, 5), 8), progress=stop)
    assert mutual_scoring.mutual_scores(make_tokens(2, 3, 1, (5, 5), 8)).shape == (3, 25)


def test_a_defect_that_many_images_share_looks_normal() -> None:
    """The nearest 30 % of the others decide: one defect in 2 of 20 images stands out, in 12 of them it does not."""
    contrast = {}
    for share in (2, 12):
        rng = np.random.default_rng(0)
        tokens = rng.normal(size=(1, 1, 25, 64)) + 0.3 * rng.normal(size=(20, 1, 25, 64))
        tokens[:share, 0, 12] = 3 * rng.normal(size=64) + 0.3 * rng.normal(size=(share, 64))
        scores = mutual_scores(tokens.astype(np.float32), degrees=(1,))
        contrast[share] = scores[0, 12] / np.median(scores)
    assert contrast[2] > 2
    assert contrast[12] < 1

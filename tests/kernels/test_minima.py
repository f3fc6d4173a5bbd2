"""The distances that mutual scoring hands back, against the float64 reference and against its own scores."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from zsad.kernels import mutual_scores, reference
from zsad.kernels.cpu import averages, comparers, scorer
from zsad.kernels.cpu.arrays import aligned_empty
from zsad.kernels.cpu.plan import Sizes, plan_mutual_scoring
from zsad.kernels.machine import default_disk_limit
from zsad.kernels.minima import ReturnedMinima
from zsad.kernels.task import Task

pytestmark = pytest.mark.filterwarnings("ignore:mutual scoring runs on NumPy alone")

GRID, DEGREES, INTERVAL = (5, 4), (1, 3, 5), (0.0, 0.5)


def make_tokens(images: int = 8, layers: int = 2, zeros: bool = False) -> np.ndarray:
    """Tokens that share structure; with `zeros` one image has only zero features and one has two at degree 1."""
    rng = np.random.default_rng(images)
    tokens = rng.normal(size=(1, layers, 20, 48)) + 0.7 * rng.normal(size=(images, layers, 20, 48))
    if zeros:
        tokens[3] = 1.0
        tokens[5, :, 10:] = -tokens[5, :, :10]  # no mean: what is zero stays so
        tokens[5, :, [3, 13]] = 0
    return tokens.astype(np.float32)


@pytest.fixture(params=["native", "numpy", "int8"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(comparers, "_cpu", None)
        monkeypatch.setattr(averages, "_cpu", None)
    elif comparers._cpu is None:
        pytest.skip("installed without a compiler: the native kernels are not there")
    return "int8" if request.param == "int8" else "fp32"


@pytest.mark.parametrize(
    ("images", "degrees", "zeros"), [(2, (1, 3, 5), False), (8, (1, 3, 5), False), (7, (3, 1), True), (6, (1, 3), True)]
)
def test_minima_equal_the_reference(precision: str, images: int, zeros: bool, degrees: tuple[int, ...]) -> None:
    tokens = make_tokens(images, zeros=zeros)
    expected = reference.patch_minima(tokens, GRID, degrees)
    scores, each = mutual_scores(tokens, GRID, degrees, INTERVAL, precision=precision, return_minima="each")
    assert each.shape == (2, len(degrees), images, 20, images)
    np.testing.assert_allclose(each, expected, atol=1e-2 if precision == "int8" else 1e-4)
    np.testing.assert_allclose(reference.interval_average(each, INTERVAL).mean(axis=(0, 1)), scores, rtol=1e-5)
    again, averaged = mutual_scores(tokens, GRID, degrees, INTERVAL, precision=precision, return_minima=True)
    np.testing.assert_array_equal(again, scores)
    np.testing.assert_allclose(averaged, each.mean(axis=(0, 1)), rtol=1e-5)
    assert averaged.dtype == each.dtype == scores.dtype == np.float32
    plain = mutual_scores(tokens, GRID, degrees, INTERVAL, precision=precision)
    # With int8 products the ranks are then chosen by exact distances, too.
    np.testing.assert_allclose(plain, scores, atol=2e-3 if precision == "int8" else 0)


def test_other_references_can_be_selected_without_products(precision: str) -> None:
    tokens = make_tokens(9)
    _, each = mutual_scores(tokens, GRID, DEGREES, precision=precision, return_minima="each")
    kept = [0, 2, 3, 6, 8]
    selected = reference.interval_average(each[:, :, kept][..., kept], INTERVAL).mean(axis=(0, 1))
    expected = reference.mutual_scores(tokens[kept], GRID, DEGREES, INTERVAL)
    np.testing.assert_allclose(selected, expected, atol=2e-3 if precision == "int8" else 1e-4)


@pytest.mark.parametrize(("images", "references", "zeros"), [(1, 1, False), (1, 5, False), (2, 6, True), (5, 2, True)])
def test_references_are_compared_with_and_not_scored(precision: str, images: int, references: int, zeros: bool) -> None:
    tokens, seen = make_tokens(images + references, zeros=zeros), []
    options = {"grid": GRID, "degrees": (3, 1), "interval": INTERVAL, "precision": precision, "return_minima": "each"}
    all_scores, all_minima = mutual_scores(tokens, **options)
    scores, each = mutual_scores(tokens, references=references, progress=lambda *pairs: seen.append(pairs), **options)
    assert each.shape == (2, 2, images, 20, images + references)
    np.testing.assert_array_equal(scores, all_scores[:images])
    np.testing.assert_array_equal(each, all_minima[:, :, :images])
    expected = reference.mutual_scores(tokens, GRID, (3, 1), INTERVAL, references)
    np.testing.assert_allclose(scores, expected, atol=2e-3 if precision == "int8" else 1e-4)
    products = 2 * (images * (images - 1) // 2 + images * references)  # none among the references
    assert seen[-1] == (products, products)


def smallest_limit(tokens: np.ndarray, **options) -> int:
    """The smallest of a few memory limits that a call runs within."""
    limit = 4096
    while True:
        try:
            mutual_scores(tokens, GRID, **options, memory_limit=limit)
            return limit
        except MemoryError:
            limit += 4096


@pytest.mark.slow
@pytest.mark.parametrize("references", [0, 1, 7])
def test_every_plan_hands_back_the_same(precision: str, references: int) -> None:
    tokens, options = make_tokens(11), {"precision": precision, "return_minima": True, "references": references}
    expected = mutual_scores(tokens, GRID, **options)
    plans, smallest = [], smallest_limit(tokens, **options)
    for limit in (smallest, smallest * 5 // 4, smallest * 3 // 2, 3 * smallest):
        got = mutual_scores(tokens, GRID, **options, memory_limit=limit, on_plan=plans.append)
        for array, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(array, other)
        assert plans[-1].peak_bytes <= limit
    assert len({plan.chunk for plan in plans}) > 1


@pytest.mark.parametrize("kind", [True, "each", "smallest degree"])
def test_minima_count_in_the_plan(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, plans = make_tokens(11), []
    mutual_scores(tokens, GRID, on_plan=plans.append)
    mutual_scores(tokens, GRID, on_plan=plans.append, return_minima=kind)
    returned = ReturnedMinima(kind, 11, Task(GRID, 2, 48, DEGREES, INTERVAL)).bytes
    assert returned == 4 * 11 * 20 * 11 * {True: 1, "each": 6, "smallest degree": 2}[kind]
    assert plans[1].peak_bytes - plans[0].peak_bytes == returned
    monkeypatch.setattr("zsad.kernels.cpu.plan.default_disk_limit", lambda: returned - 1)
    with pytest.raises(MemoryError, match="needs at least"):
        mutual_scores(tokens, GRID, memory_limit=returned, return_minima=kind)


def test_minima_that_memory_does_not_hold_lie_in_a_file(precision: str) -> None:
    tokens, plans = make_tokens(11), []
    options = {"precision": precision, "return_minima": "each"}
    expected = mutual_scores(tokens, GRID, **options)
    got = mutual_scores(tokens, GRID, **options, memory_limit=100_000, on_plan=plans.append)
    assert not plans[0].returned_in_memory
    assert plans[0].peak_bytes <= 100_000
    assert "handed back in a memory-mapped temporary file" in plans[0].describe()
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("degrees", [(3, 1), (1, 3), (3, 3)])
def test_the_smallest_degree_comes_beside_the_average(precision: str, degrees: tuple[int, ...]) -> None:
    tokens = make_tokens(9, zeros=True)
    scores, both = mutual_scores(tokens, GRID, degrees, precision=precision, return_minima="smallest degree")
    assert both.shape == (2, 9, 20, 9)
    minima = reference.patch_minima(tokens, GRID, degrees)
    error = 1e-2 if precision == "int8" else 1e-4
    np.testing.assert_allclose(both[0], minima.mean(axis=(0, 1)), atol=error)
    np.testing.assert_allclose(both[1], minima[:, degrees.index(min(degrees))].mean(axis=0), atol=error)
    plain = mutual_scores(tokens, GRID, degrees, precision=precision)
    np.testing.assert_array_equal(scores, plain)  # with int8, too: the interval's winners alone are measured


@pytest.mark.long
@pytest.mark.parametrize("kind", [False, *(pytest.param(kind, marks=pytest.mark.long) for kind in (True, "each"))])
def test_the_planned_peak_is_kept(precision: str, kind) -> None:
    tokens = np.random.default_rng(1).normal(size=(40, 1, 256, 32)).astype(np.float32)
    options = {"precision": precision, "return_minima": kind}
    mutual_scores(tokens[:3], **options)  # imports and caches are not the call's own
    plans = []
    for share in (1, 2):
        tracemalloc.start()
        try:
            limit = plans[0].peak_bytes // share if plans else None
            mutual_scores(tokens, **options, memory_limit=limit, on_plan=plans.append)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= plans[-1].peak_bytes + 2**18  # Python's own objects, a few more or less by chance


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "references"), [(0, 0), (0, 6), (20_000, 0)])
def test_a_few_rows_at_a_time_where_neither_memory_nor_disk_holds_all(
    precision: str, disk: int, references: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"precision": precision, "return_minima": "each", "references": references}
    tokens, images = make_tokens(11, zeros=True), 11 - references
    expected = mutual_scores(tokens, GRID, **options)
    monkeypatch.setattr("zsad.kernels.cpu.plan.default_disk_limit", lambda: disk)
    plans, seen = [], []
    smallest = smallest_limit(tokens, **options)
    for limit in (smallest, smallest + 20_000, smallest + 60_000):
        got = mutual_scores(
            tokens,
            GRID,
            **options,
            memory_limit=limit,
            on_plan=plans.append,
            progress=lambda done, total: seen.append((done, total)),
        )
        for array, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(array, other)
        assert seen[-1] == (2 * plans[-1].comparisons(),) * 2
    assert plans[0].rows < images
    assert plans[0].minima_in_memory
    assert plans[0].comparisons() > images * (images - 1) // 2 + images * references
    assert "in turn against all others" in plans[0].describe()


@pytest.mark.long
@pytest.mark.parametrize("failures", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_failed_allocation_halves_the_budget(
    failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = make_tokens(30)
    expected = mutual_scores(tokens, GRID, return_minima=True)
    empty, failed = aligned_empty, []

    def scarce(shape, dtype):
        if len(failed) < failures:
            failed.append(shape)
            raise MemoryError("no such memory")
        return empty(shape, dtype)

    monkeypatch.setattr(scorer, "aligned_empty", scarce)
    plans = []
    got = mutual_scores(tokens, GRID, return_minima=True, on_plan=plans.append)
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert len(plans) == failures + 1
    assert all(after.peak_bytes <= before.peak_bytes // 2 for before, after in pairwise(plans))
    assert caplog.text.count("out of memory (no such memory)") == failures


@pytest.mark.slow
def test_memory_that_always_fails_ends_in_the_usual_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(shape, dtype):
        raise MemoryError("no such memory")

    monkeypatch.setattr(scorer, "aligned_empty", none)
    with pytest.raises(MemoryError, match="needs at least"):
        mutual_scores(make_tokens(5), GRID)


def test_the_disk_limit_is_less_than_the_disk_has() -> None:
    assert 0 < default_disk_limit() < 2**60
    assert plan_mutual_scoring(Sizes(20, 400, 64, 3), 4 << 20, disk_limit=0).rows < 20

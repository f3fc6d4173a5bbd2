"""Nearest neighbours on the CPU against the float64 reference, and what must not change them."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsad.kernels import reference
from zsad.kernels.cpu import nearest as cpu
from zsad.kernels.nearest import Nearest, search_all

PRECISIONS = ["fp32"] if cpu._cpu is None else ["fp32", "int8"]
GAP = 1e-6  # of cosines, up to which neighbours may change places


def vectors(seed: int, count: int, channels: int, clusters: int = 0) -> np.ndarray:
    """Vectors of very different lengths, around a few centres or around zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, channels))
    if clusters:
        x = 0.3 * x + np.random.default_rng(99).normal(size=(clusters, channels))[rng.integers(0, clusters, count)]
    return (x * 10.0 ** rng.uniform(-9, 9, (count, 1))).astype(np.float32)


def check(found: tuple[np.ndarray, np.ndarray], queries: np.ndarray, bank: np.ndarray, k: int) -> None:
    """Cosines equal the reference's, and so do indices wherever both neighbours in its order are further than GAP."""
    cosines, indices = found
    more, numbers = reference.nearest(queries, bank, min(k + 1, len(bank)))
    assert cosines.dtype == np.float32
    assert indices.dtype == np.int64
    assert cosines.shape == indices.shape == (len(queries), k)
    np.testing.assert_allclose(cosines, more[:, :k], atol=GAP)
    gaps = np.pad(-np.diff(more, axis=1), ((0, 0), (1, 1)), constant_values=2.0)
    clear = np.minimum(gaps[:, :k], gaps[:, 1 : k + 1]) > GAP
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(indices[clear], numbers[:, :k][clear])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("queries", "bank", "channels", "k", "clusters"),
    [(1, 1, 1, 1, 0), (3, 2, 5, 2, 0), (1600, 700, 48, 3, 0), (513, 1025, 100, 16, 5), (40, 2047, 384, 1, 7)],
)
def test_neighbours_equal_the_reference(
    queries: int, bank: int, channels: int, k: int, clusters: int, precision: str
) -> None:
    x, y = vectors(1, queries, channels, clusters), vectors(2, bank, channels, clusters)
    search = Nearest(y, k, precision)
    assert search.precision == precision
    check(search.search(x), x, y, k)


def test_the_reference_finds_by_definition() -> None:
    cosines, indices = reference.nearest([[3, 0], [0, 0]], [[0, 5], [1, 1], [-1, 0], [1, 1]], 3)
    np.testing.assert_allclose(cosines, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 0]], atol=1e-15)
    np.testing.assert_array_equal(indices, [[1, 3, 0], [0, 1, 2]])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_limits_and_chunks_change_nothing(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors(3, 1200, 40, 9), vectors(4, 2600, 40, 9)
    np.save(tmp_path / "bank.npy", y)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected = Nearest(y, 4, precision).search(x)
    needed = Nearest.needed(2600, 40, 4, precision)
    assert needed < Nearest.needed(2600, 40, 4, precision, resident=True)
    for limit in (needed, Nearest.needed(2600, 40, 4, precision, resident=True) - 1):
        search = Nearest(mapped, 4, precision, memory_limit=limit)
        assert search._search._chunks is None  # type: ignore[attr-defined]
        for got, want in zip(search.search(x), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(cpu, "available_cores", lambda: 3)
    monkeypatch.setattr(cpu, "QUERY_ROWS", 96)
    monkeypatch.setattr(cpu, "BANK_ROWS", 160)
    monkeypatch.setattr(cpu, "MEASURED_ROWS", 7)
    for got, want in zip(Nearest(y, 4, precision).search(x), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(MemoryError, match="raise memory_limit"):
        Nearest(y, 4, precision, memory_limit=1000)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_stays_within_the_limit(precision: str) -> None:
    x, y = vectors(3, 3000, 96), vectors(4, 4000, 96)
    for resident in (False, True):
        limit = Nearest.needed(4000, 96, 5, precision, resident=resident)
        tracemalloc.start()
        try:
            search = Nearest(y, 5, precision, memory_limit=limit)
            search.search(x)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit + 3000 * 5 * 12 + (1 << 20)  # beside results and Python's own


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), k=st.integers(1, 5), clusters=st.sampled_from([0, 3]))
def test_a_permuted_bank_permutes_the_indices(precision: str, seed: int, k: int, clusters: int) -> None:
    x, y = vectors(seed, 30, 24, clusters), vectors(seed + 1, 150, 24, clusters)
    order = np.random.default_rng(seed).permutation(150)
    cosines, indices = Nearest(y, k, precision).search(x)
    permuted_cosines, permuted = Nearest(y[order], k, precision).search(x)
    np.testing.assert_allclose(permuted_cosines, cosines, atol=GAP)
    clear = np.abs(np.diff(reference.nearest(x, y, k + 1)[0], axis=1)).min(axis=1) > GAP
    np.testing.assert_array_equal(order[permuted][clear], indices[clear])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("copies", [2, 90])
def test_of_duplicates_the_lower_indices_come_first(precision: str, copies: int) -> None:
    # More copies than candidates: they lie in several chunks, and leave int8 in doubt.
    y = np.tile(vectors(5, 30, 32), (copies, 1))
    _, indices = Nearest(y, 16, precision).search(y[:30])
    own = np.arange(30)[:, None] + 30 * np.arange(min(copies, 16))
    np.testing.assert_array_equal(indices[:, : own.shape[1]], own)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neighbours_that_int8_cannot_tell_apart(precision: str) -> None:
    # Hundreds of vectors lie closer to each other, seen from the mean of the bank, than a step of their codes.
    rng = np.random.default_rng(6)
    centres = rng.normal(size=(3, 64))
    y = (centres[rng.integers(0, 3, 1500)] + 0.02 * rng.normal(size=(1500, 64))).astype(np.float32)
    x = y[::10] + np.float32(1e-4) * rng.normal(size=(150, 64)).astype(np.float32)
    _, indices = Nearest(y, 1, precision).search(x)
    np.testing.assert_array_equal(indices[:, 0], np.arange(0, 1500, 10))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bank_in_memory_of_lengths_near_one(precision: str) -> None:
    # int8 measures it as it is; unlike a bank of other lengths it is not read and normalised again.
    x, y = vectors(13, 400, 40, 9), vectors(14, 1500, 40, 9)
    y /= np.linalg.norm(y.astype(np.float64), axis=1, keepdims=True)
    near = y * np.random.default_rng(15).uniform(0.997, 1.003, (1500, 1)).astype(np.float32)
    y[7] = near[7] = 0
    assert cpu.Held.of(near) is not None
    assert cpu.Held.of(2 * near) is None
    for bank in (near, 2 * near):
        check(Nearest(bank, 3, precision).search(x), x, y, 3)
        np.testing.assert_array_equal(Nearest(bank, 3, precision).search(y[7:8])[1], [[0, 1, 2]])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_vectors_have_cosine_zero(precision: str) -> None:
    x, y = vectors(7, 4, 16), -np.abs(vectors(8, 6, 16))
    x[1:] = np.abs(x[1:])
    x[0] = y[4] = 0
    cosines, indices = Nearest(y, 2, precision).search(x)
    assert (cosines[0] == 0).all()
    np.testing.assert_array_equal(indices[0], [0, 1])
    assert (cosines[1:, 0] == 0).all()
    assert (indices[1:, 0] == 4).all()


def test_vectors_too_long_and_too_short_to_be_squared() -> None:
    y = np.eye(5, dtype=np.float32) * np.float32(1e38)
    x = np.eye(5, dtype=np.float32)[::-1].copy() * np.float32(1e-40)
    cosines, indices = Nearest(y).search(x)
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    np.testing.assert_array_equal(indices[:, 0], [4, 3, 2, 1, 0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neither_bank_nor_queries_are_changed(precision: str) -> None:
    x, y = vectors(9, 20, 8), vectors(10, 30, 8)
    copies = x.copy(), y.copy()
    Nearest(y, 1, precision).search(x)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(y, copies[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_banks_side_by_side(precision: str) -> None:
    # Of so many queries that each worker has its own, of fewer, and of none.
    queries = [vectors(16, count, 24, 4) for count in (1600, 40, 0)]
    banks = [Nearest(vectors(17 + k, 1100 * k, 24, 4), k, precision) for k in (1, 2, 3)]
    for found, bank, own in zip(search_all(banks, queries), banks, queries, strict=True):
        for got, want in zip(found, bank.search(own), strict=True):
            np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="query 7 is not finite"):
        search_all(banks, [*queries[:2], np.where(np.arange(9)[:, None] == 7, np.inf, queries[0][:9])])


def test_no_queries_find_nothing() -> None:
    cosines, indices = Nearest(vectors(1, 5, 4), 3).search(np.empty((0, 4), np.float32))
    assert cosines.shape == indices.shape == (0, 3)


def bad(row: int, value: float) -> np.ndarray:
    x = vectors(1, 5, 4)
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": np.empty((0, 4), np.float32)}, "the bank is empty"),
        ({"bank": np.zeros((5, 0), np.float32)}, "at least one channel"),
        ({"bank": np.zeros(5, np.float32)}, r"vectors \[N, C\]"),
        ({"bank": np.zeros((5, 4))}, "float32, not float64"),
        ({"bank": bad(3, np.nan)}, "vector 3 is not finite"),
        ({"queries": bad(2, -np.inf)}, "query 2 is not finite"),
        ({"queries": np.zeros((2, 3), np.float32)}, "4 channels of the bank, not 3"),
        ({"k": 0}, "1 to 16, not 0"),
        ({"k": 17}, "1 to 16, not 17"),
        ({"k": 6}, "only 5 vectors"),
        ({"precision": "fp16"}, "use precision fp32"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"bank": vectors(1, 5, 4), "queries": vectors(2, 3, 4), **change}
    queries = arguments.pop("queries")
    with pytest.raises(ValueError, match=message):
        Nearest(**arguments).search(queries)


def test_a_bank_that_is_not_held_is_checked_when_it_is_read() -> None:
    y = vectors(1, 3000, 4)
    y[2500, 1] = np.inf
    with pytest.raises(ValueError, match="vector 2500 is not finite"):
        Nearest(y, memory_limit=Nearest.needed(3000, 4)).search(y[:1])


@pytest.mark.parametrize("change", [{"vectors": 0}, {"channels": 0}, {"k": 0}, {"precision": "fp64"}])
def test_what_is_needed_for_no_search(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Nearest.needed(**{"vectors": 5, "channels": 4, **change})


def test_without_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = vectors(11, 60, 24, 4), vectors(12, 1500, 24, 4)
    monkeypatch.setattr(cpu, "_cpu", None)
    check(Nearest(y, 5).search(x), x, y, 5)
    _, indices = Nearest(np.tile(y[:20], (60, 1)), 7).search(y[:20])
    np.testing.assert_array_equal(indices, np.arange(20)[:, None] + 20 * np.arange(7))
    with pytest.raises(ValueError, match="install a C\\+\\+17 compiler"):
        Nearest(y, precision="int8")


def test_threads_are_kept_for_searches_while_somebody_asks_for_that() -> None:
    bank = Nearest(np.eye(8, 4, dtype=np.float32) + 1)

    def started() -> set[threading.Thread]:
        search_all([bank, bank], [np.eye(4, dtype=np.float32)] * 2)
        return {thread for thread in threading.enumerate() if thread.name.startswith(("work", "ask"))}

    assert not started()
    with cpu.kept_threads():
        kept = started()
        assert kept
        assert started() >= kept
    assert not any(thread.is_alive() for thread in kept)
    assert not started()

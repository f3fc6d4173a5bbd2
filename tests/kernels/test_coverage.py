import numpy as np
import pytest

from zsad.kernels import coverage
from zsad.kernels.coverage import DIRECTIONS, Array, farthest_first, project


def points_of(count: int, channels: int = 16, seed: int = 0) -> Array:
    drawn = np.random.default_rng(seed).standard_normal((count, channels))
    units: Array = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return units


def greedy(points: Array, count: int) -> list[int]:
    """One point at a time, in float64."""
    exact = points.astype(np.float64)
    chosen = [int(np.square(exact - exact.mean(axis=0)).sum(axis=1).argmin())]
    nearest = np.full(len(exact), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(exact - exact[chosen[-1]]).sum(axis=1))
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


@pytest.mark.parametrize("candidates", [4, 64, 512])
@pytest.mark.parametrize("rows", [100, 16384])
def test_choice_is_that_of_one_point_at_a_time(monkeypatch: pytest.MonkeyPatch, candidates: int, rows: int) -> None:
    monkeypatch.setattr(coverage, "CANDIDATES", candidates)
    monkeypatch.setattr(coverage, "ROWS", rows)
    points = points_of(700)
    for count in (1, 2, 50, 300):
        assert farthest_first(points, count).tolist() == greedy(points, count)


def test_copies_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    distinct, rounds, step = points_of(300), 0, coverage._next
    copies = np.random.default_rng(1).permutation(np.repeat(distinct, 4, axis=0))

    def counted(*arguments: object) -> list[int]:
        nonlocal rounds
        rounds += 1
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(coverage, "_next", counted)
    chosen = copies[farthest_first(copies, 1000)]
    assert len(chosen) == len(distinct) == len(np.unique(chosen, axis=0))
    assert rounds < 30


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_one_of_equal_points_is_enough(length: float) -> None:
    assert len(farthest_first(np.full((40, 8), length, np.float32), 10)) == 1
    assert len(farthest_first(np.zeros((40, 8), np.float32), 10)) == 1


@pytest.mark.parametrize("count", [5, 6, 100])
def test_all_points_where_there_are_no_more(count: int) -> None:
    assert farthest_first(points_of(5), count).tolist() == [0, 1, 2, 3, 4]


def test_projection_keeps_distances_about() -> None:
    points = points_of(60, 512).reshape(4, 15, 512)
    projected = project(4, 15, 512, points.__getitem__)
    assert projected.shape == (60, DIRECTIONS)
    first, second = np.triu_indices(60, 1)
    flat = points.reshape(60, 512)
    ratio = np.linalg.norm(projected[first] - projected[second], axis=1) / np.linalg.norm(
        flat[first] - flat[second], axis=1
    )
    assert abs(ratio.mean() - 1) < 0.05
    assert 0.05 < ratio.std() < 0.13
    few = points_of(12, 8).reshape(3, 4, 8)
    assert np.array_equal(project(3, 4, 8, few.__getitem__), few.reshape(12, 8))

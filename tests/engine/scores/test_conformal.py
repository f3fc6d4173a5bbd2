import numpy as np
import pytest

from zsad.engine.scores.conformal import images_needed, p_values, upper_bound


@pytest.mark.parametrize(
    ("count", "share", "rank"), [(99, 0.01, 99), (100, 0.01, 100), (199, 0.01, 198), (40, 0.1, 37)]
)
def test_the_bound_is_the_conformal_quantile(count: int, share: float, rank: int) -> None:
    normal = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert upper_bound(normal, share) == (rank, share)


def test_too_few_images_promise_what_they_can() -> None:
    assert upper_bound(np.array([3.0, 1.0, 2.0]), 0.01) == (3.0, 0.25)


@pytest.mark.parametrize(("share", "count"), [(0.01, 99), (0.05, 19), (0.5, 1), (0.03, 33)])
def test_as_many_images_as_a_share_needs(share: float, count: int) -> None:
    assert images_needed(share) == count
    assert upper_bound(np.arange(count, dtype=float), share)[1] == share
    assert count == 1 or upper_bound(np.arange(count - 1, dtype=float), share)[1] > share


def test_p_values_count_what_is_as_high() -> None:
    normal = np.array([1.0, 2.0, 2.0, 3.0])
    assert p_values([0, 1, 2, 2.5, 3, 4], normal) * 5 == pytest.approx([5, 5, 4, 2, 2, 1])


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential", "standard_cauchy"])
def test_p_values_of_exchangeable_scores_are_uniform(draw: str) -> None:
    count, rounds = 19, 4000
    rng = np.random.default_rng(1)
    scores = getattr(rng, draw)((rounds, count + 1))
    p = np.array([p_values(row[-1], row[:-1]) for row in scores])
    counts = np.bincount(np.round(p * (count + 1)).astype(int) - 1, minlength=count + 1)
    expected = rounds / (count + 1)
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 43.8  # chi-square with 19 degrees of freedom, once in a thousand


def test_an_image_is_above_the_bound_when_its_p_value_is_at_most_the_share() -> None:
    rng = np.random.default_rng(2)
    for share in (0.01, 0.05, 0.1, 0.37):
        normal = rng.integers(0, 30, 120).astype(float)  # with ties
        bound, _ = upper_bound(normal, share)
        scores = np.arange(-1.0, 32)
        assert (p_values(scores, normal)[scores > bound] <= share).all()

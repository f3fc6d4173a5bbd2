"""Bounds of images, and regions."""

import numpy as np
import pytest

from zsad.engine.scores.verdicts import Bounds, batch_bounds, distribution_bounds, expected_bounds, find_regions

RNG = np.random.default_rng(5)


def batch(normal: int, defective: int) -> np.ndarray:
    """Values of normal images, and behind them of others that lie five deviations above them."""
    return np.concatenate([RNG.normal(0, 1, normal), RNG.normal(5, 1, defective)])


@pytest.mark.parametrize(("normal", "defective"), [(200, 0), (190, 10), (160, 40), (100, 100), (60, 140)])
def test_few_normal_images_are_rejected_and_few_defects_accepted(normal: int, defective: int) -> None:
    values = batch(normal, defective)
    accept, reject = distribution_bounds(values)
    assert (values[:normal] > reject).mean() <= 0.1
    assert (values[normal:] <= accept).sum() <= 0.05 * defective
    if 0 < defective <= 40:
        assert (values[normal:] > reject).mean() > 0.7


@pytest.mark.parametrize(
    "values",
    [RNG.gumbel(size=300), RNG.exponential(size=300), RNG.uniform(size=300), RNG.standard_t(4, 300)],
    ids=["skewed", "exponential", "even", "outlying"],
)
def test_of_a_clean_batch_of_any_shape_few_are_rejected(values: np.ndarray) -> None:
    _, reject = distribution_bounds(values)
    assert (values > reject).mean() < 0.16  # no more than lie a deviation above the median of a normal distribution


def test_one_gross_defect_does_not_hide_the_others() -> None:
    values = np.append(batch(100, 10), 1000.0)
    accept, reject = distribution_bounds(values)
    assert (values[100:110] > accept).all()
    assert (values[100:110] > reject).sum() >= 7


def test_bounds_move_and_stretch_with_the_values_whatever_their_order() -> None:
    values = batch(50, 20)
    expected = np.array(distribution_bounds(values))
    np.testing.assert_allclose(distribution_bounds(3 * RNG.permutation(values) - 7), 3 * expected - 7)


@pytest.mark.parametrize("distances", [None, (0.0, 0.5), (0.2, 0.2)])
def test_nothing_is_rejected_where_all_scores_are_equal(distances: tuple[float, float] | None) -> None:
    for score in (0.0, 0.3, 1.0):
        assert Bounds(*batch_bounds(np.full(12, score), distances), "rule").verdict(score) == "accept"


@pytest.mark.parametrize("kind", ["distances", "probabilities"])
def test_bounds_of_scores_are_those_of_an_even_scale(kind: str) -> None:
    values = batch(80, 20) / 3
    expected = distribution_bounds(values)
    if kind == "probabilities":
        found = batch_bounds(1 / (1 + np.exp(-values)), None)
        np.testing.assert_allclose(np.log(np.array(found) / (1 - np.array(found))), expected)
        return
    raw = np.exp(values)
    low, high = raw.min(), raw.max()
    found = batch_bounds((raw - low) / (high - low), (low, high))
    np.testing.assert_allclose(np.log(low + np.array(found) * (high - low)), expected)


def test_copies_and_certainties_have_bounds_too() -> None:
    scores = np.array([0.0] * 4 + [0.5, 0.6, 0.7, 0.9] + [1.0] * 4)
    for distances in (None, (0.0, 0.3)):
        accept, reject = batch_bounds(scores, distances)
        assert 0 <= accept <= reject <= 1


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_expected_defects_leave_room_in_both_directions(share: float) -> None:
    scores = RNG.permutation(np.linspace(0, 1, 1001))
    accept, reject = expected_bounds(scores, share)
    more, less = (scores > accept).mean(), (scores > reject).mean()
    assert less < share < more
    odds = share / (1 - share)
    assert more / (1 - more) == pytest.approx(2 * odds, rel=0.1)
    assert less / (1 - less) == pytest.approx(odds / 2, rel=0.25)


def test_verdicts_follow_both_bounds() -> None:
    bounds = Bounds(0.25, 0.5, "rule")
    assert [bounds.verdict(score) for score in (0.25, 0.3, 0.5, 0.51)] == ["accept", "review", "review", "reject"]


def test_regions_are_boxed_measured_and_sorted() -> None:
    scores = np.zeros((40, 60), np.float32)
    scores[5:10, 20:30] = 0.6
    scores[30:34, 2:5] = 0.9
    scores[34, 5] = 0.8  # touches by a corner: same region
    scores[0, 0] = 1.0  # too small
    first, second = find_regions(scores, 0.5, least_area=4)
    assert (first.x, first.y, first.width, first.height, first.area) == (2, 30, 4, 5, 13)
    assert first.peak == pytest.approx(0.9)
    assert (second.x, second.y, second.width, second.height, second.area) == (20, 5, 10, 5, 50)
    assert find_regions(np.zeros((4, 4), np.float32), 0.5, 1) == []

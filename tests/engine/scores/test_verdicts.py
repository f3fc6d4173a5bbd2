"""Thresholds of images and of regions."""

import numpy as np
import pytest

from zsad.engine.scores.verdicts import auto_threshold, find_regions, region_threshold

RNG = np.random.default_rng(5)


def test_auto_threshold_separates_a_tail_from_a_normal_majority() -> None:
    normal = RNG.normal(0.3, 0.03, 90)
    threshold = auto_threshold(np.concatenate([normal, RNG.uniform(0.6, 1, 10)]))
    assert normal.max() - 0.02 < threshold < 0.6
    assert (normal > threshold).mean() < 0.05


def test_auto_threshold_finds_nothing_where_all_scores_are_equal() -> None:
    scores = np.zeros(10)
    assert not (scores > auto_threshold(scores)).any()


def test_region_threshold_looks_at_normal_images_only() -> None:
    patches = np.zeros((4, 1000))
    patches[:3] = np.linspace(0, 0.5, 1000)
    patches[3] = 1
    anomalous = np.array([False, False, False, True])
    assert region_threshold(patches, anomalous) == pytest.approx(0.4995, abs=1e-3)
    assert region_threshold(patches, np.ones(4, bool)) == 1.0


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

"""AUPIMO and SegF1 against brute force on small maps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zsad.engine.evaluation.strict import Aupimo, SegmentationF1


def brute_force(normal: list[NDArray[Any]], anomalous: NDArray[Any], lowest: float, highest: float) -> float:
    """Each rate between two at which something changes has its lowest threshold, each threshold its recall."""
    thresholds = sorted({float(score) for scores in (*normal, anomalous) for score in scores.ravel()})
    rates = [float(np.mean([np.mean(map_ >= threshold) for map_ in normal])) for threshold in thresholds]
    ends = sorted({lowest, highest, *(rate for rate in rates if lowest < rate < highest)})
    area = 0.0
    for left, right in pairwise(ends):
        kept = [threshold for threshold, rate in zip(thresholds, rates, strict=True) if rate <= left * (1 + 1e-12)]
        recall = np.mean(anomalous >= min(kept)) if kept else 0.0
        area += float(recall) * np.log(right / left)
    return area / np.log(highest / lowest)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 5),
    more=st.integers(0, 3),  # normal images that were expected, but could not be read
    levels=st.sampled_from([2, 8, 10**6]),
    rates=st.sampled_from([(1e-5, 1e-4), (0.01, 0.1), (0.05, 0.5), (0.3, 1.0)]),
)
def test_aupimo_equals_brute_force(seed: int, images: int, more: int, levels: int, rates: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 9, 2)) for _ in range(images + 1)]
    *normal, map_ = ((rng.integers(0, levels, shape) / levels).astype(np.float32) for shape in shapes)
    mask = rng.random(map_.shape) < 0.4
    mask[0, 0] = True
    aupimo = Aupimo(images + more, rates)
    for of_normal in normal:
        aupimo.add_normal(of_normal)
    assert aupimo.of_image(mask, map_) == pytest.approx(brute_force(normal, map_[mask], *rates), abs=1e-9)


def test_aupimo_is_what_the_authors_steps_approach() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(8, 100, 100)).astype(np.float32)
    map_ = rng.normal(3, 1, (50, 50)).astype(np.float32)
    aupimo = Aupimo(8, (1e-3, 1e-2))
    for of_normal in normal:
        aupimo.add_normal(of_normal)
    thresholds = np.linspace(*np.quantile(normal, (0.99, 0.999)), 300)
    rates = np.array([np.mean(normal >= threshold) for threshold in thresholds])
    recall = np.array([np.mean(map_ >= threshold) for threshold in thresholds])
    area = -np.sum(np.diff(np.log(rates)) * (recall[1:] + recall[:-1]) / 2) / np.log(10)
    assert aupimo.of_image(np.ones((50, 50), bool), map_) == pytest.approx(area, abs=5e-3)
    assert aupimo.finest_rate == 1 / normal.size


def test_aupimo_needs_normal_images() -> None:
    assert np.isnan(Aupimo(3).of_image(np.eye(2, dtype=bool), np.eye(2)))


def test_scores_of_normal_images_that_cannot_count_are_let_go() -> None:
    rng = np.random.default_rng(0)
    aupimo = Aupimo(50, (0.001, 0.01))
    for _ in range(50):
        aupimo.add_normal(rng.random((20, 20), np.float32))
    assert aupimo._scores.size <= 0.01 * 50 * 400 + 1


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0]))
def test_segmentation_f1_equals_brute_force(seed: int, images: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((images, 3, 4)) < 0.3 * (share < 1)
    finds = rng.random((images, 3, 4)) < share * (seed % 3 != 0)
    f1 = SegmentationF1()
    for mask, found in zip(masks, finds, strict=True):
        f1.add(mask, found)
    pairs = list(zip(masks.ravel(), finds.ravel(), strict=True))
    right, wrong, missed = (pairs.count(pair) for pair in ((True, True), (False, True), (True, False)))
    if right + wrong + missed == 0:
        assert np.isnan(f1.value)
    else:
        assert f1.value == pytest.approx(2 * right / (2 * right + wrong + missed))

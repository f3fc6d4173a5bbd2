"""Scores on disk give the metrics that they give in memory."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsad.engine.evaluation import spilled
from zsad.engine.evaluation.metrics import Region, curve_metrics, pixel_metrics, split_pixels
from zsad.engine.evaluation.spilled import Spilled


@pytest.fixture(autouse=True, scope="module")
def many_small_ranges() -> object:
    """Ranges of a few scores, so that small maps have many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("RANGE", 8), ("STRIDE", 4), ("POSITIVE_STRIDE", 2), ("BATCH", 5), ("PIECE", 3)):
            patch.setattr(spilled, name, size)
        yield


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 5),
    levels=st.sampled_from([1, 3, 30, 10**6]),  # of scores: all alike, many ties, few, none
    defects=st.sampled_from([0.05, 0.5, 0.95]),
    limit=st.floats(0.01, 1.0),
    steps=st.sampled_from([None, 7]),
    saturated=st.booleans(),
)
def test_metrics_are_those_of_memory(
    seed: int, images: int, levels: int, defects: float, limit: float, steps: int | None, saturated: bool
) -> None:
    rng = np.random.default_rng(seed)
    masks, maps, regions = [], [], []
    for index in range(images):
        shape = tuple(rng.integers(1, 12, 2))
        mask = (rng.random(shape) < defects) & (index % 3 != 1)
        masks.append(mask)
        # Of one run each has its own precision.
        maps.append((rng.integers(0, levels, shape) / levels - 0.3).astype([np.float32, np.float64][index % 2]))
        regions.append([Region(mask, rng.uniform(0.5, mask.sum()))] if saturated and mask.any() else None)
    expected = pixel_metrics(masks, maps, limit, steps, regions, strict=True)
    with tempfile.TemporaryFile() as file:
        sample = Spilled(file)
        for index in rng.permutation(images):  # threads come in any order
            own = masks[index], maps[index].copy(), regions[index]
            sample.add(index, split_pixels(*own, saturated, "", in_place=True))
        found = curve_metrics(sample, limit, steps, strict=True)
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)

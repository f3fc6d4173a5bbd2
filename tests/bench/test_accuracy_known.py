"""Bounds of known-good images on the benchmark: who is drawn, and that these scores are the product's."""

import numpy as np
import pytest

from zsad.bench.accuracy_known import KNOWN, drawn, rates


@pytest.mark.parametrize(("share", "bad"), [(0.0, 0), (0.08, 3), (0.4, 27), (0.9, 30)])
def test_known_good_images_are_not_judged(share: float, bad: int) -> None:
    anomalous = np.arange(90) >= 60
    known, members = drawn(anomalous, share, np.random.default_rng(0))
    assert len(known) == KNOWN
    assert not anomalous[known].any()
    assert anomalous[members].sum() == bad
    assert len(set(known) | set(members)) == 60 + bad


def test_of_few_normal_images_ten_are_judged() -> None:
    known, members = drawn(np.zeros(13, np.bool_), 0.4, np.random.default_rng(0))
    assert (len(known), len(members)) == (3, 10)


def test_rates_lie_within_their_interval() -> None:
    found = rates(np.array([0.0, 0.1, 0.1, 0.0]), np.array([0.5, 0.7]))
    assert found["rejected"] == 0.05
    assert found["recall"] == 0.6
    assert 0 <= found["low"] < 0.05 < found["high"]
    assert "recall" not in rates(np.array([0.0, 0.1]), np.array([]))

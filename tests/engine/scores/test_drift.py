"""Drift: chance is not called one, too many rejected images are, once, and once that it is over."""

import numpy as np
import pytest
from scipy import stats

from zsad.engine.scores.drift import LEAST, WINDOW, Drift, tail


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_the_tail_is_that_of_the_binomial_distribution(share: float) -> None:
    for count in (0, 1, 5, 50):
        assert tail(count, WINDOW, share) == pytest.approx(stats.binom.sf(count - 1, WINDOW, share), abs=1e-12)


def test_chance_is_no_drift() -> None:
    drift = Drift(0.01)
    above = np.random.default_rng(0).random(5000) < 0.01
    assert [note for each in above.tolist() if (note := drift.follow(each))] == []


def test_a_drift_is_said_once_and_once_that_it_is_over() -> None:
    drift = Drift(0.01)
    above = [False] * WINDOW + [True, False] * 50 + [False] * 2 * WINDOW
    notes = [note for each in above if (note := drift.follow(each))]
    assert len(notes) == 2
    assert "are rejected, where 2.0 are expected: the images have drifted" in notes[0]
    assert notes[1].startswith("the drift is over")
    assert drift.note is None


def test_a_few_images_tell_nothing() -> None:
    drift = Drift(0.01)
    assert [drift.follow(True) for _ in range(LEAST - 1)] == [None] * (LEAST - 1)
    assert drift.follow(True)
    assert drift.note


def test_more_defects_than_usual_may_be_expected() -> None:
    drift = Drift(0.3)
    rng = np.random.default_rng(1)
    assert not any(drift.follow(bool(rng.random() < 0.3)) for _ in range(2000))

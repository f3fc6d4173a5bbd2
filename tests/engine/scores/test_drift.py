"""Drift: chance is not called one, too many rejected images are, once, and once that it is over."""

import importlib
from typing import Any

import numpy as np
import pytest

from zsad.engine.scores.drift import BEGINS, LEAST, WINDOW, Drift, tail


@pytest.fixture(scope="module")
def stats() -> Any:
    """SciPy's distributions, which take long to import."""
    return importlib.import_module("scipy.stats")


@pytest.mark.parametrize(("above", "normal"), [(0, 99), (4, 30)])
def test_the_tail_is_that_of_what_a_bank_knows(stats: Any, above: int, normal: int) -> None:
    for count in (0, 1, 5, 50):
        expected = stats.betabinom.sf(count - 1, WINDOW, 1 + above, normal - above)
        assert tail(count, WINDOW, above, normal) == pytest.approx(expected, abs=1e-9)
    certain = stats.binom.sf(24, WINDOW, 0.1)  # defects alone, since so large a bank has no false alarms
    assert tail(25, WINDOW, 0, 10**7, 0.1) == pytest.approx(certain, abs=1e-4)


def test_the_tail_of_many_images(stats: Any) -> None:
    for count in (10, 3000, 5000):
        expected = stats.betabinom.sf(count - 1, 5000, 4, 26)
        assert tail(count, 5000, 3, 29) == pytest.approx(expected, abs=1e-6)
    certain = stats.binom.sf(149, 1500, 0.1)  # defects alone
    assert tail(150, 1500, 0, 10**8, 0.1) == pytest.approx(certain, abs=1e-3)


@pytest.mark.parametrize("normal", [20, 99, 250])
def test_chance_goes_beyond_the_limit_as_rarely_as_is_said_whatever_the_bank(stats: Any, normal: int) -> None:
    rng, draws = np.random.default_rng(2), 200_000
    ranks = normal - int(0.01 * (normal + 1))  # the bound is so many of the bank's images from the lowest
    rates = rng.beta(normal + 1 - max(ranks, 1), max(ranks, 1), draws)  # of good images above it, bank by bank
    counts = rng.binomial(WINDOW, rates)
    chances = np.array([tail(count, WINDOW, normal - ranks, normal) for count in range(WINDOW + 1)])
    over = int((chances[counts] < BEGINS).sum())
    assert over <= stats.poisson.ppf(0.999, BEGINS * draws)


def test_chance_is_no_drift() -> None:
    drift = Drift(9, 999)
    above = np.random.default_rng(0).random(5000) < 0.01
    assert [note for each in above.tolist() if (note := drift.follow(each))] == []


def test_a_drift_is_said_once_and_once_that_it_is_over() -> None:
    drift = Drift(9, 999)
    above = [False] * WINDOW + [True, False] * 50 + [False] * 2 * WINDOW
    notes = [note for each in above if (note := drift.follow(each))]
    assert len(notes) == 2
    assert "are rejected, where 2.0 are expected: the images have drifted" in notes[0]
    assert notes[1].startswith("the drift is over")
    assert drift.note is None


def test_a_few_images_tell_nothing() -> None:
    drift = Drift(9, 999)
    assert [drift.follow(True) for _ in range(LEAST - 1)] == [None] * (LEAST - 1)
    assert drift.follow(True)
    assert drift.note


@pytest.mark.slow
def test_more_defects_than_usual_may_be_expected() -> None:
    drift = Drift(0, 9999, 0.3)
    rng = np.random.default_rng(1)
    assert not any(drift.follow(bool(rng.random() < 0.3)) for _ in range(2000))

"""The banks' section of the accuracy benchmark: what banks keep, and rates with their intervals."""

import numpy as np
import pytest

from zsad.bench import accuracy_banks
from zsad.bench.accuracy_banks import every_third, false_alarms, rates, scored_by_bank
from zsad.kernels import reference


def make_tokens(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.random.default_rng(9).normal(size=(2, 16, 12)) + rng.normal(size=(count, 2, 16, 12))).astype(np.float32)


@pytest.mark.slow
def test_a_bank_of_all_patches_scores_as_comparing_with_all_does() -> None:
    known, new = make_tokens(5, 0), make_tokens(2, 1)
    size, scores, maps = scored_by_bank(known, new, 1.0, 56)
    assert size == 5 * 16
    for image, found in zip(new, maps, strict=True):
        expected = reference.mutual_scores(np.concatenate([image[None], known]), (4, 4), (1, 3), (0, 1))[0]
        np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(scores, maps.max(axis=1))  # one patch is 1 % of sixteen
    fewer, _, farther = scored_by_bank(known, new, 0.1, 56)
    assert fewer == 8
    assert (farther >= maps - 2e-3).all()


def test_every_third_row_and_column_is_kept() -> None:
    tokens = np.arange(2 * 25).reshape(2, 1, 25, 1).astype(np.float32)
    assert every_third(tokens)[1, 0, :, 0].tolist() == [25, 28, 40, 43]


def test_rates_are_what_was_counted_between_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_banks, "SPLITS", 10)
    found = rates(20, 20, 0.1)
    assert (found["promised"], found["rejected"]) == (pytest.approx(2 / 21, abs=1e-5), 0.1)
    assert found["low"] == pytest.approx(0.1 - 1.96 * np.sqrt(2 * 0.09 / 200), abs=1e-5)
    assert rates(0, 20, 0.05)["promised"] == pytest.approx(1 / 21, abs=1e-5)


@pytest.mark.slow
def test_normal_images_that_are_alike_are_rarely_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_banks, "SPLITS", 3)
    monkeypatch.setattr(accuracy_banks, "DRAWN", 6)
    found = false_alarms(make_tokens(13, 2)[:, 1:, :9], 0.5)
    assert list(found) == ["0.1", "0.05"]
    assert all(0 <= rate["low"] <= rate["rejected"] <= rate["high"] for rate in found.values())

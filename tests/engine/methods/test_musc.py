"""Mutual scoring as a method: what copies of a picture do to its score, as the limits say."""

import numpy as np
import pytest

from zsad.kernels.mutual_scoring import mutual_scores


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_every_further_copy_takes_its_part_of_the_interval_off_the_score(copies: int) -> None:
    """With 30 % of n − 1 other images averaged, c copies leave 1 − (c − 1) / (0.3 · (n − 1)) of the score of one."""
    rng = np.random.default_rng(0)
    usual = rng.normal(size=(1, 1, 16, 256)) + 0.3 * rng.normal(size=(40, 1, 16, 256))  # [N, L, P, C]
    odd = rng.normal(size=(1, 1, 16, 256))

    def score(count: int) -> float:
        tokens = np.concatenate([usual, np.repeat(odd, count, axis=0)]).astype(np.float32)
        return float(mutual_scores(tokens, degrees=(1,))[-1].max())

    images = len(usual) + copies
    assert score(copies) / score(1) == pytest.approx(1 - (copies - 1) / (0.3 * (images - 1)), abs=0.02)

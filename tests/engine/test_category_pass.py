"""Groups that a category is dealt into, and whose rule gives its verdicts their bounds.

Whole runs are tested as the command makes them, in commands/test_infer.py.
"""

import numpy as np
import pytest

from zsad.engine.category_bounds import Compared, image_bounds
from zsad.engine.category_pass import deal_groups
from zsad.engine.config import load_config
from zsad.engine.methods.method import method_class
from zsad.engine.scores.verdicts import Bounds


@pytest.mark.parametrize("images", [2, 3, 5, 10, 11, 37])
@pytest.mark.parametrize("size", [2, 3, 4, 10])
def test_dealt_groups_hold_every_image_once(images: int, size: int) -> None:
    groups = deal_groups(images, size, seed=0)
    assert sorted(index for group in groups for index in group) == list(range(images))
    assert min(map(len, groups)) >= 2
    assert max(map(len, groups)) <= max(size, 3)  # three images cannot be dealt in pairs
    assert groups == deal_groups(images, size, seed=0)


@pytest.mark.parametrize("images", [1, 9, 10, 40])
def test_whose_rule_speaks(images: int) -> None:
    own, scores = Bounds(0.4, 0.7, "the method's own"), np.linspace(0, 1, images)
    compared = Compared(scores + 0.1, range(images))

    def rule(own: Bounds | None, **asked: float) -> str | None:
        config = load_config("small", overrides=asked, method_of=method_class)
        bounds = image_bounds(config, own, scores, compared)
        return None if bounds is None else bounds.rule

    many = images >= 10
    assert rule(own, threshold=0.5) == rule(None, threshold=0.5) == "--threshold"
    assert rule(own) == own.rule
    assert rule(None) == ("distribution of the scores" if many else None)
    assert rule(None, expected_defects=0.2) == ("--expected-defects 0.2" if many else None)
    assert rule(own, expected_defects=0.2) == ("--expected-defects 0.2" if many else own.rule)

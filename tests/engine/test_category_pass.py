"""Groups that a category is dealt into; whole runs are tested as the command makes them, in commands/test_infer.py."""

import pytest

from zsad.engine.category_pass import deal_groups


@pytest.mark.parametrize("images", [2, 3, 5, 10, 11, 37])
@pytest.mark.parametrize("size", [2, 3, 4, 10])
def test_dealt_groups_hold_every_image_once(images: int, size: int) -> None:
    groups = deal_groups(images, size, seed=0)
    assert sorted(index for group in groups for index in group) == list(range(images))
    assert min(map(len, groups)) >= 2
    assert max(map(len, groups)) <= max(size, 3)  # three images cannot be dealt in pairs
    assert groups == deal_groups(images, size, seed=0)

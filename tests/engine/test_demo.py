"""The drawn data set: its layout, its masks, and that one seed draws one set."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.demo import KINDS, SIZE, draw_demo, draw_image


def read_all(category: Path) -> dict[str, NDArray[np.uint8]]:
    files = sorted(path for path in category.rglob("*") if path.is_file())
    return {
        path.relative_to(category).as_posix(): np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), np.uint8)
        for path in files
    }


@pytest.mark.slow
def test_layout_counts_and_masks(tmp_path: Path) -> None:
    category = draw_demo(tmp_path, seed=0, count=9, defects=5)
    assert category.parent == tmp_path
    pictures = read_all(category)
    tests = [name for name in pictures if name.startswith("test/")]
    defective = [name for name in tests if not name.startswith("test/good/")]
    assert len(tests) == 9
    assert len(defective) == 5
    assert {name.split("/")[1] for name in defective} == set(KINDS)
    masks = {name for name in pictures if name.startswith("ground_truth/")}
    assert masks == {name.replace("test/", "ground_truth/").replace(".png", "_mask.png") for name in defective}
    for name in tests:
        assert pictures[name].shape == (SIZE, SIZE, 3)
    for name in masks:
        assert pictures[name].shape == (SIZE, SIZE)
        assert set(np.unique(pictures[name])) == {0, 255}
        assert 0.0001 < np.mean(pictures[name] > 0) < 0.05


@pytest.mark.slow
def test_one_seed_draws_one_set(tmp_path: Path) -> None:
    first, again, other = (
        read_all(draw_demo(tmp_path / name, seed=seed, count=5, defects=4))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first.keys() == again.keys() == other.keys()
    for name, picture in first.items():
        assert np.array_equal(picture, again[name])
        assert not np.array_equal(picture, other[name])


def test_good_parts_are_alike_but_not_identical() -> None:
    images = [draw_image(np.random.default_rng(seed), None) for seed in range(4)]
    assert all(not mask.any() for _, mask in images)
    small = [cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA).astype(float) for image, _ in images]
    for one, two in itertools.pairwise(small):
        assert 0.5 < np.abs(one - two).mean() < 15
        assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_defect_can_be_seen(kind: str, seed: int) -> None:
    image, mask = draw_image(np.random.default_rng(seed), kind)
    defect = mask > 0
    # A ring around the defect shows what its place would look like; some of the defect must stand out from it.
    ring = (cv2.dilate(mask, np.ones((25, 25), np.uint8)) > 0) & ~defect
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(float)
    if kind == "missing_hole":  # plain metal where the mat would show
        assert np.median(grey[defect]) > 80
    else:
        assert np.abs(grey[defect] - np.median(grey[ring])).mean() > 12


@pytest.mark.parametrize(("count", "defects"), [(3, 4), (3, -1)])
def test_impossible_counts_are_refused(tmp_path: Path, count: int, defects: int) -> None:
    with pytest.raises(ValueError, match="defective images out of 3"):
        draw_demo(tmp_path, count=count, defects=defects)
    assert not any(tmp_path.iterdir())

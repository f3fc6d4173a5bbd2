"""Image scores and RsCIN against the golden arrays and by hand."""

from pathlib import Path

import numpy as np
import pytest

from zsad.engine.scores.image_scores import image_scores, min_max, rscin

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(("name", "side", "size"), [("a", 8, 56), ("b", 6, 42)])
def test_golden_image_scores(golden: Path, name: str, side: int, size: int) -> None:
    arrays = np.load(golden / f"mutual_scoring_{name}.npz")
    patch_scores, grid = arrays["patch_scores"], (side, side)
    np.testing.assert_allclose(
        image_scores(patch_scores, grid, "map_maximum", size), arrays["image_scores_musc"], atol=1e-5
    )
    np.testing.assert_allclose(
        image_scores(patch_scores, grid, "top_two", size), arrays["image_scores_challenge"], atol=1e-5
    )


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_rscin(golden: Path, name: str) -> None:
    arrays = np.load(golden / f"mutual_scoring_{name}.npz")
    checked = 0
    for key in arrays.files:
        if key.startswith("rscin_"):
            _, kind, ks = key.split("_", 2)
            rescored = rscin(
                arrays[f"image_scores_{kind}"], arrays["image_embeddings"], [int(k) for k in ks[1:].split("_")]
            )
            np.testing.assert_allclose(rescored, arrays[key], atol=1e-5)
            checked += 1
    assert checked >= 2


def test_top_fraction_is_the_mean_of_the_highest_percent() -> None:
    scores = RNG.permutation(1000).reshape(1, 1000).astype(float)
    assert image_scores(scores, (10, 100), "top_fraction", 0)[0] == np.mean(np.arange(990, 1000))
    assert image_scores(scores[:, :4], (2, 2), "top_fraction", 0)[0] == scores[0, :4].max()


def test_top_two_of_a_single_patch() -> None:
    assert image_scores([[2.0]], (1, 1), "top_two", 0)[0] == 2.0


def test_min_max_of_equal_values_is_zero() -> None:
    np.testing.assert_array_equal(min_max([3.0, 3.0]), [0, 0])


def test_rscin_by_hand() -> None:
    """Two pairs of identical images: with k = 2 each pair shares its mean."""
    embeddings = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(rscin([0, 2, 4, 4], embeddings, [2]), [0.25, 0.25, 1, 1])
    np.testing.assert_allclose(rscin([0, 2, 4, 4], embeddings, [1]), [0, 0.5, 1, 1])


def test_rscin_with_more_neighbours_than_images_takes_all() -> None:
    scores, embeddings = RNG.random(5), RNG.random((5, 8))
    np.testing.assert_array_equal(rscin(scores, embeddings, [5]), rscin(scores, embeddings, [500]))


@pytest.mark.parametrize(
    ("scores", "embeddings"),
    [
        (np.full(6, 0.4), RNG.random((6, 4))),
        (RNG.random(6), np.zeros((6, 4))),
        (RNG.random(2), np.array([[1.0, 0], [-1.0, 0]])),
        (RNG.random(6), -np.ones((6, 4))),
    ],
)
def test_rscin_stays_finite_and_in_range(scores, embeddings) -> None:
    rescored = rscin(scores, embeddings, [1, 2, 9])
    assert np.isfinite(rescored).all()
    assert rescored.min() >= 0
    assert rescored.max() <= 1


@pytest.mark.parametrize(
    ("embeddings", "ks"), [(np.ones((3, 2)), [1]), (np.ones(4), [1]), (np.ones((4, 2)), [0]), (np.ones((4, 2)), [])]
)
def test_rscin_refuses_what_makes_no_sense(embeddings, ks) -> None:
    with pytest.raises(ValueError, match="must be"):
        rscin(np.arange(4.0), embeddings, ks)

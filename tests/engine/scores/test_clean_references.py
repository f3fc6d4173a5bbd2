"""Clean references against golden arrays, and what must hold of them whatever the images."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.scores.clean_references import CleanScores, Rule, clean_scores, salient_features
from zsad.engine.scores.image_scores import rscin
from zsad.kernels import mutual_scores

RULE = Rule((0.0, 0.3), keep_share=0.5, rounds=3, image_blend=0.25, map_blend=0.5)
GRID = (4, 4)


@pytest.fixture(params=["random", "real"])
def case(request: pytest.FixtureRequest, golden: Path) -> Mapping[str, NDArray[Any]]:
    path = golden / "clean_references.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not part of the repository")
    with np.load(path) as arrays:
        prefix = f"{request.param}_"
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def test_every_intermediate_is_the_golden_one(case: Mapping[str, NDArray[Any]]) -> None:
    scores = clean_scores(np.stack([case["minima"], case["minima_degree1"]]), RULE)
    found = {
        "first_pass": scores.first_pass,
        "A": scores.average,
        "A1": scores.average_smallest,
        "H": scores.clean,
        "H1": scores.clean_smallest,
        "patch_map": scores.patch_maps,
        "image_score_before": scores.image_scores,
        "top_patch": scores.salient,
        "keep": scores.rounds[-1].kept,
    }
    for number, one in enumerate(scores.rounds, 1):
        found[f"round{number}_image_score"] = one.image_scores
        found[f"round{number}_keep"] = one.kept
        found[f"round{number}_patch_scores"] = one.patch_scores
    for name, array in found.items():
        np.testing.assert_allclose(array, case[name], atol=1e-5, err_msg=name)
    features = salient_features(case["tokens"][np.arange(len(case["tokens"])), :, scores.salient])
    np.testing.assert_allclose(features, case["features"], atol=1e-5)
    np.testing.assert_allclose(rscin(scores.image_scores, features, (1, 7)), case["image_score"], atol=1e-5)


def make_tokens(images: int, odd: int = 3, seed: int = 0) -> NDArray[np.float32]:
    """Tokens [N, 2, 16, 24] that share structure; the last images have a patch of their own."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(1, 2, 16, 24)) + 0.4 * rng.normal(size=(images, 2, 16, 24))
    tokens[images - odd :, :, 5] = 3 * rng.normal(size=(odd, 2, 24))
    return tokens.astype(np.float32)


def scored(tokens: NDArray[np.float32], rule: Rule = RULE, **options: Any) -> CleanScores:
    _, minima = mutual_scores(tokens, GRID, (1, 3), rule.interval, return_minima="smallest degree", **options)
    return clean_scores(minima, rule)


def test_images_with_a_defect_are_not_kept_and_stand_out() -> None:
    scores = scored(make_tokens(20))
    assert not scores.rounds[-1].kept[-3:].any()
    assert scores.rounds[-1].kept.sum() == 10
    assert set(np.argsort(scores.image_scores)[-3:]) == {17, 18, 19}
    assert (scores.salient[-3:] == 5).all()


@pytest.mark.parametrize("rule", [RULE, Rule((0.1, 0.6), 0.3, 1, 1.0, 1.0)])
def test_the_order_of_the_images_changes_nothing(rule: Rule) -> None:
    tokens, order = make_tokens(15), np.random.default_rng(3).permutation(15)
    scores, again = scored(tokens, rule), scored(tokens[order], rule)
    np.testing.assert_array_equal(again.rounds[-1].kept, scores.rounds[-1].kept[order])
    np.testing.assert_allclose(again.patch_maps, scores.patch_maps[order], atol=1e-6)
    np.testing.assert_allclose(again.image_scores, scores.image_scores[order], atol=1e-6)
    np.testing.assert_array_equal(again.salient, scores.salient[order])


@pytest.mark.parametrize("seed", range(4))
def test_another_image_never_raises_the_nearest_distances(seed: int) -> None:
    """Of a count of nearest images; a mean over a share of them grows with the images that it takes in."""
    tokens = make_tokens(14, seed=seed)
    rule = Rule((0, 4), 0.5, 3, 0.0, 0.0)
    fewer, more = scored(tokens[:13], rule), scored(tokens, rule)
    assert (more.average[:13] <= fewer.average + 1e-6).all()
    assert (more.patch_maps[:13] <= fewer.patch_maps + 1e-6).all()


def test_whatever_the_memory_limit_the_scores_are_the_same() -> None:
    tokens = make_tokens(14)
    expected, plans = scored(tokens), []
    for limit in (45_000, 100_000):
        found = scored(tokens, memory_limit=limit, on_plan=plans.append)
        np.testing.assert_array_equal(found.patch_maps, expected.patch_maps)
        np.testing.assert_array_equal(found.image_scores, expected.image_scores)
    assert not plans[0].returned_in_memory


def test_known_good_images_are_always_kept_and_not_scored() -> None:
    tokens = make_tokens(16)
    scores = scored(tokens, references=4)  # three of them the odd ones
    assert scores.patch_maps.shape == (12, 16)
    assert scores.rounds[-1].kept.sum() == 6 + 4
    assert scores.rounds[-1].kept[12:].all()


@pytest.mark.parametrize(("known", "kept"), [(0, 2), (1, 2), (4, 4)])
def test_at_least_two_are_kept_known_good_ones_among_them(known: int, kept: int) -> None:
    _, minima = mutual_scores(
        make_tokens(12 + known), GRID, (1, 3), RULE.interval, references=known, return_minima="smallest degree"
    )
    scores = clean_scores(minima, replace(RULE, keep_share=0.01))
    assert scores.rounds[-1].kept.sum() == kept


def test_few_images_are_references_of_each_other() -> None:
    scores = scored(make_tokens(9))
    assert not scores.rounds
    np.testing.assert_array_equal(scores.clean, scores.average)
    np.testing.assert_array_equal(scores.patch_maps, scores.average_smallest)
    assert scores.salient[-1] == 5


def test_features_of_patches_without_length() -> None:
    features = salient_features(np.array([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]]))
    np.testing.assert_allclose(features * np.sqrt(2), [[0.6, 0.8, 0, 0], [1, 0, 0, 1]])


@pytest.mark.parametrize("known", [0, 1, 5])
def test_known_good_images_count_the_more_by_themselves_the_more_they_are(known: int) -> None:
    minima = mutual_scores(make_tokens(14), GRID, (1, 3), references=known, return_minima="smallest degree")[1]
    found = clean_scores(minima, RULE)
    blended = found.average_smallest + 0.5 * (found.clean_smallest - found.average_smallest)
    if known < 2:
        np.testing.assert_array_equal(found.patch_maps, blended)
        return
    nearest = minima[1][..., -known:].min(axis=-1)  # three tenths of five are one
    np.testing.assert_allclose(found.patch_maps, 0.8 * blended + 0.2 * nearest, atol=1e-6)
    # Scored as an image, a known-good one is compared with the others.
    every = mutual_scores(make_tokens(14), GRID, (1, 3), return_minima="smallest degree")[1]
    both = clean_scores(every, RULE, known=known)
    np.testing.assert_allclose(both.patch_maps[:-known], found.patch_maps, atol=1e-6)
    assert np.isfinite(both.image_scores).all()

"""Metrics against scikit-learn, brute force over all thresholds, and stored values of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from clip_checkpoints import text_arrays
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zsad.engine.evaluation import metrics
from zsad.engine.evaluation.metrics import aupro, image_metrics, pixel_metrics

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "metrics_a.npz"
DECIMALS = [pytest.param(2, id="many ties"), pytest.param(6, id="few ties")]


def sklearn_metrics(labels: NDArray[Any], scores: NDArray[Any]) -> dict[str, float]:
    oracle = pytest.importorskip("sklearn.metrics")
    precision, recall, _ = oracle.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {
        "auroc": oracle.roc_auc_score(labels, scores),
        "ap": oracle.average_precision_score(labels, scores),
        "f1": f1.max(),
    }


def brute_force_aupro(masks: list[NDArray[Any]], maps: list[NDArray[Any]], limit: float) -> float:
    """Every distinct score as a threshold, every region counted on its own, the curve cut at the limit."""
    thresholds = np.unique(np.concatenate([map_.ravel() for map_ in maps]))[::-1]
    regions = []
    for mask, map_ in zip(masks, maps, strict=True):
        count, region = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [map_[region == label] for label in range(1, count)]
    normal = np.concatenate([map_[mask == 0] for mask, map_ in zip(masks, maps, strict=True)])
    rates, overlaps = [0.0], [0.0]
    for threshold in thresholds:
        rates.append(np.mean(normal >= threshold))
        overlaps.append(np.mean([np.mean(region >= threshold) for region in regions]))
    area = 0.0
    for left, right, low, high in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if left < limit:
            end = min(right, limit)
            at_end = low + (high - low) * (end - left) / (right - left) if right > left else high
            area += (end - left) * (low + at_end) / 2
    return area / limit


def random_images(
    seed: int, count: int, decimals: int, sizes: list[tuple[int, int]] | None = None
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    masks, maps = [], []
    for index in range(count):
        size = sizes[index % len(sizes)] if sizes else (24, 24)
        noise = cv2.GaussianBlur(rng.normal(size=size), (0, 0), 2)
        mask = (noise > np.quantile(noise, 0.93)).astype(np.uint8) * (index != 0)
        maps.append(np.round(rng.normal(size=size) + mask, decimals).astype(np.float32))
        masks.append(mask.astype(np.uint8))
    return masks, maps


scores_with_ties = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2, max_size=60)
any_scores = st.lists(
    st.tuples(st.integers(0, 1), st.floats(allow_nan=False, allow_infinity=False, width=32)), min_size=2, max_size=60
)


@pytest.mark.slow
@given(scores_with_ties | any_scores)
def test_image_metrics_equal_sklearn(pairs: list[tuple[int, float]]) -> None:
    labels, scores = np.array([label for label, _ in pairs]), np.array([float(score) for _, score in pairs])
    found = image_metrics(labels, scores)
    if labels.min() == labels.max():
        assert all(np.isnan(value) for value in found.values())
    else:
        assert found == pytest.approx(sklearn_metrics(labels, scores), abs=1e-12)


@pytest.mark.slow
@given(any_scores, st.sampled_from([np.float32, np.float64]))
def test_counts_are_exact_for_any_scale(pairs: list[tuple[int, float]], dtype: type[np.floating[Any]]) -> None:
    values = np.array([value for role, value in pairs if role == 0], np.float32)
    thresholds = np.sort(np.array([value for role, value in pairs if role == 1], dtype))
    if thresholds.size == 0:
        return
    above, at_least = metrics._count_beyond([values[::2], values[1::2]], thresholds)
    np.testing.assert_array_equal(above, [(values.astype(np.float64) > t).sum() for t in thresholds])
    np.testing.assert_array_equal(at_least, [(values.astype(np.float64) >= t).sum() for t in thresholds])


def test_constant_scores_are_chance() -> None:
    found = image_metrics([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5])
    assert found == pytest.approx({"auroc": 0.5, "ap": 0.5, "f1": 2 / 3})


@pytest.mark.parametrize("decimals", DECIMALS)
@pytest.mark.parametrize("piece", [100, 4_000_000])
def test_pixel_metrics_equal_sklearn(decimals: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PIECE_PIXELS", piece)
    masks, maps = random_images(0, 6, decimals, [(20, 31), (44, 12)])
    labels, scores = (np.concatenate([array.ravel() for array in arrays]) for arrays in (masks, maps))
    found = pixel_metrics(masks, maps)
    assert found.pop("aupro") == aupro(masks, maps)
    assert found == pytest.approx(sklearn_metrics(labels, scores), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("decimals", DECIMALS)
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_exact_aupro_equals_brute_force(decimals: int, limit: float) -> None:
    masks, maps = random_images(1, 5, decimals, [(18, 25), (30, 14)])
    assert aupro(masks, maps, limit) == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-12)


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_exact_aupro_equals_brute_force_with_ties_at_the_limit(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    masks = [(rng.random((5, 6)) < 0.3).astype(np.uint8) for _ in range(2)]
    masks[0].flat[:2] = 0, 1
    maps = [rng.integers(0, 4, (5, 6)).astype(np.float32) for _ in range(2)]
    assert aupro(masks, maps, limit) == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-12)


def test_aupro_of_perfect_and_inverted_maps() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 2:4] = mask[4, 4] = 1
    assert aupro([mask], [mask.astype(np.float32)]) == pytest.approx(1.0)
    assert aupro([mask], [1 - mask.astype(np.float32)]) == pytest.approx(0.0)


def test_aupro_weighs_regions_alike_and_joins_diagonal_neighbours() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[0:4, 0:4] = mask[4, 4] = 1  # touches by a corner: one region of 17 pixels
    mask[8, 8] = 1
    found = np.zeros((10, 10), np.float32)
    found[8, 8] = 1
    found[mask == 0] = 0.5
    # The small region is found before any normal pixel, the large one after all of them.
    assert aupro([mask], [found]) == pytest.approx(0.5)


def test_more_regions_than_small_numbers_count() -> None:
    masks = np.zeros((1, 520, 520), np.uint8)
    masks[:, ::2, ::2] = 1  # 67,600 regions
    maps = masks.astype(np.float32)
    maps[0, 0, 0] = 0  # one is found last, with all that is normal
    assert aupro(masks, maps) == pytest.approx(1 - 1 / 67_600 + 0.5 * 0.3 / 67_600, abs=1e-9)


def test_steps_approach_the_exact_curve_where_it_reaches_the_limit() -> None:
    masks, maps = random_images(2, 8, 6)
    # The variant rescales by the range its own points cover, so it converges to the exact area only to that range.
    assert aupro(masks, maps, steps=20_000) == pytest.approx(aupro(masks, maps), abs=2e-3)


def test_golden_values() -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"no reference values at {GOLDEN}")
    with np.load(GOLDEN) as golden:
        image = image_metrics(golden["gt_image"], golden["pred_image"])
        pixel = pixel_metrics(golden["gt_pixel"], golden["pred_pixel"], 0.3, aupro_steps=200)
        assert [image[key] for key in ("auroc", "f1", "ap")] == pytest.approx(golden["image_auroc_f1_ap"], abs=1e-9)
        expected = golden["pixel_auroc_f1_ap_aupro"]
        assert [pixel[key] for key in ("auroc", "f1", "ap", "aupro")] == pytest.approx(expected, abs=1e-6)
        assert aupro(golden["gt_pixel"], golden["pred_pixel"], steps=200) == pixel["aupro"]


@pytest.mark.parametrize(
    ("metrics_of", "map_", "score"),
    [
        ("zero", "zero_map", "zero_image_score"),
        ("few1", "few1_combined_map", "few1_image_score"),
        ("few2", "few2_combined_map", "few2_image_score"),
        ("fake", "fake_map", "zero_image_score"),
    ],
)
def test_april_gans_golden_values(metrics_of: str, map_: str, score: str) -> None:
    arrays = text_arrays("april")
    for number, expected in enumerate(arrays[f"{metrics_of}_metrics"][:2]):
        of_class = arrays["class_index"] == number
        pixel = pixel_metrics(arrays["ground_truth"][of_class], arrays[map_][of_class], aupro_steps=200)
        image = image_metrics(arrays["anomaly"][of_class], arrays[score][of_class])
        found = [
            *(pixel[key] for key in ("auroc", "f1", "ap", "aupro")),
            *(image[key] for key in ("auroc", "f1", "ap")),
        ]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mask", [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)], ids=["normal", "anomalous"])
def test_one_class_is_nan(mask: NDArray[np.uint8]) -> None:
    found = pixel_metrics([mask], [np.arange(16, dtype=np.float32).reshape(4, 4)])
    assert all(np.isnan(value) for value in found.values())
    assert set(found) == {"auroc", "ap", "f1", "aupro"}


def test_nothing_is_nan() -> None:
    assert all(np.isnan(value) for value in {**pixel_metrics([], []), **image_metrics([], [])}.values())


def test_constant_maps_have_no_steps() -> None:
    mask = np.eye(4, dtype=np.uint8)
    constant = np.ones((4, 4), np.float32)
    assert np.isnan(aupro([mask], [constant], steps=200))
    assert aupro([mask], [constant], 0.3) == pytest.approx(0.15)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_mask_types(dtype: type) -> None:
    masks, maps = random_images(3, 3, 6)
    assert pixel_metrics([mask.astype(dtype) for mask in masks], maps) == pixel_metrics(np.stack(masks), np.stack(maps))


def test_double_precision_maps_keep_their_order() -> None:
    labels, close = np.array([[0, 1]]), np.array([[1.0, 1.0 + 1e-12]])
    assert pixel_metrics([labels], [close])["auroc"] == 1.0


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        (np.zeros((2, 4, 4)), np.zeros((3, 4, 4)), "2 masks and 3 maps"),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 5)), r"mask 0 is \(4, 4\), its map \(4, 5\)"),
        (np.zeros((4, 4)), np.zeros((4, 4)), r"both must be \[H, W\]"),
        (np.full((1, 4, 4), 255), np.zeros((1, 4, 4)), "only 0 .* and 1"),
        (np.zeros((1, 4, 4)), np.full((1, 4, 4), np.nan), "map 0 holds NaN or infinity"),
        (np.zeros((1, 4, 4)), np.full((1, 4, 4), np.inf), "map 0 holds NaN or infinity"),
    ],
)
def test_pixel_errors(masks: NDArray[Any], maps: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixel_metrics(masks, maps)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, float("nan")])
def test_limit_errors(limit: float) -> None:
    with pytest.raises(ValueError, match="false-positive rate"):
        aupro([np.eye(3)], [np.eye(3)], limit)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "one length"),
        ([[0, 1]], [[0.1, 0.2]], "one-dimensional"),
        ([0, 2], [0.1, 0.2], "only 0 .* and 1"),
        ([0, 1], [0.1, float("nan")], "score 1 is not finite"),
    ],
)
def test_image_errors(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_metrics(labels, scores)

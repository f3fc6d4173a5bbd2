"""The accuracy benchmark, small: what it keeps, draws, plants and judges, and all of it from pictures to records."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from zsad.bench import accuracy, accuracy_banks, accuracy_known
from zsad.bench.accuracy_batches import SIDE, Batch, drawn_defect, planted, resized
from zsad.engine.evaluation.metrics import image_metrics
from zsad.kernels.mutual_scoring import mutual_scores

TAPS, DEGREES = (5, 8), (1, 3)


def make_batch(images: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(images, 2, 16, 12)).astype(np.float32)
    each = mutual_scores(tokens, (4, 4), DEGREES, return_minima="each")[1]
    return Batch(tokens, tokens[:, 0, 0], each, TAPS, DEGREES)


def test_a_part_of_a_batch_is_as_if_it_had_been_compared_alone() -> None:
    members = [0, 3, 4, 9]
    batch = make_batch(12)
    alone = mutual_scores(batch.tokens[members], (4, 4), DEGREES, return_minima="each")
    part = batch.of(members)
    np.testing.assert_allclose(part.each, alone[1], atol=1e-6)
    np.testing.assert_allclose(accuracy.small(part, 56).maps, alone[0], atol=1e-6)


def test_known_good_images_are_compared_with_and_not_scored() -> None:
    members, known = [1, 2, 6], [7, 0]
    batch = make_batch(9)
    alone = mutual_scores(batch.tokens[members + known], (4, 4), DEGREES, references=2)
    part = batch.of(members, known)
    np.testing.assert_allclose(accuracy.small(part, 56).maps, alone, atol=1e-6)
    assert len(next(accuracy.clean_rows(part, (0.25,))).images) == len(members)


def test_masks_stay_in_place_when_they_are_resized() -> None:
    mask = np.zeros((3 * SIDE, 5 * SIDE), np.bool_)
    mask[301:-301, 501:-501] = True
    small = resized(mask)
    np.testing.assert_array_equal(small, small[::-1, ::-1])
    assert small.any()


def test_chosen_taps_and_degrees() -> None:
    batch = make_batch(5)
    np.testing.assert_array_equal(batch.minima((8,), (3,)), batch.each[1:, 1:])
    np.testing.assert_array_equal(batch.tokens_of((8,)), batch.tokens[:, 1:])


def test_anomaly_dino_averages_the_nearest_of_all_patches() -> None:
    batch = make_batch(6)
    cosine = np.square(batch.each, dtype=np.float64).mean(axis=(0, 1)) / 2
    # A thousandth of 5 · 16 patches is none, so the nearest alone counts.
    np.testing.assert_allclose(accuracy.anomaly_dino(batch, 56).maps, cosine.min(axis=-1))


def test_intervals_lie_around_the_value() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3 == 0
    scores = {"all": rng.normal(size=60), "better": rng.normal(size=60) + 1.5 * labels, "sure": labels + 0.0}
    drawn = accuracy.bootstrap(labels, scores, 400, 0)
    for name, values in scores.items():
        low, high = accuracy.percentiles(drawn[name])
        assert low - 1e-9 <= image_metrics(labels, values)["auroc"] <= high + 1e-9
    np.testing.assert_allclose(drawn["sure"], 1)
    metrics = {name: {"image_auroc": image_metrics(labels, values)["auroc"]} for name, values in scores.items()}
    found = accuracy.intervals({"a": drawn, "b": drawn}, {"a": metrics, "b": metrics}, 0)
    assert found["all"] == {"images": [0, 0], "sets": [0, 0]}
    assert found["better"]["images"][0] > 0
    assert found["better"]["sets"] == [round(metrics["better"]["image_auroc"] - metrics["all"]["image_auroc"], 5)] * 2


@pytest.mark.parametrize(("share", "bad"), [(0.2, 10), (0.08, 3), (0.9, 25)])
def test_draws_have_the_share_asked_for_as_far_as_it_goes(share: float, bad: int) -> None:
    anomalous = np.arange(65) >= 40
    members = accuracy.draw(anomalous, share, np.random.default_rng(0))
    assert anomalous[members].sum() == bad
    assert (~anomalous)[members].sum() == 40
    assert len(set(members)) == len(members)


def test_a_defect_is_planted_where_it_was() -> None:
    source, target = Image.new("RGB", (40, 20), (250, 0, 0)), Image.new("RGB", (80, 60), (0, 0, 200))
    where = Image.new("L", (40, 20))
    ImageDraw.Draw(where).rectangle((10, 5, 19, 9), 255)
    result = np.asarray(planted(target, (source, where)))
    assert result.shape == (60, 80, 3)
    assert tuple(result[21, 30]) == (250, 0, 0)
    assert tuple(result[50, 70]) == tuple(result[21, 60]) == (0, 0, 200)


def test_drawn_defects_differ() -> None:
    first, second = (np.asarray(drawn_defect(seed)[1]) for seed in (0, 1))
    assert 0 < (first > 0).mean() < 0.05
    assert (first != second).any()


@pytest.mark.parametrize("rule", ["otsu", "two gaussians"])
def test_rules_that_split_find_the_gap(rule: str) -> None:
    rng = np.random.default_rng(0)
    logs = np.concatenate([rng.normal(0, 0.1, 30), rng.normal(2, 0.1, 20)])
    assert 0.4 < accuracy.RULES[rule](logs) < 1.6


def test_rules_that_count_deviations() -> None:
    logs = np.log([1.0, 2.0, 3.0, 4.0, 5.0])
    assert accuracy.RULES["lower half"](logs) == pytest.approx(np.log(3 + 3 * 1.4826))
    deviation = 1.4826 * np.median(np.abs(logs - np.log(3)))
    assert accuracy.RULES["2.5 deviations"](logs) == pytest.approx(np.log(3) + 2.5 * deviation)


def test_verdicts_are_judged() -> None:
    labels = np.array([True, True, True, False, False])
    found = accuracy.judged(labels, np.array([3.0, 2, 0, 1, 0]), np.array([True, False, False, True, False]))
    assert found == pytest.approx({"f1": 0.4, "false_alarms": 0.5, "recall": 1 / 3, "best_f1": 0.8})
    none = accuracy.judged(np.zeros(2, bool), np.zeros(2), np.array([True, False]))
    assert none["false_alarms"] == 0.5
    assert np.isnan([none["recall"], none["best_f1"]]).all()


def draw_set(root: Path, masks: bool) -> None:
    """Draw eleven normal pictures and six with a bright square."""
    rng = np.random.default_rng(0)
    for number in range(17):
        kind = "good" if number < 11 else "spot"
        picture = Image.fromarray(rng.integers(90, 120, (40, 48, 3), np.uint8))
        mask = Image.new("L", picture.size)
        if kind == "spot":
            box = (number, number, number + 6 + number % 3, number + 8)
            ImageDraw.Draw(picture).rectangle(box, (250, 250, 250))
            ImageDraw.Draw(mask).rectangle(box, 255)
        for folder, image, name in [("test", picture, f"{number}.png"), ("ground_truth", mask, f"{number}_mask.png")]:
            if folder == "test" or (masks and kind == "spot"):
                (root / folder / kind).mkdir(parents=True, exist_ok=True)
                image.save(root / folder / kind / name)


@pytest.mark.long
def test_every_section_is_recorded(
    random_dinov2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(accuracy_banks, "SPLITS", 5)
    monkeypatch.setattr(accuracy_known, "SPLITS", 5)
    draw_set(tmp_path / "sets" / "masked", masks=True)
    draw_set(tmp_path / "sets" / "bare", masks=False)
    output, checkpoint = tmp_path / "out.jsonl", random_dinov2(width=64, depth=12)
    arguments = ["--checkpoint", str(checkpoint), "--image-size", "70", "--draws", "50", "--output", str(output)]
    assert accuracy.main([str(tmp_path / "sets"), *arguments]) == 0
    records = {record["section"]: record for record in map(json.loads, output.read_text("utf-8").splitlines())}
    assert list(records) == list(accuracy.SECTIONS)
    assert str(tmp_path) not in output.read_text("utf-8")
    methods = records["methods"]["sets"]
    assert all(("pixel_ap" in row) == (name == "masked") for name, of_set in methods.items() for row in of_set.values())
    assert methods["bare"]["all"]["image_auroc"] == records["contamination"]["sets"]["bare"]["all"]["all"][0]
    assert records["pooling"]["sets"]["masked"]["musc"] == methods["masked"]["musc"]
    windows = records["windows"]["sets"]["masked"]
    assert list(windows) == ["None", "8", "4", "2"]
    assert windows["None"]["all"] == windows["8"]["all"] == methods["masked"]["all"]  # there are 5 × 5 patches
    assert windows["None"] != windows["2"]
    precisions = records["precisions"]["sets"]["masked"]
    assert precisions["pair"] == round(1 / (11 * 6), 6)
    ways = precisions["rows"]["maximum"]
    assert {"fp32", "ONNX Runtime int8", "fp32, images mirrored"} <= set(ways)
    assert all(found.get("correlation", 1) > 0.9 for found in ways.values())
    assert set(ways["fp32"]) == {"image_auroc", "pixel_ap"}
    known = records["known"]["sets"]["bare"]
    assert list(known) == ["0", "1", "4"]  # of eleven normal images five are drawn
    assert {len(values) for values in known["4"].values()} == {3}
    bounds = records["bounds"]["sets"]["bare"]
    assert (bounds["known"], bounds["promised"]) == (1, 0.5)  # ten of eleven are judged
    assert [("recall" in rate) for rate in bounds["shares"].values()] == [False, True, True]
    assert {len(values) for values in records["planted"]["sets"]["masked"]["0.4"].values()} == {3}
    assert records["verdicts"]["sets"]["bare"]["0 %"]["otsu"][0]["recall"] is None
    assert records["verdicts"]["sets"]["bare"]["0 %"]["expected review"][0]["false_alarms"] == 0

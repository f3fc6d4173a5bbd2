"""Mutual scoring as a method: known-good images beside those of a category, and what copies do, as the limits say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from runs import draw

from zsad.engine.config import ConfigError, load_config
from zsad.engine.images.loader import Batch
from zsad.engine.images.references import References, find_references
from zsad.engine.methods.arrays import HostArrays
from zsad.engine.methods.method import Group, Place, Scored, method_class
from zsad.engine.methods.musc import FEW_IMAGES, MuSc
from zsad.engine.networks.network import Network, TensorSpec
from zsad.engine.scores.clean_references import CleanScores, Rule, clean_scores, salient_features
from zsad.engine.scores.image_scores import min_max, rscin
from zsad.engine.scores.known_good import HALF_UNLIKE
from zsad.kernels import reference
from zsad.kernels.mutual_scoring import mutual_scores

GRID, CHANNELS = (3, 3), 24
SPLITS = int(os.environ.get("ZSAD_SPLITS", "50"))  # of good images, whose false alarms are counted


class Tower:
    """A graph whose inputs are their own outputs; with a number some channels of them are others."""

    largest_batch = 3

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.inputs = {"images": TensorSpec((2, 9, CHANNELS), np.dtype(np.float32))}
        self.outputs = {"tokens": self.inputs["images"], "embedding": TensorSpec((CHANNELS,), np.dtype(np.float32))}
        self.rows = 0

    def run(self, inputs: Any) -> dict[str, NDArray[np.float32]]:
        self.rows += len(inputs["images"])
        return {"tokens": mixed(inputs["images"], self.number), "embedding": inputs["images"][:, 0, 0] * np.float32(1)}


def mixed(tokens: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    return tokens + number * np.roll(tokens, number, axis=-1) ** 2


class Run:
    """A method that is given tokens as images."""

    def __init__(self, preset: str = "small", **overrides: Any) -> None:
        overrides = {"image_size": 42, "references": "all", **overrides}
        config = load_config(preset, overrides=overrides, method_of=method_class)
        self.tower, self.timings = Tower(), {}
        # The first network's tokens are the images themselves, the other's another mixture of their channels.
        networks = {
            name: Network(spec, "tiny", "", "dinov2", {"image": Tower(number) if number else self.tower})
            for number, (name, spec) in enumerate(config.networks.items())
        }
        place = Place(networks, HostArrays((), None), self.timings, None)  # type: ignore[arg-type]
        self.stages: set[str] = set()
        self.method = MuSc(config, place)

    def batches(self, tokens: NDArray[np.float32], members: Sequence[int], size: int = 4) -> Any:
        for start in range(0, len(members), size):
            indices = list(members[start : start + size])
            yield Batch(indices, {self.method.inputs[0]: tokens[indices]}, [])

    def scored(
        self, images: NDArray[np.float32], known: NDArray[np.float32], groups: Sequence[Sequence[int]], lost: int = 0
    ) -> list[Scored]:
        """Score groups of images; lost: how many more the first group and the references were to have."""
        found: list[Scored] = []
        for number, members in enumerate(groups):
            references = self.batches(known, range(len(known)))
            count, kept = len(known) + lost, len(members) + lost
            self.method.start(Group(kept, "part", references, count, "parts", number, len(groups)))
            for batch in self.batches(images, members):
                assert not list(self.method.take(batch))
            found += self.method.finish(lambda stage, *_: self.stages.add(stage))
        return sorted(found, key=lambda image: image.index)


def make_tokens(count: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(9).normal(size=(1, 2, 9, CHANNELS))
    return (shared + 0.5 * rng.normal(size=(count, 2, 9, CHANNELS))).astype(np.float32)


def expected(images: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float64]:
    return reference.mutual_scores(np.concatenate([images, known]), GRID, (1, 3), (0.0, 0.3), len(known))


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize(("images", "known"), [(12, 0), (12, 1), (12, 5), (1, 1), (1, 12), (4, 3)])
def test_images_are_scored_with_known_good_ones_beside_them(images: int, known: int, lost: int) -> None:
    x, y, run = make_tokens(images), make_tokens(known, 1), Run()
    found = run.scored(x, y, [range(images)], lost)
    assert [image.index for image in found] == list(range(images))
    maps = np.array([image.map.ravel() for image in found])
    np.testing.assert_allclose(maps, expected(x, y), atol=1e-4)
    np.testing.assert_allclose([image.raw_score for image in found], maps.max(axis=1), atol=1e-6)
    assert run.tower.rows == images + known


def test_every_group_meets_all_references_which_run_once() -> None:
    x, y, run = make_tokens(11), make_tokens(3, 1), Run()
    groups = [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8)]
    maps = np.array([image.map.ravel() for image in run.scored(x, y, groups)])
    for members in groups:
        np.testing.assert_allclose(maps[list(members)], expected(x[list(members)], y), atol=1e-4)
    assert run.tower.rows == 11 + 3
    assert run.method.map_range is None  # of the category there are enough
    assert not any("known-good" in stage for stage in run.stages)  # so that nothing is measured by the references
    again = run.scored(x, make_tokens(0), groups)  # another category, without references
    np.testing.assert_allclose(again[2].map.ravel(), expected(x[[2, 5, 8]], y[:0])[0], atol=1e-4)


def test_few_images_in_groups_are_measured_when_all_are_scored() -> None:
    run = Run()
    run.scored(make_tokens(5), make_tokens(3, 1), [(0, 2), (1, 3), (4,)])
    assert run.method.map_range is not None


@pytest.mark.parametrize("known", [2, 5, FEW_IMAGES + 3])
def test_few_images_are_measured_by_what_known_good_ones_come_to_by_each_other(known: int) -> None:
    x, y, run = make_tokens(3), make_tokens(known, 1), Run()
    x[1, :, 4] *= -2
    found = run.scored(x, y, [range(3)])
    measured = min(known, FEW_IMAGES)
    yard = expected(y[:measured], y[measured:])
    low, high = yard.min(), yard.max()
    assert run.method.map_range == pytest.approx((low, 2 * high - low), abs=1e-4)
    assert not run.method.rescores
    scores = run.method.image_scores(found)
    np.testing.assert_allclose(scores, expected(x, y).max(axis=1) / (2 * yard.max()), atol=1e-4)
    assert scores[1] > 0.55 > scores[[0, 2]].max()
    alone = Run()
    (single,) = alone.scored(x[1:2], y, [range(1)])
    assert alone.method.image_scores([single])[0] > 0.55


@pytest.mark.parametrize("copies", [1, 4])
def test_one_known_good_image_gives_no_calibration(copies: int) -> None:
    x, run = make_tokens(1), Run()
    y = np.repeat(make_tokens(1, 1), copies, axis=0)
    found = run.scored(x, y, [range(1)])
    assert run.method.map_range == (0.0, 2 * HALF_UNLIKE)
    assert run.method.bounds() is None
    said = run.method.note()
    assert said is not None
    assert "1 has nothing in common with the known-good image" in said
    np.testing.assert_allclose(run.method.image_scores(found), expected(x, y).max(axis=1) / np.sqrt(2), atol=1e-4)


@pytest.mark.parametrize("images", [1, 3])
def test_few_images_with_clean_references_are_measured_by_known_good_ones_all_of_which_are_kept(images: int) -> None:
    x, y, run = make_tokens(images), make_tokens(12, 1), Run(references="blended")
    found = run.scored(x, y, [range(images)])
    minima = reference.patch_minima(y, GRID, (1, 3), 12 - FEW_IMAGES)  # [L, R, n, P, 12]
    average, smallest = (
        reference.interval_average(of, (0.0, 0.3)) for of in (minima.mean(axis=(0, 1)), minima[:, 0].mean(axis=0))
    )
    half = (average.max(axis=1) + smallest.max(axis=1)).max()  # the highest hundredth of nine patches is one
    scores = run.method.image_scores(found)
    np.testing.assert_allclose(scores, [image.raw_score / (2 * half) for image in found], atol=1e-4)
    assert run.method.map_range == pytest.approx((smallest.min(), 2 * smallest.max() - smallest.min()), abs=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_known_good_images_are_scored_as_images_are_for_bounds(groups: int) -> None:
    x, y, run = make_tokens(12), make_tokens(10, 1), Run()
    members = [range(12)[number::groups] for number in range(groups)]
    found = run.scored(x, y, members)
    raw = np.array([image.raw_score for image in found])
    assert run.method.image_scores(found).max() == 1
    bounds = run.method.bounds()
    assert bounds is not None
    assert "at most 9.09 % of good images are rejected" in bounds.rule
    beside = [expected(np.concatenate([x[list(group)], y]), y[:0])[-10:] for group in members]  # as if all were images
    highest = max(maps.max() for maps in beside)
    assert bounds.accept == bounds.reject == pytest.approx(min((highest - raw.min()) / np.ptp(raw), 1), abs=1e-4)
    run.scored(x, y[:8], members)
    assert run.method.bounds() is None  # the highest of eight promises no tenth


@pytest.mark.parametrize("groups", [[range(1)], [range(4)], [(0, 2), (1, 3)]])
@pytest.mark.parametrize("references", ["all", "blended"])
def test_bounds_of_few_images_follow_from_known_good_ones_too(references: str, groups: list[Sequence[int]]) -> None:
    x, y, run = make_tokens(4), make_tokens(19, 1), Run(references=references, false_alarms=0.05)
    x[0, :, 4] *= -2
    found = run.scored(x, y, groups)
    scores, bounds = run.method.image_scores(found), run.method.bounds()
    assert bounds is not None
    assert bounds.rule.startswith("at most 5 % of good images are rejected")
    assert bounds.region == 0.5
    assert bounds.verdict(scores[0]) == "reject"
    if references == "all":
        half = expected(y[:FEW_IMAGES], y[FEW_IMAGES:]).max()
        # As if all were images.
        beside = [expected(np.concatenate([x[list(group)], y]), y[:0])[-19:] for group in groups]
        assert bounds.reject == pytest.approx(max(maps.max() for maps in beside) / (2 * half), abs=1e-4)
    fewer = run.scored(x, y[:8], groups)
    run.method.image_scores(fewer)
    usual = run.method.bounds()
    assert usual is not None
    assert usual.rule == "the most unusual of 8 known-good images"


def test_more_false_alarms_can_be_asked_for() -> None:
    x, y = make_tokens(12), make_tokens(30, 1)
    bounds = []
    for asked in (0.01, 0.2, 0.5):
        run = Run(false_alarms=asked)
        run.method.image_scores(run.scored(x, y, [range(12)]))
        bounds.append(run.method.bounds())
    few, fifth, half = bounds
    assert few is not None
    assert fifth is not None
    assert half is not None
    assert few.rule.startswith("at most 3.23 % of good images")
    assert few.rule.endswith("1 % takes 99 of these")
    assert fifth.rule.startswith("at most 20 % of good images")
    assert "takes" not in fifth.rule
    assert few.reject > fifth.reject > half.reject


@pytest.mark.long
@pytest.mark.parametrize(("references", "defects"), [("all", 2), ("all", 13), ("blended", 2)])
def test_of_good_images_no_more_are_rejected_than_known_good_ones_promise(references: str, defects: int) -> None:
    pool, bad = make_tokens(70), make_tokens(13, 2)[:defects]
    bad[:, :, 4] *= -2
    rng, run, rejected = np.random.default_rng(3), Run(references=references), 0
    for _ in range(SPLITS):
        order = rng.permutation(70)
        found = run.scored(np.concatenate([pool[order[20:40]], bad]), pool[order[:20]], [range(20 + defects)])
        scores, bounds = run.method.image_scores(found), run.method.bounds()
        assert bounds is not None
        rejected += int(np.sum(scores[:20] > bounds.reject))
    # Images of a split share a bound, so that they count for half as many.
    assert abs(rejected / (20 * SPLITS) - 1 / 21) < 3 * np.sqrt(2 / 21 * 20 / 21 / (20 * SPLITS))


@pytest.mark.long
@pytest.mark.parametrize("references", ["all", "blended"])
def test_of_single_good_images_no_more_are_rejected_than_known_good_ones_promise(references: str) -> None:
    pool, rng, run, draws = make_tokens(70), np.random.default_rng(4), Run(references=references), 4 * SPLITS
    rejected = 0
    for _ in range(draws):
        order = rng.permutation(70)[:20]
        (score,) = run.method.image_scores(run.scored(pool[order[19:]], pool[order[:19]], [range(1)]))
        bounds = run.method.bounds()
        assert bounds is not None
        rejected += int(score > bounds.reject)
    assert abs(rejected / draws - 1 / 20) < 3 * np.sqrt(1 / 20 * 19 / 20 / draws)


@pytest.mark.parametrize("images", [1, 4, 12])
def test_images_are_rescored_by_each_other_and_not_by_references(images: int) -> None:
    x, y, run = make_tokens(images), make_tokens(4, 1), Run(rscin=(1, 3), image_rule="top_fraction")
    found = run.scored(x, y, [range(images)])
    np.testing.assert_array_equal([image.facts for image in found], x[:, 0, 0])
    raw = expected(x, y).max(axis=1)
    scores = raw / (2 * expected(y, y[:0]).max())  # few are not rescored
    if images >= FEW_IMAGES:
        scores = rscin(raw, x[:, 0, 0], (1, 3))
    np.testing.assert_allclose(run.method.image_scores(found), scores, atol=1e-3)


def clean(images: NDArray[np.float32], known: NDArray[np.float32], rule: Rule) -> CleanScores:
    tokens = np.concatenate([images, known])
    _, minima = mutual_scores(
        tokens, GRID, (1, 3), rule.interval, references=len(known), return_minima="smallest degree"
    )
    return clean_scores(minima, rule)


@pytest.mark.parametrize(("references", "blends"), [("blended", (0.25, 0.5)), ("clean", (1.0, 1.0))])
@pytest.mark.parametrize(("images", "known"), [(14, 0), (13, 5), (4, 0)])
def test_clean_references(references: str, blends: tuple[float, float], images: int, known: int) -> None:
    x, y, run = make_tokens(images), make_tokens(known, 1), Run(references=references)
    x[-1, :, 4] *= -2
    found = run.scored(x, y, [range(images)])
    expected = clean(x, y, Rule((0.0, 0.3), 0.5, 3, *blends))
    np.testing.assert_allclose([image.map.ravel() for image in found], expected.patch_maps, atol=1e-6)
    np.testing.assert_allclose([image.raw_score for image in found], expected.image_scores, atol=1e-6)
    facts = salient_features(x[np.arange(images), :, expected.salient])
    np.testing.assert_allclose([image.facts for image in found], facts, atol=1e-6)
    scores = run.method.image_scores(found)
    by_others = rscin(expected.image_scores, facts, (1, 7))
    np.testing.assert_allclose(scores, by_others if images >= FEW_IMAGES else min_max(expected.image_scores), atol=1e-6)
    assert run.timings["references"] > 0


@pytest.mark.parametrize(
    ("options", "blend"),
    [
        ({}, 0.25),
        ({"expected_defects": 0.09}, 0.0),
        ({"expected_defects": 0.3}, 0.25),
        ({"expected_defects": 0.31}, 0.75),
        ({"expected_defects": 0.09, "image_blend": 0.5}, 0.5),
        ({"expected_defects": 0.09, "references": "clean"}, 1.0),
    ],
)
def test_the_image_blend_follows_from_how_many_defects_are_expected(options: dict[str, Any], blend: float) -> None:
    x, none, run = make_tokens(12), make_tokens(0), Run(**{"references": "blended", **options})
    map_blend = 1.0 if blend == 1.0 else 0.5
    expected = clean(x, none, Rule((0.0, 0.3), 0.5, 3, blend, map_blend))
    found = run.scored(x, none, [range(12)])
    np.testing.assert_allclose([image.raw_score for image in found], expected.image_scores, atol=1e-6)
    record = run.method.record()
    assert (record["image_blend"], record["map_blend"]) == (blend, map_blend)


def test_every_group_has_clean_references_of_its_own() -> None:
    x, run = make_tokens(24), Run(references="blended")
    found = run.scored(x, make_tokens(0), [range(0, 24, 2), range(1, 24, 2)])
    expected = clean(x[1::2], x[:0], Rule((0.0, 0.3), 0.5, 3, 0.25, 0.5))
    np.testing.assert_allclose([image.map.ravel() for image in found[1::2]], expected.patch_maps, atol=1e-6)


def test_maps_and_image_scores_are_of_the_networks_that_are_named() -> None:
    x, run = make_tokens(12), Run("challenge", references="clean", interval=(0.0, 0.5))
    found = run.scored(x, make_tokens(0), [range(12)])
    rule = Rule((0.0, 0.5), 0.5, 3, 1.0, 1.0)
    of_maps, of_images = clean(x, x[:0], rule), clean(mixed(x, 1), x[:0], rule)
    np.testing.assert_allclose([image.map.ravel() for image in found], of_maps.patch_maps, atol=1e-6)
    np.testing.assert_allclose([image.raw_score for image in found], of_images.image_scores, atol=1e-6)
    facts = salient_features(mixed(x, 1)[np.arange(12), :, of_images.salient])
    np.testing.assert_allclose([image.facts for image in found], facts, atol=1e-6)


def test_memory_counts_the_minima_of_clean_references() -> None:
    counts = Run("small").method, Run("small", references="blended").method
    for method in counts:
        assert method.needed(3, 0) > 0
    assert counts[1].needed(300, 0) >= counts[0].needed(300, 0)


@pytest.mark.parametrize(("key", "value"), [("references", "some"), ("clean_rounds", 0), ("map_blend", 1.5)])
def test_settings_of_clean_references_that_make_no_sense(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{key.replace('_', '-')} must be"):
        Run(**{key: value})


def test_memory_counts_references() -> None:
    run = Run()
    assert run.method.needed(5, 40) > run.method.needed(5, 0)
    assert run.method.needed(1, 40) >= run.method.needed(FEW_IMAGES, 30)  # so many are measured


@pytest.mark.slow
def test_a_single_image_beside_a_reference(infer: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("good"), 4)
    for number in (1, 2, 3):
        Path(f"good/{number:02d}.png").rename(f"{number}.png")  # the last one has a defect
    Path("data").mkdir()
    Path("3.png").rename("data/bad.png")
    assert infer("small", "data", "--reference", "good") == 0
    assert "1 has nothing in common with the known-good image" in capsys.readouterr().err
    record = json.loads(Path("out/data/category.json").read_text())
    assert record["scale"] == pytest.approx([0, np.sqrt(2)])
    assert not record["relative"]
    assert 0 < record["images"][0]["score"] < 1
    assert len(record["references"]) == 1
    assert record["bounds"] is None  # one does not say what is usual

    Path("good/broken.png").write_bytes(b"no image")
    Path("1.png").rename("good/1.png")
    Path("2.png").rename("good/2.png")
    assert infer("small", "data", "--reference", "good", "--resume") == 1  # other references: scored again
    said = capsys.readouterr().err
    assert "broken.png: skipped" in said
    assert "0.5 is what the most unusual known-good image comes to" in said
    record = json.loads(Path("out/data/category.json").read_text())
    assert 0.5 < record["images"][0]["score"] <= 1
    assert record["images"][0]["verdict"] == "review"
    assert record["images"][0]["regions"]  # what is above all of the known-good images
    assert record["bounds"]["rule"] == "the most unusual of 3 known-good images"

    assert infer("small", "data", "--reference", "good", "--strict") == 1
    assert "data: 1 image" not in (said := capsys.readouterr().err)
    assert "good/broken.png: " in said
    Path("good/broken.png").unlink()
    Path("shots.txt").write_text("good/1.png\ngood/2.png\ngood/absent.png\n")
    assert infer("small", "data", "--reference", "shots.txt") == 1  # what is listed counts as any other input
    said = capsys.readouterr().err
    assert "good/absent.png: skipped: there is no such file" in said
    assert "data/good" not in said
    assert json.loads(Path("out/data/category.json").read_text())["images"]
    assert infer("small", "data", "--reference", "shots.txt", "--strict") == 1
    assert "good/absent.png: there is no such file" in capsys.readouterr().err

    for path in Path("good").iterdir():
        path.write_bytes(path.name.encode())
    assert infer("small", "data", "--reference", "good") == 1
    assert "of 3 references none can be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 2])
def test_references_that_vanish_while_images_are_scored(
    infer: Callable[..., int], left: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("data"), 4)
    for number in range(4):
        picture = draw(Path(f"other{number}"), number + 2) / "00.png"
        Path("good").mkdir(exist_ok=True)
        Image.open(picture).rotate(3 * number + 3).save(f"good/{number}.png")

    def vanishing(*arguments: Any) -> References:
        found = find_references(*arguments)
        for image in found.images[left:]:
            image.path.unlink()
        if not left:
            Path("good").rmdir()
        return found

    monkeypatch.setattr("zsad.engine.category_pass.find_references", vanishing)
    assert infer("small", "data", "--reference", "good") == 1
    said = capsys.readouterr().err
    record = json.loads(Path("out/run.json").read_text())["categories"]["data"]
    if left:
        assert said.count("skipped: no longer there") == 2
        assert "good/3.png: skipped" in said
        assert record["images"] == 4
    else:
        assert "data: of 4 references none can be read" in said
        assert not record["images"]


@pytest.mark.slow
def test_a_reference_that_is_encoded_again_is_named(
    infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("data"), 8)
    draw(Path("other"), 3)
    Path("good").mkdir()
    Path("good/0.png").write_bytes(Path("data/00.png").read_bytes())
    Image.open("data/01.png").save("good/1.bmp")
    Image.open("data/02.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("good/2.png")
    assert infer("small", "data", "--reference", "good") == 0
    said = capsys.readouterr().err
    assert "the reference good/0.png is left out: it is one of the images to score, 00.png" in said
    assert (
        "01.png, the reference good/1.bmp are the same picture; an image that is a reference too looks normal" in said
    )
    assert "2 known-good images to compare with" in said
    assert "good/2.png are" not in said


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


def test_snamd_pools_tokens_once_and_compares_them_at_one_degree() -> None:
    tokens, run = make_tokens(6) / np.float32(8), Run(pooling="snamd")
    pooled = np.array([[reference.snamd(layer, GRID, (1, 3)) for layer in image] for image in tokens])
    maps = [image.map.ravel() for image in run.scored(tokens, tokens[:0], [range(6)])]
    np.testing.assert_allclose(maps, reference.mutual_scores(pooled, GRID, (1,), (0.0, 0.3)), atol=1e-4)
    unlike = Run().scored(tokens, tokens[:0], [range(6)])
    assert np.abs(maps[0] - unlike[0].map.ravel()).max() > 0.01


def shifted_tokens(count: int) -> NDArray[np.float32]:
    """Tokens of images every other one of which shows the same one patch further."""
    tokens = make_tokens(count)
    tokens[::2] = np.roll(tokens[::2], 1, axis=2)
    return tokens


def test_patches_meet_those_near_their_own_place_alone() -> None:
    tokens, known = np.split(shifted_tokens(8), [6])
    for window in (0, 1):
        maps = [image.map.ravel() for image in Run(position_window=window).scored(tokens, known, [range(6)])]
        everyone = np.concatenate([tokens, known])
        expected = reference.mutual_scores(everyone, GRID, (1, 3), (0.0, 0.3), references=2, window=window)
        np.testing.assert_allclose(maps, expected, atol=1e-4)


@pytest.mark.parametrize("references", ["all", "blended", "clean"])
def test_a_position_window_beyond_the_grid_changes_nothing(references: str) -> None:
    tokens = shifted_tokens(12)
    whole, windowed = (
        Run(references=references, position_window=window).scored(tokens, tokens[:0], [range(12)])
        for window in (None, 2)
    )
    for one, other in zip(whole, windowed, strict=True):
        assert one.raw_score == other.raw_score
        np.testing.assert_array_equal(one.map, other.map)
    nearer = Run(references=references, position_window=0).scored(tokens, tokens[:0], [range(12)])
    assert all((one.map != other.map).any() for one, other in zip(whole, nearer, strict=True))


@pytest.mark.slow
def test_the_command_has_position_windows(infer: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("data"), 3)
    assert infer("small", "data") == 0
    assert infer("small", "data", "--position-window", "1", "--resume") == 0
    assert "other settings (musc.position_window)" in capsys.readouterr().err
    assert json.loads(Path("out/run.json").read_text())["config"]["settings"]["position_window"] == 1
    assert infer("small", "data", "--position-window", "1", "--resume") == 0
    assert "scored again" not in capsys.readouterr().err
    assert infer("small", "data", "--position-window", "-1") == 2
    assert "--position-window must be a whole number from 0, not -1" in capsys.readouterr().err
    assert infer("small", "data", "--position-window", "1", "--save-bank", "part.zsad") == 2
    assert "leave out --position-window" in capsys.readouterr().err

"""Variance Vigilance Vanguard: between the networks, and as a whole through zsad-infer."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import save_pictures
from PIL import Image
from runs import scores_and_maps

from zsad.engine.commands.evaluate import main as evaluate
from zsad.engine.config import ForegroundSettings, load_config
from zsad.engine.images.decode import bilinear, network_input, recipe
from zsad.engine.methods.bitmasks import BitMask, pack
from zsad.engine.methods.component_wise import ComponentWise, component_scores, image_score
from zsad.engine.methods.foreground import combined, dichotomous
from zsad.engine.methods.method import method_class
from zsad.engine.methods.text_guided import chosen_prompts
from zsad.engine.methods.tiles import components, tiles, with_parts
from zsad.engine.methods.vvv import LOWEST, counted_prompts, harmonic_mean
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.engine.text.prompts import prompt_set
from zsad.engine.text.tokenizer import load_tokenizer
from zsad.engine.text.vectors import abnormal_probability, class_vector
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ClipSegDecoderOptions, ClipSegImageOptions, ExportOptions, IsnetOptions, TextOptions

Arrays = Mapping[str, NDArray[Any]]


def classes(arrays: Arrays) -> NDArray[np.float64]:
    return np.stack([class_vector(arrays[f"prompts_{label}"], "unit_norenorm") for label in ("normal", "abnormal")])


def test_golden_scenes(vvv_host: Arrays, scene: Arrays) -> None:
    scores = abnormal_probability(scene["tile_image_embeddings"], classes(vvv_host), tau=0.07)
    np.testing.assert_allclose(scores, scene["tile_scores"], atol=1e-5)
    for logits, expected in zip(scene["tile_logits"], scene["tile_maps"], strict=True):
        np.testing.assert_allclose(harmonic_mean(logits), expected, atol=1e-5)


def test_golden_functions(vvv_host: Arrays) -> None:
    np.testing.assert_allclose(harmonic_mean(vvv_host["harmonic_logits"]), vvv_host["harmonic_mean"], atol=1e-5)
    for tau in (0.01, 0.07):
        found = abnormal_probability(vvv_host["score_image_embeddings"], classes(vvv_host), tau)
        np.testing.assert_allclose(found, vvv_host[f"score_tau_{tau}"], atol=1e-5)


def test_the_mean_of_the_prompts_gives_the_mean_of_their_cosines(vvv_host: Arrays) -> None:
    vectors = vvv_host["score_image_embeddings"].astype(np.float64)
    units = [
        prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
        for prompts in (vvv_host["prompts_normal"].astype(np.float64), vvv_host["prompts_abnormal"])
    ]
    cosines = [(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ unit.T).mean(axis=1) for unit in units]
    expected = 1 / (1 + np.exp((cosines[0] - cosines[1]) / 0.07))
    np.testing.assert_allclose(abnormal_probability(vectors, classes(vvv_host), 0.07), expected, atol=1e-6)


def test_prompts_that_are_there_twice_run_once_and_count_twice() -> None:
    prompts, counts = counted_prompts(prompt_set("vvv").localising, deduplicate=False)
    assert len(prompts) == len(set(prompts)) == 18
    assert counts.sum() == 19
    assert dict(zip(prompts, counts, strict=True))["an error"] == 2
    np.testing.assert_array_equal(counted_prompts(prompt_set("vvv").localising, deduplicate=True)[1], np.ones(18))
    logits = np.random.default_rng(0).normal(size=(18, 3, 4)).astype(np.float32)
    twice = np.stack([logits[prompts.index(prompt)] for prompt in prompt_set("vvv").localising])
    np.testing.assert_allclose(harmonic_mean(logits, counts), harmonic_mean(twice), rtol=1e-6)


@settings(max_examples=50)
@given(prompts=st.integers(1, 25), scale=st.sampled_from([0.1, 10.0, 1000.0]), seed=st.integers(0, 2**32 - 1))
def test_harmonic_means_are_finite_and_below_arithmetic_ones(prompts: int, scale: float, seed: int) -> None:
    logits = (scale * np.random.default_rng(seed).normal(size=(prompts, 3, 5))).astype(np.float32)
    means = harmonic_mean(logits)
    exact = np.maximum(logits.astype(np.float64), LOWEST)
    np.testing.assert_allclose(means, prompts / (1 + np.exp(-exact)).sum(axis=0), rtol=1e-5)
    assert (means > 0).all()
    assert (means <= (1 / (1 + np.exp(-exact))).mean(axis=0) * (1 + 1e-5)).all()


BORDER = 50  # pixels of |logit| < 1e-3 that the golden masks of a picture have at most


class Recomputed:
    """The results of images, one tile and one prompt after the other, from graphs and the functions tested above."""

    def __init__(self, object_name: str, named: str | None = None) -> None:
        """named: a prompt set, not the file of the configuration."""
        overrides = {"prompts": named} if named else {}
        self.config = load_config("vvv", Path("tiny.toml"), overrides, method_of=method_class)
        prompts = chosen_prompts(self.config.settings.prompt_name)
        clip = TextOptions("gelu", precision="fp32", attention="fused")
        halves = (self.texts("clip", half, clip) for half in prompts.compose(object_name))
        self.classes = np.stack([class_vector(half, "unit_norenorm") for half in halves])
        clipseg = TextOptions("quick_gelu", heads=2, precision="fp32", attention="fused")
        self.conditions = self.texts("clipseg", prompts.localising, clipseg)

    def graph(self, network: str, options: Any) -> OnnxRuntimeGraph:
        return OnnxRuntimeGraph(export_onnx(self.config.specs[network].checkpoint, options).path, None, 1024)

    def texts(self, network: str, prompts: Iterable[str], options: TextOptions) -> NDArray[np.float32]:
        ids = load_tokenizer(77).encode(list(prompts)).astype(np.int32)
        return np.asarray(self.graph(network, options).run({"ids": ids})["embedding"])

    @cached_property
    def networks(self) -> list[OnnxRuntimeGraph]:
        tower = ExportOptions((), 96, outputs=("embedding",), antialias=True, preprocessing="clip")
        return [
            self.graph("clip", tower),
            self.graph("clipseg", ClipSegImageOptions(96, activation="quick_gelu", heads=3, attention="fused")),
            self.graph("clipseg", ClipSegDecoderOptions(96, attention="fused")),
        ]

    def dichotomous(self, rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
        spec = self.config.stages.isnet
        graph = self.graph("isnet", IsnetOptions(spec.image_size))
        images = network_input(Image.fromarray(rgb), recipe("isnet", spec.image_size))[None]
        (values,) = graph.run({"images": images})["foreground"]
        return dichotomous(np.asarray(values), rgb.shape[:2], self.config.stages.foreground.min_peak)

    def tile(self, crop: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
        """Return a tile's score and map [96, 96]."""
        clip, clipseg, decoder = self.networks
        image = Image.fromarray(crop)
        embedding = clip.run({"images": network_input(image, recipe("clip", 96))[None]})["embedding"]
        (score,) = abnormal_probability(np.asarray(embedding), self.classes, self.config.settings.tau)
        images = network_input(image, recipe("imagenet", 96))[None]
        activations = np.asarray(clipseg.run({"images": images})["activations"])[0]
        logits = [
            np.asarray(decoder.run({"activations": activations, "conditions": condition[None]})["logits"])[0]
            for condition in self.conditions
        ]
        return float(score), harmonic_mean(np.stack(logits))

    def image(
        self, rgb: NDArray[np.uint8], foreground: NDArray[np.bool_], parts: Sequence[BitMask]
    ) -> tuple[int, float, NDArray[np.float64]]:
        """Return how many tiles an image has, its score and its map; parts: of its foreground."""
        settings, size = self.config.stages.tiles, rgb.shape[:2]
        labels, found = components(foreground, settings.min_component)
        laid = list(tiles(with_parts(labels, found, parts), size, settings))
        total, count, scores = np.zeros(size), np.zeros(size), []
        for tile in laid:
            here = slice(tile.box.y0, tile.box.y1), slice(tile.box.x0, tile.box.x1)
            score, values = self.tile(rgb[here])
            total[here] += score * bilinear(values, (tile.box.height, tile.box.width)).astype(np.float64)
            count[here] += 1
            scores.append(score)
        per_component = component_scores(scores, [tile.component for tile in laid], len(found))
        return len(laid), image_score(per_component, settings), total / np.maximum(count, 1)


def golden_masks(golden: Path, number: int, size: tuple[int, ...]) -> NDArray[np.bool_]:
    bits = np.load(golden / "sam_tiny.npz")[f"image{number}_amg_masks_packed"]
    return np.unpackbits(bits, axis=1, count=size[0] * size[1]).reshape(-1, *size[:2]).view(bool)


def written_foreground(output: str, number: int = 0) -> NDArray[np.bool_]:
    return np.asarray(Image.open(f"{output}/nuts/stages/{number}-foreground.png")) > 0


MASKS = ["min_predicted_iou = 0.72\nmin_stability = 0.78", "min_predicted_iou = 0.71\nmin_stability = 0.81"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "isnet", "coverage", "tile_count"),
    [
        (0, "bright", 0.4, 4),  # a component of two masks, elongated
        pytest.param(0, "bright", 0.8, 5, marks=pytest.mark.slow),  # no mask is kept; five components
        pytest.param(1, "bright", 0.2, 2, marks=pytest.mark.slow),  # a component in the hole of another
        pytest.param(0, "golden", 0.8, 1, marks=pytest.mark.slow),
        pytest.param(1, "golden", 0.8, 3, marks=pytest.mark.slow),
    ],
)
def test_a_whole_run_is_what_its_parts_give(
    vvv: Callable[..., int],
    golden_segmentation: Path,
    golden_pictures: list[NDArray[np.uint8]],
    number: int,
    isnet: str,
    coverage: float,
    tile_count: int,
) -> None:
    rgb = golden_pictures[number]
    save_pictures("nuts", rgb)
    settings = {"foreground": f"coverage = {coverage}", "masks": MASKS[number], "tiles": "parts = 1"}
    assert vvv("nuts", "--keep-stages", isnet=isnet, **settings) == 0
    expected = Recomputed("nuts")
    masks = golden_masks(golden_segmentation, number, rgb.shape)
    foreground = combined(
        expected.dichotomous(rgb), [pack(mask) for mask in masks], ForegroundSettings(coverage=coverage)
    )
    found = written_foreground("out")
    assert np.count_nonzero(found != foreground.pixels) < BORDER
    count, score, pixels = expected.image(rgb, found, foreground.parts)
    assert count == tile_count
    scores, (found_map,) = scores_and_maps("out", "nuts")
    np.testing.assert_allclose(scores, [score], atol=1e-5)
    np.testing.assert_allclose(found_map, pixels, atol=1e-5)
    assert found_map.max() > 0.1


@pytest.mark.long
def test_a_whole_run_with_all_words(
    vvv: Callable[..., int], golden_pictures: list[NDArray[np.uint8]], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures("nuts", golden_pictures[0])
    assert vvv("nuts", "--keep-stages", "-v", "--prompts", "vvv") == 0
    expected = Recomputed("nuts", "vvv")
    _, score, pixels = expected.image(golden_pictures[0], written_foreground("out"), ())
    scores, (found,) = scores_and_maps("out", "nuts")
    np.testing.assert_allclose(scores, [score], atol=1e-5)
    np.testing.assert_allclose(found, pixels, atol=1e-5)
    said = capsys.readouterr().err
    if "running the text tower" in said:  # unless another test has left them in the cache
        assert "the text tower of clip over 924 prompts" in said
        assert "the text tower of clipseg over 18 prompts" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_masks_of_a_run_are_the_golden_ones(
    vvv: Callable[..., int], golden_segmentation: Path, golden_pictures: list[NDArray[np.uint8]], number: int
) -> None:
    save_pictures("nuts", golden_pictures[number])
    assert vvv("nuts", "--keep-stages", foreground="coverage = 0.0", masks=MASKS[number]) == 0
    union = golden_masks(golden_segmentation, number, golden_pictures[number].shape).any(axis=0)
    assert np.count_nonzero(~union) > 0
    assert np.count_nonzero(written_foreground("out") != union) < BORDER


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "3"],
        pytest.param(["--batch-size", "64", "--workers", "1"], marks=pytest.mark.slow),
        pytest.param(["--workers", "5"], marks=pytest.mark.slow),
    ],
)
def test_results_depend_neither_on_batches_nor_on_threads(
    vvv: Callable[..., int], golden_pictures: list[NDArray[np.uint8]], options: list[str]
) -> None:
    save_pictures("nuts", *golden_pictures)
    assert vvv("nuts", tiles="parts = 1") == 0
    assert vvv("nuts", "--output", "other", *options, tiles="parts = 1") == 0
    (scores, maps), (expected, expected_maps) = scores_and_maps("other", "nuts"), scores_and_maps("out", "nuts")
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    if "--batch-size" not in options:
        for file in Path("out/nuts/maps").iterdir():
            assert file.read_bytes() == (Path("other/nuts/maps") / file.name).read_bytes()


def report_images(output: str) -> list[dict[str, Any]]:
    page = (Path(output) / "report.html").read_text()
    begin = 'id="images-0">'
    return json.JSONDecoder().raw_decode(page, page.index(begin) + len(begin))[0]


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_stages(
    vvv: Callable[..., int],
    golden_pictures: list[NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_pictures("nuts", *golden_pictures)
    assert vvv("nuts", "--output", "whole", "--keep-stages") == 0
    stages = sorted(path.name for path in Path("whole/nuts/stages").iterdir())
    assert stages == [f"{number}-{kind}" for number in range(3) for kind in ("foreground.png", "tiles.jpg")]
    take = ComponentWise._scored

    def interrupted(self: ComponentWise, index: int, image: NDArray[np.uint8]) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return take(self, index, image)

    with monkeypatch.context() as patch:
        patch.setattr(ComponentWise, "_scored", interrupted)
        assert vvv("nuts", "--keep-stages", "--workers", "1") == 130
    assert vvv("nuts", "--keep-stages", "--resume") == 0
    assert "going on after" in capsys.readouterr().err
    for file in stages:
        assert (Path("out/nuts/stages") / file).read_bytes() == (Path("whole/nuts/stages") / file).read_bytes()
    shown = report_images("out")
    assert all(image["stages"].startswith("data:image/jpeg;base64,") for image in shown)
    assert shown == report_images("whole")
    assert vvv("nuts", "--keep-stages", "--resume") == 0
    assert "already finished" in capsys.readouterr().err
    assert report_images("out") == shown
    (Path("out/nuts/stages") / stages[1]).write_bytes(b"")
    assert vvv("nuts", "--keep-stages", "--resume") == 0
    assert "going on after 2 images" in capsys.readouterr().err
    assert (Path("out/nuts/stages") / stages[1]).read_bytes() == (Path("whole/nuts/stages") / stages[1]).read_bytes()


@pytest.mark.slow
def test_stages_that_are_wanted_later_are_written(
    vvv: Callable[..., int], golden_pictures: list[NDArray[np.uint8]], capsys: pytest.CaptureFixture[str]
) -> None:
    save_pictures("nuts", golden_pictures[0])
    assert vvv("nuts") == 0
    assert not Path("out/nuts/stages").exists()
    assert report_images("out")[0]["stages"]  # in the report they are in any case
    assert vvv("nuts", "--resume", "--keep-stages") == 0
    assert "--keep-stages" in capsys.readouterr().err
    assert written_foreground("out").any()


@pytest.mark.slow
def test_maps_are_evaluated(vvv: Callable[..., int], golden_pictures: list[NDArray[np.uint8]]) -> None:
    save_pictures("data/nuts/test/bad", golden_pictures[0])
    save_pictures("data/nuts/test/good", golden_pictures[1])
    mask = golden_pictures[0].mean(axis=2) > 128
    Path("data/nuts/ground_truth/bad").mkdir(parents=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save("data/nuts/ground_truth/bad/0_mask.png")
    assert vvv("data", "--keep-stages") == 0
    assert Path("out/nuts/stages/test/bad/0-tiles.jpg").is_file()
    assert evaluate(["out", "data", "--output-json", "metrics.json", "-q"]) == 0
    (metrics,) = json.loads(Path("metrics.json").read_text())["categories"].values()
    pixels = [np.asarray(Image.open(f"out/nuts/maps/test/{name}.tiff")).ravel() for name in ("bad/0", "good/0")]
    anomalous = np.concatenate([mask.ravel(), np.zeros(pixels[1].size, bool)])
    values = np.concatenate(pixels)
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values[order], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean ranks of equal values
    positives = anomalous[order]
    auroc = (ranks[positives].sum() - positives.sum() * (positives.sum() + 1) / 2) / (
        positives.sum() * (~positives).sum()
    )
    assert metrics["pixel_auroc"] == pytest.approx(auroc, abs=1e-6)

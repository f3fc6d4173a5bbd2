"""What is computed equals the committed arrays of tests/golden, which every clone has."""

from pathlib import Path

import numpy as np
import pytest
from make_golden import (
    CLEAN_DEGREES,
    DEGREES,
    FINE_PATCH,
    GOLDEN,
    GRID,
    HEADS,
    INPUT_SIDE,
    INTERVAL,
    MAKERS,
    NEIGHBOURS,
    PATCH,
    SIDE,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from zsad.engine.evaluation.metrics import image_metrics, pixel_metrics
from zsad.engine.images.decode import network_input, recipe
from zsad.engine.scores.clean_references import Rule, clean_scores, salient_features
from zsad.engine.scores.image_scores import image_scores, rscin
from zsad.export.agreement import run_graph
from zsad.export.onnx_export import export_onnx
from zsad.export.options import ExportOptions
from zsad.kernels import mutual_scores


def load(name: str) -> dict[str, NDArray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", MAKERS)
def test_the_script_makes_these_arrays(name: str) -> None:
    made, found = MAKERS[name](), load(name)
    assert made.keys() == found.keys()
    for key, array in made.items():
        assert array.dtype == found[key].dtype
        np.testing.assert_allclose(array, found[key], rtol=1e-6, atol=1e-9, err_msg=key)


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 2**20


def test_mutual_scoring() -> None:
    arrays = load("mutual_scoring")
    scores, minima = mutual_scores(arrays["tokens"], GRID, DEGREES, INTERVAL, return_minima=True)
    np.testing.assert_allclose(scores, arrays["patch_scores"], atol=1e-5)
    np.testing.assert_allclose(minima, arrays["minima"], atol=1e-5)
    found = image_scores(scores, GRID, "top_two", 84)
    np.testing.assert_allclose(found, arrays["image_scores"], atol=1e-5)
    np.testing.assert_allclose(rscin(found, arrays["embeddings"], NEIGHBOURS), arrays["rescored"], atol=1e-4)


def test_clean_references() -> None:
    arrays = load("clean_references")
    tokens = arrays["tokens"]
    _, minima = mutual_scores(tokens, GRID, CLEAN_DEGREES, return_minima="smallest degree")
    scores = clean_scores(minima, Rule((0.0, 0.3), 0.5, 3, 0.25, 0.5))
    features = salient_features(tokens[np.arange(len(tokens)), :, scores.salient])
    found = {
        "first_pass": scores.first_pass,
        "kept": scores.rounds[-1].kept,
        "clean": scores.clean,
        "patch_maps": scores.patch_maps,
        "image_scores": scores.image_scores,
        "salient": scores.salient,
        "rescored": rscin(scores.image_scores, features, (1, 7)),
    }
    for name, array in found.items():
        np.testing.assert_allclose(array, arrays[name], atol=1e-4 if name == "rescored" else 1e-5, err_msg=name)


def test_network_input() -> None:
    arrays = load("network_input")
    found = network_input(Image.fromarray(arrays["picture"]), recipe("imagenet", INPUT_SIDE))
    one_grey_level = 1 / 255 / 0.224  # to which Pillow rounds, once in each direction
    np.testing.assert_allclose(found, arrays["network_input"], atol=1.01 * one_grey_level)
    assert np.abs(found - arrays["network_input"]).mean() < 0.3 * one_grey_level


def test_metrics() -> None:
    arrays = load("metrics")
    image = image_metrics(arrays["labels"], arrays["scores"])
    pixel = pixel_metrics(arrays["masks"], arrays["maps"])
    for found, expected in ((image, "image_auroc_ap_f1"), (pixel, "pixel_auroc_ap_f1")):
        assert [found[key] for key in ("auroc", "ap", "f1")] == pytest.approx(arrays[expected], abs=1e-9)


@pytest.mark.parametrize(("attention", "precision", "error"), [("fused", "fp32", 1e-5), ("standard", "fp16", 5e-3)])
@pytest.mark.parametrize(("network", "patch"), [("network", PATCH), ("rotary_network", FINE_PATCH)])
def test_the_graph_of_a_network(
    tmp_path: Path, network: str, patch: int, attention: str, precision: str, error: float
) -> None:
    arrays = load(network)
    checkpoint = tmp_path / "network.safetensors"
    save_file(
        {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}, checkpoint
    )
    options = ExportOptions((0, 1), patch * SIDE, heads=HEADS, precision=precision, attention=attention)
    model = export_onnx(str(checkpoint), options, tmp_path / "graph.onnx")
    outputs = run_graph(model.path, {"images": arrays["images"]})
    for name in arrays.keys() & outputs.keys():
        assert np.linalg.norm(outputs[name] - arrays[name]) < error * np.linalg.norm(arrays[name]), name

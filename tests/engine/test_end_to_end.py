"""The whole way on real images with real DINOv2 weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from zsad.engine.commands.infer import main
from zsad.engine.config import load_config
from zsad.engine.evaluation.masks import read_mask
from zsad.engine.evaluation.metrics import image_metrics, pixel_metrics
from zsad.engine.images.decode import decode, network_input, recipe
from zsad.engine.images.folders import scan
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import Graph
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.scores.image_scores import image_scores, rscin
from zsad.engine.scores.maps import upsample
from zsad.export.checkpoints import find_checkpoint
from zsad.export.state_dict import CheckpointError
from zsad.kernels import mutual_scores, reference

pytestmark = pytest.mark.long

SIZE = 168  # keeps the oracle affordable


@pytest.fixture(scope="module", autouse=True)
def _weights() -> None:
    try:
        find_checkpoint("dinov2-vits14")
    except CheckpointError as error:
        pytest.skip(f"the embedded default's weights cannot be had here: {error}")


def load(**overrides: object) -> Graph:
    """The image tower of the preset `small` on the CPU, one image at a time."""
    config = load_config("small", overrides=overrides, method_of=method_class)
    networks = load_networks(config, graph_requests(config), choose_runtime("cpu"), 1)
    return networks["dinov2"].graphs["image"]


def run(tower: Graph, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    return {name: output[0] for name, output in tower.run({"images": image[None]}).items()}


@pytest.fixture(scope="module")
def dinov2_small():
    """All four taps of the golden file, with the image embedding."""
    return load(taps=(2, 5, 8, 11), rscin=(1, 8, 9), references="all")


@pytest.fixture(scope="module")
def golden_run(golden: Path, real_data: Path, dinov2_small):
    """Golden arrays, and our tokens and embeddings of the same eight images."""
    arrays = np.load(golden / "end_to_end_dinov2s.npz")
    paths = [next((real_data / "ball_screw").rglob(Path(str(name)).name)) for name in arrays["files"]]
    inputs = np.stack([network_input(decode(path), recipe("imagenet", 518)) for path in paths])
    found = [run(dinov2_small, image) for image in inputs]
    return arrays, inputs, np.stack([each["tokens"] for each in found]), np.stack([each["embedding"] for each in found])


def test_network_input_equals_the_reference(golden_run) -> None:
    arrays, inputs, _, _ = golden_run
    np.testing.assert_allclose(inputs[0], arrays["image_0"], atol=1e-5)


def test_tokens_and_embeddings_equal_the_public_model(golden_run) -> None:
    arrays, _, tokens, embeddings = golden_run
    expected = arrays["tokens_0"]  # [L, 37, C], every 37th patch of the first image
    assert np.linalg.norm(tokens[0, :, ::37] - expected) < 1e-3 * np.linalg.norm(expected)
    mean = arrays["tokens_patch_mean"]
    assert np.linalg.norm(tokens.mean(axis=2) - mean) < 1e-3 * np.linalg.norm(mean)
    assert np.linalg.norm(embeddings - arrays["embedding"]) < 1e-3 * np.linalg.norm(arrays["embedding"])


def test_scores_equal_the_reference(golden_run) -> None:
    arrays, _, tokens, embeddings = golden_run
    scores = mutual_scores(tokens, degrees=(1, 3, 5))
    np.testing.assert_allclose(scores, arrays["patch_scores"], atol=2e-4)
    two_degrees = mutual_scores(tokens, degrees=(1, 3))
    np.testing.assert_allclose(two_degrees, arrays["patch_scores_degrees_1_3"], atol=2e-4)
    musc = image_scores(scores, (37, 37), "map_maximum", 518)
    np.testing.assert_allclose(musc, arrays["image_scores_musc"], atol=1e-3)
    challenge = image_scores(two_degrees, (37, 37), "top_two", 518)
    np.testing.assert_allclose(challenge, arrays["image_scores_challenge"], atol=1e-3)
    np.testing.assert_allclose(rscin(musc, embeddings, [1, 2, 3]), arrays["rscin_k1_2_3"], atol=1e-3)


def _metrics(category, images, scores: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
    """Image AUROC, and pixel AUROC where the category has masks, of patch scores [N, P]; in percent."""
    labels = np.array([image.anomalous for image in images])
    found = {"image": image_metrics(labels, image_scores(scores, grid, "top_fraction", SIZE))["auroc"]}
    if any(image.masks.files for image in images):
        pairs = []
        for image, patch_scores in zip(images, scores, strict=True):
            if image.anomalous and not image.masks.files:
                continue
            pixels = (
                read_mask(category.root / image.masks.files[0]) if image.masks.files else np.zeros((SIZE, SIZE), bool)
            )
            pairs.append((pixels, upsample(patch_scores.reshape(grid), pixels.shape)))
        found["pixel"] = pixel_metrics([m for m, _ in pairs], [s for _, s in pairs])["auroc"]
    return {name: 100 * value for name, value in found.items()}


@pytest.mark.parametrize("name", ["ball_screw", "magnetic_tile", "solar_cell_mono"])
def test_real_categories_beat_random_features_and_equal_the_oracle(real_data: Path, name: str) -> None:
    """Our float32 scores rank real images as the float64 oracle does on the same tokens, and better than chance.

    The random features know nothing of the pixels: features that do, even untrained ones, separate ball_screw's images
    by their brightness, which happens to differ between its normal and its anomalous photographs.
    """
    (category,) = scan(real_data / name).categories
    images = [category.images[i] for i in np.linspace(0, len(category.images) - 1, 32).astype(int)]
    tower, grid = load(image_size=SIZE), (SIZE // 14, SIZE // 14)
    inputs = (network_input(decode(image.path), recipe("imagenet", SIZE)) for image in images)
    tokens = np.stack([run(tower, image)["tokens"] for image in inputs])  # [32, 2, 144, 384]
    ours = _metrics(category, images, mutual_scores(tokens, degrees=(1, 3)), grid)
    oracle = _metrics(category, images, reference.mutual_scores(tokens, grid, (1, 3)), grid)
    noise = np.random.default_rng(0).normal(size=(32, 1, 144, 64)).astype(np.float32)
    random = _metrics(category, images, mutual_scores(noise, degrees=(1, 3)), grid)
    for key, value in ours.items():
        assert abs(value - oracle[key]) <= 0.5
        assert value > max(random[key], 50), f"{key} AUROC {value:.1f}, with random features {random[key]:.1f}"


def test_demo_finds_the_planted_defects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--demo", "--output", str(tmp_path), "--image-size", "196", "--json", "-q"]) == 0
    run = json.loads(capsys.readouterr().out)
    metrics = run["metrics"]["categories"]["flange"]
    assert metrics["image_auroc"] > 0.9
    assert metrics["pixel_auroc"] > 0.9
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_neither_torch_nor_cuda_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from zsad.engine.commands.infer import main\n"
        f"assert main(['--demo', '--output', {str(tmp_path)!r}, '--image-size', '70', '-q']) == 0\n"
        "heavy = {'torch', 'cupy', 'tensorrt', 'timm', 'open_clip', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    # A folder without the sources: what is imported is what is installed.
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert result.returncode == 0, result.stderr

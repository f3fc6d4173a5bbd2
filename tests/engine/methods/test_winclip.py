"""WinCLIP through zsad-infer, against what anomalib's and the Accurate-WinCLIP implementation gave."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clip_checkpoints import text_arrays, write_clip
from PIL import Image

from zsad.engine.commands.infer import main
from zsad.engine.methods.winclip import aggregated
from zsad.engine.results.records import CategoryRecord

COUNT = 6


@pytest.fixture
def winclip(tokenizer: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs zsad-infer on the pictures of a golden file, as they are or as resized for the network."""
    monkeypatch.setenv("ZSAD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    checkpoint = write_clip(tmp_path, "clip_tiny")
    Path("tiny.toml").write_text(f'image_size = 96\n[networks.clip]\ncheckpoint = "{checkpoint}"\ntaps = [5]\n')

    arrays = text_arrays("winclip_anomalib")

    def run(kind: str, *options: str, references: int = 0) -> Path:
        folder = Path(kind) / "bottle"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(COUNT):
            picture = arrays[f"image_{index}"] if kind == "image" else arrays["resized"][index]
            Image.fromarray(picture).save(folder / f"{index}.png")
        if references:
            Path("good").mkdir(exist_ok=True)
            for index in range(references):
                picture = arrays[f"reference_{index}"] if kind == "image" else arrays["reference_resized"][index]
                Image.fromarray(picture).save(f"good/{index}.png")
            options = (*options, "--reference", "good")
        arguments = [kind, "--preset", "winclip", "--config", "tiny.toml", "--output", "out", *options]
        assert main(arguments) == 0
        return Path("out/bottle")

    return run


def scores(folder: Path) -> np.ndarray:
    images = CategoryRecord.from_json((folder / "category.json").read_text()).images
    return np.array([image.raw_score for image in sorted(images, key=lambda image: image.path)])


def maps(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / "maps" / f"{index}.tiff")) for index in range(COUNT)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("image", marks=pytest.mark.slow), "resized"])
def test_zero_shot(winclip: Callable[..., Path], kind: str) -> None:
    golden = text_arrays("winclip_anomalib")
    found = winclip(kind)
    # Older versions of Pillow resize some shapes to values up to two levels away from those of the golden file.
    np.testing.assert_allclose(scores(found), golden["zero_image_score"], atol=1e-5 if kind == "resized" else 2e-3)
    if kind == "resized":
        np.testing.assert_allclose(maps(found), golden["zero_map"], atol=1e-5)


@pytest.mark.slow
def test_the_object_is_named(winclip: Callable[..., Path]) -> None:
    golden = text_arrays("winclip_anomalib")
    found = winclip("resized", "--object", "metal_nut")
    np.testing.assert_allclose(scores(found), golden["second_zero_image_score"], atol=1e-5)
    np.testing.assert_allclose(maps(found), golden["second_zero_map"], atol=1e-5)


def check_few_shot(found: Path, name: str, share: float, shots: int) -> None:
    golden = text_arrays(name)
    np.testing.assert_allclose(scores(found), golden[f"few{shots}_image_score"], atol=1e-5)
    np.testing.assert_allclose(maps(found), share * golden[f"few{shots}_map"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("name", "variant", "share"), [("winclip_anomalib", "anomalib", 1.0), ("winclip_acc", "acc", 0.5)]
)
def test_few_shot(winclip: Callable[..., Path], name: str, variant: str, share: float, shots: int) -> None:
    found = winclip("resized", "--variant", variant, references=shots)
    check_few_shot(found, name, share, shots)
    record = json.loads((found / "category.json").read_text())
    assert len(record["references"]) == shots


@pytest.mark.slow
@pytest.mark.usefixtures("native_code")
def test_few_shot_in_native_code(winclip: Callable[..., Path]) -> None:
    found = winclip("resized", "--runtime", "native", references=2)
    check_few_shot(found, "winclip_anomalib", 1.0, 2)
    assert "native" in json.loads(Path("out/run.json").read_text())["runtime"]


@pytest.mark.slow
def test_results_depend_neither_on_batches_nor_on_order(winclip: Callable[..., Path]) -> None:
    one, several = (scores(winclip("resized", "--batch-size", size)) for size in ("1", "4"))
    np.testing.assert_allclose(one, several, atol=1e-6)


@pytest.mark.slow
def test_tau_changes_no_ranking(winclip: Callable[..., Path], tmp_path: Path) -> None:
    first = scores(winclip("resized"))
    with (tmp_path / "tiny.toml").open("a") as file:
        file.write("[winclip]\ntau = 0.01\n")
    second = scores(winclip("resized"))
    assert not np.allclose(first, second)
    assert np.argsort(first).tolist() == np.argsort(second).tolist()


@pytest.mark.slow
def test_prompts_are_averaged_as_they_are_or_at_unit_length(winclip: Callable[..., Path], tmp_path: Path) -> None:
    with (tmp_path / "tiny.toml").open("a") as file:
        file.write('[winclip]\ntext_mean = "raw"\n')
    golden = text_arrays("winclip_anomalib")
    np.testing.assert_allclose(scores(winclip("resized")), golden["zero_image_score"], atol=1e-5)
    (tmp_path / "tiny.toml").write_text((tmp_path / "tiny.toml").read_text().replace("raw", "unit"))
    assert not np.allclose(scores(winclip("resized")), golden["zero_image_score"], atol=1e-5)


@pytest.mark.slow
def test_a_reference_against_itself_has_no_distance(winclip: Callable[..., Path], tmp_path: Path) -> None:
    winclip("resized", references=2)
    Path("other/bottle").mkdir(parents=True)
    with Image.open("good/0.png") as picture:
        picture.save("other/bottle/0.bmp")  # another file, the same pixels
    arguments = ["other", "--preset", "winclip", "--config", "tiny.toml", "--output", "same", "--reference", "good"]
    assert main(arguments) == 0
    (image,) = CategoryRecord.from_json(Path("same/bottle/category.json").read_text()).images
    assert main([*arguments[:-2], "--output", "zero"]) == 0
    (zero,) = CategoryRecord.from_json(Path("zero/bottle/category.json").read_text()).images
    assert image.raw_score == pytest.approx(zero.raw_score / 2, abs=1e-5)


def test_windows_are_spread_as_anomalib_does() -> None:
    values = np.array([[1, 0.75, 0.5, 0.25]])
    expected = [[1, 0.8571, 0.75], [0.6667, 0.48, 0.375], [0.5, 0.3333, 0.25]]
    np.testing.assert_allclose(aggregated(values, 2)[0], expected, atol=1e-4)


def test_a_harmonic_mean_is_no_larger_than_the_mean_and_a_zero_makes_it_zero() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.01, 1, (3, 25))  # windows of 2 × 2 on a grid of 6 × 6
    spread = aggregated(values, 2)
    plain = np.zeros((3, 6, 6))
    for row, column in np.ndindex(6, 6):
        covering = values.reshape(3, 5, 5)[:, max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1]
        plain[:, row, column] = covering.mean(axis=(1, 2))
    assert (spread <= plain + 1e-12).all()
    values[0, 0] = 0
    assert (aggregated(values, 2)[0, :2, :2] == 0).all()
    np.testing.assert_allclose(aggregated(np.full((1, 16), 0.3), 3), np.full((1, 6, 6), 0.3))

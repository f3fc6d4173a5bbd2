"""The comparison with published tables: what it takes for published, and that it runs from data to table."""

import argparse
import csv
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_checkpoints import ARRAYS, text_arrays, write_clip
from pictures import picture, touch_images
from PIL import Image

from zsad.bench import published
from zsad.bench.published import METRICS, Published

CLASSES = ("bottle", "metal_nut")
GOLDEN_ORDER = ("pixel_auroc", "pixel_f1", "pixel_ap", "pixel_aupro", "image_auroc", "image_f1", "image_ap")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compare(
    tokenizer: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the comparison on `data` with `tiny.toml` and return what it has recorded."""
    monkeypatch.setenv("ZSAD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> dict[str, Any]:
        common = ["--data", "data", "--config", "tiny.toml", "--device", "cpu", "--results", "results.jsonl"]
        assert published.main([*common, *arguments]) == 0
        found: dict[str, Any] = json.loads(Path("results.jsonl").read_text().splitlines()[-1])
        return found

    return run


def april_as_mvtec() -> None:
    """Lay out the golden pictures and references as two classes of MVTec AD, with a configuration for them."""
    arrays = text_arrays("april")
    checkpoint = write_clip(Path(), "april")
    shutil.copy(ARRAYS / "april_head.pth", "head.pth")
    Path("tiny.toml").write_text(
        f'image_size = 98\n[networks.clip]\ncheckpoint = "{checkpoint}"\ntaps = [2, 5, 8, 11]\n'
        '[april_gan]\nhead = "head.pth"\n'
    )

    def save(array: np.ndarray, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)

    for index, (number, anomalous) in enumerate(zip(arrays["class_index"], arrays["anomaly"], strict=True)):
        place, kind = Path("data") / CLASSES[number], ("good", "bad")[anomalous]
        save(arrays["resized"][index], place / "test" / kind / f"{index}.png")
        if anomalous:
            save(255 * arrays["ground_truth"][index], place / "ground_truth" / kind / f"{index}_mask.png")
    for number, of_class in enumerate(arrays["reference_resized"]):
        for shot, array in enumerate(of_class):
            save(array, Path("data") / CLASSES[number] / "train" / "good" / f"{shot}.png")


@pytest.mark.parametrize(
    ("options", "metrics_of"),
    [((), "zero"), (("--shots", "2", "--seed", "0", "1"), "few2")],
)
@pytest.mark.slow
def test_april_gan_from_pictures_to_the_published_codes_metrics(
    compare: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    metrics_of: str,
) -> None:
    april_as_mvtec()
    found = compare("--preset", "april-gan", *options)
    expected = text_arrays("april")[f"{metrics_of}_metrics"]
    for name, row in zip((*CLASSES, "mean"), expected, strict=True):
        for key, value in zip(GOLDEN_ORDER, row, strict=True):
            assert found["percent"][name][key] == pytest.approx([100 * value] * max(len(options) - 3, 1), abs=0.02)
    assert (found["data_set"], found["complete"], found["shots"]) == ("MVTec AD", False, 2 if options else 0)
    assert "2 of 15 classes: no comparison of the means" in capsys.readouterr().out


@pytest.mark.slow
def test_winclip_on_visa_as_it_is_downloaded(
    compare: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_clip(Path(), "clip_tiny")
    Path("tiny.toml").write_text(f'image_size = 96\n[networks.clip]\ncheckpoint = "{checkpoint}"\ntaps = [5]\n')
    draw_visa(Path("data"), "candle")
    found = compare("--preset", "winclip")
    assert found["data_set"] == "VisA"
    assert sorted(path.name for path in Path("published/run/candle/maps/test").rglob("*.tiff")) == [
        "000.tiff",
        "001.tiff",
        "002.tiff",
    ]
    output = capsys.readouterr().out.splitlines()
    head, zsad, _, _, paper, difference, *_ = output[next(n for n, line in enumerate(output) if "I-AUROC" in line) :]
    assert head.split() == ["class", *METRICS.values()]
    ours = zsad.split()[2:]
    assert zsad.split()[:2] == ["candle", "zsad"]
    assert paper.split("  ", 1)[1].split() == [
        "WinCLIP,",
        "its",
        "paper",
        "95.4",
        "89.4",
        "-",
        "88.9",
        "22.5",
        "-",
        "-",
    ]
    for own, of_paper, between in zip(ours, paper.split()[3:], difference.split()[1:], strict=True):
        if of_paper == "-":
            assert between == "-"
        else:
            assert float(between) == pytest.approx(float(own) - float(of_paper), abs=0.11)


def draw_visa(root: Path, name: str) -> None:
    """Draw VisA's own layout: a class with four normal images, of which two are for training, and an anomalous one."""
    rows = [("object", "split", "label", "image", "mask")]
    images = [f"{name}/Data/Images/Normal/{index:03d}.JPG" for index in range(4)]
    for index, relative in enumerate(images):
        rows.append((name, "train" if index in (0, 3) else "test", "normal", relative, ""))
    touch_images(root, *images, f"{name}/Data/Images/Anomaly/000.JPG")
    mask = np.zeros((30, 40), np.uint8)
    mask[5:12, 8:20] = 1
    (root / name / "Data/Masks/Anomaly").mkdir(parents=True)
    Image.fromarray(mask).save(root / name / "Data/Masks/Anomaly/000.png")
    rows.append((name, "test", "anomaly", f"{name}/Data/Images/Anomaly/000.JPG", f"{name}/Data/Masks/Anomaly/000.png"))
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_visa_without_its_split_is_refused(tmp_path: Path) -> None:
    draw_visa(tmp_path / "data", "pcb1")
    (tmp_path / "data/split_csv/1cls.csv").unlink()
    with pytest.raises(SystemExit, match=r"1cls\.csv is missing: without it VisA's test images cannot be told"):
        published.with_splits(tmp_path / "data", tmp_path / "links")


def test_other_data_are_refused(tmp_path: Path) -> None:
    for name in ("bottle", "screws"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "0.png")
    with pytest.raises(SystemExit, match="categories of none of MVTec AD, VisA: bottle, screws"):
        published.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.mark.slow
def test_errors_of_a_run_are_messages(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tile").mkdir(parents=True)
    picture().save(tmp_path / "data/tile/0.png")
    (tmp_path / "other.toml").write_text('[networks.clip]\ncheckpoint = "missing.pt"\n')
    with pytest.raises(SystemExit, match=r"missing\.pt"):
        published.main(["--data", "data", "--config", "other.toml", "--device", "cpu"])


@pytest.mark.parametrize(("data", "head"), [("MVTec AD", "april-gan-visa"), ("VisA", "april-gan-mvtec")])
def test_heads_are_those_of_the_other_data_set_unless_a_file_names_one(tmp_path: Path, data: str, head: str) -> None:
    given = argparse.Namespace(preset="april-gan", config=None, shots=None, reference=None)
    assert published.configuration(given, data, None).settings.head == head
    given.config = tmp_path / "own.toml"
    given.config.write_text('[april_gan]\nhead = "own.pth"\n')
    assert published.configuration(given, data, None).settings.head == "own.pth"


def test_musc_takes_its_neighbours_by_the_data_set() -> None:
    given = argparse.Namespace(preset="musc", config=None, shots=None, reference=None)
    assert published.configuration(given, "MVTec AD", 3).settings.rscin == (1, 2, 3)
    assert published.configuration(given, "VisA", 3).settings.rscin == (1, 8, 9)


def test_the_classes_of_the_published_tables_have_the_printed_means() -> None:
    rows = published.read_published()
    tables: dict[tuple[str, str], list[Published]] = {}
    for row in rows:
        if row.shots == 0:
            tables.setdefault((row.source, row.data), []).append(row)
    checked = 0
    for of_table in tables.values():
        *classes, mean = of_table
        assert mean.name == "mean"
        for key in METRICS if classes else ():
            values = [float(row.values[key]) for row in classes if row.values[key]]
            if values and mean.values[key]:
                assert len(values) == len(classes) == {"MVTec AD": 15, "VisA": 12}[mean.data]
                assert statistics.fmean(values) == pytest.approx(float(mean.values[key]), abs=0.1)
                checked += 1
    assert checked == 7 + 4 + 7 + 4 + 2 + 2
    assert {(row.method, row.data) for row in rows} == {
        *((method, data) for method in ("winclip", "april_gan", "musc") for data in ("MVTec AD", "VisA")),
        ("vvv", "VisA"),
    }


def test_seeds_are_averaged_and_compared_with_values_that_have_deviations() -> None:
    values = {key: [90.0, 92.0] for key in METRICS} | {"pixel_ap": []}
    text = dict.fromkeys(METRICS, "") | {"image_auroc": "93.1±2.0", "pixel_ap": "50"}
    row = Published("winclip", "a paper", "VisA", 1, "mean", text)
    own, paper, difference = published.lines("mean", values, [row])
    assert own == ("mean", "zsad", "91.0±1.4", "91.0±1.4", "91.0±1.4", "91.0±1.4", "91.0±1.4", "-", "91.0±1.4")
    assert paper == ("", "a paper", "93.1±2.0", "-", "-", "-", "-", "50", "-")
    assert difference == ("", "  difference", "-2.1", "-", "-", "-", "-", "-", "-")

"""zsad-eval on small fake results: values, both protocols, what is missing, output files and exit codes."""

from __future__ import annotations

import csv
import errno
import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any
from weakref import finalize

import numpy as np
import pytest
from clip_checkpoints import text_arrays
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.commands.evaluate import main
from zsad.engine.evaluation.evaluate import CHALLENGE_WEIGHTS, METRICS, EvaluationError, evaluate, format_csv, labelled
from zsad.engine.evaluation.localisation import Comparison
from zsad.engine.evaluation.metrics import image_metrics, pixel_metrics
from zsad.engine.evaluation.pixels import Source
from zsad.engine.images.folders import scan
from zsad.engine.results.output import claimed
from zsad.engine.scores.maps import upsample
from zsad.engine.scores.verdicts import region_mask
from zsad.kernels.machine import available_cores

HEIGHT, WIDTH = 24, 32
# Makes Pillow run `gs`, where nothing says which formats are meant.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\nshowpage\n%%EOF\n"


class Case:
    """A folder of categories and a folder of results, filled image by image."""

    def __init__(self, root: Path) -> None:
        self.out, self.data = root / "out", root / "data"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.rng = np.random.default_rng(0)

    def add(
        self, category: str, relative: str, score: float, mask: NDArray[Any] | None = None, image: bool = True
    ) -> NDArray[np.float32]:
        if image:
            path = self.data / category / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        if mask is not None:
            self.add_mask(category, relative, mask)
        map_ = self.rng.random((HEIGHT, WIDTH)).astype(np.float32)
        if mask is not None and mask.shape == map_.shape:
            map_ += 0.5 * (mask > 0)
        stored = PurePosixPath("maps") / PurePosixPath(relative).with_suffix(".tiff")
        map_path = self.out / category / stored
        map_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(map_).save(map_path)
        rows = self.rows.setdefault(category, [])
        rows.append({"path": relative, "score": score, "rank": len(rows) + 1, "raw_score": score, "map": str(stored)})
        self.write_scores(category)
        return map_

    def add_mask(self, category: str, relative: str, mask: NDArray[Any]) -> Path:
        _, *folders, name = PurePosixPath(relative).with_suffix("").parts
        path = self.data.joinpath(category, "ground_truth", *folders, f"{name}_mask.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(path)
        return path

    def write_scores(self, category: str) -> None:
        with (self.out / category / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[category][0])
            writer.writeheader()
            writer.writerows(self.rows[category])

    def run(self, *options: str) -> int:
        return main([str(self.out), str(self.data), *options])


def make_mask(top: int, left: int, value: int = 255) -> NDArray[np.uint8]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + 6, left : left + 7] = value
    return mask


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Category `cable` with masks, `tile` with labels only."""
    case = Case(tmp_path)
    for category, masked in (("cable", True), ("tile", False)):
        case.add(category, "test/good/000.png", 0.1)
        case.add(category, "test/good/001.png", 0.6)
        case.add(category, "test/cut/000.png", 0.5, make_mask(2, 3) if masked else None)
        case.add(category, "test/hole/000.png", 0.9, make_mask(12, 20) if masked else None)
    return case


def complaints(error: str) -> list[str]:
    """What was said on standard error, but for the word on `tile`, which has no masks."""
    return [line for line in error.splitlines() if "tile: no masks" not in line]


def test_values_and_means(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--json") == 0
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert "tile: no masks, so no pixel metrics: looked for ground_truth/cut/000_mask.png" in output.err
    found = json.loads(output.out)
    assert found.keys() == {"categories", "mean", "protocol"}
    assert found["protocol"] == "official"
    assert list(found["categories"]) == ["cable", "tile"]
    cable, tile = found["categories"].values()
    assert list(cable) == list(tile) == list(found["mean"]) == list(METRICS)

    image = image_metrics([0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9])
    stored = sorted((case.out / "cable").glob("maps/test/*/*.tiff"))  # cut, good, good, hole
    maps = [np.asarray(Image.open(path)) for path in stored]
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixel = pixel_metrics([make_mask(2, 3, 1), empty, empty, make_mask(12, 20, 1)], maps)
    expected = {f"image_{key}": value for key, value in image.items()}
    expected |= {f"pixel_{key}": value for key, value in pixel.items()}
    weights = CHALLENGE_WEIGHTS
    challenge = sum(weights[key] * expected[key] for key in weights) / sum(weights.values())
    assert cable == pytest.approx({**expected, "challenge": challenge})
    assert all((value is None) == (not key.startswith("image")) for key, value in tile.items())
    assert found["mean"] == pytest.approx(cable)  # both categories have the same image scores
    assert found == evaluate(case.out, scan(case.data))


def test_table_and_files(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--aupro-limit", "0.05") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "AUPRO@0.05" in head
    assert [row.split()[:2] for row in rows] == [[name, "official"] for name in ("cable", "tile", "mean")]
    assert rows[1].split()[2:] == ["0.7500", "0.8333", "0.8000", "-", "-", "-", "-", "-"]
    saved = json.loads((case.out / "metrics.json").read_text(encoding="utf-8"))
    with (case.out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["category"] for row in table] == ["cable", "tile", "mean"]
    assert {row["protocol"] for row in table} == {"official"}
    assert float(table[0]["pixel_aupro"]) == saved["categories"]["cable"]["pixel_aupro"]
    assert table[1]["pixel_aupro"] == ""

    elsewhere = tmp_path / "reports" / "m.csv", tmp_path / "reports" / "m.json"
    assert case.run("--aupro-limit", "0.05", "--csv", str(elsewhere[0]), "--output-json", str(elsewhere[1])) == 0
    assert elsewhere[0].read_bytes() == (case.out / "metrics.csv").read_bytes()
    assert elsewhere[1].read_bytes() == (case.out / "metrics.json").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_paper_protocol_resizes_and_keeps_full_intensity(case: Case) -> None:
    found = evaluate(case.out, scan(case.data), Comparison("paper"))
    size, bilinear = (518, 518), Image.Resampling.BILINEAR
    masks, maps = [], []
    for path in sorted((case.out / "cable").glob("maps/test/*/*.tiff")):
        mask = {"cut": make_mask(2, 3), "hole": make_mask(12, 20)}.get(path.parent.name, np.zeros((HEIGHT, WIDTH)))
        resized = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, bilinear), np.float32) / 255
        masks.append(resized.astype(np.int32))
        maps.append(np.asarray(Image.open(path).resize(size, bilinear), np.float64))
    expected = pixel_metrics(masks, maps, aupro_steps=200)
    cable = found["categories"]["cable"]
    assert found["protocol"] == "paper"
    assert {key: cable[f"pixel_{key}"] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert cable != evaluate(case.out, scan(case.data))["categories"]["cable"]


CLASSES = ("bottle", "metal_nut")
ORDER = ("pixel_auroc", "pixel_f1", "pixel_ap", "pixel_aupro", "image_auroc", "image_f1", "image_ap")


def write_record(out: Path, method: str, side: int) -> None:
    record = {"method": method, "config": {"networks": {"clip": {"image_size": side}}}}
    (out / "run.json").write_text(json.dumps(record))


def write_april(case: Case, maps: str, scores: str, own_sizes: bool) -> None:
    """Lay out the golden pictures with the published code's maps, at its own 98x98 or enlarged to the pictures'."""
    arrays = text_arrays("april")
    for index, anomalous in enumerate(arrays["anomaly"]):
        mask, map_ = 255 * arrays["ground_truth"][index], arrays[maps][index]
        if own_sizes:
            mask = arrays[f"mask_file_{index}"]
            map_ = upsample(map_, mask.shape)
        category, relative = CLASSES[arrays["class_index"][index]], f"test/{('good', 'bad')[anomalous]}/{index}.png"
        case.add(category, relative, arrays[scores][index], mask if anomalous else None)
        Image.new("L", mask.shape[::-1]).save(case.data / category / relative)
        Image.fromarray(map_).save(case.out / category / "maps" / PurePosixPath(relative).with_suffix(".tiff"))
    write_record(case.out, "april_gan", 98)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    """Masks and maps of each category that is compared."""
    seen = []

    def watched(masks: Sequence[Any], maps: Sequence[Any], *options: Any) -> dict[str, float]:
        seen.append((masks, maps))
        return pixel_metrics(masks, maps, *options)

    monkeypatch.setattr("zsad.engine.evaluation.localisation.pixel_metrics", watched)
    return seen


@pytest.mark.parametrize(
    ("metrics_of", "maps", "scores"),
    [
        ("zero", "zero_map", "zero_image_score"),
        ("few1", "few1_combined_map", "few1_image_score"),
        ("few2", "few2_combined_map", "few2_image_score"),
        ("fake", "fake_map", "zero_image_score"),
    ],
)
def test_april_gans_results_give_its_published_codes_metrics(
    tmp_path: Path, metrics_of: str, maps: str, scores: str
) -> None:
    case = Case(tmp_path)
    write_april(case, maps, scores, own_sizes=False)
    found = evaluate(case.out, scan(case.data), Comparison("paper"))
    rows = [*(found["categories"][name] for name in CLASSES), found["mean"]]
    expected = text_arrays("april")[f"{metrics_of}_metrics"]
    assert [[row[key] for key in ORDER] for row in rows] == [pytest.approx(row, abs=1e-12) for row in expected]


def test_masks_and_maps_of_any_size_become_those_of_april_gans_code(
    tmp_path: Path, compared: list[tuple[Sequence[Any], Sequence[Any]]]
) -> None:
    case = Case(tmp_path)
    write_april(case, "zero_map", "zero_image_score", own_sizes=True)
    evaluate(case.out, scan(case.data), Comparison("paper"))
    arrays = text_arrays("april")
    for number, (masks, maps) in enumerate(compared):
        order = np.flatnonzero(arrays["class_index"] == number)
        np.testing.assert_array_equal(masks, arrays["ground_truth"][order])
        assert {map_.dtype for map_ in maps} == {np.dtype(np.float32)}
        # Enlarged and brought back, at worst from a side of 76 pixels.
        np.testing.assert_allclose(maps, arrays["zero_map"][order], atol=0.03)


def test_winclips_masks_count_from_half_the_intensity_at_its_side(
    case: Case, compared: list[tuple[Sequence[Any], Sequence[Any]]]
) -> None:
    write_record(case.out, "winclip", 20)
    evaluate(case.out, scan(case.data), Comparison("paper"))
    masks, maps = compared[0]
    resized = np.asarray(Image.fromarray(make_mask(2, 3)).resize((20, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(masks[2], resized / 255 > 0.5)
    assert (maps[0].shape, maps[0].dtype) == ((20, 20), np.float64)


@pytest.mark.parametrize("method", [None, "musc", "another"])
def test_muscs_rules_hold_for_other_records(case: Case, method: str | None) -> None:
    expected = evaluate(case.out, scan(case.data), Comparison("paper"))
    (case.out / "run.json").write_text(json.dumps({"method": method, "config": {}} if method else {"config": {}}))
    assert evaluate(case.out, scan(case.data), Comparison("paper")) == expected


@pytest.mark.parametrize("record", ["{", "[]", '{"method": "winclip"}', '{"method": "winclip", "config": {}}'])
def test_a_broken_record_is_named(case: Case, record: str) -> None:
    (case.out / "run.json").write_text(record)
    evaluate(case.out, scan(case.data))
    with pytest.raises(EvaluationError, match=r"run\.json is not the record of a run .*: run `zsad-infer` again"):
        evaluate(case.out, scan(case.data), Comparison("paper"))


def test_masks_of_zero_and_one_count_in_both_protocols(case: Case) -> None:
    before = [evaluate(case.out, scan(case.data), Comparison(protocol)) for protocol in ("official", "paper")]
    case.add_mask("cable", "test/cut/000.png", make_mask(2, 3, 1))
    assert [evaluate(case.out, scan(case.data), Comparison(protocol)) for protocol in ("official", "paper")] == before


def test_one_category_as_data_is_named_by_its_folder(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(case.out, scan(case.data))["categories"]["cable"]
    monkeypatch.chdir(case.data / "cable")
    messages: list[str] = []
    assert evaluate(case.out, scan(Path()), warn=messages.append)["categories"] == {"cable": whole}
    assert messages == []


def test_one_class_has_no_image_values(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.add("cable", "test/cut/000.png", 0.5, make_mask(2, 3))
    values = evaluate(case.out, scan(case.data))["categories"]["cable"]
    assert all((value is None) == (not key.startswith("pixel")) for key, value in values.items())


def drop_mask(case: Case) -> None:
    case.add_mask("cable", "test/cut/000.png", make_mask(2, 3)).unlink()


def shrink_mask(case: Case) -> None:
    case.add_mask("cable", "test/cut/000.png", make_mask(2, 3)[:-1])


def break_mask(case: Case) -> None:
    case.add_mask("cable", "test/cut/000.png", make_mask(2, 3)).write_bytes(b"no image")


def widen_mask(case: Case) -> None:
    path = case.add_mask("cable", "test/cut/000.png", make_mask(2, 3))
    content = bytearray(path.read_bytes())
    content[16:20] = struct.pack(">I", 20_000_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def tear_mask(case: Case) -> None:
    path = case.add_mask("cable", "test/cut/000.png", make_mask(2, 3))
    content = bytearray(path.read_bytes())
    content[41:] = content[41:48]  # within the pixels
    path.write_bytes(content)


def write_program_as_mask(case: Case) -> None:
    path = case.add_mask("cable", "test/cut/000.png", make_mask(2, 3))
    path.write_bytes(POSTSCRIPT)


def write_program_as_map(case: Case) -> None:
    (case.out / "cable/maps/test/cut/000.tiff").write_bytes(POSTSCRIPT)


def cut_map(case: Case) -> None:
    path = case.out / "cable/maps/test/cut/000.tiff"
    path.write_bytes(path.read_bytes()[:-400])


def spoil_tags_of_map(case: Case) -> None:
    path = case.out / "cable/maps/test/cut/000.tiff"
    content = bytearray(path.read_bytes())
    content[8:60] = b"\xff" * 52
    path.write_bytes(content)


def drop_map(case: Case) -> None:
    (case.out / "cable/maps/test/cut/000.tiff").unlink()


def spoil_map(case: Case) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)).save(case.out / "cable/maps/test/cut/000.tiff")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_mask, "its mask is missing: looked for ground_truth/cut/000_mask.png"),
        (shrink_mask, "000_mask.png is 32x23 px, the image 32x24 px"),
        (break_mask, "000_mask.png: not a PNG"),
        (widen_mask, "000_mask.png: too large"),
        (tear_mask, "000_mask.png: damaged"),
        (write_program_as_mask, "000_mask.png: not a PNG"),
        (write_program_as_map, "its map .*000.tiff: not a TIFF image; run"),
        (cut_map, "its map .*000.tiff: damaged: .*truncated"),
        (spoil_tags_of_map, "its map .*000.tiff: "),
        (drop_map, "its map .*000.tiff is missing"),
        (spoil_map, "000.tiff holds NaN"),
    ],
)
def test_an_image_without_usable_pixels_keeps_its_score(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Case], None],
    reason: str,
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)  # no file is a reason to run another program
    intact = evaluate(case.out, scan(case.data))["categories"]["cable"]
    damage(case)
    assert case.run("--json") == 1
    output = capsys.readouterr()
    assert len(complaints(output.err)) == 1
    assert str(Path("cable/test/cut/000.png")) in output.err
    assert re.search(reason, output.err)
    damaged = json.loads(output.out)["categories"]["cable"]
    assert [damaged[key] for key in METRICS[:3]] == [intact[key] for key in METRICS[:3]]
    assert damaged["pixel_auroc"] not in (None, intact["pixel_auroc"])


def add_stray_mask(case: Case) -> None:
    case.add_mask("cable", "test/cut/777.png", make_mask(2, 3))


def add_unscored_image(case: Case) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(case.data / "cable/test/good/777.png")


def add_result_without_image(case: Case) -> None:
    case.add("cable", "test/good/777.png", 0.3, image=False)


def add_result_beside_defects(case: Case) -> None:
    case.add("cable", "test/777.png", 0.3)


def add_unscored_category(case: Case) -> None:
    (case.data / "wood777" / "test" / "good").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(case.data / "wood777/test/good/000.png")


def add_results_without_category(case: Case) -> None:
    case.add("wood777", "test/good/000.png", 0.3, image=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_stray_mask, "777_mask.png: a mask without an image"),
        (add_unscored_image, "777.png: no result in"),
        (add_result_without_image, "777.png: no longer in the data"),
        (add_result_beside_defects, "777.png: without a label"),
        (add_unscored_category, "wood777: no results in"),
        (add_results_without_category, "wood777: results in"),
    ],
)
def test_what_has_no_counterpart_is_named_and_the_rest_evaluated(
    case: Case, capsys: pytest.CaptureFixture[str], change: Callable[[Case], None], reason: str
) -> None:
    intact = evaluate(case.out, scan(case.data))
    change(case)
    assert case.run("--json") == 1
    output = capsys.readouterr()
    assert len(complaints(output.err)) == 1
    assert reason in output.err
    assert json.loads(output.out) == intact


@pytest.mark.parametrize("score", ["", "high", "nan"])
def test_a_score_that_is_no_number_leaves_its_image_out(
    case: Case, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    case.rows["cable"][0]["score"] = score
    case.write_scores("cable")
    assert case.run("--json") == 1
    output = capsys.readouterr()
    assert "000.png: the score" in output.err
    assert json.loads(output.out)["categories"]["cable"]["image_auroc"] == pytest.approx(0.5)


def test_a_short_row_is_named(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    with (case.out / "cable" / "scores.csv").open("a", encoding="utf-8") as file:
        file.write("test/good/777.png\n")
    assert case.run() == 1
    assert "777.png" in capsys.readouterr().err


def test_missing_results_or_ground_truth_end_with_2(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for out, data, reason in (
        (tmp_path / "nowhere", case.data, "run `zsad-infer "),
        (empty, case.data, "scores.csv"),
        (case.out, tmp_path / "nowhere", "no such folder"),
        (case.out, empty, "no images in it"),
    ):
        assert main([str(out), str(data)]) == 2
        output = capsys.readouterr()
        assert reason in output.err
        assert output.out == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"path,score\ntest/good/000.png,0.1\n", "lacks the column map"), (b"\xff\xfe", "lacks"), (b"", "lacks")],
)
def test_unreadable_scores_end_with_2(
    case: Case, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    (case.out / "cable" / "scores.csv").write_bytes(content)
    assert case.run() == 2
    assert reason in capsys.readouterr().err
    with pytest.raises(EvaluationError, match=reason):
        evaluate(case.out, scan(case.data))


def test_results_that_a_run_is_writing_are_refused(flat: Case, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(flat.out, (), resume=True):
        assert flat.run() == 2
        said = capsys.readouterr()
        assert re.fullmatch(
            rf"zsad-eval: {flat.out}: another run is writing there \(process .*\); wait until it has ended\n", said.err
        )
        assert said.out == ""
    assert flat.run() == 0


@pytest.mark.parametrize("limit", ["0", "1.5", "nan", "some"])
def test_usage_errors_end_with_2(case: Case, limit: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        case.run("--aupro-limit", limit)
    assert exit_.value.code == 2


def test_strict_metrics_are_none_of_a_paper(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        case.run("--strict-metrics", "--protocol", "paper")
    assert exit_.value.code == 2
    assert "leave out --protocol paper" in capsys.readouterr().err


def test_names_that_are_no_unicode_are_evaluated(case: Case) -> None:
    """The score table keeps the bytes of such names; so does the lookup of their masks."""
    name = b"odd\xff".decode("utf-8", "surrogateescape")
    scores = case.out / "cable" / "scores.csv"
    text = scores.read_text(encoding="utf-8")
    before = evaluate(case.out, scan(case.data))
    for folder, suffix in (
        (case.data / "cable" / "test" / "good", ".png"),
        (case.out / "cable" / "maps/test/good", ".tiff"),
    ):
        (folder / f"000{suffix}").rename(folder / f"{name}{suffix}")
    scores.write_text(text.replace("good/000", f"good/{name}"), encoding="utf-8", errors="surrogateescape")
    warnings: list[str] = []
    assert evaluate(case.out, scan(case.data), warn=warnings.append) == before
    assert not warnings


def test_results_without_maps_are_said_once(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    scores = case.out / "cable" / "scores.csv"
    with scores.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with scores.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "map": ""} for row in rows)
    assert case.run() == 1
    errors = capsys.readouterr().err
    assert errors.count("no maps") == 1
    assert evaluate(case.out, scan(case.data), warn=lambda _: None)["categories"]["cable"]["pixel_auroc"] is None


def test_hidden_files_of_other_systems_are_no_images_and_no_masks(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    for root in sorted(case.data.glob("*/*/*/")):
        (root / "._000.png").write_bytes(b"Mac OS X")
    assert case.run() == 0
    assert not complaints(capsys.readouterr().err)


def test_a_category_whose_name_is_no_unicode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, name = Case(tmp_path), "caf\udce9"
    case.add(name, "test/good/000.png", 0.1)
    case.add(name, "test/bent/000.png", 0.9, make_mask(3, 4))
    assert case.run() == 0
    assert b"caf\xe9," in (case.out / "metrics.csv").read_bytes()
    assert "caf\\udce9" in capsys.readouterr().out


def test_an_empty_mask_of_a_defective_image_and_a_drawn_one_of_a_normal_image(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluate(case.out, scan(case.data))["categories"]["cable"]
    case.add_mask("cable", "test/cut/000.png", make_mask(2, 3, 0))
    case.add_mask("cable", "test/good/000.png", make_mask(2, 3))
    case.add_mask("cable", "test/good/001.png", make_mask(2, 3, 0))
    assert case.run("--json") == 1
    output = capsys.readouterr()
    empty, drawn = sorted(complaints(output.err))
    assert "cut/000_mask.png is empty, though the image counts as cut" in empty
    assert "good/000_mask.png is not empty, though the image counts as normal" in drawn
    found = json.loads(output.out)["categories"]["cable"]
    assert found["image_auroc"] == before["image_auroc"]
    maps = case.out / "cable/maps/test"
    used = [(make_mask(12, 20, 1), maps / "hole/000.tiff"), (make_mask(0, 0, 0), maps / "good/001.tiff")]
    expected = pixel_metrics([mask for mask, _ in used], [np.asarray(Image.open(path)) for _, path in used])
    assert found["pixel_auroc"] == pytest.approx(expected["auroc"])


@pytest.fixture
def flat(tmp_path: Path) -> Case:
    """Images without labels, with masks beside them: one drawn, one empty; and one image without a mask."""
    case = Case(tmp_path)
    for index, mask in enumerate((make_mask(2, 3), make_mask(2, 3, 0), None)):
        case.add("part", f"{index}.png", 0.9 - index / 4)
        if mask is not None:
            Image.fromarray(mask).save(case.data / "part" / f"{index}_label.bmp")
    return case


def test_where_no_folder_says_so_masks_tell_the_defective_images(
    flat: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flat.run("--json") == 0
    output = capsys.readouterr()
    assert "part: 1 of 3 images have no mask and count as normal" in output.err
    assert json.loads(output.out)["categories"]["part"]["image_auroc"] == 1
    labels = [image.anomalous for image in labelled(scan(flat.data).categories[0]).images]
    assert labels == [True, False, False]


def test_a_mask_that_says_nothing_leaves_its_image_without_a_label(
    flat: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    (flat.data / "part" / "1_label.bmp").write_bytes(b"BM damaged")
    assert flat.run() == 1
    errors = capsys.readouterr().err
    assert errors.count("1_label.bmp") == 1
    assert "1.png: without a label" in errors


def test_metrics_that_there_cannot_be_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    case.add("part", "test/good/000.png", 0.5)
    assert case.run() == 0
    assert "part: no image metrics, since all images that are compared (1) count as normal" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", [0, -1, float("nan")])
def test_saturation_from_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: float
) -> None:
    case = Case(tmp_path)
    add_regions(case, (255,))
    entry = {"defect_name": "a", "pixel_value": 255, "saturation_threshold": threshold, "relative_saturation": False}
    (case.data / "loco" / "defects_config.json").write_text(json.dumps([entry]))
    assert case.run() == 1
    assert "defects_config.json cannot be read" in capsys.readouterr().err


def test_quiet_says_errors_only(flat: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert flat.run("-q") == 0
    assert capsys.readouterr().err == ""


def test_help_waits_for_nothing_that_works_on_images() -> None:
    code = "import sys; from zsad.engine.commands.evaluate import main; main(['--help'])"
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    assert "zsad-eval" in result.stdout
    assert not [line for line in result.stderr.splitlines() if re.search(r"\| +(numpy|cv2|PIL|onnx)", line)]


# Regions that saturate


def add_regions(case: Case, values: Sequence[int]) -> None:
    """Put an image with one mask file for each region into the category `loco`."""
    case.add("loco", "test/good/000.png", 0.1)
    case.add("loco", "test/logical/000.png", 0.9)
    folder = case.data / "loco/ground_truth/logical/000"
    folder.mkdir(parents=True)
    for index, value in enumerate(values):
        Image.fromarray(make_mask(2 + 8 * index, 3 + 5 * index, value)).save(folder / f"{index:03d}.png")


def spro_loop(case: Case, regions: Sequence[tuple[NDArray[Any], float]], limit: float) -> float:
    """The area under the saturated per-region overlap, threshold after threshold."""
    good, bad = (np.asarray(Image.open(case.out / f"loco/maps/test/{name}/000.tiff")) for name in ("good", "logical"))
    outside = ~np.any([mask > 0 for mask, _ in regions], axis=0)
    negatives = np.concatenate([good.ravel(), bad[outside]])
    points = [(0.0, 0.0)]
    for threshold in sorted({*good.ravel().tolist(), *bad.ravel().tolist()}, reverse=True):
        overlaps = [min(np.count_nonzero(bad[mask > 0] >= threshold) / area, 1) for mask, area in regions]
        points.append((float(np.mean(negatives >= threshold)), float(np.mean(overlaps))))
    area = 0.0
    for (r0, o0), (r1, o1) in pairwise(points):
        if r0 >= limit or r1 == r0:
            continue
        end = min(r1, limit)
        at_end = o0 + (o1 - o0) * (end - r0) / (r1 - r0)
        area += (end - r0) * (o0 + at_end) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_saturated_regions(tmp_path: Path, limit: float) -> None:
    case = Case(tmp_path)
    add_regions(case, (255, 254))
    config = [
        {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 10, "relative_saturation": False},
        {"defect_name": "moved", "pixel_value": 254, "saturation_threshold": 0.4, "relative_saturation": True},
    ]
    whole = [(make_mask(2, 3), 42.0), (make_mask(10, 8), 42.0)]
    values = evaluate(case.out, scan(case.data), Comparison(aupro_limit=limit))["categories"]["loco"]
    assert values["pixel_aupro"] == pytest.approx(spro_loop(case, whole, limit))
    (case.data / "loco" / "defects_config.json").write_text(json.dumps(config))
    values = evaluate(case.out, scan(case.data), Comparison(aupro_limit=limit))["categories"]["loco"]
    saturated = [(make_mask(2, 3), 10.0), (make_mask(10, 8), 0.4 * 42)]
    assert values["pixel_aupro"] == pytest.approx(spro_loop(case, saturated, limit))
    assert spro_loop(case, saturated, limit) != spro_loop(case, whole, limit)


def test_a_region_or_a_file_that_saturation_cannot_be_read_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    add_regions(case, (255,))
    config = case.data / "loco" / "defects_config.json"
    config.write_text(
        '[{"defect_name": "a", "pixel_value": 7, "saturation_threshold": 1, "relative_saturation": true}]'
    )
    assert case.run() == 1
    assert "has the value 255, which defects_config.json does not name" in capsys.readouterr().err
    config.write_text('[{"defect_name": "a"}]')
    assert case.run() == 1
    assert re.search(r"defects_config.json cannot be read .*whole area", capsys.readouterr().err)


def test_a_check_names_what_is_wrong(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case.out / "mvtec-ad"
    for category in ("cable", "tile"):
        for path in (case.out / category / "maps").rglob("*.tiff"):
            target = folder / category / path.relative_to(case.out / category / "maps")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    assert main(["--check", "mvtec-ad", str(case.out)]) == 0
    said = (
        f"{folder}: 8 files looked at, 0 faults; names, counts and sizes were not compared with images: give DATA too"
    )
    assert capsys.readouterr().out == f"{said}\n"
    assert case.run("--check", "mvtec-ad") == 0
    assert main(["--check", "mvtec-ad", str(folder)]) == 0
    for name in ("cable/test/good/000", "cable/test/good/001", "cable/test/cut/000", "tile/test/cut/000"):
        (folder / f"{name}.tiff").unlink()
    capsys.readouterr()
    assert case.run("--check", "mvtec-ad") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 4 files looked at, 4 faults",
        "  missing: cable/test/cut/000.tiff, cable/test/good/000.tiff, cable/test/good/001.tiff and 1 more",
    ]
    assert case.run("--check", "mvtec-ad", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"]["missing"]["count"] == 4
    assert case.run("--check", "rayan") == 1
    (case.out / "run.json").touch()
    assert main(["--check", "visa", str(case.out)]) == 2
    assert "run `zsad-infer DATA --output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(case.out)])
    assert "the following arguments are required: DATA" in capsys.readouterr().err


def test_names_that_are_formulas_are_neutral_in_tables_and_read_back(tmp_path: Path) -> None:
    case = Case(tmp_path)
    for name, score in (("test/good/0.png", 0.1), ("test/bad/1.png", 0.9)):
        case.add("=cmd", name, score, None if "good" in name else np.eye(HEIGHT, WIDTH) * 255)
    case.rows["=cmd"][0]["path"] = "'=gone.png"
    case.write_scores("=cmd")
    said: list[str] = []
    evaluation = evaluate(case.out, scan(case.data), warn=said.append)
    assert format_csv(evaluation).splitlines()[1].startswith("'=cmd,")
    assert f"{case.data}/=cmd/=gone.png: no longer in the data; result left out" in said


def test_verdicts_are_counted_where_there_are_some(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for row, verdict in zip(case.rows["cable"], ("accept", "review", "review", "reject"), strict=True):
        row["verdict"] = verdict
    case.write_scores("cable")
    assert case.run("--json") == 0
    said = "reject 1 of 2 defective, 0 of 2 good images; review 1 of 2 defective, 1 of 2 good images; accept 0 of 2"
    error = capsys.readouterr().err
    assert f"cable: verdicts: {said}" in error
    assert "tile: verdicts" not in error


# Beyond the memory limit


def test_beyond_the_memory_limit_all_is_the_same(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.add("cable", "test/hole/001.png", 0.7, make_mask(1, 1))
    case.add_mask("cable", "test/hole/001.png", np.eye(5) * 255)  # of another size: left out
    case.add("cable", "test/hole/002.png", 0.8, make_mask(5, 9))
    seen = []
    for options in ((), ("--memory-limit", "1KB"), ("--memory-limit", "20KB")):
        assert case.run("--strict-metrics", "--json", *options) == 1
        seen.append(capsys.readouterr())
    (expected, error), *others = ((json.loads(output.out), output.err) for output in seen)
    assert "001_mask.png is 5x5 px" in error
    for found, said in others:
        assert said == error
        assert found["categories"]["cable"] == pytest.approx(expected["categories"]["cable"], abs=1e-12, nan_ok=True)


def test_beyond_the_memory_limit_there_are_the_maps_that_threads_work_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(20):
        case.add("cable", f"test/cut/{index + 100}.png", 0.5, make_mask(2, 3))
    there, most = 0, 0
    lock = Lock()

    def read(source: Source, number: int) -> Any:
        nonlocal there, most
        pixels = read_one(source, number)
        with lock:
            there += 1
            most = max(most, there)
        finalize(pixels, leave)
        return pixels

    def leave() -> None:
        nonlocal there
        there -= 1

    read_one = Source.read
    monkeypatch.setattr(Source, "read", read)
    evaluate(case.out, scan(case.data), Comparison(memory_limit=1))
    assert most <= available_cores()
    evaluate(case.out, scan(case.data))
    assert most == 24


def test_a_full_disk_is_said_with_what_mends_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zsad.engine.evaluation.localisation.Spilled.add", full)
    assert case.run("--memory-limit", "1KB") == 2
    assert re.search(r"is full: export TMPDIR=\S+ on a larger disk, or raise --memory-limit$", capsys.readouterr().err)


# Strict metrics


def write_regions(case: Case, category: str, bound: float, areas: Mapping[str, Sequence[int]]) -> None:
    (case.out / category / "category.json").write_text(json.dumps({"bounds": {"region": bound}}))
    rows = [f"{path},0,0,1,1,{area},1.0" for path, of_image in areas.items() for area in of_image]
    (case.out / category / "regions.csv").write_text("\n".join(["path,x,y,width,height,area,peak", *rows]) + "\n")


def test_strict_metrics_stand_beside_the_others(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    write_regions(case, "cable", 0.75, {"test/cut/000.png": (3, 12), "test/good/001.png": (1,)})
    before = evaluate(case.out, scan(case.data))["categories"]["cable"]
    assert case.run("--strict-metrics") == 0
    output = capsys.readouterr()
    head, *_ = output.out.splitlines()
    assert head.split()[-4:] == ["AUPRO@0.05", "AU-sPRO@0.05", "AUPIMO@1e-5..1e-4", "SegF1@regions"]
    assert "cable: AUPIMO is coarse: it asks for false-positive rates from 1e-05 on" in output.err
    saved = json.loads((case.out / "metrics.json").read_bytes())["categories"]
    cable = saved["cable"]
    assert {key: cable[key] for key in before} == before
    assert (
        cable["pixel_aupro_0.05"]
        == evaluate(case.out, scan(case.data), Comparison(aupro_limit=0.05))["categories"]["cable"]["pixel_aupro"]
    )
    assert cable["pixel_auspro_0.05"] is None  # nothing saturates
    maps = {path.parts[-2:]: np.asarray(Image.open(path)) for path in (case.out / "cable").glob("maps/test/*/*.tiff")}
    masks = {("cut", "000.tiff"): make_mask(2, 3) > 0, ("hole", "000.tiff"): make_mask(12, 20) > 0}
    # So few normal pixels have no false-positive rate between 0 and 1e-4.
    highest = max(map_.max() for (folder, _), map_ in maps.items() if folder == "good")
    recalls = [np.mean(maps[key][mask] > highest) for key, mask in masks.items()]
    assert cable["pixel_aupimo_1e-5_1e-4"] == pytest.approx(np.mean(recalls))
    cut, good = (
        region_mask(maps[key], 0.75, least) for key, least in ((("cut", "000.tiff"), 3), (("good", "001.tiff"), 1))
    )
    hits = np.count_nonzero(cut & masks["cut", "000.tiff"])
    both = np.count_nonzero(cut) + np.count_nonzero(good) + 2 * 42
    assert 0 < cable["pixel_segf1_regions"] == pytest.approx(2 * hits / both)
    assert all(saved["tile"][key] is None for key in cable if key.startswith("pixel_"))


def test_what_strict_metrics_lack_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    case.add("cable", "test/cut/000.png", 0.5, make_mask(2, 3))
    assert case.run("--strict-metrics") == 0
    error = capsys.readouterr().err
    assert "cable: no AUPIMO, since no normal image is compared" in error
    assert re.search("cable: no SegF1, since the results tell no regions: run `zsad-infer` ", error)


@pytest.mark.slow
def test_saturated_regions_have_both_strict_areas(tmp_path: Path) -> None:
    case = Case(tmp_path)
    add_regions(case, (255, 254))
    config = [
        {"defect_name": name, "pixel_value": value, "saturation_threshold": 10, "relative_saturation": False}
        for name, value in (("missing", 255), ("moved", 254))
    ]
    (case.data / "loco" / "defects_config.json").write_text(json.dumps(config))
    for limit in (None, 1):
        values = evaluate(case.out, scan(case.data), Comparison(strict=True, memory_limit=limit))["categories"]["loco"]
        masks = make_mask(2, 3), make_mask(10, 8)
        saturated, whole = ([(mask, area) for mask in masks] for area in (10.0, 42.0))
        assert values["pixel_auspro_0.05"] == pytest.approx(spro_loop(case, saturated, 0.05))
        assert values["pixel_aupro_0.05"] == pytest.approx(spro_loop(case, whole, 0.05))
        assert values["pixel_aupro"] == pytest.approx(spro_loop(case, saturated, 0.3))

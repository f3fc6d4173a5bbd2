"""Formats that others read: where the files lie, what is in them, and that a check finds what was spoilt."""

import csv
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from tifffile import imread, imwrite

from zsad.engine.config import ConfigError
from zsad.engine.images.folders import Dataset, scan
from zsad.engine.results import coco, exports, mvtec_ad2, rayan, source
from zsad.engine.results.exports import check, export
from zsad.engine.results.formats import Export, of_finished, of_images
from zsad.engine.results.output import OutputError
from zsad.engine.results.records import CategoryRecord, Failure, ImageRecord
from zsad.engine.results.source import Faults, Finished, Source, place_of
from zsad.engine.scores.verdicts import Bounds, find_regions, labelled_regions

SIZE = (10, 14)  # rows and columns of all images
THRESHOLD = 0.5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of the time here."""
    monkeypatch.setattr(exports, "flush_all", lambda folder: None)


class Case:
    """Drawn images, and the finished results of a run over them: every other image has two defects."""

    def __init__(self, root: Path, *names: str, failed: str = "", bounds: bool = True) -> None:
        self.data, self.out, self.maps = root / "data", root / "out", dict[str, NDArray[np.float32]]()
        for name in names:
            (self.data / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE[::-1]).save(self.data / name, "PNG")
        rng, finished = np.random.default_rng(0), []
        for category in self.dataset.categories:
            records, failures = [], []
            for number, image in enumerate(category.images):
                path = str(image.relative)
                if path == failed:
                    failures.append(Failure(path, "damaged"))
                    continue
                scores = rng.random(SIZE).astype(np.float32) * np.float32(0.4)
                if number % 2:
                    scores[1:4, 2:5] = 0.9
                    scores[7:9, 6:13] = 0.7
                key = f"{category.name}/{path}"
                self.maps[key] = scores
                map_ = f"maps/{image.key}.tiff"
                (self.out / category.name / map_).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scores).save(self.out / category.name / map_, format="TIFF")
                found = find_regions(scores, THRESHOLD, 3) if bounds else None
                record = ImageRecord(path, float(scores.max()), 1.0, width=SIZE[1], height=SIZE[0], map=map_)
                records.append(replace(record, regions=found))
            limits = Bounds(0.5, 0.5, "rule", THRESHOLD) if bounds else None
            record = CategoryRecord(category.name, images=records, failures=failures, bounds=limits)
            finished.append(Finished(record, category.root, self.out / category.name))
        self.source = Source(self.data, finished)

    @property
    def dataset(self) -> Dataset:
        return scan(self.data)

    def export(self, name: Export) -> list[str]:
        self.out.mkdir(exist_ok=True)
        return export(name, self.out, self.source)

    def check(self, name: str, with_data: bool = True, place: Path | None = None) -> dict[str, int]:
        return check(name, place or self.out, self.dataset if with_data else None, lambda _: None).faults.counts


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def saved(values: NDArray[Any], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    return file.getvalue()


# Trees of maps


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("mvtec-ad", "bolt/test/bent/000.png", "bolt/test/bent/000.tiff"),
        ("mvtec-loco", "bag/test/logical_anomalies/000.png", "bag/test/logical_anomalies/000.tiff"),
        ("mvtec-3d", "bagel/test/hole/rgb/000.png", "bagel/test/hole/000.tiff"),
        ("visa", "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Images/Anomaly/000.tiff"),
        ("visa", "candle/test/bad/000.JPG", "candle/test/bad/000.tiff"),
    ],
)
def test_maps_lie_where_an_evaluator_looks(tmp_path: Path, name: Export, image: str, expected: str) -> None:
    good = image.replace("bent", "good").replace("hole", "good").replace("Anomaly", "Normal").replace("bad", "good")
    case = Case(tmp_path, image, good.replace("logical_anomalies", "good"))
    assert case.export(name) == []
    assert expected in files(case.out / name)
    category = case.dataset.categories[0].name
    map_ = case.maps[f"{category}/{image.partition('/')[2]}"]
    np.testing.assert_array_equal(imread(case.out / name / expected), map_)
    assert case.check(name) == case.check(name, with_data=False) == {}
    if name == "visa":
        with (case.out / name / "image_scores.csv").open(newline="") as file:
            rows = {row["image"]: row for row in csv.DictReader(file)}
        assert rows[image]["object"] == "candle"
        assert (float(rows[image]["score"]), rows[image]["map"]) == (round(float(map_.max()), 6), expected)


def test_what_a_tree_cannot_hold_is_said(tmp_path: Path) -> None:
    names = ["bolt/test/good/0.png", "bolt/test/bent/0.png", "bolt/test/bent/0.jpg", "bolt/test/bent/1.png"]
    case = Case(tmp_path, *names, "nut/0.png", failed="test/bent/1.png")
    assert case.export("mvtec-ad") == [
        "mvtec-ad: no file, since the image failed: bolt/test/bent/1.png",
        "mvtec-ad: no file, since another image has the same name but for its suffix: bolt/test/bent/0.png",
        "mvtec-ad: no file, since the image does not lie in <object>/test/<defect>/: nut/0.png",
    ]
    assert files(case.out / "mvtec-ad") == ["bolt/test/bent/0.tiff", "bolt/test/good/0.tiff", "format.json"]
    assert case.check("mvtec-ad") == {"missing": 1}


@pytest.mark.parametrize("name", ["mvtec-ad", "visa", "coco"])
def test_any_names_are_held(tmp_path: Path, name: Export) -> None:
    if name == "coco":
        pytest.importorskip("pycocotools")
    names = ["=1+1/test/go od/=2.png", "x.tiff/test/a.csv/b.tiff.png", "ü/test/good/\udcff.png", "-/test/good/a~0.png"]
    case = Case(tmp_path, *names)
    assert case.export(name) == []
    assert case.check(name) == {}
    assert case.check(name, with_data=False) == {}


def test_a_later_export_replaces_the_earlier_one(tmp_path: Path) -> None:
    case = Case(tmp_path, "bolt/test/good/0.png", "bolt/test/bent/0.png")
    case.export("mvtec-ad")
    (case.out / "mvtec-ad/bolt/test/bent/0.tiff").rename(case.out / "mvtec-ad/bolt/test/bent/1.tiff")
    case.export("mvtec-ad")
    assert files(case.out / "mvtec-ad") == ["bolt/test/bent/0.tiff", "bolt/test/good/0.tiff", "format.json"]
    assert not list(case.out.glob(".*"))


def test_a_check_finds_what_is_wrong_with_maps(tmp_path: Path) -> None:
    names = [f"bolt/test/good/{number}.png" for number in range(8)]
    case = Case(tmp_path, *names)
    case.export("mvtec-ad")
    folder = case.out / "mvtec-ad/bolt/test/good"
    (folder / "0.tiff").unlink()  # first, since the others are also names of the results' own files
    for number in range(1, 7):
        (folder / f"{number}.tiff").unlink()
    whole = saved(np.zeros(SIZE, np.float32), "TIFF")
    imwrite(folder / "1.tiff", np.zeros((10, 15), np.float32))
    imwrite(folder / "2.tiff", np.zeros(SIZE, np.uint8))
    imwrite(folder / "3.tiff", np.zeros((*SIZE, 3), np.float32), photometric="rgb")
    imwrite(folder / "4.tiff", np.full(SIZE, np.nan, np.float32))
    (folder / "5.tiff").write_bytes(whole[:-1])
    (folder / "6.tiff").write_bytes(b"no TIFF file")
    (folder / "7.png").write_bytes(whole)
    assert case.check("mvtec-ad") == {
        "another size than its image": 1,
        "a map of uint8, not of float16 or float32 or float64": 1,
        "a map with more than one channel": 1,
        "NaN or infinity in a map": 1,
        "damaged, or no TIFF file": 2,
        "not expected": 1,
        "missing": 1,
    }
    assert "another size than its image" not in case.check("mvtec-ad", with_data=False)


@pytest.mark.parametrize(
    ("root", "path", "place"),
    [
        ("/data/can", "test_private/0.png", ("can", "test_private", "0.png")),
        ("/data/can/test_private", "0.png", ("can", "test_private", "0.png")),
        ("/data/test/bolt", "test/bent/0.png", ("bolt", "test", "bent/0.png")),
        ("/data/bolt", "good/0.png", None),
        ("/test", "0.png", None),
    ],
)
def test_the_place_of_an_image(root: str, path: str, place: tuple[str, str, str] | None) -> None:
    found = place_of(Path(root), path)
    assert (found and (*found[:2], str(found.inner))) == place


# MVTec AD 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants two images of each split of two objects."""
    monkeypatch.setattr(mvtec_ad2, "COUNTS", {"can": 2, "vial": 2})


def submission(tmp_path: Path, **options: Any) -> Case:
    names = [
        f"{product}/{split}/{number:03d}_{ending}.png"
        for product in ("can", "vial")
        for split, ending in mvtec_ad2.SPLITS.items()
        for number in range(2)
    ]
    return Case(tmp_path, *names, "can/test_public/good/000_regular.png", **options)


@pytest.mark.usefixtures("few")
def test_a_submission_is_as_the_server_wants_it(tmp_path: Path) -> None:
    case = submission(tmp_path)
    said = case.export("mvtec-ad2")
    assert said == [
        "mvtec-ad2: left out, since it lies in no private split of the eight objects: "
        "can_test_public/test_public/good/000_regular.png"
    ]
    folder = case.out / "mvtec-ad2/submission"
    found = files(folder)
    assert len(found) == 16
    assert found[0] == "anomaly_images/can/test_private/000_regular.tiff"
    assert found[-1] == "anomaly_images_thresholded/vial/test_private_mixed/001_mixed.png"
    scores = case.maps["can_test_private/test_private/001_regular.png"]
    written = imread(folder / "anomaly_images/can/test_private/001_regular.tiff")
    assert written.dtype == np.float16
    np.testing.assert_array_equal(written, scores.astype(np.float16))
    with Image.open(folder / "anomaly_images_thresholded/can/test_private/001_regular.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.where(scores > THRESHOLD, 255, 0))
    with tarfile.open(folder.with_name("submission.tar.gz")) as archive:
        assert archive.getnames() == [f"submission/{name}" for name in found]
        for name in found:
            packed = archive.extractfile(f"submission/{name}")
            assert packed is not None
            assert packed.read() == (folder / name).read_bytes()
    assert case.check("mvtec-ad2") == case.check("mvtec-ad2", with_data=False, place=folder) == {}
    before = folder.with_name("submission.tar.gz").read_bytes()
    case.export("mvtec-ad2")
    assert folder.with_name("submission.tar.gz").read_bytes() == before


@pytest.mark.usefixtures("few")
def test_what_a_submission_lacks_is_said(tmp_path: Path) -> None:
    case = submission(tmp_path, failed="test_private/001_regular.png", bounds=False)
    shutil.rmtree(case.data / "can/test_private_mixed")
    said = "\n".join(case.export("mvtec-ad2"))
    assert "no file, since the image failed: can_test_private/test_private/001_regular.png" in said
    assert "refuses the archive: can/test_private/001_regular, vial/test_private/001_regular" in said
    assert "give --threshold: can_test_private, can_test_private_mixed, vial_test_private and 1 more" in said
    assert case.check("mvtec-ad2") == {"missing": 10}


Spoil = Callable[[Path], object]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / "anomaly_images_thresholded/vial")
    shutil.rmtree(folder / "anomaly_images/vial")


MAP, MASK = (
    "anomaly_images/can/test_private/001_regular.tiff",
    "anomaly_images_thresholded/can/test_private/000_regular.png",
)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("fault", "spoil"),
    [
        ("missing", lambda folder: (folder / MAP).unlink()),
        ("an object without any file", _remove),
        ("not expected", lambda folder: (folder / "readme.txt").write_text("")),
        ("a map of float32, not of float16", lambda folder: imwrite(folder / MAP, np.zeros(SIZE, np.float32))),
        ("NaN or infinity in a map", lambda folder: imwrite(folder / MAP, np.full(SIZE, np.inf, np.float16))),
        ("another size than its image", lambda folder: imwrite(folder / MAP, np.zeros((9, 9), np.float16))),
        ("other values than 0 and 255", lambda folder: (folder / MASK).write_bytes(saved(np.ones(SIZE, np.uint8)))),
        ("no PNG file of 8-bit grey values", lambda folder: (folder / MASK).write_bytes(saved(np.zeros(SIZE, bool)))),
        ("damaged, or no PNG file", lambda folder: (folder / MASK).write_bytes(b"\x89PNG\r\n\x1a\n")),
    ],
)
def test_a_check_finds_what_is_wrong_with_a_submission(tmp_path: Path, fault: str, spoil: Spoil) -> None:
    case = submission(tmp_path)
    case.export("mvtec-ad2")
    folder = case.out / "mvtec-ad2/submission"
    spoil(folder)
    assert fault in case.check("mvtec-ad2", place=folder)
    assert case.check("mvtec-ad2") == {}  # the archive is what is uploaded
    mvtec_ad2._pack(folder.parent, lambda *_: None)
    assert fault in case.check("mvtec-ad2")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", ["cut", "text", "start", "checksum", "no top", "two tops", "link"])
def test_a_check_finds_what_is_wrong_with_an_archive(tmp_path: Path, kind: str) -> None:
    case = submission(tmp_path)
    case.export("mvtec-ad2")
    archive = case.out / "mvtec-ad2/submission.tar.gz"
    whole = archive.read_bytes()
    spoilt = {"cut": whole[:-2000], "text": b"no archive", "start": whole[:3]}
    spoilt["checksum"] = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    if kind in spoilt:
        archive.write_bytes(spoilt[kind])
        assert next(iter(case.check("mvtec-ad2"))).startswith("no whole .tar.gz archive")
        return
    with tarfile.open(archive, "w:gz") as packed:
        for name in files(archive.with_name("submission")):
            top = {"no top": "", "two tops": f"{name.startswith(MAP)}/"}.get(kind, "submission/")
            packed.add(archive.with_name("submission") / name, f"{top}{name}")
        link = tarfile.TarInfo("submission/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        if kind == "link":
            packed.addfile(link)
    found = case.check("mvtec-ad2")
    assert found[{"link": "no file of at most 1 GB"}.get(kind, "not in one folder at the archive's top")] >= 1


# COCO


@pytest.fixture
def masks() -> Any:
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    return coco.library()


def test_coco_holds_every_region_with_its_mask(tmp_path: Path, masks: Any) -> None:
    case = Case(tmp_path, *(f"bolt/test/bent/{number}.png" for number in range(4)), failed="test/bent/2.png")
    assert case.export("coco") == ["coco: no file, since the image failed: bolt/test/bent/2.png"]
    labels = json.loads((case.out / "coco/labels.json").read_text())
    results = json.loads((case.out / "coco/results.json").read_text())
    names = {image["id"]: image["file_name"] for image in labels["images"]}
    assert list(names.values()) == [f"bolt/test/bent/{number}.png" for number in (0, 1, 3)]
    assert len(results) == len(labels["annotations"]) == 4
    for result, label in zip(results, labels["annotations"], strict=True):
        assert result == {key: label[key] for key in result}
        pixels = masks.decode(result["segmentation"]).astype(bool)
        scores = case.maps[names[result["image_id"]]]
        assert result["score"] == pytest.approx(float(scores[pixels].max()), abs=1e-6)
        assert label["area"] == pixels.sum()
        np.testing.assert_array_equal(pixels, (scores > THRESHOLD) & (scores >= scores[pixels].min()) & pixels)
    together = np.sum(
        [masks.decode(result["segmentation"]) for result in results if names[result["image_id"]][-5] == "1"], 0
    )
    np.testing.assert_array_equal(together, case.maps["bolt/test/bent/1.png"] > THRESHOLD)
    assert case.check("coco") == {"missing": 1}
    assert case.check("coco", with_data=False) == {}


def test_coco_s_own_evaluation_reads_both_files(tmp_path: Path, masks: Any) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    case = Case(tmp_path, *(f"bolt/{number}.png" for number in range(4)))
    case.export("coco")
    truth = COCO(str(case.out / "coco/labels.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(case.out / "coco/results.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)  # found by itself


def test_coco_without_verdicts_says_so(tmp_path: Path, masks: Any) -> None:
    case = Case(tmp_path, "bolt/0.png", "bolt/1.png", "nut/0.png", bounds=False)
    assert case.export("coco") == ["coco: no regions, since the category has no verdicts; give --threshold: bolt, nut"]
    assert case.check("coco") == {}


def _first(file: str, **changed: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        (content[file] if file == "results" else content["labels"][file])[0].update(changed)

    return change


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("missing", lambda content: content["labels"]["images"][0].update(file_name="bolt/9.png")),
        ("not expected", lambda content: content["labels"]["images"][0].update(file_name="bolt/9.png")),
        ("another size than its image", _first("images", width=15)),
        ("no whole entry of an image, in labels.json", _first("images", width=None)),
        ("a number of two images", _first("images", id=2)),
        ("no whole finding (score), in results.json", _first("results", score=1.5)),
        ("no whole finding (bbox), in labels.json", _first("annotations", bbox=[1, 2])),
        ("an image_id or category_id that there is not, in results.json", _first("results", image_id=77)),
        ("an image_id or category_id that there is not, in results.json", _first("results", category_id=2)),
        ("a box that is not its mask's, in results.json", _first("results", bbox=[1.0, 1.0, 3.0, 3.0])),
        (
            "a mask of another size than its image, in results.json",
            _first("results", segmentation={"size": [14, 10], "counts": "0"}),
        ),
        ("another number of findings than in labels.json", lambda content: content["results"].pop()),
        ("no list of findings", lambda content: content["labels"].pop("annotations")),
    ],
)
def test_a_check_finds_what_is_wrong_with_coco(tmp_path: Path, masks: Any, fault: str, change: Any) -> None:
    case = Case(tmp_path, *(f"bolt/{number}.png" for number in range(2)))
    case.export("coco")
    paths = {name: case.out / f"coco/{name}.json" for name in ("labels", "results")}
    content = {name: json.loads(path.read_text()) for name, path in paths.items()}
    change(content)
    for name, path in paths.items():
        path.write_text(json.dumps(content[name]))
    assert fault in case.check("coco")
    paths["labels"].write_text("[")
    assert case.check("coco")["no JSON"] == 1


def test_pycocotools_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r"pip install 'zsad\[coco\]'"):
        Case(tmp_path, "bolt/0.png").export("coco")


# The Rayan challenge


@pytest.mark.parametrize(
    ("fault", "spoil"),
    [
        (None, lambda content: None),
        ("not the JSON of the Rayan challenge", lambda content: content.pop("img_level_score")),
        ("no score and map of float64 and 4 by 4 pixels", lambda content: content["pix_level_score"].update(shape=[4])),
        ("scores that are not in [0, 1]", lambda content: content["img_level_score"].update(__ndarray__=1.5)),
    ],
)
def test_a_check_of_the_challenge_s_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None, spoil: Callable[[dict[str, Any]], object]
) -> None:
    monkeypatch.setattr(rayan, "SIDE", 4)
    case = Case(tmp_path, "bolt/test/bent/0.png", "bolt/test/good/0.png")
    for name in ("bent", "good"):
        path = case.out / f"bolt/test/{name}/0_scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(rayan.challenge_json(0.5, np.full((4, 4), 0.25, np.float32)))
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    assert case.check("rayan") == ({} if fault is None else {fault: 1})
    path.unlink()
    assert case.check("rayan") == {"missing": 1}


# All of them


def test_formats_bring_along_what_they_are_made_of() -> None:
    assert of_images(["coco"]) == ["zsad"]
    assert of_images(["rayan"]) == ["rayan"]
    assert of_images(["visa", "rayan"]) == ["zsad", "rayan"]
    assert of_finished(["coco", "rayan", "mvtec-ad2"]) == ["mvtec-ad2", "coco"]


@pytest.mark.parametrize("name", ["mvtec-ad", "mvtec-ad2", "rayan"])
def test_nothing_to_look_at_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "out/part/test").mkdir(parents=True)
    (tmp_path / "out/run.json").touch()
    with pytest.raises(OutputError, match=f"--format {name}` first"):
        check(name, tmp_path / "out", None, lambda _: None)
    with pytest.raises(OutputError, match="no such folder"):
        check(name, tmp_path / "nothing", None, lambda _: None)


def test_faults_are_counted_and_the_first_ones_named() -> None:
    faults = Faults()
    for number in range(5):
        faults.add("missing", number)
    for name in ("a", "a", "b"):
        faults.add("category", name, once=True)
    assert faults.lines() == ["missing: 0, 1, 2 and 2 more", "category: a, b"]
    assert len(faults) == 7


@settings(max_examples=50)
@given(arrays(np.float32, (7, 9), elements=st.floats(0, 1, width=32)), st.integers(1, 6))
def test_masks_are_the_regions_on_record(scores: NDArray[np.float32], least_area: int) -> None:
    on_record = find_regions(scores, THRESHOLD, least_area)
    if not on_record:
        return
    labels, found = labelled_regions(scores, THRESHOLD, min(region.area for region in on_record))
    assert [region for _, region in found] == on_record
    for label, region in found:
        rows, columns = np.nonzero(labels == label)
        box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1, rows.size)
        assert box == (region.x, region.y, region.width, region.height, region.area)


@pytest.mark.parametrize("name", ["mvtec-ad2", "coco"])
def test_the_number_of_cores_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: Export
) -> None:
    if name == "coco":
        request.getfixturevalue("masks")
    names = [f"can/{split}/{number:03d}_{kind}.png" for split, kind in mvtec_ad2.SPLITS.items() for number in range(5)]
    case, written = Case(tmp_path, *names, failed="003_mixed.png"), []
    for cores, limit in ((1, 1 << 30), (4, 1 << 30), (4, 1)):  # the last one by one
        monkeypatch.setattr(source, "available_cores", lambda cores=cores: cores)
        monkeypatch.setattr(source, "default_memory_limit", lambda limit=limit: limit)
        lacking = case.export(name)
        written.append((lacking, {file: (case.out / name / file).read_bytes() for file in files(case.out / name)}))
    assert written[0] == written[1] == written[2]
    assert len(written[0][1]) > 2

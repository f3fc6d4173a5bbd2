"""The main command: whole results for good input, and for bad input, a clear message and everything else done."""

import csv
import errno
import fcntl
import json
import os
import pty
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.category_pass import CategoryPass
from zsad.engine.commands.evaluate import main as evaluate
from zsad.engine.commands.infer import main
from zsad.engine.results.output import claimed
from zsad.export.checkpoints import find_checkpoint, read_manifest
from zsad.export.state_dict import CheckpointError
from zsad.kernels.cpu import comparers
from zsad.kernels.files import from_cell

ENOUGH = 30.0  # seconds that a waiting test gives up after


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


@pytest.fixture
def infer(tiny: Path) -> Callable[..., int]:
    """Run the command in this process with the tiny network."""
    return lambda *arguments: main([*map(str, arguments), "--config", str(tiny / "config.toml")])


ONE_LIBRARY = ("--device", "cpu", "--runtime", "onnxruntime")  # as in this process, where nothing is compared


def start(tiny: Path, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Run the command in a process of its own."""
    code = "import sys; from zsad.engine.commands.infer import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--config", str(tiny / "config.toml"), *ONE_LIBRARY],
        **options,
    )


def pixels(seed: int, size: tuple[int, int] = (48, 40)) -> NDArray[np.uint8]:
    base = np.random.default_rng(0).integers(40, 200, (size[1], size[0], 3))
    return np.clip(base + np.random.default_rng(seed + 1).normal(0, 8, base.shape), 0, 255).astype(np.uint8)


def draw(root: Path, *names: str) -> Path:
    """Write alike images; the last one has a defect."""
    for seed, name in enumerate(names):
        image = pixels(seed)
        if seed == len(names) - 1:
            image[10:24, 10:24] = (255, 0, 0)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name, format="PNG")
    return root


def numbered(count: int, folder: str = "") -> list[str]:
    return [f"{folder}{index:02d}.png" for index in range(count)]


def read_scores(category: Path) -> dict[str, float]:
    with (category / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {from_cell(row["path"]): float(row["score"]) for row in csv.DictReader(file)}


def check_whole(output: Path) -> None:
    """Every visible file is complete, every category has its record, and every value lies in [0, 1]."""
    for path in output.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(output).parts):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".tiff", ".jpg"):
                with Image.open(path) as image:
                    values = np.asarray(image)
                if path.suffix == ".tiff":
                    assert values.dtype == np.float32
                    assert values.min() >= 0
                    assert values.max() <= 1
    for category in (path for path in output.iterdir() if path.is_dir() and not path.name.startswith(".")):
        record = json.loads((category / "category.json").read_text())
        assert {image["path"] for image in record["images"]} == set(read_scores(category))
        for image in record["images"]:
            assert 0 <= image["score"] <= 1
            assert np.isfinite(image["raw_score"])
            assert all((category / image[kind]).is_file() for kind in ("map", "overlay_file") if image[kind])


# Whole runs


@pytest.mark.slow
def test_everything_of_a_run(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(5, "bolt/test/good/"), "bolt/test/bent/00.png")
    (tmp_path / "data/bolt/ground_truth/bent").mkdir(parents=True)
    mask = np.zeros((40, 48), np.uint8)
    mask[10:24, 10:24] = 255
    Image.fromarray(mask).save(tmp_path / "data/bolt/ground_truth/bent/00_mask.png")
    Image.fromarray(mask).save(tmp_path / "data/bolt/ground_truth/bent/77_mask.png")
    draw(tmp_path / "data", *numbered(4, "nut/"))
    assert infer("data", "--output", "out") == 0
    printed = capsys.readouterr()
    assert "bolt: 6 images scored, 0 failed" in printed.out
    assert "77_mask.png: a mask without an image" in printed.err
    check_whole(Path("out"))
    scores = read_scores(Path("out/bolt"))
    assert max(scores, key=scores.__getitem__) == "test/bent/00.png"
    with Image.open("out/bolt/maps/test/bent/00.tiff") as image:
        assert image.size == (48, 40)
    run = json.loads(Path("out/run.json").read_text())
    assert (run["images"], run["failed"], list(run["categories"])) == (10, 0, ["bolt", "nut"])
    assert run["metrics"]["categories"]["bolt"]["image_auroc"] == 1.0
    assert Path("out/report.html").stat().st_size > 1000
    assert not list(Path("out").glob(".*"))


@pytest.mark.slow
def test_images_of_every_kind_and_size_together(infer, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", *numbered(3))
    Image.fromarray(pixels(7)).save(data / "JPEG.JPG")
    Image.fromarray(pixels(8)).convert("CMYK").save(data / "cmyk.TIF")
    Image.fromarray(pixels(9)).convert("P").save(data / "palette.bmp")
    Image.fromarray(pixels(10)[:, :, 0].astype(np.uint16) * 257).save(data / "sixteen.tiff")
    Image.fromarray(pixels(11)).convert("1").save(data / "bit.png")
    Image.fromarray(pixels(12)).convert("RGBA").save(data / "alpha.webp")
    Image.new("RGB", (1, 1)).save(data / "dot.png")
    Image.new("RGB", (3000, 1)).save(data / "line.png")
    Image.new("RGB", (1, 3000)).save(data / "column.png")
    assert infer("data", "--threshold", "0.1", "--format", "zsad,rayan") == 0
    check_whole(Path("out"))
    assert len(read_scores(Path("out/data"))) == 12


@pytest.mark.slow
def test_demo(infer) -> None:
    assert infer("--demo", "--output", "out") == 0
    assert len(read_scores(Path("out/flange"))) == 24


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_images(infer, tmp_path: Path, count: int) -> None:
    draw(tmp_path / "data", *numbered(count))
    assert infer("data") == 0
    check_whole(Path("out"))
    assert len(read_scores(Path("out/data"))) == count


def test_one_image_is_a_clear_error(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", "only.png")
    assert infer("data") == 1
    error = capsys.readouterr().err
    assert "zsad-infer: 1 image in 1 category" in error
    assert "zsad-infer: data: fewer than two readable images" in error
    assert not Path("out/data").exists()


@pytest.mark.parametrize("kind", ["identical", "constant", "black"])
@pytest.mark.parametrize("count", [2, 5])
def test_images_without_differences(infer, tmp_path: Path, kind: str, count: int) -> None:
    (tmp_path / "data").mkdir()
    for index in range(count):
        image = {"identical": pixels(0), "constant": np.full((9, 9, 3), 40 * index, np.uint8)}.get(kind)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8) if image is None else image).save(f"data/{index}.png")
    assert infer("data", "--format", "zsad,rayan", "--threshold", "auto") == 0
    check_whole(Path("out"))


# Files and folders that are no good


def spoil(data: Path) -> dict[str, str]:
    """Put one file of every bad kind into a folder; return what must be said of each."""
    whole = (data / "00.png").read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "empty.png").write_bytes(b"")
    (data / "words.png").write_text("not an image")
    (data / "bomb.png").write_bytes(whole[:16] + (60000).to_bytes(4, "big") * 2 + whole[24:])
    os.mkfifo(data / "pipe.png")
    (data / "device.png").symlink_to("/dev/zero")
    (data / "dangling.png").symlink_to("nowhere.png")
    (data / "ring.png").symlink_to("ring.png")
    return {
        "cut.png": "truncated",
        "empty.png": "empty file",
        "words.png": "not a PNG",
        "bomb.png": "",  # refused by its checksum or by its size
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "dangling.png": "link to nothing",
        "ring.png": "symbolic links",
    }


@pytest.mark.slow
def test_bad_files_are_named_and_the_rest_scored(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", *numbered(4))
    assert infer("data", "--output", "clean") == 0
    reasons = spoil(data)
    (data / "notes.txt").write_text("text")
    capsys.readouterr()
    assert infer("data", "--output", "out", "--batch-size", 3) == 1
    lines = capsys.readouterr().err.splitlines()
    for name, reason in reasons.items():
        assert any(f"data/{name}: skipped: " in line and reason in line for line in lines), name
    check_whole(Path("out"))
    expected, scores = read_scores(Path("clean/data")), read_scores(Path("out/data"))
    assert scores == pytest.approx(expected, abs=1e-5)
    record = json.loads(Path("out/run.json").read_text())["categories"]["data"]
    assert {failure["path"] for failure in record["failures"]} == set(reasons)
    # Resumed, the failures are neither forgotten nor tried again.
    assert infer("data", "--output", "out", "--resume", "--batch-size", 3) == 1
    assert "already finished" in capsys.readouterr().err


@pytest.mark.slow
def test_strict_stops_at_the_first_bad_file(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(3, "b/"), *numbered(3, "c/"))
    (tmp_path / "data/b/01.png").write_bytes(b"")
    assert infer("data", "--strict") == 1
    error = capsys.readouterr().err
    assert "data/b/01.png: empty file" in error
    assert "--strict" in error
    assert Path("out/a/scores.csv").is_file()
    assert not Path("out/b").exists()
    assert not Path("out/c").exists()


def test_only_bad_files_keep_their_reasons(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", "00.png")
    spoil(tmp_path / "data")
    assert infer("data") == 1
    error = capsys.readouterr().err
    assert "data/words.png: skipped: not a PNG" in error
    assert "data/00.png: skipped: no other readable image" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_one_failing_category_does_not_stop_the_others(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", "alone/0.png", *numbered(3, "bolt/"), *numbered(3, "cursed/"), *numbered(3, "nut/"))
    write = CategoryPass.write

    def fail_once(self: CategoryPass, *rest: Any) -> Any:
        if self.category.name == "cursed":
            raise RuntimeError("the session broke")
        return write(self, *rest)

    monkeypatch.setattr(CategoryPass, "write", fail_once)
    assert infer("data") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cursed" in line]
    assert line.endswith("cursed: the session broke; 3 images without a score")
    check_whole(Path("out"))
    assert [name for name in ("alone", "bolt", "cursed", "nut") if Path("out", name).exists()] == ["bolt", "nut"]
    run = json.loads(Path("out/run.json").read_text())
    assert run["categories"]["cursed"]["failures"]
    assert run["failed"] == 4


def test_a_want_of_address_space_is_one_line(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "bolt/"), *numbered(3, "nut/"))

    def fail(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(CategoryPass, "write", fail)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 40, 1 << 40))
    assert infer("data", "-q") == 2
    assert capsys.readouterr().err == (
        "zsad-infer: too little memory: ulimit -v allows 1048576 MB; allow more: ulimit -v unlimited\n"
    )


@pytest.mark.slow
def test_an_unreadable_folder_is_a_failure_now_and_when_resumed(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "bolt/"), *numbered(2, "bolt/locked/"), *numbered(2, "nut/"))
    scandir = os.scandir

    def refuse(path: str | Path | int) -> object:
        if not isinstance(path, int) and Path(path).name in ("locked", "nut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for extra in ([], ["--resume"]):
        assert infer("data", *extra) == 1
        error = capsys.readouterr().err
        if not extra:
            assert "bolt/locked: skipped: cannot be listed (Permission denied)" in error
        assert "nut/.: skipped: cannot be listed" in error
        failures = json.loads(Path("out/run.json").read_text())["categories"]["bolt"]["failures"]
        assert [failure["path"] for failure in failures] == ["locked"]
    assert infer("data", "--strict", "--output", "strict") == 1
    assert not Path("strict/bolt").exists()


@pytest.mark.parametrize("content", [b"", b"no mask", b"bomb"])
def test_a_mask_that_cannot_be_read_costs_no_scores(infer, tmp_path: Path, content: bytes) -> None:
    data = draw(tmp_path / "data", *numbered(3, "test/good/"), "test/bent/0.png", "test/bent/1.png")
    if content == b"bomb":
        whole = (data / "test/bent/0.png").read_bytes()
        header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + whole[24:29]
        content = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    (data / "ground_truth/bent").mkdir(parents=True)
    (data / "ground_truth/bent/0_mask.png").write_bytes(content)
    os.mkfifo(data / "ground_truth/bent/1_mask.png")
    assert infer("data") == 1
    check_whole(Path("out"))
    assert Path("out/report.html").is_file()


@pytest.mark.slow
def test_metrics_leave_out_the_old_results_of_a_category_that_fails_now(infer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / "data" / name, *numbered(3, "test/good/"), "test/bent/0.png")
    assert infer("data") == 0
    for path in (tmp_path / "data/b/test/good").iterdir():
        path.write_bytes(b"")
    assert infer("data") == 1
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]
    assert list(metrics["categories"]) == ["a"]
    assert metrics["mean"] == metrics["categories"]["a"]


# Names


HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "--output.png",
    "line\nbreak.png",
    "escape\x1b[31m.png",
    "x...png",
    "caf\udce9.png",
    "=cmd|' !A0'.png",
    "report.html.png",
    "category.json.png",
    "name.jpg/under.png",
    "scores.csv/under.png",
    f"{'n' * 251}.png",
    "ü" * 125 + ".png",
    " .png",
    "same.png",
    "same.jpg",
    "name.png",
    "%2e%2e%2fname.png",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "category",
    [
        "line\nbreak",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("report.html", "run.json", "-rf", "caf\udce9", "c" * 255)
        ),
    ],
)
def test_hostile_names_stay_inside_and_escaped(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], category: str
) -> None:
    parent = tmp_path / "parent"
    draw(parent / "data" / category, *HOSTILE)
    (parent / "data" / category / "bad\n\x1b]0;title\x07.png").write_bytes(b"")
    before = set(parent.rglob("*"))
    assert infer(parent / "data", "--output", parent / "out", "--format", "zsad,rayan", "--threshold", "auto") == 1
    check_whole(parent / "out")
    after = set(parent.rglob("*")) - before
    assert all(path.is_relative_to(parent / "out") for path in after)
    (folder,) = (path for path in (parent / "out").iterdir() if path.is_dir())
    assert sorted(read_scores(folder)) == sorted(HOSTILE)
    for pattern, count in (("*.tiff", 18), ("*.jpg", 18), ("*_scores.json", 18)):
        assert len([path for path in folder.rglob(pattern) if path.is_file()]) == count
    page = (parent / "out/report.html").read_text()
    assert "<img src=x" not in page
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "bad\\n\\x1b]0;title\\x07.png: skipped: empty file" in printed.err


def test_a_path_that_gets_too_long_costs_one_map_only(infer, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", *numbered(3))
    deep = tmp_path / "data"
    output = tmp_path / ("p" * 200) / ("q" * 200)
    here = Path.cwd()
    while len(str(deep)) < 3900:
        deep = deep / ("d" * 100)
    deep.mkdir(parents=True)
    shutil.copy(data / "00.png", deep / "0.png")
    assert infer("data", "--output", output) == 1
    os.chdir(here)
    scores = read_scores(output / "data")
    assert len(scores) == 4
    failures = json.loads((output / "run.json").read_text())["categories"]["data"]["failures"]
    assert [failure["reason"] for failure in failures] == ["no map, its path in the output is too long"]


# The output folder


@pytest.mark.slow
def test_output_inside_the_data_twice(infer, tmp_path: Path, monkeypatch, capsys) -> None:
    draw(tmp_path / "data", *numbered(3))
    monkeypatch.chdir(tmp_path / "data")
    for _ in range(2):
        assert infer(".") == 0
        assert len(read_scores(Path("out/data"))) == 3
    assert infer(".", "--output", "second") == 0
    assert len(read_scores(Path("second/data"))) == 3
    assert infer(".", "--output", ".") == 2
    assert "choose another --output" in capsys.readouterr().err


def test_an_output_that_cannot_be_used_is_refused_before_any_work(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(tmp_path / "data", *numbered(3))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken/data").mkdir(parents=True)
    (tmp_path / "taken/data/thesis.tex").write_text("years of work")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/data").symlink_to("nowhere")
    for output in ("file", "/dev/full/out", "taken", "dangling"):
        assert infer("data", "--output", output) == 2
        assert "choose another --output" in capsys.readouterr().err
    for arguments in (["data"], ["--demo"]):
        with claimed(tmp_path / "busy", (), resume=False):
            assert infer(*arguments, "--output", "busy") == 2
        assert "busy: another run is writing there (process" in capsys.readouterr().err
    assert infer(data, "--output", tmp_path) == 2  # the category's folder would be the data's own
    assert (tmp_path / "taken/data/thesis.tex").read_text() == "years of work"

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for arguments in (["data"], ["--demo"]):
        assert infer(*arguments, "--output", "readonly") == 2
        assert "readonly: cannot be written to (Read-only file system)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_stops_cleanly_and_resumes(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(4, "b/"), *numbered(3, "c/"))
    save = Image.Image.save
    saved: list[object] = []

    def fill(self: Image.Image, path: Any, **options: Any) -> None:
        saved.append(path)
        if len(saved) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", fill)
    assert infer("data") == 1
    error = capsys.readouterr().err
    assert "No space left on device: 'out/" in error
    assert "--resume" in error
    assert [path.name for path in Path("out").iterdir()] == ["a"]
    check_whole(Path("out"))
    monkeypatch.setattr(Image.Image, "save", save)
    assert infer("data", "--resume") == 0
    assert "a: already finished" in capsys.readouterr().err
    check_whole(Path("out"))


def test_metrics_that_there_cannot_be_are_on_record(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data/part/test", *numbered(3, "good/"), *numbered(2, "bent/"))
    assert infer("data") == 0
    output = capsys.readouterr()
    (line,) = (line for line in output.err.splitlines() if "no masks" in line)
    said = line.removeprefix("zsad-infer: ") + "."
    assert said.startswith("part: no masks, so no pixel metrics: looked for ground_truth/bent/00_mask.png")
    record = json.loads(Path("out/run.json").read_text())
    assert said in record["notes"]
    assert "no masks, so no pixel metrics" in Path("out/report.html").read_text()
    # The table on the console has the numbers of the record and the report.
    (row,) = (line for line in output.out.splitlines() if line.startswith("mean"))
    assert float(row.split()[2]) == pytest.approx(record["metrics"]["mean"]["image_auroc"], abs=1e-4)


def test_a_damaged_mask_costs_the_metrics_of_its_own_image(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "data/part/test", *numbered(3, "good/"), *numbered(3, "bent/"))
    mask = np.zeros((40, 48), np.uint8)
    mask[10:24, 10:24] = 255
    masks = tmp_path / "data/part/ground_truth/bent"
    masks.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(mask).save(masks / f"{index:02}_mask.png")
    assert infer("data") == 0
    (masks / "01_mask.png").write_bytes((masks / "01_mask.png").read_bytes()[:-30])
    capsys.readouterr()
    assert infer("data") == 1
    assert "part/test/bent/01.png: left out of the pixel metrics: its mask" in capsys.readouterr().err
    record = json.loads(Path("out/run.json").read_text())
    assert (record["failed"], record["not_compared"]) == (0, 1)
    assert record["metrics"]["mean"]["pixel_auroc"] is not None


def test_a_damaged_file_is_marked_and_does_not_flatten_the_others(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data", "sound"):
        (tmp_path / name).mkdir()
        for seed in range(5):
            Image.fromarray(pixels(seed, (96, 80))).save(tmp_path / name / f"{seed}.jpg", quality=95)
    whole = (tmp_path / "data/3.jpg").read_bytes()
    (tmp_path / "data/3.jpg").write_bytes(whole[: len(whole) // 2].rstrip(b"\xff") + b"\xff\xd9")
    assert infer("sound", "--output", "sound-out") == 0
    assert not any("note" in row for row in table(Path("sound-out/sound/scores.csv")))
    capsys.readouterr()
    assert infer("data", "--threshold", "0.5") == 0
    note = "the file looks damaged: its bits end before its picture does"
    assert f"data: 3.jpg: {note}" in capsys.readouterr().err
    rows = {row["path"]: row for row in table(Path("out/data/scores.csv"))}
    assert {name: row["note"] for name, row in rows.items()} == {f"{i}.jpg": note * (i == 3) for i in range(5)}
    record = json.loads(Path("out/data/category.json").read_text())
    assert [image.get("note") for image in record["images"]] == [None, None, None, note, None]
    assert note in Path("out/report.html").read_text()
    # The highest of the others, in scores and maps, is 1 as if the damaged one were not there.
    others = [row for name, row in rows.items() if name != "3.jpg"]
    assert max(float(row["score"]) for row in others) == 1
    assert max(np.asarray(Image.open(Path("out/data") / row["map"])).max() for row in others) == pytest.approx(
        1, abs=0.2
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_what_is_not_kept_says_why(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(3))
    assert infer("data") == 0
    assert "scored again" not in capsys.readouterr().err
    for options, reason in (
        (["--degrees", "1", "--seed", "4"], "it was finished with other settings (musc.degrees, seed)"),
        (["--degrees", "3", "--seed", "4"], "it was finished with other settings (musc.degrees)"),
        (
            ["--degrees", "3", "--seed", "4", "--format", "rayan"],
            "its images, its known-good images, --format or --keep-stages are",
        ),
    ):
        capsys.readouterr()
        assert infer("data", "--resume", *options) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "again" in line)
        assert line.startswith(f"zsad-infer: data: scored again, since {reason}")
    Path("out/run.json").unlink()
    assert infer("data", "--resume") == 0
    assert capsys.readouterr().err.count("scored again, since it was finished with other settings\n") == 1
    next(Path("out/data/maps").rglob("*.tiff")).unlink()
    assert infer("data", "--resume") == 0
    assert "data: scored again, since some of its files are gone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_category_that_cannot_be_written_keeps_its_old_results(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(4, "b/"))
    assert infer("data") == 0
    old = read_scores(Path("out/a"))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and target.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert infer("data", "--degrees", "1") == 1
    assert "Permission denied: 'out/a'" in capsys.readouterr().err
    assert read_scores(Path("out/a")) == old
    assert json.loads(Path("out/b/category.json").read_text())
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def when_written(monkeypatch: pytest.MonkeyPatch, category: str, do: Callable[[], object]) -> None:
    """Do something while a category is scored."""
    write = CategoryPass.write

    def watched(self: CategoryPass, *rest: Any) -> Any:
        if self.category.name == category:
            do()
        return write(self, *rest)

    monkeypatch.setattr(CategoryPass, "write", watched)


def test_results_that_go_while_a_run_goes_on_are_named(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(3, "b/"))
    when_written(monkeypatch, "b", lambda: shutil.rmtree("out/a"))
    assert infer("data") == 1
    printed = capsys.readouterr()
    assert "zsad-infer: a: its results are gone from out; --resume scores it again\n" in printed.err
    assert "a: 0 images scored, 3 failed\nb: 3 images scored, 0 failed" in printed.out
    assert json.loads(Path("out/run.json").read_text())["failed"] == 3
    assert "its results are gone" in Path("out/report.html").read_text()
    check_whole(Path("out"))
    assert infer("data", "--resume") == 0


@pytest.mark.parametrize("moment", ["before a category", "while it is written", "after the last"])
def test_an_output_folder_that_goes_ends_the_run_and_does_not_come_back(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(3, "b/"))
    if moment == "while it is written":
        save = Image.Image.save

        def gone(self: Image.Image, path: Any, **options: Any) -> None:
            if "02.tiff" in str(path):
                Path("out").rename("elsewhere")
            save(self, path, **options)

        monkeypatch.setattr(Image.Image, "save", gone)
    elif moment == "before a category":
        when_written(monkeypatch, "a", lambda: shutil.rmtree("out"))
    else:
        monkeypatch.setattr("zsad.engine.run._notes", lambda _: shutil.rmtree("out") or [])
    assert infer("data", "--workers", "1") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("zsad-infer: stopped: ")
    assert "b: " not in error.replace("b: no verdicts", "")
    assert "stopped: the output folder out is gone" in error
    assert not Path("out").exists()


def test_an_output_folder_that_becomes_read_only_ends_the_run(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "data", *numbered(3, "a/"), *numbered(3, "b/"))
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *rest: access(path, *rest) and not (path == Path("out") and Path("out/a").exists())
    )
    assert infer("data") == 1
    error = capsys.readouterr().err
    assert error.endswith(
        "stopped: the output folder out can no longer be written to; change its mode. "
        "What was finished is in out; add --resume to go on from there\n"
    )
    check_whole(Path("out"))


@pytest.mark.slow
def test_standard_output_that_is_full(tiny: Path, tmp_path: Path) -> None:
    draw(tmp_path / "data", *numbered(3))
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = start(tiny, "data", "--json", stdout=full, stderr=subprocess.PIPE)
        _, error = process.communicate(timeout=ENOUGH)
    assert process.returncode == 1
    assert b"standard output" in error
    assert b"Traceback" not in error
    check_whole(tmp_path / "out")


# Interruption and resuming


@pytest.mark.slow
def test_resume_redoes_what_changed_and_nothing_else(infer, tmp_path: Path, capsys, monkeypatch) -> None:
    data = draw(tmp_path / "data", *numbered(3, "a/"), *numbered(3, "b/"))

    def done(*arguments: object) -> list[str]:
        """Run with --resume; return the categories that were scored again."""
        scored: list[str] = []
        write = CategoryPass.write

        def noted(self: CategoryPass, *rest: Any) -> Any:
            scored.append(self.category.name)
            return write(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(CategoryPass, "write", noted)
            assert infer(data, "--resume", *arguments) == 0
        return scored

    assert done() == ["a", "b"]
    stamp = Path("out/a/maps/00.tiff").stat().st_mtime_ns
    assert done() == []
    assert Path("out/a/maps/00.tiff").stat().st_mtime_ns == stamp
    assert json.loads(Path("out/run.json").read_text())["images"] == 6
    assert done("--degrees", "1") == ["a", "b"]
    assert done() == ["a", "b"]
    Image.fromarray(pixels(99)).save(data / "b/01.png")
    assert done() == ["b"]
    Image.fromarray(pixels(98)).save(data / "a/03.png")
    assert done() == ["a"]
    assert done("--threshold", "auto") == []  # as without it
    assert done("--threshold", "0.5") == ["a", "b"]
    assert done("--threshold", "0.5", "--format", "rayan") == ["a", "b"]
    assert done() == ["a", "b"]
    Path("out/a/overlays/00.jpg").unlink()
    assert done() == ["a"]
    Path("out/b/category.json").write_text("[]")
    assert done() == ["b"]
    Path("out/b/category.json").write_text('{"fingerprint": ')
    assert done() == ["b"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("many") / "data"
    return draw(data, *numbered(40, "a/"), *numbered(40, "b/"), *numbered(40, "c/"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + ENOUGH
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def there(folder: Path, pattern: str) -> bool:
    """Tell whether there is such a file; what is removed meanwhile is not there."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the output": lambda output: True,
    "at the start": lambda output: output.exists(),
    "while writing": lambda output: there(output, ".*.partial/**/*.tiff"),
    "after the first category": lambda output: (output / "a").exists(),
    "in the last category": lambda output: (output / "b").exists(),
}


@pytest.mark.slow
def test_the_report_of_many_images_is_a_folder_also_when_resumed(
    infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zsad.engine.results.report.ALONE", 3)
    draw(tmp_path / "data", *numbered(3, "report_files/"), *numbered(3, "b/"))
    assert infer("data", "--output", "data/out") == 0
    assert sorted(path.name for path in Path("data/out").glob("[!.]*")) == [
        *("b", "report.html", "report_files", "report_files_", "run.json")
    ]
    first = {path.name: path.read_bytes() for path in Path("data/out/report_files/1").rglob("*.jpg")}
    assert len(first) == 2 * 6
    capsys.readouterr()
    assert infer("data", "--output", "data/out", "--resume") == 0
    assert "already finished" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("data/out/report_files/2").rglob("*.jpg")} == first
    assert not Path("data/out/report_files/1").exists()
    assert infer("data", "--output", "other") == 0  # its pictures are no images
    assert json.loads(Path("other/run.json").read_text())["images"] == 6
    shutil.rmtree("other/report_files")
    Path("other/report_files").mkdir()
    assert infer("data", "--output", "other") == 2
    assert "report_files: exists and holds no zsad results" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(tiny: Path, infer, many: Path, tmp_path: Path, moment: str) -> None:
    process = start(tiny, many, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: MOMENTS[moment](tmp_path / "out"), process)
    process.kill()
    process.wait()
    if Path("out").exists():
        check_whole(Path("out"))
    assert infer(many, "--resume") == 0
    check_whole(Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["a", "b", "c", "report.html", "run.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("at the start", signal.SIGINT),
        ("while writing", signal.SIGINT),
        ("while writing", signal.SIGTERM),
        ("after the first category", signal.SIGINT),
    ],
)
def test_interrupted_at_any_moment(
    tiny: Path, infer, many: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    process = start(tiny, many, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for(lambda: MOMENTS[moment](tmp_path / "out"), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=ENOUGH)
    assert process.returncode == 130, error
    go_on = b". What was finished is in out; add --resume to go on from there" if list(Path("out").glob("*/")) else b""
    assert error.endswith(b"zsad-infer: interrupted" + go_on + b"\n")
    assert b"Traceback" not in error
    check_whole(Path("out"))
    assert not list(Path("out").glob(".*"))
    assert infer(many, "--resume") == 0
    check_whole(Path("out"))


class InterruptedFinalizer:
    """Ctrl-C arrives while this is collected, where no exception can leave."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_inside_a_finalizer_is_not_lost(infer, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = CategoryPass.write

    def interrupted(*arguments: Any) -> Any:
        InterruptedFinalizer()
        return write(*arguments)

    monkeypatch.setattr(CategoryPass, "write", interrupted)
    assert infer(many, "-q") == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Options


def read_array(node: dict[str, Any]) -> NDArray[Any]:
    """The challenge's convention, read on its own."""
    array = np.array(node["__ndarray__"], dtype=node["dtype"])
    assert list(array.shape) == node["shape"]
    return array


@pytest.mark.slow
def test_the_challenge_format(infer, tmp_path: Path) -> None:
    draw(tmp_path / "data", *numbered(3, "flat/"))
    draw(tmp_path / "data", *numbered(3, "bolt/test/good/"), "bolt/test/bent/007.png")
    assert infer("data", "--format", "rayan", "--output", "scores") == 0
    record = json.loads(Path("scores/bolt/test/bent/007_scores.json").read_text())
    assert set(record) == {"img_level_score", "pix_level_score"}
    assert read_array(record["img_level_score"]) == 1.0
    files = sorted(Path("scores").rglob("*_scores.json"))
    assert len(files) == 7
    for file in files:
        record = json.loads(file.read_text())
        image, map_ = read_array(record["img_level_score"]), read_array(record["pix_level_score"])
        assert (image.shape, image.dtype) == ((), np.float64)
        assert (map_.shape, map_.dtype) == ((1, 224, 224), np.float64)
        for values in (image, map_):
            assert values.min() >= 0
            assert values.max() <= 1
            np.testing.assert_array_equal(values, values.round(4))
    assert not Path("scores/report.html").exists()
    assert not Path("scores/bolt/maps").exists()


@pytest.mark.slow
def test_formats_that_others_read_are_made_without_scoring_again(
    infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(tmp_path / "data", *numbered(3, "bolt/test/good/"), "bolt/test/bent/007.png")
    (data / "bolt/test/bent/008.png").write_text("no image")
    assert infer("data", "--threshold", "0.5") == 1
    before = Path("out/bolt/scores.csv").stat().st_mtime_ns
    assert infer("data", "--threshold", "0.5", "--resume", "--format", "visa,mvtec-ad") == 1
    said = "no file, since the image failed: bolt/test/bent/008.png"
    printed = capsys.readouterr()
    assert f"mvtec-ad: {said}" in printed.err
    assert f"visa: {said}." in json.loads(Path("out/run.json").read_text())["notes"]
    assert printed.out.splitlines()[-3:] == ["out/report.html", "out/mvtec-ad", "out/visa"]
    assert Path("out/bolt/scores.csv").stat().st_mtime_ns == before
    assert Path("out/mvtec-ad/bolt/test/bent/007.tiff").read_bytes() == (
        Path("out/bolt/maps/test/bent/007.tiff").read_bytes()
    )
    assert evaluate(["--check", "visa", "out", "data"]) == 1
    assert "missing: bolt/test/bent/008.tiff" in capsys.readouterr().out
    (data / "bolt/test/bent/008.png").unlink()
    assert evaluate(["--check", "visa", "out", "data"]) == 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zsad.engine.results.map_trees.linked", full)
    Path("out/report.html").unlink()
    assert infer("data", "--threshold", "0.5", "--resume", "--format", "mvtec-ad") == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert "out/visa is of an earlier run" in printed.err
    assert Path("out/report.html").exists()
    assert Path("out/mvtec-ad/bolt").exists()
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize("options", [[], ["--threshold", "0.5"], ["--expected-defects", "0.1"]])
def test_verdicts_and_regions_follow_the_bounds(
    infer, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "data", *numbered(12))
    assert infer("data", *options) == 0
    with Path("out/data/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert next(row for row in rows if row["path"] == "11.png")["verdict"] in ("review", "reject")
    bounds = json.loads(Path("out/run.json").read_text())["categories"]["data"]["bounds"]
    assert bounds["rule"].startswith(options[0] if options else "distribution")
    for row in rows:
        score, verdict = float(row["score"]), row["verdict"]
        assert verdict == ("reject" if score > bounds["reject"] else "review" if score > bounds["accept"] else "accept")
        assert verdict != "accept" or row["regions"] == "0"
    printed = capsys.readouterr()
    counts = [sum(row["verdict"] == verdict for row in rows) for verdict in ("reject", "review", "accept")]
    assert "data: {} reject, {} review, {} accept; reject above".format(*counts) in printed.err
    assert bounds["rule"] in printed.err
    with Path("out/data/regions.csv").open(newline="") as file:
        regions = [row for row in csv.DictReader(file) if row["path"] == "11.png"]
    first = {name: float(value) for name, value in regions[0].items() if name != "path"}
    assert first["peak"] > 0.99
    assert first["x"] < 24
    assert first["y"] < 24
    assert first["x"] + first["width"] > 10
    assert first["y"] + first["height"] > 10


def test_too_few_images_have_no_verdict(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(4))
    assert infer("data") == 0
    assert "data: no verdicts, since fewer than 10 images" in capsys.readouterr().err
    assert "verdict" not in table(Path("out/data/scores.csv"))[0]
    assert not Path("out/data/regions.csv").exists()
    assert infer("data", "--fail-on", "reject") == 1
    assert "--fail-on reject: data has no verdicts; give --threshold a number" in capsys.readouterr().err


@pytest.mark.slow
def test_scripts_hear_of_verdicts(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(12))
    assert infer("data", "--expected-defects", "0.1", "--fail-on", "review", "--json") == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["categories"]["data"]["verdicts"] == {"reject": 1, "review": 1, "accept": 10}
    assert "--fail-on review: of 12 images 1 rejected, 1 to be reviewed" in said.err
    assert infer("data", "--threshold", "1", "--fail-on", "review", "--resume") == 0
    (tmp_path / "data/broken.png").write_bytes(b"none")
    assert infer("data", "--threshold", "0", "--fail-on", "review") == 1  # not all was looked at


def test_json_is_all_there_is_on_standard_output(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(3))
    (tmp_path / "data/caf\udce9.png").write_bytes(b"")
    assert infer("data", "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("out/run.json").read_text())
    assert printed["failed"] == 1
    assert infer("data", "--json", "--interval", "1,0") == 2
    assert capsys.readouterr().out == ""


def test_quiet_prints_nothing_but_errors(infer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", *numbered(3))
    Image.fromarray(pixels(3)).convert("P").save(data / "palette.png", transparency=bytes([0, 128]))
    assert infer("data", "-q") == 0
    assert capfd.readouterr() == ("", "")
    (data / "bad.png").write_bytes(b"")
    assert infer("data", "-q") == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "zsad-infer: data/bad.png: skipped: empty file\n"


@pytest.mark.slow
def test_progress_bars_only_on_a_terminal(infer, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(3))
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    process = start(tiny, "data", stderr=end, stdout=subprocess.DEVNULL, env=environment)
    os.close(end)
    shown = b""
    while select.select([terminal], [], [], ENOUGH)[0]:
        try:
            read = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end was closed
            break
        if not read:
            break
        shown += read
    os.close(terminal)
    assert process.wait() == 0
    assert b"data: networks" in shown
    assert infer("data") == 0  # here they would go into a file
    written = capfd.readouterr().err
    assert "\r" not in written
    assert "networks" not in written


@pytest.mark.slow
def test_groups_are_seeded_blind_and_reported(infer, tmp_path: Path) -> None:
    names = [*numbered(5, "test/bent/"), *numbered(6, "test/good/")]
    draw(tmp_path / "one/part", *names)
    draw(tmp_path / "two/part", *(name.replace("bent", "a").replace("good", "zzz") for name in names))
    for run in ("one", "two"):
        assert infer(f"{run}/part", "--output", f"out-{run}", "--group-size", 4) == 0
    one, two = (read_scores(Path(f"out-{run}/part")) for run in ("one", "two"))
    assert [one[name] for name in sorted(one)] == [two[name] for name in sorted(two)]
    record = json.loads(Path("out-one/run.json").read_text())
    assert (record["categories"]["part"]["groups"], record["categories"]["part"]["group_size"]) == (3, 4)
    assert any("3 random groups" in note for note in record["notes"])
    assert "3 random groups" in Path("out-one/report.html").read_text()
    assert infer("one/part", "--output", "again", "--group-size", 4) == 0
    assert read_scores(Path("again/part")) == one
    assert infer("one/part", "--output", "other", "--group-size", 4, "--seed", 1) == 0
    assert read_scores(Path("other/part")) != one


@pytest.mark.slow
def test_memory_limits_change_nothing_but_speed(infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(8))
    assert infer("data", "--output", "free") == 0
    capsys.readouterr()
    assert infer("data", "--output", "tight", "--memory-limit", "50KB", "-v") == 0
    assert "memory-mapped" in capsys.readouterr().err
    assert read_scores(Path("tight/data")) == pytest.approx(read_scores(Path("free/data")), abs=2e-4)
    for limit in ("0B", "1KB"):
        assert infer("data", "--output", "none", "--memory-limit", limit) == 2
        assert "raise --memory-limit" in capsys.readouterr().err
    assert not Path("none/data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder of images, or --demo"),
        (["data", "--demo"], "--demo draws its own images; leave out data or --demo"),
        (["data", "--preset", "large"], "invalid choice"),
        (["data", "--memory-limit", "much"], "must be a size like"),
        (["data", "--memory-limit", "1..5GB"], "must be a size like"),
        (["data", "--memory-limit", "4"], "needs a unit: 4GB or 4MB?"),
        (["data", "--taps", "one"], "numbers separated by commas"),
        (["data", "--threshold", "high"], "must be auto or a number"),
        (["data", "--image-size", "large"], "must be auto or a number of pixels, not 'large'"),
        (["data", "--format", "csv"], "must be some of"),
        (["data", "--format", ""], "must be some of"),
        (["--watch", "data", "--bank", "a.zsad", "--format", "coco"], "is made once all images have a score"),
        (["data", "--batch-size", "0"], "must be at least 1"),
        (["data", "--workers", "-1"], "must be at least 1"),
        (["data", "-q", "-v"], "not allowed with"),
    ],
)
def test_usage_errors(infer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        infer(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: there is no such folder"),
        (["data/00.png"], "folders of images are read"),
        (["data", "--device", "tpu"], "device must be"),
        (["data", "--threshold", "nan"], "threshold must be"),
        (["data", "--threshold", "2"], "threshold must be"),
        (["data", "--interval", "0.5,0.1"], "zsad-infer: --interval must be"),
        (["data", "--degrees", "2"], "zsad-infer: --degrees must be"),
        (["data", "--taps", "3,9"], "taps [3, 9] must be"),
        (["data", "--image-size", "71"], "use --image-size 70"),
        (["data", "--image-size", "1000000"], "zsad-infer: --image-size must be"),
        (["data", "--group-size", "1"], "zsad-infer: --group-size must be"),
        (["data", "--seed", "-1"], "seed must be"),
    ],
)
def test_configuration_errors(
    infer, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "data", *numbered(2))
    assert infer(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("zsad-infer: ")
    assert message in printed.err
    assert printed.out == ""


# Presets


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["challenge", pytest.param("musc", marks=pytest.mark.slow)])
def test_the_large_presets_run(golden: Path, tmp_path: Path, preset: str) -> None:
    clip = f'[networks.clip]\ncheckpoint = "{golden / "clip_vit_tiny.safetensors"}"\nheads = 2\ntaps = [2, 5, 8, 11]\n'
    dinov2 = (
        f'[networks.dinov2]\ncheckpoint = "{golden / "dinov2_vit_tiny.safetensors"}"\nheads = 3\ntaps = [1, 3, 5]\n'
    )
    Path("tiny.toml").write_text("image_size = 84\n" + clip + (dinov2 if preset == "challenge" else ""))
    draw(tmp_path / "data", *numbered(11, "bolt/test/good/"), "bolt/test/bent/00.png")
    assert main(["data", "--preset", preset, "--config", "tiny.toml", "--format", "zsad,rayan"]) == 0
    check_whole(Path("out"))
    run = json.loads(Path("out/run.json").read_text())
    assert run["preset"] == preset
    assert len(run["checkpoints"]) == (2 if preset == "challenge" else 1)
    assert len(list(Path("out/bolt/test").rglob("*_scores.json"))) == 12


def test_missing_weights_say_how_to_bring_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "nothing"))
    try:
        find_checkpoint("dinov2-vitl14")
    except CheckpointError:
        pass
    else:
        pytest.skip("the weights are installed here")
    draw(tmp_path / "data", *numbered(2))
    assert main(["data", "--preset", "challenge"]) == 2
    error = capsys.readouterr().err
    for source in read_manifest()["dinov2-vitl14"].sources:
        assert source.file in error
        assert source.location in error
        assert str(source.digest) in error
    assert "curl" in error
    assert not Path("out/data").exists()


def test_a_cache_that_may_only_be_read(
    infer,
    tiny: Path,
    tmp_path: Path,
    read_only: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw(tmp_path / "data", *numbered(3))
    cache = tmp_path / "cache"
    shutil.copytree(tiny / "cache", cache)
    (cache / "models").mkdir(exist_ok=True)  # what stands for a read-only disk only keeps files away
    monkeypatch.setenv("ZSAD_CACHE", str(cache))
    before = sorted(cache.rglob("*"))
    read_only(cache)
    assert infer("data", "--image-size", "84") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ZSAD_CACHE" in line]
    assert "temporary folder that is removed at the end" in line
    assert sorted(cache.rglob("*")) == before
    check_whole(Path("out"))


def test_a_cache_that_is_a_file(
    infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "data", *numbered(2))
    Path("cache").touch()
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    assert infer("data") == 2
    assert f"{tmp_path / 'cache'} is a file); set ZSAD_CACHE to a folder" in capsys.readouterr().err
    assert not Path("out/data").exists()


def test_a_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "data", *numbered(2))
    Path("bad.safetensors").write_bytes(b"not weights")
    for checkpoint in ("bad.safetensors", "absent.safetensors", "data", ""):
        Path("bad.toml").write_text(f'[networks.dinov2]\ncheckpoint = "{checkpoint}"\n')
        assert main(["data", "--config", "bad.toml"]) == 2
        assert checkpoint in capsys.readouterr().err


@pytest.mark.slow
def test_int8_products_give_nearly_the_same_scores(infer, tmp_path: Path, monkeypatch, capsys) -> None:
    if comparers._cpu is None:
        pytest.skip("installed without a compiler: int8 needs the native kernel")
    data = draw(tmp_path / "data", *numbered(8))
    raw = {}
    for precision in ("fp32", "int8"):
        assert infer(data, "--output", tmp_path / precision, "--precision", precision, "-q") == 0
        record = json.loads((tmp_path / precision / "data" / "category.json").read_text())
        raw[precision] = np.array([image["raw_score"] for image in record["images"]])
    np.testing.assert_allclose(raw["int8"], raw["fp32"], atol=2e-3)
    monkeypatch.setattr(comparers, "_cpu", None)
    assert infer(data, "--output", tmp_path / "without", "--precision", "int8") == 2
    assert "compiler" in capsys.readouterr().err

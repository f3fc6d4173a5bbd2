"""A category's folder, written in one go, or by several runs of which some were killed: the same files come out."""

import errno
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np
import pytest
import runs

from zsad.engine.images.categories import Category
from zsad.engine.images.decode import decode
from zsad.engine.images.folders import scan
from zsad.engine.results import category as module
from zsad.engine.results import image_files
from zsad.engine.results.category import CategoryWriter
from zsad.engine.results.image_files import ImageFiles, Result, Writing
from zsad.engine.results.output import JOURNAL, claimed, own_folder
from zsad.engine.results.records import CategoryRecord
from zsad.engine.results.report import shown_categories
from zsad.engine.results.resume import finished_record, why_again
from zsad.engine.scores.verdicts import Bounds

IMAGES = 4
KEPT = 2  # that the interrupted run has written
WRITING = Writing(("zsad", "rayan"), background="none", keep_stages=False, workers=1, memory_limit=1 << 30)


@pytest.fixture(scope="module", autouse=True)
def _small_maps() -> Iterator[None]:
    """Most of a run's time here would go into the challenge's maps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "SIDE", 40)
        yield


@pytest.fixture(scope="module")
def category(tmp_path_factory: pytest.TempPathFactory) -> Category:
    return scan(runs.draw(tmp_path_factory.mktemp("drawn") / "data", IMAGES)).categories[0]


@pytest.fixture(scope="module")
def whole(category: Category, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("whole")
    assert write(category, output) == ["00.png", "01.png", "02.png", "03.png"]
    found = files(output)
    assert {"data/thumbnails.jsonl", "data/category.json", "data/03_scores.json"} <= found.keys()
    return found


def write(
    category: Category, output: Path, images: int = IMAGES, before_each: Callable[[], object] = lambda: None
) -> list[str]:
    """Write a category, or go on; returns the images that were written now.

    images: after so many of the category a KeyboardInterrupt. before_each: called before an image is written.
    """
    now: list[str] = []
    with ExitStack() as held:
        held.enter_context(claimed(output, [category], resume=True))
        if finished_record(output, category, "fingerprint"):
            return now
        writer = held.enter_context(CategoryWriter(output, category, WRITING, None, "fingerprint", resume=True))
        done = writer.done
        for number, image in enumerate(category.images[:images]):
            if not done[number]:
                before_each()
                map_ = np.linspace(0, number / 4, 4, dtype=np.float32).reshape(2, 2)
                writer.write(Result(number, 0.5, number / 8, map_, (0.0, 1.0), np.array([number / 7])))
                now.append(str(image.relative))
        scores = writer.scores()
        if images < IMAGES:
            raise KeyboardInterrupt
        # All are alike before, so that ranks depend on the order.
        writer.rescore(np.where(np.arange(len(scores)) == 1, 0.75, scores / 2))
        writer.finish(CategoryRecord(category.name, "fingerprint", bounds=Bounds(0.5, 0.6, "rule", 0.1)))
    return now


def files(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def interrupted(category: Category, output: Path, images: int = KEPT) -> Path:
    """Interrupt a run; returns the folder that it leaves."""
    with pytest.raises(KeyboardInterrupt):
        write(category, output, images)
    (partial,) = output.iterdir()
    return partial


def fail(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_file_is_left_without_its_end(
    category: Category,
    whole: dict[str, bytes],
    tmp_path: Path,
    files_up_to: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Whichever file a full disk takes only the beginning of: that is noticed, and made up for by the next run."""
    for size in {len(content) for content in whole.values()}:
        output = tmp_path / str(size)
        with files_up_to(size - 1), pytest.raises(OSError, match="File too large"):
            write(category, output)
        write(category, output)
        assert files(output) == whole


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["interrupted", "finished"])
def test_a_run_may_be_killed_at_any_moment_after_it_went_on(
    category: Category, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """What is on disk before each of its file operations, or half through, is what a kill would leave there."""
    output = tmp_path / "out"
    if begun == "interrupted":
        interrupted(category, output)
    else:
        write(category, output)
        for image in category.images[KEPT:]:
            (output / category.name / f"maps/{image.key}.tiff").unlink()
    partial = own_folder(output / category.name, "partial")
    moments: list[tuple[str, Path]] = []  # what came next, and a copy of all before it

    def copy(following: str) -> None:
        if current_thread() is main_thread() and partial.exists():
            target = tmp_path / str(len(moments))
            for folder in filter(Path.exists, (partial, output / category.name)):
                shutil.copytree(folder, target / folder.name)
            moments.append((following, target))

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(Path, name)

        def operation(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.is_relative_to(partial):
                copy(f"{name} {self.name}")
                if name == "write_text":
                    original(self, arguments[0][: len(arguments[0]) // 2])
                    copy(f"the rest of {self.name}")
            return original(self, *arguments, **options)

        return operation

    with monkeypatch.context() as patch:
        for name in ("open", "replace", "rename", "unlink", "write_text"):
            patch.setattr(Path, name, watched(name))
        assert write(category, output, before_each=lambda: copy("an image")) == ["02.png", "03.png"]
    assert files(output) == whole
    names = [following for following, _ in moments]
    assert {"an image", "rename journal.jsonl", "open category.json", f"rename {partial.name}"} <= set(names)
    all_written = next(number for number, name in enumerate(names) if name.startswith("write_text"))  # new scores
    for number, (following, killed) in enumerate(moments):
        assert len(write(category, killed)) <= (0 if number >= all_written else IMAGES - KEPT), following
        assert files(killed) == whole, following


@pytest.mark.parametrize("step", ["_write_tables", "rounded", "with_score"])
def test_a_full_disk_at_the_end_costs_no_image(
    category: Category, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail)
        with pytest.raises(OSError, match=r"No space left on device: .*\.partial"):
            write(category, tmp_path)
    assert write(category, tmp_path) == []
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    "damage",
    [
        "half a JSON",
        "no JSON",
        "no map",
        "no thumbnails",
        "half its line",
        "another line",
        "no lines",
        "half a map",
        "an empty overlay",
    ],
)
def test_only_what_is_damaged_is_done_again(
    category: Category, whole: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    partial = interrupted(category, tmp_path, 3)
    thumbnails, journal, challenge = (partial / n for n in ("thumbnails.jsonl", JOURNAL, "00_scores.json"))
    redone = ["00.png"]
    if damage == "half a JSON":
        challenge.write_text(challenge.read_text()[:1000])
    elif damage == "no JSON":
        challenge.unlink()
    elif damage == "no map":
        (partial / "maps/00.tiff").unlink()
    elif damage == "half a map":
        os.truncate(partial / "maps/00.tiff", 5000)
    elif damage == "an empty overlay":
        os.truncate(partial / "overlays/00.jpg", 0)
    elif damage == "no thumbnails":
        thumbnails.write_text("".join(thumbnails.read_text().splitlines(keepends=True)[1:]))
    elif damage == "half its line":
        journal.write_text(journal.read_text()[:-20])
        redone = ["02.png"]
    elif damage == "another line":
        first, _, *rest = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join([first, "[0, 1, 2, 3, 4]\n", *rest]))
        redone = ["00.png", "01.png", "02.png"]  # from there on
    else:
        journal.write_text("")
        redone = ["00.png", "01.png", "02.png"]
    assert write(category, tmp_path) == [*redone, "03.png"]
    assert files(tmp_path) == whole


def test_an_image_without_memory_is_tried_again(
    category: Category, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(path: Path, *rest: Any) -> Any:
        if path.name == "01.png":
            raise MemoryError("none left")
        return decode(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", short)
        interrupted(category, tmp_path, 3)
    assert write(category, tmp_path) == ["01.png", "03.png"]
    assert files(tmp_path) == whole


def test_an_overlay_drawn_beside_its_map_is_the_same(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Result(0, 0.5, 0.5, np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), (0.0, 1.0))
    with ThreadPoolExecutor(1) as beside:
        found = []
        for name, threads in (("alone", None), ("beside", beside)):
            (tmp_path / name).mkdir()
            written, pictures = ImageFiles(tmp_path / name, WRITING, None, threads).write(
                category.images[0], result, True
            )
            files = [(tmp_path / name / file).read_bytes() for file in written.record.files()]
            found.append((written, {key: picture.tobytes() for key, picture in pictures.items()}, files))
        assert found[0] == found[1]

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(image_files.Image.Image, "save", full)
        (tmp_path / "full").mkdir()
        with pytest.raises(OSError, match="No space left"):
            ImageFiles(tmp_path / "full", WRITING, None, beside).write(category.images[0], result, True)
        (overlay,) = (tmp_path / "full" / "overlays").rglob("*.jpg")
        assert overlay.read_bytes() == found[0][2][1]  # nobody is still at it


@pytest.mark.slow
def test_next_to_nothing_is_held_of_an_image(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first image to the report; its record and thumbnails take more than 3000 bytes each."""
    here = "./" * 1500

    def draw(*arguments: Any) -> Any:
        return replace(arguments[-1], map=here + "thumbnails.jsonl"), 1, {}

    monkeypatch.setattr(ImageFiles, "_draw", draw)
    monkeypatch.setattr("zsad.engine.results.category.thumbnails_of", lambda _: {"image": "x" * 4000})

    def peak(images: int) -> int:
        many = replace(category, images=category.images[:1] * images)
        (output := tmp_path / f"{images} {len(list(tmp_path.iterdir()))}").mkdir()
        tracemalloc.start()
        try:
            with CategoryWriter(output, many, WRITING, None, "fingerprint", resume=False) as writer:
                for number in range(images):
                    writer.write(Result(number, 0.5, 0.5, np.zeros((1, 1), np.float32), (0.0, 1.0), np.zeros(2)))
                writer.rescore(writer.scores())
                assert sum(written.facts == [0.0, 0.0] for written in writer.written()) == images
                record = writer.finish(CategoryRecord(category.name, bounds=Bounds(0.6, 0.6, "rule")))
            (shown,) = shown_categories(output, [many], [record], None)
            assert sum(image.record.rank for image in shown.images) == images * (images + 1) / 2
            again = finished_record(output, many, "")
            assert again is not None
            assert len(again.images) == images
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)  # what is made once
    few, many = peak(20), peak(320)
    assert many - few < 300 * 1500


@pytest.mark.parametrize(
    ("file", "size"),
    [
        *(("category.json", size) for size in (0, 1000, -3)),
        *((file, size) for file in ("thumbnails.jsonl", "scores.csv", "regions.csv") for size in (0, -1)),
        *((file, size) for file in ("maps/02.tiff", "overlays/02.jpg", "02_scores.json") for size in (0, -1)),
    ],
)
def test_results_that_are_cut_are_not_finished(category: Category, finished: Path, file: str, size: int) -> None:
    path = finished / category.name / file
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    check_again(category, finished)


@pytest.mark.parametrize(
    ("part", "other"),
    [(' "failures": [],\n', ""), ('   "rank": 2,\n', ""), ('"path": "02.png"', '"path": "x2.png"'), (": 2,", ": [],")],
)
def test_records_that_lack_something_are_not_finished(
    category: Category, finished: Path, part: str, other: str
) -> None:
    path = finished / category.name / "category.json"
    text = path.read_text()
    assert part in text
    path.write_text(text.replace(part, other))
    check_again(category, finished)


@pytest.fixture
def finished(category: Category, whole: dict[str, bytes], tmp_path: Path) -> Path:
    """An output folder with finished results, which are found to be so."""
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert finished_record(tmp_path, category, "fingerprint") is not None
    return tmp_path


def check_again(category: Category, output: Path) -> None:
    """Check that a category is not believed to be finished, and that its results may be replaced all the same."""
    assert finished_record(output, category, "fingerprint") is None
    assert "damaged" in (why_again(output, category.name, "fingerprint", {}, {}) or "")
    with claimed(output, [category], resume=True):
        pass


def test_thumbnails_that_are_damaged_cost_their_pictures_only(category: Category, finished: Path) -> None:
    """A file system may give back other bytes of the same number."""
    record = finished_record(finished, category, "fingerprint")
    assert record is not None
    path = finished / category.name / "thumbnails.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (bytes(len(lines[1])), b"\xff" * len(lines[1]), b"1", b'["01.png"]', b"[1, 2, 3]"):
        path.write_bytes(b"".join([lines[0], damaged + b"\n", *lines[2:]]))
        (shown,) = shown_categories(finished, [category], [record], None)
        assert [bool(image.pictures) for image in shown.images] == [True, False, True, True]


def test_everything_is_on_disk_before_it_is_in_place(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    real, rename = os.fsync, Path.rename

    def flush(file: int) -> None:
        flushed.add(os.fstat(file).st_ino)
        real(file)

    def checked(self: Path, target: Path) -> Path:
        if target.name == category.name:
            assert {path.stat().st_ino for path in (self, *self.rglob("*"))} <= flushed
            flushed.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", checked)
    write(category, tmp_path)
    assert flushed == {tmp_path.stat().st_ino}

"""A category's folder that grows: wherever it is cut off, the next run goes on, and no image is there twice."""

import csv
import errno
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from zsad.engine.images.arrivals import Arrival, Known, Version
from zsad.engine.images.categories import HERE, ImageFolder, InputImage
from zsad.engine.images.tree import WATCHED, is_stream, read_tree
from zsad.engine.results import stream as module
from zsad.engine.results.growing import Growing
from zsad.engine.results.output import OutputError
from zsad.engine.results.records import ImageRecord
from zsad.engine.results.stream import SHOWN, Stream
from zsad.engine.scores.verdicts import Region

NAMES = ("a.png", "b,'c.png", "=1.png", "caf\udce9.png")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def arrival(name: str, number: int = 0) -> Arrival:
    image = InputImage(ImageFolder(Path(), HERE, HERE), name, name)
    return Arrival(name, Version(10, 10**18 + 1 + number, number), image, young=False)


def image(name: str) -> ImageRecord:
    regions = [Region(1, 2, 3, 4, 5, 0.75)] * (name == "a.png")
    return ImageRecord(name, 0.25, 0.125, verdict="reject", map=f"maps/{name}.tiff", regions=regions, p_value=0.5)


def add(folder: Path, *names: str) -> list[str]:
    """Add those that are not there, and one that cannot be read; returns what was added now."""
    known, now = Known(), []
    with Stream(folder, known) as stream:
        for number, name in enumerate(names):
            if not known.has(name, arrival(name, number).version):
                stream.add(arrival(name, number), image(name))
                now.append(name)
        if not known.has("broken.png", arrival("broken.png", 9999).version):
            stream.refuse(arrival("broken.png", 9999), "damaged")
    return now


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("scores.csv", "regions.csv")}


def test_tables_have_the_columns_of_those_of_runs(tmp_path: Path) -> None:
    assert add(tmp_path / "in", *NAMES) == list(NAMES)
    with (tmp_path / "in" / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["a.png", "b,'c.png", "'=1.png", "caf\udce9.png"]
    assert rows[0] | {"path": ""} == {
        "path": "",
        "score": "0.250000",
        "raw_score": "0.125000",
        "map": "maps/a.png.tiff",
        "verdict": "reject",
        "regions": "1",
        "defect_area": "5",
        "p_value": "0.500000",
        "note": "",
    }
    assert (tmp_path / "in" / "regions.csv").read_text().splitlines()[1] == "a.png,1,2,3,4,5,0.75"


@pytest.mark.parametrize("table", ["scores.csv", "regions.csv", WATCHED])
def test_wherever_it_is_cut_off_the_next_run_ends_with_the_same_tables(tmp_path: Path, table: str) -> None:
    add(tmp_path / "whole", *NAMES)
    wanted = tables(tmp_path / "whole")
    content = (tmp_path / "whole" / table).read_bytes()
    for length in range(0, len(content), 31):
        folder = tmp_path / "cut"
        add(folder, *NAMES)
        if table == WATCHED and length < 40:
            continue
        os.truncate(folder / table, length)
        add(folder, *NAMES)
        assert sorted(tables(folder)["scores.csv"].splitlines()) == sorted(wanted["scores.csv"].splitlines())
        assert tables(folder)["regions.csv"] == wanted["regions.csv"]
        assert add(folder, *NAMES) == []
        for path in folder.iterdir():
            path.unlink()


def test_a_power_cut_takes_nothing_that_was_settled_and_what_it_takes_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves anything between what was waited for and what was written of each file, as the worst disks do."""
    folder, safe = tmp_path / "in", dict[Path, int]()
    names = [f"{number}.png" for number in range(8)]

    def fsync(file: int) -> None:
        safe[Path(f"/proc/self/fd/{file}").readlink()] = os.fstat(file).st_size

    def write(stream: Stream, number: int) -> None:
        record = replace(image(names[number]), map=f"maps/{number}.tiff", sizes=[100])
        stream.folder.joinpath("maps").mkdir(exist_ok=True)
        (stream.folder / record.map).write_bytes(bytes(100))
        stream.add(arrival(names[number], number), record)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "PAUSE", 1000.0)  # as quick as images may come
    for seed in range(10):
        rng = random.Random(seed)
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "__exit__", lambda *_: None)
            settled, written = rng.randrange(7), rng.randrange(7, 9)
            with Stream(folder, Known()) as stream:
                for number in range(written):
                    write(stream, number)
                    if number + 1 == settled:
                        stream.settle(at_once=True)
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            os.truncate(path, rng.choice((safe.get(path, 0), rng.randint(safe.get(path, 0), path.stat().st_size))))
        known = Known()
        with Stream(folder, known) as stream:
            found = [known.has(name, arrival(name, number).version) for number, name in enumerate(names)]
            assert found[:settled] == [True] * settled
            for number in range(8):
                if not found[number]:
                    write(stream, number)
        with (folder / "scores.csv").open(newline="") as file:
            assert [row["path"] for row in csv.DictReader(file)] == names
        assert all(path.stat().st_size == 100 for path in folder.glob("maps/*"))
        shutil.rmtree(folder / "maps")  # what was settled may go
        known = Known()
        with Stream(folder, known):
            assert all(known.has(name, arrival(name, number).version) for number, name in enumerate(names))
        shutil.rmtree(folder)
        safe.clear()


@pytest.mark.parametrize("refuses", range(1, 5))
def test_what_the_disk_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: int
) -> None:
    known, writes = Known(), 0
    append = Growing.append

    def half(self: Growing, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == refuses:
            self._file.seek(self.end)
            self._file.write(content[: len(content) // 2])
            self.cut(self.end)
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, content)

    with Stream(tmp_path / "in", known) as stream:
        stream.add(arrival("z.png", 9), image("z.png"))
        before = tables(tmp_path / "in")
        monkeypatch.setattr(Growing, "append", half)
        if refuses < 4:
            with pytest.raises(OSError, match="No space"):
                stream.add(arrival("a.png"), image("a.png"))
            assert tables(tmp_path / "in") == before
            assert not known.has("a.png", arrival("a.png").version)
        stream.add(arrival("a.png"), image("a.png"))
    lines = (tmp_path / "in" / "scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["path", "z.png", "a.png"]


def test_of_many_images_the_last_are_in_memory(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(SHOWN + 30)]
    add(tmp_path / "in", *names)
    known = Known()
    with Stream(tmp_path / "in", known) as stream:
        assert stream.latest.scored == len(names)
        assert stream.latest.failed == 1
        assert [record.path for record, _ in stream.latest.images] == names[30:]
        assert stream.latest.images[0][0] == image(names[30])
    assert all(known.has(name, arrival(name, number).version) for number, name in enumerate(names))


def test_folders_of_others_are_refused_and_its_own_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("others", "link"):
        with pytest.raises(OutputError, match="holds no results of a --watch"):
            Stream(tmp_path / name, Known())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / WATCHED).write_bytes(b'{"zsad"')  # a power cut as it was begun
    add(tmp_path / "in", "a.png")
    (tmp_path / "in" / "overlays").mkdir()
    (tmp_path / "in" / "overlays" / "a.png.jpg").write_bytes(b"x")
    assert is_stream(tmp_path / "in")
    assert read_tree(tmp_path, None).folders["in"].count() == 0

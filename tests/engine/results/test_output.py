"""The output folder: one run at a time, nothing written through links, and nothing left of killed runs."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import runs

from zsad.engine.images.categories import Category
from zsad.engine.images.folders import scan
from zsad.engine.images.tree import RECORD, SCORES
from zsad.engine.results.formats import Export
from zsad.engine.results.output import LOCK, OutputError, claimed, left_folder, own_folder
from zsad.engine.results.records import CategoryRecord, write_record

DEAD = 2**22 + 1  # no process has such a number
CLAIM = """
import sys
from pathlib import Path
from zsad.engine.results.output import claimed
with claimed(Path(sys.argv[1]), (), resume=False):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def category(tmp_path_factory: pytest.TempPathFactory) -> Category:
    return scan(runs.draw(tmp_path_factory.mktemp("drawn") / "part", 2)).categories[0]


def results(folder: Path, name: str = "part", note: str = "") -> Path:
    """Finished results of a category without images."""
    folder.mkdir(parents=True)
    write_record(folder / RECORD, CategoryRecord(name, notes=[note]), [])
    (folder / SCORES).write_text("path,score,rank,raw_score,map\n")
    return folder


def dead(final: Path, kind: str) -> Path:
    """Name the hidden folder of a process that is no more, on another machine."""
    own = own_folder(final, kind)
    return own.with_name(own.name.replace(f".{platform.node()}.{os.getpid()}.", f".away.{DEAD}."))


def content(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*")}


@pytest.mark.slow
def test_a_second_run_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        (tmp_path / f".{platform.node()}.{os.getpid()}.report.html").mkdir()  # would be swept
        before = content(tmp_path)
        for _ in range(2):
            said = rf"another run is writing there \(process {other.pid} on {platform.node()}, since 20.* UTC\); wait"
            with pytest.raises(OutputError, match=said), claimed(tmp_path, (), resume=False):
                pass
        assert content(tmp_path) == before
        other.kill()
    with claimed(tmp_path, (), resume=False):
        assert content(tmp_path) == {LOCK}
    assert content(tmp_path) == set()


def test_without_locks_others_are_left_in_peace(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    away, here = dead(tmp_path / "part", "partial"), own_folder(tmp_path / "part", "partial")
    away.mkdir()
    here.mkdir()
    with claimed(tmp_path, [category], resume=False), claimed(tmp_path, [category], resume=False):
        pass
    assert content(tmp_path) == {away.name}


def test_what_holds_the_lock_of_a_folder_that_is_gone_leaves_others_theirs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with ExitStack() as first:
        first.enter_context(claimed(output, (), resume=False))
        output.rename(tmp_path / "moved")
        with claimed(output, (), resume=False):
            first.close()
            assert content(output) == {LOCK}


@pytest.mark.parametrize("resume", [False, True])
def test_what_killed_runs_have_left_goes(category: Category, tmp_path: Path, resume: bool) -> None:
    final = results(tmp_path / "part")
    (dead(final, "partial") / "maps").mkdir(parents=True)
    results(dead(final, "old"))
    for draft in ("report.html", "run.json"):
        (tmp_path / f".away.{DEAD}.{draft}").mkdir()
    others = [".away.1.metrics.json", ".away.1.partial", ".git"]  # of zsad-eval, which may run, and of nobody known
    for other in others:
        (tmp_path / other).mkdir()
    with claimed(tmp_path, [category], resume):
        pass
    assert content(tmp_path) == {*others, "part", f"part/{RECORD}", f"part/{SCORES}"}


def test_what_can_be_gone_on_from_stays_for_those_who_ask(category: Category, tmp_path: Path) -> None:
    partial = dead(tmp_path / "part", "partial")
    partial.mkdir()
    (partial / "journal.jsonl").write_text('"fingerprint"\n')
    left = left_folder(tmp_path / "part")
    for _ in range(2):
        with claimed(tmp_path, [category], resume=True):
            assert content(tmp_path) == {LOCK, left.name, f"{left.name}/journal.jsonl"}
    with claimed(tmp_path, [category], resume=False):
        assert content(tmp_path) == {LOCK}


@pytest.mark.parametrize(
    "killed", ["before the old one goes", "before the new one comes", "before the old one is gone"]
)
def test_a_run_killed_while_it_puts_results_in_place_has_finished_them(
    category: Category, tmp_path: Path, killed: str
) -> None:
    final = tmp_path / "part"
    results(dead(final, "partial") if killed != "before the old one is gone" else final, note="new")
    results(final if killed == "before the old one goes" else dead(final, "old"), note="old")
    with claimed(tmp_path, [category], resume=False):
        assert '"new"' in (final / RECORD).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_old_results_come_back_where_new_ones_are_not_finished(category: Category, tmp_path: Path) -> None:
    final = tmp_path / "part"
    results(dead(final, "old"), note="old")
    (results(dead(final, "partial"), note="new") / "journal.jsonl").touch()
    with claimed(tmp_path, [category], resume=False):
        assert '"old"' in (final / RECORD).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../part", "..", ".", "other", ".part"])
def test_only_what_belongs_beside_it_is_put_in_place(category: Category, tmp_path: Path, name: str) -> None:
    (tmp_path / "part").mkdir()
    output = tmp_path / "out"
    hidden = dead(output / ("part" if name == "other" else Path(name).name or "."), "partial")
    results(output / hidden.name, name)
    with claimed(output, [category], resume=True):
        assert content(output) == {LOCK}
    assert list((tmp_path / "part").iterdir()) == []


@pytest.mark.parametrize(
    "link",
    [
        LOCK,
        "run.json",
        "report.html",
        "report_files",
        "part",
        "demo-data",
        "demo-data/part",
        "partial",
        "partial/maps/00.tiff",
    ],
)
def test_nothing_is_written_through_links(category: Category, tmp_path: Path, link: str) -> None:
    output, target = tmp_path / "out", results(tmp_path / "target")
    where = output / link.replace("partial", left_folder(output / "part").name)
    where.parent.mkdir(parents=True)
    where.symlink_to(target)
    before = content(tmp_path)
    for resume in (False, True):
        with pytest.raises(OutputError, match="is a link, and nothing is written"), claimed(output, [category], resume):
            pass
    assert content(tmp_path) == before


def test_folders_of_formats_replace_neither_a_category_nor_what_is_not_theirs(
    category: Category, tmp_path: Path
) -> None:
    for name, said in (("coco", "both write there"), ("visa", "holds no zsad results")):
        (tmp_path / "visa").mkdir(exist_ok=True)
        with (
            pytest.raises(OutputError, match=said),
            claimed(tmp_path, [replace(category, name="coco")], False, exports=[cast(Export, name)]),
        ):
            pass
    (tmp_path / "visa/format.json").write_text('{"zsad_format": "visa"}')
    with claimed(tmp_path, [category], False, exports=["visa"]):
        pass


@pytest.mark.parametrize("name", ["run.json", "report.html"])
def test_what_stands_where_results_will_be_written_is_named_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with (
        pytest.raises(OutputError, match=rf"{name} is a folder; name a file\); choose"),
        claimed(tmp_path, (), resume=False),
    ):
        pass

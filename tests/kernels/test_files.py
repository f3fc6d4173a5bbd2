"""Files appear whole or not at all, in place of nothing but files."""

import errno
import hashlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tifffile import imwrite

from zsad.kernels import files
from zsad.kernels.files import (
    WholeFile,
    as_cell,
    check_target,
    file_sha256,
    find_sealed,
    from_cell,
    parse_json,
    printable,
    read_text,
    remembered_fact,
    remembered_sha256,
    write_sealed,
    written_whole,
)


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with written_whole(target) as draft:
            draft.write_text(content)
        with pytest.raises(UnicodeEncodeError), written_whole(target) as draft:
            draft.write_text("half\udcff", encoding="utf-8")
        assert target.read_text() == content
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "save",
    [
        lambda file, values: Image.fromarray(values).save(file, format="TIFF"),
        lambda file, values: Image.fromarray(values.view(np.uint8)).save(file, format="PNG"),
        lambda file, values: imwrite(file, values, photometric="minisblack", metadata=None),
        lambda file, values: file.write(values.tobytes()),
    ],
)
def test_what_a_library_writes_is_there_to_its_last_byte_or_refused(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]], save: Callable[[Any, Any], None]
) -> None:
    values = np.random.default_rng(0).random((80, 97), np.float32)
    with (tmp_path / "expected").open("wb") as file:
        save(file, values)
    expected = (tmp_path / "expected").read_bytes()
    for size in (len(expected) - 1, len(expected) // 2, 0):
        with files_up_to(size), pytest.raises(OSError, match="File too large") as raised:  # noqa: SIM117
            with WholeFile(tmp_path / "file") as file:
                save(file, values)
        assert raised.value.errno == errno.EFBIG
    with files_up_to(len(expected)), WholeFile(tmp_path / "file") as file:
        save(file, values)
    assert (tmp_path / "file").read_bytes() == expected


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flush(file: int) -> None:
        seen.append((os.fstat(file).st_ino, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", flush)
    with written_whole(tmp_path / "file") as draft:
        draft.write_text("whole")
    assert seen == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.slow
def test_drafts_of_killed_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    target = tmp_path / "file"
    code = (
        "import os, signal, sys; from pathlib import Path; from zsad.kernels.files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as draft:\n"
        "    draft.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("file", "another"):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
        assert killed.returncode == -signal.SIGKILL
    own, another = sorted(tmp_path.iterdir(), key=lambda path: path.name.endswith("another"))
    assert (own / "file").read_text() == "half"
    node = platform.node()
    earlier = tmp_path / f".{node}.{os.getpid()}.file"  # the same number, as the first process of a container has it
    stays = [another, tmp_path / f".{node}.{os.getppid()}.file", tmp_path / f".{node}-2.{own.name.split('.')[-2]}.file"]
    for folder in (earlier, *stays[1:]):
        folder.mkdir()
    with written_whole(target) as draft:
        draft.write_text("whole")
    assert set(tmp_path.iterdir()) == {target, *stays}
    assert target.read_text() == "whole"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    for name, message in (
        ("folder", "folder is a folder; name a file"),
        ("pipe", "pipe is not a regular file"),
        ("link", "link is not a regular file"),
        ("file/below", "file is not a folder"),
    ):
        with pytest.raises(OSError, match=message), written_whole(tmp_path / name) as draft:
            draft.write_text("whole")
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo()


def test_names_are_safe_to_print() -> None:
    assert printable("Schraube 7 – größer.png") == "Schraube 7 – größer.png"
    assert printable("a\x1b[2Jb\n\udcff") == "a\\x1b[2Jb\\n\\udcff"
    assert printable("two\nlines", keep="\n") == "two\nlines"


def test_digests_of_files(tmp_path: Path) -> None:
    for size in (0, 3, (1 << 20) + 1):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * size).hexdigest()


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    check_target(tmp_path / "other", tmp_path / "file")
    with pytest.raises(OSError, match="is what is to be read"):
        check_target(tmp_path / "link", tmp_path / "file")


def test_a_digest_is_computed_again_when_the_file_has_changed(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def compute(path: Path) -> str:
        asked.append(path)
        return file_sha256(path)

    file = tmp_path / "file"
    file.write_bytes(b"content")
    for _ in range(2):  # it has changed just now, and might once more without its time telling
        assert remembered_fact(file, "sha256", compute) == hashlib.sha256(b"content").hexdigest()
    assert len(asked) == 2
    os.utime(file, (1e9, 1e9))
    for _ in range(2):
        assert remembered_fact(file, "sha256", compute) == hashlib.sha256(b"content").hexdigest()
    file = file.rename(tmp_path / "renamed")
    assert remembered_fact(file, "sha256", compute) == hashlib.sha256(b"content").hexdigest()
    assert len(asked) == 3
    file.write_bytes(b"Content")
    assert remembered_fact(file, "sha256", compute) == hashlib.sha256(b"Content").hexdigest()
    os.utime(file, (2e9, 1e9))
    assert remembered_fact(file, "md5", lambda _: "of another kind") == "of another kind"
    (known,) = (empty_cache / "digests").glob("*.md5")
    for damage in (b"", b"\xff", b"7 1000000000"):
        known.write_bytes(damage)
        assert remembered_fact(file, "md5", lambda _: "once more") == "once more"


def test_a_digest_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "file").write_bytes(b"content")
    os.utime(tmp_path / "file", (1e9, 1e9))
    assert remembered_sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_a_sealed_file_is_found_until_it_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a [kernel]-0.cubin"
    assert find_sealed(path) is None
    sealed = write_sealed(path, b"content")
    assert sealed.read_bytes() == b"content"
    assert find_sealed(path) == sealed
    assert find_sealed(tmp_path / "a [kernel].cubin") is None
    sealed.write_bytes(b"cOntent")
    assert find_sealed(path) is None
    assert f"{sealed}: damaged, it is made anew" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["=1+1.png", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "'=x", "''-x"])
def test_a_name_that_is_a_formula_is_none_in_a_table(name: str) -> None:
    assert as_cell(name) == f"'{name}"
    assert from_cell(as_cell(name)) == name


@pytest.mark.parametrize("name", ["a=1.png", "'tis.png", "''", "0.png", ""])
def test_other_names_are_in_tables_as_they_are(name: str) -> None:
    assert as_cell(name) == from_cell(name) == name


def test_texts_are_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("näme", encoding="utf-8")
    assert read_text(tmp_path / "text") == "näme"
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (("pipe", "not a regular file"), ("/dev/zero", "not a regular file"), (".", "a folder")):
        with pytest.raises(OSError, match=problem):
            read_text(tmp_path / path)
    monkeypatch.setattr(files, "LARGEST_TEXT", 3)
    with pytest.raises(OSError, match="larger than"):
        read_text(tmp_path / "text")


def test_json_nested_too_deep_is_no_json() -> None:
    assert parse_json(b"[1]") == [1]
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 10**5)

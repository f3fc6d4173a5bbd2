"""Files appear whole or not at all, in place of nothing but files."""

import hashlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zsad.kernels.files import check_target, file_sha256, printable, written_whole


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with written_whole(target) as draft:
            draft.write_text(content)
        with pytest.raises(UnicodeEncodeError), written_whole(target) as draft:
            draft.write_text("half\udcff", encoding="utf-8")
        assert target.read_text() == content
        assert list(target.parent.iterdir()) == [target]


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

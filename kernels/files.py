"""Files: their digests, names that are safe to print, and writing them so that nobody ever sees half of one."""

import errno
import glob
import hashlib
import io
import json
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .machine import CacheError, cache_folder, cache_to_write

log = logging.getLogger("zsad")

LARGEST_TEXT = 2**28  # bytes
# What spreadsheets take for a formula, and names that could be mistaken for one that has its apostrophe.
FORMULA = re.compile("'*[=+@\t\r-]")

SEAL = 16  # hexadecimal digits
SETTLED = 2 * 10**9  # nanoseconds after a change until another one shows in a file's time on every file system


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside it; the file becomes `path` only if the block succeeds.

    It is on disk by then, so that a power cut leaves no half of it either. What killed processes left there of the same
    file goes first. Raises OSError, also where `check_target` does.
    """
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    folder = path.with_name(f".{platform.node()}.{os.getpid()}.{path.name}")
    folder.mkdir()
    try:
        yield folder / path.name
        flush(folder / path.name)
        (folder / path.name).replace(path)
        flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class WholeFile(io.BufferedWriter):
    """A new file for libraries to write to: writing or closing it raises OSError unless all of it is there.

    Some, such as Pillow, would write to its descriptor, and take no notice where a full disk takes only a part of that.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        super().__init__(io.FileIO(path, "w"))

    def fileno(self) -> int:
        """Refuse; raises io.UnsupportedOperation."""
        raise io.UnsupportedOperation("fileno")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; raises OSError, but not of folders: not all can."""
    opened = os.open(path, os.O_RDONLY)
    try:
        with suppress(*[OSError] * path.is_dir()):
            os.fsync(opened)
    finally:
        os.close(opened)


def _sweep(path: Path) -> None:
    """Remove drafts of a file whose writers are dead; those of other machines may live."""
    draft = re.compile(rf"\.{re.escape(platform.node())}\.(\d+)\.{re.escape(path.name)}")
    for left in path.parent.iterdir():
        if match := draft.fullmatch(left.name):
            writer = int(match[1])
            if writer == os.getpid() or not psutil.pid_exists(writer):  # in a container it often is the same number
                shutil.rmtree(left, ignore_errors=True)


def check_target(path: Path, source: Path | None = None) -> None:
    """Raise OSError where writing a file would replace what is no regular file, or what it is made from."""
    if path.parent.exists() and not path.parent.is_dir():
        raise OSError(f"{path.parent} is not a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; name a file")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OSError(f"{path} is what is to be read; name another file to write")


def check_writable(folder: Path) -> None:
    """Raise OSError unless a file can be written in a folder, or where there is none in the one it is to be made in."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        probe.write(bytes(4096))  # a full disk still takes empty files


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def remembered_fact(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    """Return what follows from a file, such as a digest, computed once while size, time of change and inode stay.

    kind: tells facts of several kinds apart. The cache keeps it, where that can be written. Raises OSError.
    """
    status = path.stat()
    known, facts = f"{status.st_dev:x}-{status.st_ino:x}.{kind}", f"{status.st_size} {status.st_mtime_ns} "
    with suppress(OSError, UnicodeDecodeError):
        remembered = (cache_folder() / "digests" / known).read_text("ascii")
        if remembered.startswith(facts):
            return remembered.removeprefix(facts)
    fact = compute(path)
    if time.time_ns() - status.st_mtime_ns > SETTLED:
        with suppress(OSError, CacheError), written_whole(cache_to_write("digests", keep=True) / known) as draft:
            draft.write_text(facts + fact, "ascii")
    return fact


def remembered_sha256(path: Path) -> str:
    """Return the sha256 of a large file in hexadecimal, see `remembered_fact`."""
    return remembered_fact(path, "sha256", file_sha256)


def find_sealed(path: Path) -> Path | None:
    """Return the file of the cache that `write_sealed` made for this path; None where there is none.

    What has another content by now goes, with a word.
    """
    for found in path.parent.glob(f"{glob.escape(path.stem)}-*{path.suffix}"):
        with suppress(OSError):
            if found.stem == f"{path.stem}-{file_sha256(found)[:SEAL]}":
                return found
            log.warning("%s: damaged, it is made anew", found)
            found.unlink()
    return None


def write_sealed(path: Path, content: bytes) -> Path:
    """Write a file of the cache under a name that has the beginning of its sha256 too; returns it."""
    sealed = path.with_name(f"{path.stem}-{hashlib.sha256(content).hexdigest()[:SEAL]}{path.suffix}")
    with written_whole(sealed) as draft:
        draft.write_bytes(content)
    return sealed


def read_text(path: Path) -> str:
    """Return a UTF-8 text that somebody wrote; raises UnicodeDecodeError, and OSError also for what is no regular file.

    A pipe would be waited for, a device never ends.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file", str(path))
    if status.st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_TEXT >> 20} MB", str(path))
    return path.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; raises ValueError for anything else, also for one nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def as_cell(text: str) -> str:
    """Return a name as a table holds it: a spreadsheet shall not take it for a formula, so an apostrophe goes first."""
    return f"'{text}" if FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Return the name that `as_cell` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def printable(text: str, keep: str = "") -> str:
    """Escape what would steer a terminal or is no Unicode, for names that come from a file system."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

"""Files: their digests, names that are safe to print, and writing them so that nobody ever sees half of one."""

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside it; the file becomes `path` only if the block succeeds.

    What killed processes left there of the same file goes first. Raises OSError, also where `check_target` does.
    """
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    folder = path.with_name(f".{platform.node()}.{os.getpid()}.{path.name}")
    folder.mkdir()
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def printable(text: str, keep: str = "") -> str:
    """Escape what would steer a terminal or is no Unicode, for names that come from a file system."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

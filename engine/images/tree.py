"""Folders as they lie on disk, each listed once, whatever links lead to it."""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .layouts import is_hidden
from .stored import SUFFIXES

RECORD = "category.json"  # written last into a category's results: a folder that has it is finished
SCORES = "scores.csv"
REGIONS = "regions.csv"
SCORED = "scored.jsonl"  # the journal of a finished category, from which a later run takes what is still valid
WATCHED = "watched.jsonl"  # the journal of a category whose images are scored as they arrive
RUN = "run.json"
REPORT = "report.html"
REPORT_FILES = "report_files"  # of a page of many images, beside it
RUN_FILES = (RUN, REPORT, "metrics.json", "metrics.csv")  # at the top of the output folder
EXPORT = "format.json"  # in a folder of files that others read, made of finished results
DEMO = "demo-data"  # images that zsad has drawn, in the folder of their results

POINTS = frozenset({"rgb", "xyz"})  # folders beside each other where MVTec 3D-AD has its coordinates

DEEPEST = 64  # folders within folders

_SUFFIXES = tuple(SUFFIXES)
_SCORES_START = b"path,score,rank,raw_score,map"
_RECORD_START = b'{\n "name": "'
WATCHED_START = b'{"zsad": "watched", "version": 2}\n'
EXPORT_START = "zsad_format"
_RUN_START = (b'"version": ', b'"preset": ')


@dataclass
class Folder:
    """What is in a folder, without what systems leave there and without results of zsad."""

    path: Path
    files: list[str] = field(default_factory=list)  # in sorted order; whatever is no folder, also broken links
    folders: dict[str, "Folder"] = field(default_factory=dict)  # in sorted order; circles where links make them
    links: set[str] = field(default_factory=set)  # which of the folders are links
    error: str | None = None  # why it could not be listed
    real: str = ""  # its path without links
    points: int = 0  # files of MVTec 3D-AD with coordinates for pixels, which lie beside the images and are none
    _count: int | None = None

    def images(self) -> list[str]:
        """Return the names of the files in it that claim to be images."""
        return [name for name in self.files if is_image(name)]

    def walk(self, enter: Callable[[PurePosixPath], bool] = lambda path: True) -> list[tuple[PurePosixPath, "Folder"]]:
        """Return this folder and all below it with their relative paths, sorted, each once.

        Links are followed to folders that are not met without them. `enter` is asked before any folder is entered.
        """
        found: list[tuple[PurePosixPath, Folder]] = []
        met: set[int] = set()
        waiting, links = deque([(PurePosixPath(), self)]), deque[tuple[PurePosixPath, Folder]]()
        while waiting or links:
            path, folder = waiting.pop() if waiting else links.popleft()
            if id(folder) in met:
                continue
            met.add(id(folder))
            found.append((path, folder))
            for name, child in folder.folders.items():
                if enter(path / name):
                    (links if name in folder.links else waiting).append((path / name, child))
        return sorted(found, key=lambda item: item[0].parts)

    def count(self) -> int:
        """Return how many files in it and below claim to be images."""
        if self._count is None:
            self._count = sum(len(folder.images()) for _, folder in self.walk())
        return self._count


def is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def read_tree(root: Path, hidden: str | None) -> Folder:
    """List a folder and everything below it; `hidden` is the real path of a folder to leave out.

    Links to folders that they lie in are not followed.
    """
    top = Folder(root, real=os.path.realpath(root))
    known, waiting = {top.real: top}, [(top, 0)]
    while waiting:
        folder, depth = waiting.pop()
        if depth > DEEPEST:
            folder.error = f"lies more than {DEEPEST} folders deep and is not read"
            continue
        try:
            files, entries = _listed(folder.path)
        except OSError as error:
            folder.error = f"cannot be listed ({error.strerror})"
            continue
        folder.files = files
        for entry in entries:
            link = entry.is_symlink()
            real = os.path.realpath(entry.path) if link else os.path.join(folder.real, entry.name)  # noqa: PTH118
            if real == hidden or (link and f"{folder.real}/".startswith(f"{real.rstrip('/')}/")):
                continue
            if real not in known:
                known[real] = Folder(folder.path / entry.name, real=real)
                waiting.append((known[real], depth + 1))
            folder.folders[entry.name] = known[real]
            if link:
                folder.links.add(entry.name)
    for folder in known.values():
        if any(name in folder.files and tells(folder.path) for name, tells in _RESULTS.items()):
            folder.files.clear()
            folder.folders.clear()
        elif RUN in folder.files and all(part in _start(folder.path / RUN) for part in _RUN_START):
            folder.folders.pop(DEMO, None)
            folder.files = [name for name in folder.files if name not in RUN_FILES]
        elif POINTS.issubset(folder.folders):
            folder.points = folder.folders.pop("xyz").count()
    return top


def is_results(folder: Path) -> bool:
    """Tell whether a folder holds a category's finished results, of which one of two files may be damaged.

    Files of others may have the same names.
    """
    finished = os.path.isfile(folder / RECORD)  # noqa: PTH113 - pathlib raises where a folder may not be entered
    return finished and (
        _start(folder / SCORES).startswith(_SCORES_START) or _start(folder / RECORD).startswith(_RECORD_START)
    )


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds results in a format that others read."""
    return _start(folder / EXPORT).startswith(f'{{"{EXPORT_START}": '.encode())


def is_stream(folder: Path) -> bool:
    """Tell whether a folder holds results of images that were scored as they arrived."""
    return _start(folder / WATCHED).startswith(WATCHED_START)


_RESULTS = {RECORD: is_results, WATCHED: is_stream, EXPORT: is_export}


def _listed(folder: Path) -> tuple[list[str], list["os.DirEntry[str]"]]:
    """Return the names of the files in a folder, of which there may be a million, and its folders, both sorted."""
    files, folders = [], []
    with os.scandir(folder) as listing:
        for entry in listing:
            if is_hidden(entry.name):
                continue
            if _leads_to_folder(entry):
                folders.append(entry)
            else:
                files.append(entry.name)
    files.sort()
    return files, sorted(folders, key=lambda entry: entry.name)


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into a folder that may not be entered
        return False


def _start(path: Path) -> bytes:
    try:
        if not os.path.isfile(path):  # noqa: PTH113 - a pipe would be waited for
            return b""
        with path.open("rb") as file:
            return file.read(512)
    except OSError:
        return b""

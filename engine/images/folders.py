"""Images in: find them, decode them safely, make the network's input of them."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from .decode import SUFFIXES, ImageError

RECORD = "category.json"  # written last into a category's results: a folder that has it is finished

# Names that the results use at the top of the output folder.
RESERVED_NAMES = frozenset({"report.html", "run.json", "metrics.json", "metrics.csv", "demo-data"})

# Longer names leave no room for what the results append to them; file systems take 255 bytes.
LONGEST_NAME = 200
# Folders so named could stand where a result file must go; names that look marked are marked too, to stay distinct.
_AMBIGUOUS_FOLDER = re.compile(r"\.(tiff|jpg|csv|json)$", re.IGNORECASE)
_MARKED = re.compile(r"~[0-9a-f]{8}$")


class NothingToScoreError(ImageError):
    """A data folder without images, or that is none; the message says what was looked for."""


@dataclass(frozen=True)
class InputImage:
    """One file of a category and the name that its results are kept under."""

    path: Path
    relative: PurePosixPath  # to the category's folder, for example test/scratch/003.png
    key: PurePosixPath  # `relative` without its suffix, changed where results would clash or names be too long
    anomalous: bool | None = None  # what the folders say; None where they say nothing
    defect: str | None = None  # the folder's name, of an anomalous image
    mask: Path | None = None  # which pixels are anomalous, of an anomalous image where there is such a file


@dataclass(frozen=True)
class Category:
    """Images of one product, scored against each other."""

    name: str
    root: Path
    images: tuple[InputImage, ...]
    ignored: Mapping[str, int]  # files that do not claim to be images, by suffix
    unreadable: tuple[tuple[PurePosixPath, str], ...]  # folders that could not be listed, and why
    notes: tuple[str, ...] = ()  # one line each: how the folders were read where that is not plain


def scan(data: Path, exclude: Path | None = None) -> list[Category]:
    """Find the categories under a folder and their images, in sorted order.

    A folder with `test/` is one category in MVTec layout (only `test/` is read); a folder with images in it, or with a
    `good` folder, is one category; otherwise every subfolder is one. `exclude` is a folder to leave out, the results of
    this run; those of earlier runs are known by their record and left out too. Raises NothingToScoreError.
    """
    hidden = os.path.realpath(exclude) if exclude is not None else None
    if not os.path.lexists(data):
        raise NothingToScoreError(f"{data}: there is no such folder")
    if not _is(stat.S_ISDIR, data):
        raise NothingToScoreError(f"{data}: must be a folder of images, not a file")
    if os.path.realpath(data) == hidden:
        raise NothingToScoreError(f"{data}: is where the results are to go; choose another --output")
    try:
        entries = sorted(entry for entry in data.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise NothingToScoreError(f"{data}: cannot be listed ({error.strerror})") from error
    folders = [entry for entry in entries if _is(stat.S_ISDIR, entry) and os.path.realpath(entry) != hidden]
    is_category = (
        any(folder.name in ("test", "good") for folder in folders)
        or any(_is_image(entry) and _is(stat.S_ISREG, entry) for entry in entries)
        or not folders
    )
    categories: list[Category] = []
    for folder in [data] if is_category else folders:
        name = _shortened((data.resolve() if is_category else folder).name or "images")
        while name in RESERVED_NAMES or name in [other.name for other in categories]:
            name += "_"
        category = _read_category(name, folder, hidden)
        if category.images or category.unreadable:
            categories.append(category)
    if not any(category.images for category in categories):
        reasons = [f"; {category.root / path} {why}" for category in categories for path, why in category.unreadable]
        looked_for = ", ".join(sorted(SUFFIXES))
        raise NothingToScoreError(f"{data}: there are no images in it (looked for {looked_for}){''.join(reasons[:1])}")
    return categories


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except OSError:  # a link to nothing or in a circle, or in a folder that may not be entered
        return False


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read_category(name: str, root: Path, hidden: str | None) -> Category:
    start = root / "test" if _is(stat.S_ISDIR, root / "test") else root
    files: list[Path] = []
    unreadable: list[tuple[PurePosixPath, str]] = []
    visited: set[str] = set()

    def note(error: OSError) -> None:
        relative = PurePosixPath(os.path.relpath(error.filename, root))
        unreadable.append((relative, f"cannot be listed ({error.strerror})"))

    for folder, subfolders, names in os.walk(start, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in visited or real == hidden or RECORD in names:  # a link back to a folder already read, or results
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "ground_truth")
        files.extend(Path(folder) / name for name in sorted(names) if not name.startswith("."))
    paths = [path for path in files if _is_image(path)]
    relatives = [PurePosixPath(path.relative_to(root).as_posix()) for path in paths]
    return Category(
        name,
        root,
        tuple(
            InputImage(path, relative, key, *_ground_truth(root, relative))
            for path, relative, key in zip(paths, relatives, _result_keys(relatives), strict=True)
        ),
        Counter(path.suffix.lower() for path in files if not _is_image(path)),
        tuple(unreadable),
    )


def _ground_truth(root: Path, relative: PurePosixPath) -> tuple[bool | None, str | None, Path | None]:
    """Return label, defect and mask of an image, from its path relative to the category's folder."""
    if len(relative.parts) < 3 or relative.parts[0] != "test":
        return None, None, None
    if relative.parts[1] == "good":
        return False, None, None
    mask = root.joinpath("ground_truth", *relative.parts[1:-1], f"{relative.stem}_mask.png")
    return True, relative.parts[1], mask if _is(stat.S_ISREG, mask) else None


def _result_keys(relatives: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Choose the names that results are kept under, so that no two images and no file and folder share one."""
    stems = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    whole = {str(relative).casefold() for relative in relatives}
    keys = []
    for relative in relatives:
        stem = str(relative.with_suffix("")).casefold()
        key = relative.with_suffix("") if stems[stem] == 1 and stem not in whole else relative
        folders = [_marked(name) if _AMBIGUOUS_FOLDER.search(name) else _shortened(name) for name in key.parent.parts]
        keys.append(PurePosixPath(*folders, _shortened(key.name)))
    return keys


def _shortened(name: str) -> str:
    return _marked(name) if len(os.fsencode(name)) > LONGEST_NAME or _MARKED.search(name) else name


def _marked(name: str) -> str:
    encoded = os.fsencode(name)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"

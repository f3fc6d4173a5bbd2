"""From a list of files to categories: a row for each image, in CSV, JSON lines or Parquet, here or at a URL.

rows, one after another → a line of a temporary file for each image → categories, whose images are read from that file
when they are asked for: a list may have millions, of which a few numbers each are held
"""

import csv
import io
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, overload

import numpy as np

from zsad.export.libraries import install_command

from .categories import Category, ImageFolder, InputImage, counted
from .ground_truth import NO_MASKS, ImageMasks
from .layouts import is_normal
from .limits import ImageError
from .names import marked, result_folder, shortened
from .remote import Location, Remote, check_opens, is_url, location, open_remote, said

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
PATHS = ("path", "url", "image")  # what the column of files may be called; the first of these counts
OTHERS = ("category", "label", "mask")
ROWS = 4096  # of a Parquet file at once
LINE = 512  # bytes that most lines of the temporary file fit in
NORMAL, ANOMALOUS = ("0", "false"), ("1", "true", "defect", "bad", "anomaly", "anomalous")  # labels, beside names

_SUFFIX = re.compile(r"(?<=[^./])\.\w+$")  # after a name


class ManifestError(ImageError):
    """A list that cannot be read at all; the message says why."""


def is_manifest(data: Location) -> bool:
    """Tell whether what is to be scored is a list of files."""
    return data.suffix.lower() in SUFFIXES and (isinstance(data, Remote) or os.path.isfile(data))  # noqa: PTH113


def read_manifest(data: Location, reserved: Sequence[str]) -> list[Category]:
    """Read a list of images; categories are in the order of their first rows, images in that of theirs.

    reserved: names that no category may have. Rows that name no file are among what is unreadable of a category.
    Raises ManifestError for a list without rows or without a column of files.
    """
    shelves: dict[str, _Shelf] = {}
    raw, schemes = _Lines(), set[str]()
    stem, base = _SUFFIX.sub("", data.name) or "images", _base(data)
    for number, row in _rows(data):
        wish, failure = stem, ""
        try:
            wish = _category_name(row.get("category")) or stem
            line = _image_of(row, base)
        except ValueError as error:
            failure = str(error)
        shelf = shelves.setdefault(wish, _Shelf())
        if failure:
            shelf.unreadable.append((PurePosixPath(f"{data.name}, row {number}"), failure))
        else:
            _check_plug_in(line[0], schemes)
            shelf.add(raw, line)
    if not any(shelf.starts for shelf in shelves.values()):
        reasons = [f"; {path}: {why}" for shelf in shelves.values() for path, why in shelf.unreadable[:3]]
        raise ManifestError(f"{data}: has no row that names an image{''.join(reasons[:3])}")
    final, names, categories = _Lines(), set(reserved), []
    for wish, shelf in shelves.items():
        name = shortened(wish)
        while name in names:
            name += "_"
        names.add(name)
        images, notes = _Resolved(raw, shelf).written(final)
        root = Path(str(data))
        found = Category(name, root, images, {}, tuple(shelf.unreadable), tuple(notes), called=wish)
        categories.append(found)
    return categories


@dataclass
class _Shelf:
    """What is held of a category's rows: of each image where its line begins, and digests of its names."""

    starts: "array[int]" = field(default_factory=lambda: array("Q"))
    places: "array[int]" = field(default_factory=lambda: array("q"))  # hashes of where the files are
    names: "array[int]" = field(default_factory=lambda: array("q"))  # of what they are called in the results
    stems: "array[int]" = field(default_factory=lambda: array("q"))  # the same without suffixes
    unreadable: list[tuple[PurePosixPath, str]] = field(default_factory=list)

    def add(self, raw: "_Lines", line: list[Any]) -> None:
        place, relative = line[0], line[1]
        self.starts.append(raw.append(line))
        self.places.append(hash(place))
        self.names.append(hash(relative.casefold()))
        self.stems.append(hash(_SUFFIX.sub("", relative).casefold()))


class _Lines:
    """Lines of JSON in a temporary file, which goes with the last who reads it."""

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="zsad-")  # noqa: SIM115
        self._end = self._written = 0

    def append(self, line: Sequence[Any]) -> int:
        """Write a line; returns where it begins."""
        start, content = self._end, json.dumps(line).encode() + b"\n"
        self._file.write(content)
        self._end += len(content)
        return start

    def line(self, start: int) -> Any:
        """Return what is in the line that begins there; may be called from any thread."""
        if self._written < self._end:
            self._file.flush()
            self._written = self._end
        content, size = b"", LINE
        while b"\n" not in content:
            content = os.pread(self._file.fileno(), size, start)
            size *= 4
        return json.loads(content.split(b"\n", 1)[0])


class _Resolved:
    """A category's images with names of results that no two share; of a file that is named twice the first counts."""

    def __init__(self, raw: _Lines, shelf: _Shelf) -> None:
        self._raw, self._shelf = raw, shelf
        self._twice = _repeated(shelf.places)
        self._same_names = _repeated(shelf.names)
        both = np.concatenate([np.asarray(shelf.stems), np.unique(np.asarray(shelf.names))])
        self._same_stems = _repeated(both)

    def written(self, final: _Lines) -> tuple["ListedImages", list[str]]:
        starts, met, dropped = array("Q"), set[str](), 0
        bounds = zip(self._shelf.starts, self._shelf.places, self._shelf.names, self._shelf.stems, strict=True)
        for start, place, name, stem in bounds:
            line = self._raw.line(start)
            if place in self._twice:
                if line[0] in met:
                    dropped += 1
                    continue
                met.add(line[0])
            relative = PurePosixPath(line[1])
            if name in self._same_names:
                suffix = _SUFFIX.search(relative.name)
                kind = suffix[0] if suffix else ""
                relative = relative.with_name(marked(relative.name.removesuffix(kind), of=line[0]) + kind)
            own = relative.name if stem in self._same_stems else _SUFFIX.sub("", relative.name)
            line[1:2] = [str(relative), shortened(own)]
            starts.append(final.append(line))
        notes = [f"{counted(dropped, 'row')} of files that are listed already: not scored again"] * bool(dropped)
        return ListedImages(final, starts), notes


def _repeated(hashes: Any) -> frozenset[int]:
    found, counts = np.unique(np.asarray(hashes, np.int64), return_counts=True)
    return frozenset(found[counts > 1].tolist())


class ListedImages(Sequence[InputImage]):
    """The images of a list, each read when it is asked for; another process is handed them all."""

    def __init__(self, lines: _Lines, starts: Sequence[int]) -> None:
        """starts: where each image's line begins."""
        self._lines, self._starts = lines, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> InputImage: ...

    @overload
    def __getitem__(self, index: slice) -> "ListedImages": ...

    def __getitem__(self, index: int | slice) -> "InputImage | ListedImages":
        if isinstance(index, slice):
            raise TypeError("images of a list are asked for one by one")
        number = range(len(self))[index]
        place, relative, own_key, anomalous, defect, masks = self._lines.line(self._starts[number])
        path = PurePosixPath(relative)
        folder = ImageFolder(Path(str(path.parent)), path.parent, result_folder(path.parent))
        files = tuple(Remote(mask) if is_url(mask) else PurePosixPath(mask) for mask in masks)
        of_image = ImageMasks(files) if files else NO_MASKS
        return InputImage(folder, path.name, own_key, anomalous, defect, of_image, location(place))

    def __iter__(self) -> Iterator[InputImage]:
        return (self[number] for number in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


def _check_plug_in(place: str, known: set[str]) -> None:
    """Raise ManifestError where what opens such files is not installed, with the first of its kind; known: kinds."""
    kind = "::".join(piece.partition("://")[0] for piece in place.split("::")) if is_url(place) else ""
    if kind in known:
        return
    known.add(kind)
    if kind:
        check_opens(Remote(place))


def _base(data: Location) -> str:
    """Return where files lie that rows name without saying where."""
    if isinstance(data, Remote):
        return data.url.split("?")[0].rpartition("/")[0]
    return os.path.abspath(data.parent)  # noqa: PTH100 - links stay as they are


def _image_of(row: Mapping[str, Any], base: str) -> list[Any]:
    """Return what is kept of a row: place, name in the results, label, masks; raises ValueError."""
    given = next((row[name] for name in PATHS if row.get(name) is not None), None)
    if not isinstance(given, str) or not given.strip():
        raise ValueError("names no file")
    place = _placed(given.strip(), base)
    masks = row.get("mask")
    masks = [masks] if isinstance(masks, str) else list(masks if masks is not None else ())
    if not all(isinstance(mask, str) for mask in masks):
        raise ValueError(f"its mask must be a path or a list of paths, not {masks!r}")
    found = [_placed(mask.strip(), base) for mask in masks if mask.strip()]
    return [place, _relative(place, base), *_label(row.get("label")), found]


def _placed(text: str, base: str) -> str:
    """Return where a file is that a row names; what is relative is so to the list."""
    if is_url(text):
        return text
    text = text.removeprefix("file://")
    if is_url(base):
        return text if text.startswith("/") else f"{base}/{text}"
    return os.path.abspath(os.path.join(base, text))  # noqa: PTH100, PTH118 - links stay as they are


def _relative(place: str, base: str) -> str:
    """Return what an image is called in the results: its path below the list, or else all of it."""
    text = str(location(place))
    if text.startswith(f"{base}/"):
        text = text.removeprefix(f"{base}/")
    pieces = [piece for piece in text.split("::") if "/" in piece or "." in piece]  # of archives the outer one first
    parts = [part for piece in reversed(pieces) for part in piece.replace("://", "/").split("/")]
    safe = [shortened(part) for part in parts if part not in ("", ".", "..")]
    if not safe:
        raise ValueError(f"{text!r} names no file")
    if place != text and "?" in place and not _SUFFIX.search(safe[-1]):  # what a query alone tells apart
        safe[-1] = marked(safe[-1], of=place)
    return "/".join(safe)


def _label(value: Any) -> tuple[bool | None, str | None]:
    """Return whether an image is anomalous, and its defect; None where the list says nothing."""
    text = "" if value is None else str(value).strip()
    if not text or text.lower() == "nan":
        return None, None
    if is_normal(text) or text.lower() in NORMAL:
        return False, None
    return True, "defect" if text.lower() in ANOMALOUS else text


def _category_name(value: Any) -> str:
    """Return what the folder of a category is called; raises ValueError where no folder can be called so."""
    text = "" if value is None else str(value).strip()
    name = "_".join(part for part in text.split("/") if part)
    if name.startswith(".") or "\0" in name:
        raise ValueError(f"no folder of results can be called as its category {text!r}")
    return name


def _rows(data: Location) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows with their numbers, from 1; raises ManifestError."""
    try:
        with _opened(data) as file:
            kind = data.suffix.lower()
            rows = _parquet_rows(file) if kind == ".parquet" else (_csv_rows if kind == ".csv" else _json_rows)(file)
            yield from enumerate(rows, 1)
    except ManifestError as error:
        raise ManifestError(f"{data}: {error}") from None
    except ImageError:  # which names it
        raise
    except UnicodeDecodeError:
        raise ManifestError(f"{data}: is no UTF-8 text; save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise ManifestError(f"{data}: cannot be read ({getattr(error, 'strerror', None) or said(error)})") from None
    except Exception as error:  # file systems have errors of their own
        if isinstance(data, Path) or isinstance(error, MemoryError):
            raise
        raise ManifestError(f"{data}: cannot be fetched: {said(error)}") from None


@contextmanager
def _opened(data: Location) -> Iterator[BinaryIO]:
    """Open a list; of one at a URL parts are fetched as they are read."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            yield file
        return
    check_opens(data)
    try:
        opened = open_remote(data)
    except OSError as error:
        raise ManifestError(error.strerror) from None
    with opened as file:
        yield file


def _csv_rows(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    text = io.TextIOWrapper(file, "utf-8-sig", errors="strict", newline="")
    head = next(csv.reader([text.readline()]), [])
    joined = ",".join(head)
    delimiter = max(",;\t", key=joined.count)
    names = [name.strip().lower() for name in next(csv.reader([joined], delimiter=delimiter), [])]
    _check_columns(names)
    for cells in csv.reader(text, delimiter=delimiter):
        if cells:
            yield dict(zip(names, cells, strict=False))


def _json_rows(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    for line in io.TextIOWrapper(file, "utf-8-sig"):
        if not line.strip():
            continue
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        yield {str(name).lower(): value for name, value in row.items()} if isinstance(row, dict) else {}


def _parquet_rows(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ManifestError(f"needs pyarrow; run: {install_command(chr(39) + 'zsad[parquet]' + chr(39))}") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = {name: name.lower() for name in table.schema_arrow.names if name.lower() in (*PATHS, *OTHERS)}
        _check_columns(list(names.values()))
        for batch in table.iter_batches(ROWS, columns=list(names)):
            yield from ({names[name]: value for name, value in row.items()} for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ManifestError(f"is no Parquet file that can be read ({error})") from None


def _check_columns(names: Sequence[str]) -> None:
    if not any(name in PATHS for name in names):
        has = ", ".join(name for name in names if name) or "none"
        raise ManifestError(f"has no column {', '.join(PATHS[:-1])} or {PATHS[-1]} in its first line (it has {has})")

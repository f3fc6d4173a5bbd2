"""What others read, made of finished categories: a folder for each format, which comes into place as a whole.

Each format is a module beside this one. Its `write` makes the files from the records and maps that lie in the
categories' folders, so that a run that goes on after another makes them anew without scoring anything; its `check`
looks at them as their reader would.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from zsad.engine.images.folders import Dataset
from zsad.engine.images.layouts import fold, is_test
from zsad.engine.images.stored import read_map
from zsad.engine.images.tree import EXPORT, EXPORT_START, RUN

from .formats import Export
from .output import OutputError, flush_all, move_into_place, own_folder
from .records import CategoryRecord, ImageRecord

NAMED = 3  # of the files with the same fault

Report = Callable[[int], None]  # is told how many files are done
Progress = Callable[[str, int, int], None]  # stage, done, all


class Faults:
    """What is wrong with files, by kind: counted, and the first ones named."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}
        self._last: dict[str, object] = {}

    def add(self, kind: str, name: object, once: bool = False) -> None:
        """Count a file; once: not if it was the last one of this kind, where several images say it."""
        if once and self._last.get(kind) == name:
            return
        self._last[kind] = name
        self.counts[kind] = self.counts.get(kind, 0) + 1
        named = self.first.setdefault(kind, [])
        if len(named) < NAMED:
            named.append(str(name))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """Say each kind with its count and the first of its files."""
        said = []
        for kind, count in self.counts.items():
            more = f" and {count - NAMED} more" if count > NAMED else ""
            said.append(f"{kind}: {', '.join(self.first[kind])}{more}")
        return said


@dataclass(frozen=True)
class Finished:
    """A category whose results are in place."""

    record: CategoryRecord
    root: Path  # of its images
    folder: Path  # of its results
    groups: Callable[[], Iterable[int]] = lambda: repeat(0)  # the number of each image's group

    def map(self, image: ImageRecord) -> NDArray[np.float32]:
        """Read an image's map [H, W] in [0, 1]; raises ImageError."""
        return np.asarray(read_map(self.folder / image.map), np.float32)


@dataclass(frozen=True)
class Source:
    """What formats are made of."""

    data: Path  # the folder that the images were found in
    categories: Sequence[Finished]
    progress: Progress = lambda stage, done, total: None

    def images(self, lacking: Faults, stage: str = "export") -> Iterator[tuple[Finished, ImageRecord]]:
        """Yield the images that have a map, in order; those that failed are lacking."""
        done, total = 0, sum(len(category.record.images) for category in self.categories)
        for category in self.categories:
            for failure in category.record.failures:
                lacking.add("no file, since the image failed", f"{category.record.name}/{failure.path}")
            for image in category.record.images:
                if image.map:
                    yield category, image
                done += 1
                self.progress(stage, done, total)


class Place(NamedTuple):
    """Where an image lies in a data set: its product, its split, and the rest of its path."""

    product: str
    split: str
    inner: PurePosixPath


def place_of(root: Path, path: str) -> Place | None:
    """Return the place of an image with this path below its category's root; None where it is in no test split."""
    parts = (*Path(os.path.abspath(root)).parts, *PurePosixPath(path).parts)  # noqa: PTH100 - links stay as they are
    for number in range(len(parts) - 2, 1, -1):
        if is_test(parts[number]):
            return Place(parts[number - 1], parts[number], PurePosixPath(*parts[number + 1 :]))
    return None


def in_test(place: Place | None) -> bool:
    return place is not None and fold(place.split) == "test"


class Writer(Protocol):
    """Writes a format into a folder, which is there; returns what it cannot hold. Raises OSError, ImageError."""

    def __call__(self, folder: Path, source: Source) -> Faults: ...


def export(name: Export, output: Path, source: Source) -> list[str]:
    """Make a format's folder in the output folder, in place of an earlier one; returns what it cannot hold.

    Raises OSError, ImageError where a map is gone or damaged.
    """
    final = output / name
    staging = own_folder(final, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        lacking = writer(name)(staging, source)
        facts: dict[str, Any] = {EXPORT_START: name, "version": importlib.metadata.version("zsad")}
        (staging / EXPORT).write_text(json.dumps({**facts, "lacking": lacking.counts}) + "\n")
        flush_all(staging)
        move_into_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [f"{name}: {line}" for line in lacking.lines()]


def writer(name: Export) -> Writer:
    """Return what writes a format; raises ConfigError where a library for it is missing."""
    from . import coco, map_trees, mvtec_ad2, parquet

    if name in parquet.BITS:
        parquet.library()
        return partial(parquet.write, name=name)
    if name == "coco":
        coco.library()
        return coco.write
    return mvtec_ad2.write if name == "mvtec-ad2" else map_trees.TREES[name].write


class Checked(NamedTuple):
    """What was found in files of a format."""

    place: Path  # where they are
    files: int
    faults: Faults


def check(name: str, out: Path, dataset: Dataset | None, report: Report) -> Checked:
    """Look at a format's files as their reader would; with the images also at what is missing, and at sizes.

    out: what `zsad-infer` wrote, or what is to be handed in itself. Raises OutputError where there is nothing of this
    format, OSError, ConfigError where a library is missing.
    """
    from . import coco, map_trees, mvtec_ad2, parquet, rayan

    categories = None if dataset is None else dataset.categories
    nothing = OutputError(
        f"{out} holds nothing of the format {name}; run `zsad-infer DATA --output {out} --format {name}` first"
    )
    place, faults = _place(name, out), Faults()
    if place == out and name != "rayan" and (out / RUN).is_file():
        raise nothing
    if name == "rayan":
        files = rayan.check(place, categories, faults, report)
    elif name == "mvtec-ad2":
        files = mvtec_ad2.check(place, categories, faults, report)
    elif name in parquet.BITS:
        files = parquet.check(place, name, dataset, faults, report)
    elif name == "coco":
        files = coco.check(place, dataset, faults, report)
    else:
        files = map_trees.TREES[name].check(place, categories, faults, report)
    if not files and not faults:
        raise nothing
    return Checked(place, files, faults)


def _place(name: str, out: Path) -> Path:
    """Return the folder of a format, or the archive; raises OutputError where there is none."""
    if not out.exists():
        raise OutputError(f"{out}: there is no such folder")
    within = out / name
    if name == "mvtec-ad2":
        from .mvtec_ad2 import ARCHIVE, FOLDER

        places = [place for place in (within / ARCHIVE, within / FOLDER, out / ARCHIVE, out / FOLDER) if place.exists()]
        return next(iter(places), out)
    return within if name != "rayan" and within.is_dir() else out


def linked(source: Path, target: Path) -> None:
    """Give a finished file a second name, or a copy on file systems without links; raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)

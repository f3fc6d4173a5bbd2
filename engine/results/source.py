"""What formats that others read are made of, and what is found wrong with their files."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from zsad.engine.images.ahead import Ahead
from zsad.engine.images.layouts import fold, is_test
from zsad.engine.images.stored import read_map
from zsad.kernels.machine import available_cores, default_memory_limit

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


BYTES = 24  # for each pixel of a map, while a format is made of it
Made = TypeVar("Made")


def in_threads(jobs: Iterable[tuple[ImageRecord, Callable[[], Made]]]) -> Iterator[Made]:
    """Yield what jobs, each of an image, return, in their order; they run on all cores, within half of free memory."""

    def work(job: Callable[[], Made], last_try: bool) -> Made:
        return job()

    workers = available_cores()
    with Ahead(work, workers, 2 * workers, default_memory_limit() // 2, "export") as ahead:
        for image, job in jobs:
            yield from (made for _, made in ahead.put(job, BYTES * (image.width or 0) * (image.height or 0)))
        yield from (made for _, made in ahead.rest())


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


def linked(source: Path, target: Path) -> None:
    """Give a finished file a second name, or a copy on file systems without links; raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)

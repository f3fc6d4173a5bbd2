"""What is on record of a run: of each image, of each category, and of the whole; kept as JSON beside the results."""

import json
import textwrap
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from zsad.engine.scores.verdicts import VERDICTS, Bounds, Region, Verdict
from zsad.kernels.files import parse_json

if TYPE_CHECKING:
    from zsad.engine.evaluation.evaluate import Evaluation

RARE = ("p_value", "stage_files", "note")  # fields of an image that its record has only where there is something to say


@dataclass(frozen=True)
class ImageRecord:
    """Scores of one image, and its files relative to the category's folder (empty where there is none)."""

    path: str  # within the category
    score: float  # in [0, 1]
    raw_score: float  # in the method's own units
    rank: int = 0  # 1 is the most anomalous; 0 where others may follow
    verdict: Verdict | None = None  # None where the category has no bounds
    width: int | None = None  # pixels; None where the file could not be read again
    height: int | None = None
    map: str = ""
    overlay_file: str = ""
    json_file: str = ""
    stage_files: list[str] | None = None  # pictures of what led to the score, where they were asked for
    sizes: list[int] = field(default_factory=list)  # bytes of these files, of those there are
    regions: list[Region] | None = None  # none of accepted images; None without a verdict or a map
    p_value: float | None = None  # share of normal images that score as high; None where the method knows of none
    note: str | None = None  # what the user should know of the file

    def facts(self) -> dict[str, Any]:
        """Return the fields for JSON, without a p-value, pictures of stages and a note where there are none."""
        return {name: value for name, value in asdict(self).items() if name not in RARE or value is not None}

    @classmethod
    def from_facts(cls, facts: Any) -> "ImageRecord":
        """Make a record of what `facts` has returned; raises ValueError for anything else."""
        return _checked(ImageRecord, facts)

    def files(self) -> list[str]:
        return [file for file in (self.map, self.overlay_file, *(self.stage_files or ()), self.json_file) if file]

    def sizes_in(self, folder: Path) -> list[int]:
        """Return the sizes that its files have in a category's folder; raises OSError where one is gone."""
        return [(folder / file).stat().st_size for file in self.files()]


@dataclass(frozen=True)
class Failure:
    """A file or folder without results, within its category, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class CategoryRecord:
    """One category, scored and written, or why it is not (no images, then)."""

    name: str
    fingerprint: str = ""  # of everything that decides the results
    images: Sequence[ImageRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    groups: int = 0  # of images that are compared with each other; none where each arrives by itself
    group_size: int | None = None
    image_sizes: dict[str, int] = field(default_factory=dict)  # pixels, the side of each network's input
    scale: tuple[float, float] | None = None  # map values that became 0 and 1
    relative: bool = True  # whether scores depend on the other images of the category
    bounds: Bounds | None = None  # None: too few images to judge them
    ignored: dict[str, int] = field(default_factory=dict)  # files that are no images, by suffix
    references: dict[str, str] = field(default_factory=dict)  # known-good images: sha256 of their files, or nothing
    notes: list[str] = field(default_factory=list)  # what was found or decided while reading the images
    seconds: float = 0.0
    resumed: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the files that tell of all images

    @property
    def region_bound(self) -> float | None:
        """Return which map values are a defect; None where the category has no verdicts."""
        return None if self.bounds is None else self.bounds.region

    def verdicts(self) -> dict[str, int]:
        """Return how many images have each verdict, nothing where there are none."""
        counts = Counter(image.verdict for image in self.images) if self.bounds is not None else {}
        return {verdict: counts[verdict] for verdict in VERDICTS if counts}

    @classmethod
    def from_json(cls, text: str | bytes) -> "CategoryRecord":
        """Read a record; raises ValueError for anything else."""
        return _read(CategoryRecord, text)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


_Record = TypeVar("_Record", CategoryRecord, ImageRecord)


# Of what `json` reads: pydantic's own reader refuses names that are no valid Unicode. Made where one is read first.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def _read(kind: type[_Record], text: str | bytes) -> _Record:
    """Read a record that is all there: what lacks of a damaged one is not made up. Raises ValueError."""
    return _checked(kind, parse_json(text))


def _checked(kind: type[_Record], content: Any) -> _Record:
    names = {field.name for field in fields(kind)}
    may_lack = {"images", *RARE}  # the former are read apart
    if not isinstance(content, dict) or content.keys() | may_lack != names | may_lack:
        raise ValueError(f"not a {kind.__name__}")
    record: _Record = _adapter(kind).validate_python(content)
    return record


class ImageRecords(Sequence[ImageRecord]):
    """The images on record of a category, of which there may be a million: they stay in its file until asked for.

    Raises OSError and ValueError where the file is no longer as it was.
    """

    def __init__(self, file: Path, bounds: Sequence[int], seconds: NDArray[np.float32] | None = None) -> None:
        """bounds: where each image begins in the file, and where the last one ends.

        seconds: [N] that this run has taken for each, NaN where an earlier one has; no file holds them, since results
        of two runs are the same but for these. None where only a whole category's time is known.
        """
        self._file, self._bounds, self.seconds = file, bounds, seconds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        wanted = range(len(self))[index]
        return list(self.ordered(wanted)) if isinstance(wanted, range) else next(self.ordered([wanted]))

    def __iter__(self) -> Iterator[ImageRecord]:
        return self.ordered(range(len(self)))

    def ordered(self, numbers: Iterable[int]) -> Iterator[ImageRecord]:
        """Yield the images with these numbers."""
        with self._file.open("rb") as file:
            for number in numbers:
                file.seek(self._bounds[number])
                text = file.read(self._bounds[number + 1] - self._bounds[number])
                yield _read(ImageRecord, text.strip(b" \n,"))

    def moved(self, file: Path, seconds: NDArray[np.float32] | None = None) -> "ImageRecords":
        """Return the same images after their file was moved; seconds: as there."""
        return ImageRecords(file, self._bounds, seconds)


# Lines of a category's file; only what belongs to the category itself begins with a single space.
_NO_IMAGES, _FIRST, _IMAGE, _LAST = '\n "images": [],\n', b' "images": [\n', b"  {\n", b" ],\n"


def write_record(
    file: Path,
    record: CategoryRecord,
    images: Iterable[ImageRecord],
    write_others: Callable[[ImageRecords], dict[str, int]] = lambda _: {},
) -> ImageRecords:
    """Write a category's record, as `to_json` would of one with these images, each as it comes.

    write_others: writes what else tells of the images, once they can be read; returns the `sizes` of the record.
    """
    before, _ = replace(record, images=[]).to_json().split(_NO_IMAGES)
    bounds = array("Q")
    with file.open("wb") as opened:
        opened.write(before.encode())
        for image in images:
            opened.write(b",\n" if bounds else b"\n" + _FIRST)
            bounds.append(opened.tell())
            opened.write(textwrap.indent(json.dumps(image.facts(), indent=1), "  ").encode())
        bounds.append(opened.tell())
        opened.flush()
        sizes = write_others(ImageRecords(file, bounds))
        _, after = replace(record, images=[], sizes=sizes).to_json().split(_NO_IMAGES)
        opened.write((b"\n" + _LAST if len(bounds) > 1 else _NO_IMAGES.encode()) + after.encode())
    return ImageRecords(file, bounds)


def read_record(file: Path) -> CategoryRecord:
    """Read what `write_record` has written, but for the images; raises OSError, and ValueError for anything else."""
    bounds, others = array("Q"), list[bytes]()
    with file.open("rb") as lines:
        within, position = False, 0
        for line in lines:
            if line == _FIRST:
                within = True
            elif not within:
                others.append(line)
            elif line in (_IMAGE, _LAST):
                within = line != _LAST
                bounds.append(position)
            position += len(line)
    record = CategoryRecord.from_json(b"".join(others))
    return replace(record, images=ImageRecords(file, bounds)) if bounds else record


@dataclass(frozen=True)
class CheckpointRecord:
    """Weights that a run has used."""

    name: str
    sha256: str


@dataclass(frozen=True)
class RunRecord:
    """A whole run: what `run.json` holds and the report shows."""

    version: str
    preset: str
    method: str
    device: str  # cpu or cuda:N
    runtime: str
    started: str  # UTC
    seconds: float
    images: int  # with a score
    failed: int
    not_compared: int  # images with masks or maps that are unreadable
    images_per_second: float  # resumed ones not counted
    peak_memory_bytes: int  # of host memory
    device_memory_bytes: int | None
    stages: dict[str, float]  # seconds
    library_share: float  # of the time, in networks and products
    config: dict[str, Any]
    checkpoints: list[CheckpointRecord]
    versions: dict[str, str]
    categories: list[CategoryRecord]
    metrics: "Evaluation | None"
    notes: list[str]

    def to_json(self) -> str:
        """Return the record without the single images, which are in the records of the categories."""
        content: dict[str, Any] = {**asdict(replace(self, categories=[])), "categories": {}}
        for category in self.categories:
            facts = asdict(replace(category, images=[]))
            del facts["name"], facts["fingerprint"], facts["sizes"]
            counts = {"images": len(category.images), "verdicts": category.verdicts()}
            content["categories"][category.name] = {**facts, **counts}
        return json.dumps(content, indent=1)

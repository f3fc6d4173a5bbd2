"""The images of a report as its page asks for them: numbers of all, and names, facts and pictures in parts."""

import base64
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from zsad.engine.scores.verdicts import VERDICTS

from .records import CategoryRecord, ImageRecord

PICTURES = ("image", "overlay", "stages")  # the last one shows foreground and tiles
PART = 100  # images whose facts are in one part
NUMBERS = 20_000  # images whose numbers are in one part, and whose paths are; a multiple of it
FILES = 1000  # images whose pictures are in one folder


@dataclass(frozen=True)
class ShownImage:
    """What the page shows of an image."""

    record: ImageRecord
    label: str | None  # its defect, or good; None without ground truth
    anomalous: bool | None
    pictures: Mapping[str, str]  # data URIs of JPEG files by their name in PICTURES, of those that there are


@dataclass(frozen=True)
class ShownCategory:
    """What the page shows of a category."""

    record: CategoryRecord
    images: Iterable[ShownImage]  # those on record, in the same order; gone through once
    metrics: Mapping[str, float | None] | None  # by name
    protocol: str | None


class Pictures(Protocol):
    """Keeps the pictures of images, which come in order, and tells the page where each is."""

    def add(self, pictures: Mapping[str, str]) -> None: ...

    def of(self, number: int) -> Mapping[str, str]: ...


class EmbeddedPictures:
    """Pictures in the page itself, all of which are held until it is written."""

    def __init__(self) -> None:
        self._kept = list[Mapping[str, str]]()

    def add(self, pictures: Mapping[str, str]) -> None:
        self._kept.append(pictures)

    def of(self, number: int) -> Mapping[str, str]:
        return self._kept[number]


class PictureFiles:
    """Pictures in files, of which a byte is held for each image."""

    def __init__(self, folder: Path, address: str) -> None:
        """folder: there already. address: how the page calls it."""
        self._folder, self._address, self._which = folder, address, bytearray()

    def add(self, pictures: Mapping[str, str]) -> None:
        number, which = len(self._which), 0
        for bit, name in enumerate(PICTURES):
            file = self._folder / _picture_file(number, name)
            with suppress(ValueError):  # of damaged text, which costs the picture alone
                content = base64.b64decode(pictures.get(name, "").partition(",")[2])
                if content:
                    if not file.parent.is_dir():
                        file.parent.mkdir(parents=True)
                    file.write_bytes(content)
                    which |= 1 << bit
        self._which.append(which)

    def of(self, number: int) -> Mapping[str, str]:
        which = self._which[number]
        names = [name for bit, name in enumerate(PICTURES) if which >> bit & 1]
        return {name: f"{self._address}/{_picture_file(number, name)}" for name in names}


class Listing:
    """All images of a report in the order in which the page numbers them: as they came, or the highest score first.

    About thirty bytes are held of each.
    """

    def __init__(self, categories: Sequence[ShownCategory], pictures: Pictures, as_they_came: bool) -> None:
        self._categories, self._pictures = categories, pictures
        self._starts = array("Q", [0])  # of each category among all images, and where the last one ends
        self._scores, self._ranks, self._verdicts, self._labels = array("d"), array("I"), array("B"), array("I")
        labels: dict[tuple[str | None, bool | None], int] = {}
        for category in categories:
            for image in category.images:
                record = image.record
                self._scores.append(record.score)
                self._ranks.append(record.rank)
                self._verdicts.append(0 if record.verdict is None else 1 + VERDICTS.index(record.verdict))
                self._labels.append(labels.setdefault((image.label, image.anomalous), len(labels)))
                pictures.add(image.pictures)
            self._starts.append(len(self._scores))
        self.labels = [{"name": name, "anomalous": anomalous} for name, anomalous in labels]
        self._order: NDArray[np.intp] = np.arange(len(self._scores))
        if not as_they_came:
            self._order = np.lexsort((np.asarray(self._ranks), -np.asarray(self._scores)))

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Yield the parts of the data by name: `numbers-K`, `images-K` and `paths-K`."""
        for part, start in enumerate(range(0, len(self._order), NUMBERS)):
            yield f"numbers-{part}", self._numbers(self._order[start : start + NUMBERS])
        paths = list[str]()
        for part, start in enumerate(range(0, len(self._order), PART)):
            records = [self._record(number) for number in self._order[start : start + PART].tolist()]
            yield f"images-{part}", [self._facts(*record) for record in records]
            paths += [record.path for *_, record in records]
            if len(paths) == NUMBERS or start + PART >= len(self._order):
                yield f"paths-{start // NUMBERS}", paths
                paths = []

    def _numbers(self, chosen: NDArray[np.intp]) -> dict[str, list[float]]:
        """Return what filters and order need: scores, and numbers of verdicts, from 1, of `labels` and categories."""
        return {
            "scores": np.asarray(self._scores)[chosen].tolist(),
            "verdicts": np.asarray(self._verdicts)[chosen].tolist(),
            "labels": np.asarray(self._labels)[chosen].tolist(),
            "categories": (np.searchsorted(np.asarray(self._starts), chosen, "right") - 1).tolist(),
        }

    def _record(self, number: int) -> tuple[int, str, ImageRecord]:
        """Return an image's number, the name of its category, and its record."""
        index = bisect_right(self._starts, number) - 1
        record = self._categories[index].record
        return number, record.name, record.images[number - self._starts[index]]

    def _facts(self, number: int, category: str, record: ImageRecord) -> dict[str, Any]:
        """Return what the page shows of an image besides its numbers."""
        return {
            "path": record.path,
            "raw_score": record.raw_score,
            "rank": record.rank,
            "regions": None if record.regions is None else [asdict(region) for region in record.regions],
            "p_value": record.p_value,
            "note": record.note,
            **self._pictures.of(number),
            # Quoted and anchored, a name can be neither a query nor another scheme; undecodable bytes keep their value.
            "overlay_file": record.overlay_file
            and "./" + quote(f"{category}/{record.overlay_file}", errors="surrogateescape"),
        }


def _picture_file(number: int, name: str) -> str:
    return f"pictures/{number // FILES}/{number % FILES}-{name}.jpg"

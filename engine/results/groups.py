"""What comes of the groups of a category that are compared with each other, on disk until all of it is written.

A run that dies leaves it, and a later one with the same fingerprint goes on after the groups that have ended. It also
keeps a run's memory from growing with the number of images: there may be a million.
"""

import base64
import json
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from zsad.engine.methods.bitmasks import BitMask, Box
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Scored
from zsad.kernels.files import parse_json

from .growing import Growing
from .image_files import Result
from .output import ENDED
from .records import Failure

Kept = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class GroupFacts:
    """What there is to know of a group that has ended, beside the scores and maps of its images."""

    number: int  # among the groups of the category
    seconds: float  # that it took
    failures: dict[int, str]  # why images have no score, by their number
    damaged: dict[int, str]  # what speaks for damage
    copies: list[str]  # a note for each picture that is there several times
    readable_references: int = 0
    failed_references: list[Failure] = field(default_factory=list)
    kept: Kept = field(default_factory=dict)  # by the method


class EndedGroups:
    """The groups that have ended, in a hidden folder beside the category's."""

    def __init__(self, folder: Path, fingerprint: str, resume: bool) -> None:
        """resume: go on from what an earlier run with this fingerprint has left. Raises OSError."""
        self._folder, self.facts = folder, list[GroupFacts]()
        self._indices, self._groups, self._raw = array("q"), array("i"), array("d")
        self._extremes = array("f")  # of each map, lowest and highest
        self._shapes = array("i")  # of each map, rows and columns: of images in tiles they differ
        self._ends, self._stage_ends = array("Q", [0]), array("Q", [0])  # where those of images end, after a 0
        self._vector: int | None = None  # numbers of an image's facts
        head = f"{json.dumps(fingerprint)}\n".encode("ascii")
        lines = list(self._left(head)) if resume else []
        if not lines:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self._maps, self._vectors, self._stages = (Growing(folder / name) for name in ("maps", "vectors", "stages"))
        self._journal = Growing(folder / ENDED, head)
        valid = len(head)
        for line in lines:
            if not self._took(line):
                break
            valid += len(line)
        self._journal.cut(valid)
        self._maps.cut(self._ends[-1])
        self._stages.cut(self._stage_ends[-1])
        self._vectors.cut(8 * len(self._indices) * (self._vector or 0))

    def _left(self, head: bytes) -> Iterator[bytes]:
        with suppress(OSError), (self._folder / ENDED).open("rb") as file:
            if file.readline() == head:
                yield from file

    def _took(self, line: bytes) -> bool:
        """Take up a line of the journal, if all that it tells of is there."""
        try:
            images, vector, facts = parse_json(line)
            facts["kept"] = {name: _array(*kept) for name, kept in facts["kept"].items()}
            for name in ("failures", "damaged"):
                facts[name] = {int(number): said for number, said in facts[name].items()}
            facts["failed_references"] = [Failure(**failure) for failure in facts["failed_references"]]
            count = len(self._indices) + len(images["indices"])
            whole = (
                self._ends[-1] + sum(4 * rows * columns for rows, columns in images["shapes"]) <= self._maps.end
                and self._stage_ends[-1] + sum(images["stages"]) <= self._stages.end
                and 8 * count * (vector or 0) <= self._vectors.end
            )
            if not whole or not line.endswith(b"\n"):
                return False
            self._note(images, vector, GroupFacts(**facts))
            return True
        except (ValueError, TypeError, LookupError, AttributeError):
            return False

    def _note(self, images: Mapping[str, Any], vector: int | None, facts: GroupFacts) -> None:
        self._indices.extend(images["indices"])
        self._groups.extend([facts.number] * len(images["indices"]))
        self._raw.extend(images["raw"])
        self._extremes.extend(images["extremes"])
        for rows, columns in images["shapes"]:
            self._shapes.extend((rows, columns))
            self._ends.append(self._ends[-1] + 4 * rows * columns)
        for size in images["stages"]:
            self._stage_ends.append(self._stage_ends[-1] + size)
        if images["indices"]:
            self._vector = vector
        self.facts.append(facts)

    def add(self, scored: Sequence[Scored], facts: GroupFacts) -> None:
        """Keep a group that has ended; it is on disk then. Raises OSError."""
        vector, stages = None, [_packed_stages(image.stages) for image in scored]
        for image in scored:
            self._maps.append(image.map.astype(np.float32, copy=False).tobytes())
        self._stages.append(b"".join(stages))
        if scored and scored[0].facts is not None:
            vectors = np.array([image.facts for image in scored], np.float64)  # [n, D]
            vector = vectors.shape[1]
            self._vectors.append(vectors.tobytes())
        images = {
            "indices": [image.index for image in scored],
            "raw": [image.raw_score for image in scored],
            "extremes": [float(end) for image in scored for end in (image.map.min(), image.map.max())],
            "shapes": [image.map.shape for image in scored],
            "stages": list(map(len, stages)),
        }
        for file in (self._maps, self._vectors, self._stages):
            file.flush()
        told = asdict(facts) | {"kept": {name: _packed(np.asarray(kept)) for name, kept in facts.kept.items()}}
        self._journal.append(f"{json.dumps([images, vector, told])}\n".encode("ascii"))
        self._journal.flush()
        self._note(images, vector, facts)

    def images(self) -> "KeptImages":
        """Return what was scored, in the order of the category."""
        order = np.argsort(np.asarray(self._indices, np.int64), kind="stable")
        extremes = np.asarray(self._extremes, np.float32).reshape(-1, 2)[order]
        shapes = np.asarray(self._shapes, np.int64).reshape(-1, 2)
        maps = _Pieces(self._maps, self._ends, shapes)
        indices, groups, raw = (np.asarray(each)[order] for each in (self._indices, self._groups, self._raw))
        files = (maps, self._vectors, self._vector, _Pieces(self._stages, self._stage_ends))
        return KeptImages(order, indices, groups, raw, extremes, files)

    def close(self) -> None:
        for file in (self._maps, self._vectors, self._stages, self._journal):
            file.close()

    def remove(self) -> None:
        """Remove what is no longer of use, since the category's folder is in place."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class _Pieces:
    """Pieces of a file that follow each other, one for each image."""

    file: Growing
    ends: Sequence[int]  # after a 0
    shapes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))  # of maps

    def read(self, row: int) -> bytes:
        return self.file.part(self.ends[row], self.ends[row + 1] - self.ends[row])

    def map(self, row: int) -> NDArray[np.float32]:
        rows, columns = self.shapes[row].tolist()
        return np.frombuffer(self.read(row), np.float32).reshape(rows, columns)


class KeptImages(Sequence[Scored]):
    """What was scored of a category's images, in their order; what lies in files is read when it is asked for."""

    def __init__(
        self,
        rows: NDArray[np.intp],
        indices: NDArray[np.int64],
        groups: NDArray[np.int64],
        raw_scores: NDArray[np.float64],
        extremes: NDArray[np.float32],
        files: tuple[_Pieces, Growing, int | None, _Pieces],
    ) -> None:
        """rows: where each lies in the files, which are: maps, vectors and their length, stages."""
        self._rows, self._indices = rows, indices
        self.groups, self.raw_scores = groups, raw_scores  # [N] each
        self.extremes = extremes  # [N, 2], lowest and highest of each map
        self._maps, self._vectors, self._vector, self._stages = files

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Scored: ...

    @overload
    def __getitem__(self, place: slice) -> list[Scored]: ...

    def __getitem__(self, place: int | slice) -> Scored | list[Scored]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        row = int(self._rows[place])
        return replace(self._scored(place, self._maps.map(row)), stages=_stages(self._stages.read(row)))

    def light(self, places: Iterable[int]) -> Iterator[Scored]:
        """Yield images at these places without their maps and stages."""
        return (self._scored(place, np.zeros((0, 0), np.float32)) for place in places)

    def _scored(self, place: int, of_image: NDArray[np.float32]) -> Scored:
        facts = None
        if self._vector is not None:
            content = self._vectors.part(8 * self._vector * int(self._rows[place]), 8 * self._vector)
            facts = np.frombuffer(content, np.float64)
        return Scored(int(self._indices[place]), float(self.raw_scores[place]), of_image, facts)


class Results(Sequence[Result]):
    """What there is to write of images that were compared with each other; those on disk are read one by one."""

    def __init__(
        self,
        found: Sequence[Scored],
        scores: NDArray[np.float64],
        scale: tuple[float, float],
        said: tuple[Mapping[int, Stages], Mapping[int, str]],
        sound: Sequence[int],
    ) -> None:
        """scores: [N] of all images; scale: of all maps; said: stages and damage of single images, by their numbers."""
        self._found, self._scores, self._scale, (self._stages, self._damaged) = found, scores, scale, said
        self.sound = sound  # places of images that are not damaged
        self.on_disk = isinstance(found, KeptImages)
        self.raw_scores = np.array([image.raw_score for image in light(found, range(len(found)))])  # [N]

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, place: int) -> Result: ...

    @overload
    def __getitem__(self, place: slice) -> list[Result]: ...

    def __getitem__(self, place: int | slice) -> Result | list[Result]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        image = self._found[place]
        return Result(
            image.index,
            float(self._scores[place]),
            image.raw_score,
            image.map,
            self._scale,
            stages=image.stages or self._stages.get(image.index),
            note=self._damaged.get(image.index),
        )


def light(found: Sequence[Scored], places: Iterable[int]) -> Iterator[Scored]:
    """Yield images at these places, those on disk without their maps."""
    return found.light(places) if isinstance(found, KeptImages) else (found[place] for place in places)


def ends_of_maps(found: Sequence[Scored], places: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return maps, or values of such, with the same lowest value and the same two highest ends as all of them."""
    if isinstance(found, KeptImages):
        extremes = found.extremes[places]  # of a million images, for all of which these two stand
        lowest, highest = extremes[:, 0].min(), np.sort(extremes[:, 1])[-2:]
        return [np.array([lowest, end], np.float32) for end in highest]
    return [found[place].map for place in places]


def _packed_stages(stages: Stages | None) -> bytes:
    """Return stages as bytes, none of none."""
    if stages is None:
        return b""
    masks = [(mask.row, mask.byte, *_packed(mask.bits)) for mask in (stages.foreground, *stages.parts)]
    return zlib.compress(json.dumps([masks, stages.size, stages.tiles]).encode("ascii"), 1)


def _stages(content: bytes) -> Stages | None:
    if not content:
        return None
    masks, size, tiles = parse_json(zlib.decompress(content))
    foreground, *parts = (BitMask(row, byte, _array(*bits)) for row, byte, *bits in masks)
    return Stages(foreground, tuple(size), parts, [(Box(*box), score) for box, score in tiles])


def _packed(kept: NDArray[Any]) -> tuple[str, list[int], str]:
    return kept.dtype.str, list(kept.shape), base64.b64encode(np.ascontiguousarray(kept).tobytes()).decode()


def _array(kind: str, shape: Sequence[int], content: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(content), np.dtype(kind)).reshape(shape)

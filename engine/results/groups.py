"""What comes of the groups of a category that are compared with each other, on disk until all of it is written.

A run that dies leaves it, and a later one with the same fingerprint goes on after the groups that have ended. It also
keeps a run's memory from growing with the number of images: there may be a million.
"""

import base64
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

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
        self._indices, self._groups, self._raw = array("q"), array("l"), array("d")
        self._extremes = array("f")  # of each map, lowest and highest
        self._shape: tuple[int, ...] | None = None  # of a map
        self._vector: int | None = None  # numbers of an image's facts
        head = f"{json.dumps(fingerprint)}\n".encode("ascii")
        lines = list(self._left(head)) if resume else []
        if not lines:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self._maps, self._vectors = Growing(folder / "maps"), Growing(folder / "vectors")
        self._journal = Growing(folder / ENDED, head)
        valid = len(head)
        for line in lines:
            if not self._took(line):
                break
            valid += len(line)
        self._journal.cut(valid)
        self._maps.cut(4 * len(self._indices) * int(np.prod(self._shape or (0,))))
        self._vectors.cut(8 * len(self._indices) * (self._vector or 0))

    def _left(self, head: bytes) -> Iterator[bytes]:
        with suppress(OSError), (self._folder / ENDED).open("rb") as file:
            if file.readline() == head:
                yield from file

    def _took(self, line: bytes) -> bool:
        """Take up a line of the journal, if all that it tells of is there."""
        try:
            images, shape, vector, facts = parse_json(line)
            facts["kept"] = {name: _array(*kept) for name, kept in facts["kept"].items()}
            for name in ("failures", "damaged"):
                facts[name] = {int(number): said for number, said in facts[name].items()}
            facts["failed_references"] = [Failure(**failure) for failure in facts["failed_references"]]
            count = len(self._indices) + len(images["indices"])
            whole = (
                4 * count * int(np.prod(shape or [0])) <= self._maps.end
                and 8 * count * (vector or 0) <= self._vectors.end
            )
            if not whole or not line.endswith(b"\n"):
                return False
            self._note(images, shape, vector, GroupFacts(**facts))
            return True
        except (ValueError, TypeError, LookupError, AttributeError):
            return False

    def _note(
        self, images: Mapping[str, Any], shape: Sequence[int] | None, vector: int | None, facts: GroupFacts
    ) -> None:
        self._indices.extend(images["indices"])
        self._groups.extend([facts.number] * len(images["indices"]))
        self._raw.extend(images["raw"])
        self._extremes.extend(images["extremes"])
        if images["indices"]:
            self._shape, self._vector = (None if shape is None else tuple(shape)), vector
        self.facts.append(facts)

    def add(self, scored: Sequence[Scored], facts: GroupFacts) -> None:
        """Keep a group that has ended; it is on disk then. Raises OSError."""
        shape, vector = None, None
        if scored:
            maps = np.stack([image.map for image in scored]).astype(np.float32, copy=False)  # [n, h, w]
            shape = list(maps.shape[1:])
            self._maps.append(maps.tobytes())
            if scored[0].facts is not None:
                vectors = np.array([image.facts for image in scored], np.float64)  # [n, D]
                vector = vectors.shape[1]
                self._vectors.append(vectors.tobytes())
        images = {
            "indices": [image.index for image in scored],
            "raw": [image.raw_score for image in scored],
            "extremes": [float(end) for image in scored for end in (image.map.min(), image.map.max())],
        }
        self._maps.flush()
        self._vectors.flush()
        told = asdict(facts) | {"kept": {name: _packed(np.asarray(kept)) for name, kept in facts.kept.items()}}
        self._journal.append(f"{json.dumps([images, shape, vector, told])}\n".encode("ascii"))
        self._journal.flush()
        self._note(images, shape, vector, facts)

    def images(self) -> "KeptImages":
        """Return what was scored, in the order of the category."""
        order = np.argsort(np.asarray(self._indices, np.int64), kind="stable")
        extremes = np.asarray(self._extremes, np.float32).reshape(-1, 2)[order]
        files = (self._maps, self._shape or (0, 0), self._vectors, self._vector)
        indices, groups, raw = (np.asarray(each)[order] for each in (self._indices, self._groups, self._raw))
        return KeptImages(order, indices, groups, raw, extremes, files)

    def close(self) -> None:
        for file in (self._maps, self._vectors, self._journal):
            file.close()

    def remove(self) -> None:
        """Remove what is no longer of use, since the category's folder is in place."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class KeptImages(Sequence[Scored]):
    """What was scored of a category's images, in their order; maps and vectors are read when they are asked for."""

    def __init__(
        self,
        rows: NDArray[np.intp],
        indices: NDArray[np.int64],
        groups: NDArray[np.int64],
        raw_scores: NDArray[np.float64],
        extremes: NDArray[np.float32],
        files: tuple[Growing, tuple[int, ...], Growing, int | None],
    ) -> None:
        """rows: where each lies in the files, which are: maps and their shape, vectors and their length."""
        self._rows, self._indices = rows, indices
        self.groups, self.raw_scores = groups, raw_scores  # [N] each
        self.extremes = extremes  # [N, 2], lowest and highest of each map
        self._maps, self._shape, self._vectors, self._vector = files

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Scored: ...

    @overload
    def __getitem__(self, place: slice) -> list[Scored]: ...

    def __getitem__(self, place: int | slice) -> Scored | list[Scored]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        size = int(np.prod(self._shape))
        content = self._maps.part(4 * size * int(self._rows[place]), 4 * size)
        return self._scored(place, np.frombuffer(content, np.float32).reshape(self._shape))

    def light(self, places: Iterable[int]) -> Iterator[Scored]:
        """Yield images at these places without their maps."""
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
            stages=self._stages.get(image.index),
            note=self._damaged.get(image.index),
        )


def light(found: Sequence[Scored], places: Iterable[int]) -> Iterator[Scored]:
    """Yield images at these places, those on disk without their maps."""
    return found.light(places) if isinstance(found, KeptImages) else (found[place] for place in places)


def ends_of_maps(found: Sequence[Scored], places: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return the lowest and the highest value of each map."""
    if isinstance(found, KeptImages):
        return list(found.extremes[places])
    return [found[place].map for place in places]


def _packed(kept: NDArray[Any]) -> tuple[str, list[int], str]:
    return kept.dtype.str, list(kept.shape), base64.b64encode(np.ascontiguousarray(kept).tobytes()).decode()


def _array(kind: str, shape: Sequence[int], content: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(content), np.dtype(kind)).reshape(shape)

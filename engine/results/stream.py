"""A category's folder that grows as images arrive: tables and a journal, each image at once and whole.

The journal has a line for each file that was handled, with where the tables end after it: whatever ends a run, the next
one cuts off what is half there and goes on, and no image is in the tables twice.
"""

import csv
import io
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from zsad.engine.images.arrivals import Arrival, Known, Version
from zsad.engine.images.tree import SCORES, WATCHED, WATCHED_START, is_stream
from zsad.kernels.files import parse_json

from .category import COLUMNS, NOTE, P_VALUE, REGION_COLUMNS, REGIONS, VERDICTS, region_rows, score_row
from .image_files import key_of
from .output import OutputError
from .records import Failure, ImageRecord

SHOWN = 200  # the last images, which the page shows

# Of the table of scores; an image has no rank, since others follow.
_COLUMNS = (*(column for column in COLUMNS if column != "rank"), *VERDICTS, P_VALUE, NOTE)


class _Line(NamedTuple):
    """What the journal keeps of a file: where the tables end after it, and its score or why it has none."""

    relative: str
    version: Version
    ends: tuple[int, int]
    record: Mapping[str, Any] | None
    reason: str | None


@dataclass
class Latest:
    """What is in memory of the images: the last ones, and how many there were."""

    images: deque[tuple[ImageRecord, Mapping[str, str]]] = field(default_factory=lambda: deque(maxlen=SHOWN))
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=SHOWN))
    scored: int = 0
    failed: int = 0


class Stream:
    """The tables and the journal of a category; raises OSError where the disk refuses, and then holds what it held."""

    def __init__(self, folder: Path, known: Known) -> None:
        """Make the folder, or go on with what is there, which `known` gets to know; raises OutputError for others'."""
        self.folder, self._known, self.latest = folder, known, Latest()
        if folder.is_symlink() or (folder.exists() and not is_stream(folder) and any(folder.iterdir())):
            raise OutputError(
                f"{folder}: exists and holds no results of a --watch; move it away or choose another --output"
            )
        folder.mkdir(exist_ok=True)
        self._scores = _Growing(folder / SCORES, _csv([_COLUMNS]))
        self._regions = _Growing(folder / REGIONS, _csv([REGION_COLUMNS]))
        self._journal = _Growing(folder / WATCHED, WATCHED_START)
        self._recover()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._scores, self._regions, self._journal):
            file.close()

    def add(self, arrival: Arrival, record: ImageRecord, thumbnails: Mapping[str, str]) -> None:
        """Take in an image whose files are written."""
        ends = self._scores.end, self._regions.end
        try:
            self._scores.append(_csv([score_row(record, _COLUMNS)]))
            self._regions.append(_csv(region_rows(record)))
            self._note(arrival, record, None)
        except OSError:
            self._cut(ends)
            raise
        self.latest.images.append((record, thumbnails))
        self.latest.scored += 1

    def refuse(self, arrival: Arrival, reason: str) -> None:
        """Take note of a file that has no score."""
        self._note(arrival, None, reason)
        self.latest.failures.append(Failure(arrival.relative, reason))
        self.latest.failed += 1

    def _note(self, arrival: Arrival, record: ImageRecord | None, reason: str | None) -> None:
        ends = [self._scores.end, self._regions.end]
        kept = None if record is None else record.facts()
        line = json.dumps([arrival.relative, arrival.version, ends, kept, reason]) + "\n"
        self._journal.append(line.encode("ascii"))
        self._known.add(arrival.relative, arrival.version)

    def _cut(self, ends: Sequence[int]) -> None:
        for table, end in zip((self._scores, self._regions), ends, strict=True):
            table.cut(end)

    def _recover(self) -> None:
        """Go on after the last image that is wholly there."""
        latest, end, last = self.latest, len(WATCHED_START), deque[Mapping[str, Any]](maxlen=SHOWN)
        ends = len(_csv([_COLUMNS])), len(_csv([REGION_COLUMNS]))
        for line, after in self._lines():
            if line.ends[0] > self._scores.end or line.ends[1] > self._regions.end:
                break  # a power cut has taken more of the tables than of the journal
            end, ends = after, line.ends
            self._known.add(line.relative, line.version)
            if line.record is not None:
                if key := key_of(line.record):
                    self._known.call(line.relative, key)
                last.append(line.record)
                latest.scored += 1
            else:
                latest.failures.append(Failure(line.relative, line.reason or ""))
                latest.failed += 1
        with suppress(ValueError):  # of another version; then they are not shown
            latest.images.extend((ImageRecord.from_facts(facts), {}) for facts in last)
        self._journal.cut(end)
        self._cut(ends)

    def _lines(self) -> Iterator[tuple[_Line, int]]:
        """Yield the journal's lines, up to the first that is not whole, and where each ends."""
        end = len(WATCHED_START)
        with (self.folder / WATCHED).open("rb") as file, suppress(ValueError, TypeError):
            file.seek(end)
            for text in file:
                relative, version, (scores, regions), record, reason = parse_json(text)
                if not text.endswith(b"\n"):
                    return
                end += len(text)
                yield _Line(relative, Version(*version), (scores, regions), record, reason), end


class _Growing:
    """A file that is appended to, whole pieces at a time."""

    def __init__(self, path: Path, head: bytes) -> None:
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115, PTH123
        self.end = self._file.seek(0, os.SEEK_END)
        if self.end < len(head):
            self.cut(0)
            self.append(head)

    def append(self, content: bytes) -> None:
        """Write at the end, so that it is there if the run is killed; raises OSError, and then leaves nothing of it."""
        left = memoryview(content)
        self._file.seek(self.end)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self.cut(self.end)
            raise
        self.end += len(content)

    def cut(self, end: int) -> None:
        self._file.truncate(end)
        self.end = end

    def close(self) -> None:
        self._file.close()


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    # Names that are no valid Unicode keep their bytes.
    return text.getvalue().encode("utf-8", "surrogateescape")

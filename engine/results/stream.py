"""A category's folder that grows as images arrive: tables and a journal, each image at once and whole.

The journal has a line for each file that was handled, with where the tables end after it, and an empty one, a mark,
once all before it is on disk. Whatever ends a run, the next one cuts off what is half there and goes on: no image is in
the tables twice, and files of those after the last mark, which a power cut may have taken, are looked at.
"""

import csv
import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zsad.engine.images.arrivals import Arrival, Known, Version
from zsad.engine.images.tree import REGIONS, SCORES, WATCHED, WATCHED_START, is_stream
from zsad.kernels.files import flush, parse_json

from .category import COLUMNS, NOTE, P_VALUE, REGION_COLUMNS, VERDICTS, region_rows, score_row
from .growing import Growing
from .image_files import key_of
from .output import OutputError
from .records import Failure, ImageRecord

SHOWN = 200  # the last images, which the page shows
PAUSE = 1.0  # seconds from mark to mark at least
MOST_FLUSHES = 12  # files whose content is waited for at a time
MARK = b"[]\n"

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
        if folder.is_symlink() or not (is_stream(folder) or _is_begun(folder)):
            raise OutputError(
                f"{folder}: exists and holds no results of a --watch; move it away or choose another --output"
            )
        folder.mkdir(exist_ok=True)
        self._journal = Growing(folder / WATCHED, WATCHED_START)  # first: it says whose folder it is
        self._journal.flush()
        flush(folder)
        self._scores = Growing(folder / SCORES, _csv([_COLUMNS]))
        self._regions = Growing(folder / REGIONS, _csv([REGION_COLUMNS]))
        self._unsettled, self._files, self._next_mark = False, set[str](), 0.0  # of images since the last mark
        self._marked = False  # by a mark that may not be on disk itself
        self._pool = ThreadPoolExecutor(MOST_FLUSHES, "flush")
        self._recover()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, say
            self.settle(at_once=True)
            self.settle()
        self._pool.shutdown()
        for file in (self._scores, self._regions, self._journal):
            file.close()

    def has(self, arrival: Arrival) -> bool:
        """Tell whether a file was handled as it is."""
        return self._known.has(arrival.relative, arrival.version)

    def add(self, arrival: Arrival, record: ImageRecord) -> None:
        """Take in an image whose files are written."""
        ends = self._scores.end, self._regions.end
        try:
            self._scores.append(_csv([score_row(record, _COLUMNS)]))
            self._regions.append(_csv(region_rows(record)))
            self._note(arrival, record, None)
        except OSError:
            self._cut(ends)
            raise
        self.latest.images.append((record, {}))
        self.latest.scored += 1

    def show(self, thumbnails: Mapping[str, str]) -> None:
        """Keep thumbnails of the image that was added last."""
        record, _ = self.latest.images.pop()
        self.latest.images.append((record, thumbnails))

    def refuse(self, arrival: Arrival, reason: str) -> None:
        """Take note of a file that has no score."""
        self._note(arrival, None, reason)
        self.latest.failures.append(Failure(arrival.relative, reason))
        self.latest.failed += 1

    def settle(self, at_once: bool = False) -> None:
        """Wait until all that was added is on disk, where the last time was a while ago or it has to be `at_once`.

        The mark itself follows with the next call.
        """
        if not self._unsettled:
            if self._marked:  # nobody is waiting for it
                self._journal.flush()
                self._marked = False
            return
        if not at_once and time.monotonic() < self._next_mark:
            return
        files = {self.folder / file for file in self._files}
        places = [*files, *{path.parent for path in files}, self.folder]
        flushes: list[Callable[[], None]] = [partial(_flush_if_there, place) for place in places]
        flushes += [self._scores.flush, self._regions.flush, self._journal.flush]
        for _ in self._pool.map(lambda flush: flush(), flushes):  # at once: the disk takes many in the time of one
            pass
        self._journal.append(MARK)
        self._unsettled, self._marked, self._next_mark = False, True, time.monotonic() + PAUSE
        self._files.clear()

    def _note(self, arrival: Arrival, record: ImageRecord | None, reason: str | None) -> None:
        ends = [self._scores.end, self._regions.end]
        kept = None if record is None else record.facts()
        line = json.dumps([arrival.relative, arrival.version, ends, kept, reason]) + "\n"
        self._journal.append(line.encode("ascii"))
        self._known.add(arrival.relative, arrival.version, refused=record is None)
        self._unsettled = True
        self._files.update(() if record is None else record.files())

    def _cut(self, ends: Sequence[int]) -> None:
        for table, end in zip((self._scores, self._regions), ends, strict=True):
            table.cut(end)

    def _recover(self) -> None:
        """Go on after the last image that is wholly there."""
        latest, end, last = self.latest, len(WATCHED_START), deque[Mapping[str, Any]](maxlen=SHOWN)
        ends = len(_csv([_COLUMNS])), len(_csv([REGION_COLUMNS]))
        for line, after in self._whole_lines():
            if line is None:
                end = after
                continue
            if line.ends[0] > self._scores.end or line.ends[1] > self._regions.end:
                break  # a power cut has taken more of the tables than of the journal
            end, ends = after, line.ends
            self._known.add(line.relative, line.version, refused=line.record is None)
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
        self._unsettled |= (end, *ends) != (self._journal.end, self._scores.end, self._regions.end)
        self._journal.cut(end)
        self._cut(ends)

    def _whole_lines(self) -> Iterator[tuple[_Line | None, int]]:
        """Yield the journal's lines, None for marks, and where each ends, up to the first whose image lacks something.

        Files before the last mark may have been removed since, by somebody; of those after it a power cut may have
        taken something.
        """
        marked = max((after for line, after in self._lines(marks_only=True)), default=0)
        for line, after in self._lines():
            if line is not None and after > marked:
                if line.record is not None:
                    try:
                        record = ImageRecord.from_facts(line.record)
                        if record.sizes_in(self.folder) != record.sizes:
                            return
                    except (OSError, ValueError):
                        return
                    self._files.update(record.files())
                self._unsettled = True
            yield line, after

    def _lines(self, marks_only: bool = False) -> Iterator[tuple[_Line | None, int]]:
        """Yield the journal's lines, None for marks, up to the first that is not whole, and where each ends."""
        end = len(WATCHED_START)
        with (self.folder / WATCHED).open("rb") as file, suppress(ValueError, TypeError):
            file.seek(end)
            for text in file:
                end += len(text)
                if text == MARK:
                    yield None, end
                    continue
                if marks_only:
                    continue
                relative, version, (scores, regions), record, reason = parse_json(text)
                if not text.endswith(b"\n"):
                    return
                yield _Line(relative, Version(*version), (scores, regions), record, reason), end


def _is_begun(folder: Path) -> bool:
    """Tell whether a folder is new, or holds what a power cut has left of the beginning of a journal."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return not names or (names == [WATCHED] and WATCHED_START.startswith((folder / WATCHED).read_bytes()))


def _flush_if_there(path: Path) -> None:
    with suppress(FileNotFoundError):  # somebody has removed it, as is allowed
        flush(path)


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    # Names that are no valid Unicode keep their bytes.
    return text.getvalue().encode("utf-8", "surrogateescape")

"""One category's folder: files of its images as they come, then tables and the record, and into place as a whole."""

import csv
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.images.ahead import Ahead
from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.remote import stamps
from zsad.engine.images.stored import read_map
from zsad.engine.images.tree import RECORD, REGIONS, SCORED, SCORES
from zsad.kernels.files import as_cell, parse_json, written_whole

from .drawing import thumbnails_of
from .growing import Growing
from .image_files import ImageFiles, Result, Writing, Written, bytes_to_write, judged, rounded
from .output import JOURNAL, UNFINISHED, flush_all, left_folder, move_into_place, own_folder
from .rayan import read_challenge, with_score
from .records import CategoryRecord, Failure, ImageRecord, ImageRecords, write_record

THUMBNAILS = "thumbnails.jsonl"  # a line for each image: its path and data URIs by name
DRAFT = "draft"  # what replaces a file of an image; one name for all, because theirs may be as long as allowed


# Columns of tables of scores: those of all, and those of tables that need them.
COLUMNS = ("path", "score", "rank", "raw_score", "map")
VERDICTS, P_VALUE, NOTE = ("verdict", "regions", "defect_area"), "p_value", "note"
REGION_COLUMNS = ("path", "x", "y", "width", "height", "area", "peak")

SAMPLED_MAPS, SAMPLED_PIXELS = 200, 100_000  # for a percentile of the maps of a category, and of each of them


class CategoryWriter:
    """Writes a category's folder under a temporary name; without `finish`, nothing of it is left behind.

    With a journal, what was written stays, and the next writer with the same journal goes on from there, whether this
    one was killed or has finished: with all images that are as they were, whatever others have joined. Those that had a
    failure are left for it to try again. Raises OSError, naming a file, when the disk refuses.
    """

    def __init__(
        self,
        output: Path,
        category: Category,
        writing: Writing,
        bit_depth: int | None,
        journal: str | None,
        resume: bool,
    ) -> None:
        """bit_depth: of grey values in 16-bit files. journal: the fingerprint under which a later run may go on."""
        self._final, self._writing = output / category.name, writing
        self._images, self._fingerprint, self._resume = category.images, journal, resume
        self._staging, self._left = own_folder(self._final, "partial"), left_folder(self._final)
        # All else that is kept of an image is on disk: there may be a million.
        self._scores = np.zeros(len(self._images))
        self._failures: dict[int, Failure] = {}  # of writing, by the image's number
        self.notes: dict[int, str] = {}  # of images, by their number
        self._with_p_values = False  # whether an image has one
        self._seconds = np.full(len(self._images), np.nan, np.float32)  # see `ImageRecords`
        self.scale: tuple[float, float] | None = None  # of the maps, the same for all images
        self._files = ImageFiles(self._staging, writing, bit_depth)
        self._stamps = np.zeros((len(self._images), 2), np.int64)
        if journal is not None:  # before any is read: what changes meanwhile is done again
            for number, stamp in enumerate(stamps(image.path for image in self._images)):
                self._stamps[number] = stamp

    def __enter__(self) -> "CategoryWriter":
        recovered: Iterator[tuple[Written, str]] = iter(())
        finished: Iterator[tuple[Written, str]] = iter(())
        shutil.rmtree(self._staging, ignore_errors=True)
        with suppress(FileNotFoundError):
            self._left.rename(self._staging)
        if self._resume and self._fingerprint is not None:
            known = _Known(self._images, self._stamps)
            recovered = _recovered(self._staging / JOURNAL, self._fingerprint, known)
            finished = _recovered(self._final / SCORED, self._fingerprint, known)
        first = next(recovered, None)
        if first is None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
        # What is no longer valid goes before any image is done again: a half-written one would count as done later.
        # Thumbnails first, so that an image in the journal always has its own.
        journal = self._staging / (UNFINISHED if self._fingerprint is None else JOURNAL)
        with written_whole(journal) as lines, written_whole(self._staging / THUMBNAILS) as thumbnails:
            count = len(self._images)
            head = f"{json.dumps(self._fingerprint)}\n".encode("ascii")
            self._journal = Growing(journal, head, count, draft=lines)
            self._thumbnails = Growing(self._staging / THUMBNAILS, b"", count, draft=thumbnails)
            for written, pictures in chain([] if first is None else [first], recovered):
                self._keep(written, pictures)
            for written, pictures in finished:
                if not self.done[written.number]:
                    self._files.take_over(self._final, written.record)
                    self._keep(written, pictures)
        workers = self._writing.workers
        self._ahead = Ahead(self._write_image, workers, 2 * workers, self._writing.memory_limit, "write")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, traceback)
        try:
            with suppress(OSError):  # of a full disk, say
                for _, (written, thumbnails) in self._ahead.ready():  # what a later run need not do again
                    self._keep(written, thumbnails)
            self._close()
        finally:
            if error is None or self._fingerprint is None or not self.done.any():
                shutil.rmtree(self._staging, ignore_errors=True)
            else:
                with suppress(OSError):  # the folder may be gone
                    shutil.rmtree(self._left, ignore_errors=True)
                    self._staging.rename(self._left)
        if isinstance(error, OSError) and error.filename is None:
            # Writing to an open file fails without naming it.
            raise OSError(error.errno, error.strerror or str(error), str(self._staging)) from error

    @property
    def done(self) -> NDArray[np.bool_]:
        """Which images of the category [N] are written, by this run or the one that it goes on from."""
        return self._journal.starts >= 0

    def written(self) -> Iterator[Written]:
        """Read what is kept of the images that are written, in the order of the category."""
        return self._written(np.flatnonzero(self.done))

    def write(self, result: Result) -> None:
        """Queue the files of an image."""
        self.scale = result.scale
        size = bytes_to_write(self._images[result.index], result)
        for _, (written, thumbnails) in chain(self._ahead.put(result, size), self._ahead.ready()):
            self._keep(written, thumbnails)

    def scores(self) -> NDArray[np.float64]:
        """Wait for what is queued; return the scores [N] of all images in the order of the category."""
        for _, (written, thumbnails) in self._ahead.rest():
            self._keep(written, thumbnails)
        return self._scores[self.done]

    def rescore(self, scores: NDArray[np.float64]) -> None:
        """Replace the scores [N] of all images, as `scores` has given them, also in the files that hold them."""
        self._scores[self.done] = scores
        for written in self.written():
            if written.record.json_file:
                path, draft = self._staging / written.record.json_file, self._staging / DRAFT
                draft.write_text(with_score(path.read_text(), written.record.score))
                draft.replace(path)

    def map_percentile(self, numbers: NDArray[np.intp], percentile: float) -> float | None:
        """Return a percentile of the maps of images with these numbers among the written; None without maps.

        Of many or large maps, a part spread evenly is looked at.
        """
        files = (written.record.map for written in self._written(np.flatnonzero(self.done)[numbers]))
        values = []
        for file in islice(filter(None, files), 0, None, max(1, len(numbers) // SAMPLED_MAPS)):
            whole = np.asarray(read_map(self._staging / file)).ravel()
            values.append(whole[:: max(1, whole.size // SAMPLED_PIXELS)])
        return float(np.percentile(np.concatenate(values), percentile)) if values else None

    def finish(self, record: CategoryRecord) -> CategoryRecord:
        """Complete a record that lacks only what belongs to single images, and move the folder into place.

        The record's bounds say which images are accepted; the regions of others are what is above its region bound.
        """
        best_first = np.argsort(-self.scores(), kind="stable")
        self._close()
        self._thumbnails.sort()
        failures = [*record.failures, *(self._failures[index] for index in sorted(self._failures))]
        complete = replace(record, failures=failures)
        columns = [
            *VERDICTS * (record.bounds is not None),
            *[P_VALUE] * self._with_p_values,
            *[NOTE] * bool(self.notes),
        ]
        tables = partial(_write_tables, self._staging, best_first, columns)
        images = write_record(self._staging / RECORD, complete, self._judged(record, best_first), tables)
        if self._fingerprint is not None:
            self._journal.sort()
        flush_all(self._staging)
        # Last: on a full disk all before it may fail.
        if self._fingerprint is None:
            self._journal.path.unlink()
        else:
            self._journal.path.rename(self._staging / SCORED)
        move_into_place(self._staging, self._final)
        return replace(complete, images=images.moved(self._final / RECORD, self._seconds[self.done]))

    def _close(self) -> None:
        self._thumbnails.close()
        self._journal.close()

    def _keep(self, written: Written, thumbnails: str) -> None:
        """Note an image whose files are written, with the line of its thumbnails, empty where it has none."""
        self._scores[written.number] = written.record.score
        if written.record.note is not None:
            self.notes[written.number] = written.record.note
        self._with_p_values |= written.record.p_value is not None
        if written.failure is not None:
            self._failures[written.number] = written.failure
        if thumbnails:
            # First, so that an image in the journal has its own.
            self._thumbnails.append(thumbnails.encode("ascii"), written.number)
        failure = None if written.failure is None else asdict(written.failure)
        facts = [written.number, asdict(written.record), written.facts, written.least_area, failure]
        line = json.dumps([*facts, self._stamps[written.number].tolist()]) + "\n"
        self._journal.append(line.encode("ascii"), written.number)

    def _written(self, indices: NDArray[np.intp]) -> Iterator[Written]:
        for line in self._journal.read(indices):
            written, _ = _read_line(line)
            score = float(self._scores[written.number])
            yield written._replace(record=replace(written.record, score=score))

    def _judged(self, record: CategoryRecord, best_first: NDArray[np.intp]) -> Iterator[ImageRecord]:
        """Yield the images' records with ranks, and where there are bounds with verdicts and regions."""
        ranks = np.empty(len(best_first), int)
        ranks[best_first] = np.arange(1, len(ranks) + 1)
        for written, rank in zip(self.written(), ranks, strict=True):
            # The challenge's files may have other scores now.
            image = written.record if record.bounds is None else judged(self._staging, written, record.bounds)
            yield rounded(replace(image, rank=int(rank), sizes=image.sizes_in(self._staging)))

    def _write_image(self, result: Result, last_try: bool) -> tuple[Written, str]:
        """Write an image's files; returns what is kept of it, and the line of its thumbnails."""
        start = time.perf_counter()
        written, pictures = self._files.write(self._images[result.index], result, last_try)
        try:
            shown = thumbnails_of(pictures)
        except MemoryError:
            if not last_try:
                raise
            shown = {}
        if result.seconds is not None:
            self._seconds[result.index] = result.seconds + time.perf_counter() - start
        return written, json.dumps([written.record.path, shown]) + "\n" if shown else ""


class _Known:
    """Finds images of a category by what is on record of them, if they are as they were then."""

    def __init__(self, images: Sequence[InputImage], stamps: NDArray[np.int64]) -> None:
        """stamps: [N, 2]. Of each image 16 bytes are held, since there may be a million."""
        self._images, self._stamps = images, stamps
        hashes = np.fromiter((hash(str(image.relative)) for image in images), np.int64, len(images))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def number(self, record: ImageRecord, stamp: Sequence[int]) -> int | None:
        """Return the number that an image has now; None where it is not the same, or its files would be called so."""
        first, end = (int(np.searchsorted(self._hashes, hash(record.path), side)) for side in ("left", "right"))
        for number in self._order[first:end].tolist():
            image = self._images[number]
            if str(image.relative) == record.path and self._stamps[number].tolist() == list(stamp):
                named = {"", f"maps/{image.key}.tiff", f"{image.key}_scores.json"}
                return number if {record.map, record.json_file} <= named else None
        return None


def _read_line(line: str | bytes) -> tuple[Written, list[int]]:
    """Read a line of the journal, with the stamp of the image's file; raises ValueError where its end is missing."""
    number, record, facts, least_area, failure, stamp = parse_json(line)
    failed = None if failure is None else Failure(**failure)
    return Written(number, ImageRecord(**record), facts, least_area, failed), stamp


def _recovered(file: Path, fingerprint: str, known: _Known) -> Iterator[tuple[Written, str]]:
    """Yield what a run has written of a category, by its journal, with the lines of thumbnails, empty for none.

    Images that are not as they were, that had a failure, or whose files are not all there, are left out; of another
    fingerprint, all are.
    """
    staging = file.parent
    with suppress(OSError, ValueError), file.open(encoding="ascii") as journal:
        if parse_json(journal.readline()) != fingerprint:
            return
        thumbnails = _thumbnail_lines(staging)  # in the order of the journal, where some may lack
        pictured, pictures = next(thumbnails, ("", ""))
        for line in journal:
            with suppress(ValueError, TypeError):
                written, stamp = _read_line(line)
                has_thumbnails = pictured == written.record.path
                number = known.number(written.record, stamp)
                whole = written.failure is None and _has_files(staging, written.record, has_thumbnails)
                if number is not None and whole:
                    yield written._replace(number=number), pictures if has_thumbnails else ""
                if has_thumbnails:
                    pictured, pictures = next(thumbnails, ("", ""))


def _has_files(staging: Path, image: ImageRecord, has_thumbnails: bool) -> bool:
    """Return whether the files of an image are there and whole; the challenge's is read, since its size may change."""
    try:
        if image.json_file:
            read_challenge((staging / image.json_file).read_text())
        sizes = image.sizes_in(staging)
    except (OSError, ValueError):
        return False
    known = len(sizes) - bool(image.json_file)
    return sizes[:known] == image.sizes[:known] and (has_thumbnails or not image.overlay_file)


def _thumbnail_lines(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of thumbnails in a category's folder with their images' paths, but for damaged ones."""
    with (folder / THUMBNAILS).open(encoding="ascii", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                path, _ = parse_json(line)
                yield path, line


def read_thumbnails(output: Path, category: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the thumbnails of a finished category by image path, in the order of its images."""
    for path, line in _thumbnail_lines(output / category):
        yield path, parse_json(line)[1]


def _write_tables(
    folder: Path, best_first: NDArray[np.intp], columns: Sequence[str], images: ImageRecords
) -> dict[str, int]:
    """Write the tables of a category; returns their sizes in bytes, and that of the thumbnails.

    columns: beside those that every table of scores has.
    """
    columns = [*COLUMNS, *columns]
    with_verdicts = VERDICTS[0] in columns
    # Names that are no valid Unicode keep their bytes.
    with (folder / SCORES).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(score_row(image, columns) for image in images.ordered(best_first.tolist()))
    if with_verdicts:
        with (folder / REGIONS).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(REGION_COLUMNS)
            for image in images:
                table.writerows(region_rows(image))
    names = [THUMBNAILS, SCORES, *[REGIONS] * with_verdicts]
    return {name: (folder / name).stat().st_size for name in names}


def score_row(image: ImageRecord, columns: Sequence[str]) -> list[Any]:
    """Return what a table of scores with these columns has of an image."""
    regions = image.regions or []
    cells = {
        "path": as_cell(image.path),
        "score": f"{image.score:.6f}",
        "rank": image.rank,
        "raw_score": f"{image.raw_score:.6f}",
        "map": image.map,
        P_VALUE: "" if image.p_value is None else f"{image.p_value:.6f}",
        NOTE: image.note,
        **dict(zip(VERDICTS, (image.verdict, len(regions), sum(region.area for region in regions)), strict=True)),
    }
    return [cells[column] for column in columns]


def region_rows(image: ImageRecord) -> list[list[Any]]:
    """Return an image's rows of the table of regions."""
    return [[as_cell(image.path), *asdict(region).values()] for region in image.regions or []]

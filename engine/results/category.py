"""One category's folder: files of its images as they come, then tables and the record, and into place as a whole."""

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from zsad.engine.images.ahead import Ahead
from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.decode import decode
from zsad.engine.images.loader import held_bytes
from zsad.engine.images.stored import ImageError
from zsad.engine.images.tree import RECORD, SCORES
from zsad.engine.scores.maps import object_mask, pixel_map
from zsad.engine.scores.verdicts import Region, find_regions
from zsad.kernels.files import written_whole

from .drawing import draw_small, jpeg, thumbnail
from .rayan import SIDE, challenge_json, read_challenge, with_score
from .records import CategoryRecord, Failure, ImageRecord

Format = Literal["zsad", "rayan"]

THUMBNAILS = "thumbnails.jsonl"  # a line for each image: its path and data URIs by name
JOURNAL = "journal.jsonl"  # the fingerprint, then a line for each image that is written; gone once all is written
DRAFT = "draft"  # what replaces a file of an image; one name for all, because theirs may be as long as allowed


SAMPLED_MAPS, SAMPLED_PIXELS = 200, 100_000  # for a percentile of the maps of a category, and of each of them


@dataclass(frozen=True)
class Writing:
    """How results are written."""

    formats: Sequence[Format]
    object_mask: bool  # background by colour gets the lowest score
    workers: int
    memory_limit: int  # bytes that images on their way may take
    middle_square: bool = False  # maps are of the middle square of each image


@dataclass(frozen=True)
class Result:
    """What there is to write of one image."""

    image: InputImage
    score: float  # in [0, 1]
    raw_score: float
    map: NDArray[np.float32]  # [h, w] in the method's units
    scale: tuple[float, float]  # map values that become 0 and 1
    facts: ArrayLike | None = None  # [D], what scores of the whole category need of the image


class Written(NamedTuple):
    """What is kept of an image whose files are written."""

    record: ImageRecord
    facts: list[float] | None = None  # of `Result`
    least_area: int = 0  # pixels of a defect region at least: a quarter of a map's cell
    failure: Failure | None = None


class CategoryWriter:
    """Writes a category's folder under a temporary name; without `finish`, nothing of it is left behind.

    With a journal, what was written stays, and the next writer with the same journal goes on from there, whenever this
    one was killed; images that had a failure are left for it to try again. Raises OSError, naming a file, when the disk
    refuses.
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
        self._final, self._writing, self._bit_depth = output / category.name, writing, bit_depth
        self._order = {str(image.relative): number for number, image in enumerate(category.images)}
        self._journal, self._resume = journal, resume
        self._staging = _beside(self._final, "partial")
        self.written: list[Written] = []  # in the order of the category's images once `scores` was asked for
        self.scale: tuple[float, float] | None = None  # of the maps, the same for all images

    def __enter__(self) -> "CategoryWriter":
        thumbnails: Mapping[str, str] = {}
        if self._resume and self._journal is not None:
            self.written, thumbnails = read_journal(self._staging, self._journal)
        self._went_on = bool(self.written)
        if not self._went_on:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        # What is no longer valid goes before any image is done again: a half-written one would count as done later.
        # Thumbnails first, so that an image in the journal always has its own.
        self._thumbnails = _rewritten(self._staging / THUMBNAILS, thumbnails.values())
        self._lines: IO[str] | None = None
        if self._journal is not None:
            lines = [json.dumps(self._journal) + "\n", *map(_line, self.written)]
            self._lines = _rewritten(self._staging / JOURNAL, lines)
        workers = self._writing.workers
        self._ahead = Ahead(self._write_image, workers, 2 * workers, self._writing.memory_limit, "write")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, traceback)
        try:
            self._close()
        finally:
            if error is None or self._journal is None or not self.written:
                shutil.rmtree(self._staging, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            # Writing to an open file fails without naming it.
            raise OSError(error.errno, error.strerror or str(error), str(self._staging)) from error

    def write(self, result: Result) -> None:
        """Queue the files of an image."""
        self.scale = result.scale
        self._keep(self._ahead.put(result, held_bytes(result.image.path)))

    def scores(self) -> NDArray[np.float64]:
        """Wait for what is queued; return the scores [N] of all images in the order of the category."""
        self._keep(self._ahead.rest())
        # Those of an earlier run and those that it lacked are one after the other until here.
        self.written.sort(key=lambda written: self._order[written.record.path])
        return np.array([written.record.score for written in self.written])

    def rescore(self, scores: NDArray[np.float64]) -> None:
        """Replace the scores [N] of all images, as `scores` has given them, also in the files that hold them."""
        for number, score in enumerate(scores.tolist()):
            written = self.written[number]
            self.written[number] = written._replace(record=replace(written.record, score=score))
            if written.record.json_file:
                path, draft = self._staging / written.record.json_file, self._staging / DRAFT
                draft.write_text(with_score(path.read_text(), score))
                draft.replace(path)

    def map_percentile(self, numbers: NDArray[np.intp], percentile: float) -> float | None:
        """Return a percentile of the written maps of images with these numbers; None without maps.

        Of many or large maps, a part spread evenly is looked at.
        """
        files = [self.written[number].record.map for number in numbers.tolist()]
        files = [file for file in files if file][:: max(1, len(numbers) // SAMPLED_MAPS)]
        values = []
        for file in files:
            with Image.open(self._staging / file) as image:
                pixels = np.asarray(image).ravel()
            values.append(pixels[:: max(1, pixels.size // SAMPLED_PIXELS)])
        return float(np.percentile(np.concatenate(values), percentile)) if values else None

    def finish(self, record: CategoryRecord) -> CategoryRecord:
        """Complete a record that lacks only what belongs to single images, and move the folder into place.

        Images that score above the record's threshold are anomalous, their regions what is above its region threshold.
        """
        images = self._judged(record)
        self._close()
        if self._went_on:
            thumbnails = _thumbnail_lines(self._staging)
            in_order = sorted(thumbnails, key=lambda path: self._order[path])
            _rewritten(self._staging / THUMBNAILS, (thumbnails[path] for path in in_order)).close()
        failures = [*record.failures, *(written.failure for written in self.written if written.failure is not None)]
        complete = replace(record, images=images, failures=failures)
        _write_tables(self._staging, images, record.threshold is not None)
        (self._staging / RECORD).write_text(complete.to_json())
        (self._staging / JOURNAL).unlink(missing_ok=True)  # last: on a full disk all before it may fail
        _move_into_place(self._staging, self._final)
        return complete

    def _close(self) -> None:
        self._thumbnails.close()
        if self._lines is not None:
            self._lines.close()

    def _keep(self, done: Iterator[tuple[Result, tuple[Written, Mapping[str, str]]]]) -> None:
        for _, (written, thumbnails) in done:
            if thumbnails:
                self._thumbnails.write(json.dumps([written.record.path, thumbnails]) + "\n")
            self.written.append(written)
            if self._lines is not None:
                self._thumbnails.flush()  # first, so that an image in the journal has its thumbnails
                self._lines.write(_line(written))
                self._lines.flush()

    def _judged(self, record: CategoryRecord) -> list[ImageRecord]:
        """Return the images' records with ranks, and where there is a threshold with verdicts and regions."""
        scores = self.scores()
        ranks = np.empty(len(scores), int)
        ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
        images = []
        for written, rank in zip(self.written, ranks.tolist(), strict=True):
            image = replace(written.record, rank=rank)
            if record.threshold is not None:
                anomalous = image.score > record.threshold
                regions = self._regions(written, record.region_threshold) if anomalous else []
                verdict = "anomalous" if anomalous else "normal"
                image = replace(image, verdict=verdict, regions=regions if image.map else None)
            images.append(_rounded(image))
        return images

    def _regions(self, written: Written, threshold: float | None) -> list[Region]:
        if threshold is None or not written.record.map:
            return []
        with Image.open(self._staging / written.record.map) as file:
            return find_regions(np.asarray(file), threshold, written.least_area)

    def _write_image(self, result: Result, last_try: bool) -> tuple[Written, Mapping[str, str]]:
        """Write an image's files; returns what is kept of it, and its thumbnails."""
        record = ImageRecord(str(result.image.relative), result.score, result.raw_score)
        facts = None if result.facts is None else np.asarray(result.facts).tolist()
        try:
            record, least_area, thumbnails = self._draw(result, record)
            return Written(record, facts, least_area), thumbnails
        except MemoryError as error:
            if not last_try:
                raise
            reason = f"no map, too little memory for it: {error}"
        except ImageError as error:  # readable when it was scored, but not now
            reason = f"no map, the file has changed: {error}"
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            reason = "no map, its path in the output is too long"
        return Written(record, facts, failure=Failure(record.path, reason)), {}

    def _draw(self, result: Result, record: ImageRecord) -> tuple[ImageRecord, int, Mapping[str, str]]:
        """Draw an image's files; returns its record, the least area of a region in pixels, and thumbnails."""
        picture = np.asarray(decode(result.image.path, self._bit_depth))  # [H, W, 3] RGB
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        mask = object_mask(bgr) if self._writing.object_mask else None
        key = result.image.key
        thumbnails: dict[str, str] = {}
        height, width = picture.shape[:2]
        record = replace(record, width=width, height=height)
        shortest = min(height, width)
        seen = (shortest / height, shortest / width) if self._writing.middle_square else (1.0, 1.0)
        if "zsad" in self._writing.formats:
            scores = pixel_map(result.map, picture.shape[:2], result.scale, mask, seen)  # [H, W]
            record = replace(record, map=f"maps/{key}.tiff", overlay_file=f"overlays/{key}.jpg")
            Image.fromarray(scores).save(self._path(record.map), format="TIFF")
            small, overlay = draw_small(bgr, scores)
            self._path(record.overlay_file).write_bytes(jpeg(overlay, 90))
            thumbnails = {"image": thumbnail(small), "overlay": thumbnail(overlay)}
        if "rayan" in self._writing.formats:
            scores = pixel_map(result.map, (SIDE, SIDE), result.scale, mask, seen)
            record = replace(record, json_file=f"{key}_scores.json")
            self._path(record.json_file).write_text(challenge_json(result.score, scores))
        return record, int(height * seen[0] * width * seen[1] / result.map.size / 4), thumbnails

    def _path(self, relative: str) -> Path:
        path = self._staging / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _line(written: Written) -> str:
    failure = None if written.failure is None else asdict(written.failure)
    return json.dumps([asdict(written.record), written.facts, written.least_area, failure]) + "\n"


def _rewritten(path: Path, lines: Iterable[str]) -> IO[str]:
    """Write a file anew, so that it always is either the old or the new one; return it, open for more lines."""
    with written_whole(path) as draft, draft.open("w", encoding="ascii") as file:
        file.writelines(lines)
    return path.open("a", encoding="ascii")


def read_journal(staging: Path, fingerprint: str) -> tuple[list[Written], dict[str, str]]:
    """Return what an interrupted run has written of a category, and the lines of its thumbnails by image path.

    Images that had a failure, or whose files are not all there, are left out; of another fingerprint, all are.
    """
    try:
        first, *lines = (staging / JOURNAL).read_text(encoding="ascii").splitlines()
        thumbnails = _thumbnail_lines(staging)
        if json.loads(first) != fingerprint:
            return [], {}
    except (OSError, ValueError):
        return [], {}
    written = []
    for line in lines:
        with suppress(ValueError):  # the end of a line is missing
            record, facts, least_area, failure = json.loads(line)
            image = ImageRecord(**record)
            if failure is None and _has_files(staging, image, image.path in thumbnails):
                written.append(Written(image, facts, least_area))
    return written, {image.record.path: thumbnails[image.record.path] for image in written if image.record.overlay_file}


def _has_files(staging: Path, image: ImageRecord, has_thumbnails: bool) -> bool:
    """Return whether the files of an image are there; the challenge's is read, because it may be half of one."""
    try:
        if image.json_file:
            read_challenge((staging / image.json_file).read_text())
    except (OSError, ValueError):
        return False
    there = all((staging / file).is_file() for file in (image.map, image.overlay_file) if file)
    return there and (has_thumbnails or not image.overlay_file)


def _thumbnail_lines(folder: Path) -> dict[str, str]:
    """Return the lines of thumbnails in a category's folder by image path, but for those whose end is missing."""
    lines = {}
    for line in (folder / THUMBNAILS).read_text(encoding="ascii").splitlines():
        with suppress(ValueError):
            lines[json.loads(line)[0]] = line + "\n"
    return lines


def read_thumbnails(output: Path, category: str) -> dict[str, dict[str, str]]:
    """Return the thumbnails of a finished category by image path."""
    lines = (output / category / THUMBNAILS).read_text(encoding="ascii").splitlines()
    return dict(json.loads(line) for line in lines)


def _rounded(image: ImageRecord) -> ImageRecord:
    return replace(image, score=round(image.score, 6), raw_score=round(image.raw_score, 6))


def _write_tables(folder: Path, images: Sequence[ImageRecord], with_verdicts: bool) -> None:
    columns = ["path", "score", "rank", "raw_score", "map"] + (
        ["verdict", "regions", "defect_area"] if with_verdicts else []
    )
    # Names that are no valid Unicode keep their bytes.
    with (folder / SCORES).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for image in sorted(images, key=lambda image: image.rank):
            row = [image.path, f"{image.score:.6f}", image.rank, f"{image.raw_score:.6f}", image.map]
            if with_verdicts:
                regions = image.regions or []
                row += [image.verdict, len(regions), sum(region.area for region in regions)]
            table.writerow(row)
    if not with_verdicts:
        return
    with (folder / "regions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["path", "x", "y", "width", "height", "area", "peak"])
        for image in images:
            table.writerows([image.path, *asdict(region).values()] for region in image.regions or [])


def _beside(final: Path, suffix: str) -> Path:
    """Name a hidden folder next to a category's; a digest, because that name may be as long as allowed."""
    return final.with_name(f".{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}.{suffix}")


def _move_into_place(staging: Path, final: Path) -> None:
    """Replace a finished category's folder; the old one stays whole until the new one is ready."""
    old = _beside(final, "old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        staging.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)

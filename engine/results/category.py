"""One category's folder: files of its images as they come, then tables and the record, and into place as a whole."""

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.ahead import Ahead
from zsad.engine.images.categories import InputImage
from zsad.engine.images.decode import decode
from zsad.engine.images.loader import held_bytes
from zsad.engine.images.stored import ImageError
from zsad.engine.images.tree import RECORD, SCORES
from zsad.engine.scores.maps import object_mask, pixel_map
from zsad.engine.scores.verdicts import Region, find_regions

from .drawing import draw_small, jpeg, thumbnail
from .rayan import SIDE, challenge_json, with_score
from .records import CategoryRecord, Failure, ImageRecord

Format = Literal["zsad", "rayan"]

THUMBNAILS = "thumbnails.jsonl"  # a line for each image: its path and data URIs by name


@dataclass(frozen=True)
class Writing:
    """How results are written."""

    formats: Sequence[Format]
    object_mask: bool  # background by colour gets the lowest score
    workers: int
    memory_limit: int  # bytes that images on their way may take


@dataclass(frozen=True)
class Result:
    """What there is to write of one image."""

    image: InputImage
    score: float  # in [0, 1]
    raw_score: float
    map: NDArray[np.float32]  # [h, w] in the method's units
    scale: tuple[float, float]  # map values that become 0 and 1


@dataclass(frozen=True)
class _Written:
    record: ImageRecord
    thumbnails: Mapping[str, str]
    least_area: int = 0  # pixels of a defect region at least: a quarter of a map's cell
    failure: Failure | None = None


class CategoryWriter:
    """Writes a category's folder under a temporary name; without `finish`, nothing of it is left behind.

    Raises OSError, naming a file, when the disk refuses.
    """

    def __init__(self, output: Path, name: str, writing: Writing, bit_depth: int | None) -> None:
        """bit_depth: of grey values in 16-bit files."""
        self._final, self._writing, self._bit_depth = output / name, writing, bit_depth
        self._staging = _beside(self._final, "partial")
        self._written: list[_Written] = []  # without maps and thumbnails
        self.scale: tuple[float, float] | None = None  # of the maps, the same for all images

    def __enter__(self) -> "CategoryWriter":
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        self._thumbnails: IO[str] = (self._staging / THUMBNAILS).open("w", encoding="ascii")
        workers = self._writing.workers
        self._ahead = Ahead(self._write_image, workers, 2 * workers, self._writing.memory_limit, "write")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ahead.__exit__(kind, error, traceback)
        self._thumbnails.close()
        shutil.rmtree(self._staging, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            # Writing to an open file fails without naming it.
            raise OSError(error.errno, error.strerror or str(error), str(self._staging)) from error

    def write(self, result: Result) -> None:
        """Queue the files of an image."""
        self.scale = result.scale
        self._keep(self._ahead.put(result, held_bytes(result.image.path)))

    def scores(self) -> NDArray[np.float64]:
        """Wait for what is queued; return the scores [N] of all images in the order of `write`."""
        self._keep(self._ahead.rest())
        return np.array([written.record.score for written in self._written])

    def rescore(self, scores: NDArray[np.float64]) -> None:
        """Replace the scores [N] of all images, in the order of `write`, also in the files that hold them."""
        self._keep(self._ahead.rest())
        for number, score in enumerate(scores.tolist()):
            written = self._written[number]
            self._written[number] = replace(written, record=replace(written.record, score=score))
            if written.record.json_file:
                path = self._staging / written.record.json_file
                path.write_text(with_score(path.read_text(), score))

    def finish(self, record: CategoryRecord) -> CategoryRecord:
        """Complete a record that lacks only what belongs to single images, and move the folder into place.

        Images that score above the record's threshold are anomalous, their regions what is above its region threshold.
        """
        images = self._judged(record)
        self._thumbnails.close()
        failures = [*record.failures, *(written.failure for written in self._written if written.failure is not None)]
        complete = replace(record, images=images, failures=failures)
        _write_tables(self._staging, images, record.threshold is not None)
        (self._staging / RECORD).write_text(complete.to_json())
        _move_into_place(self._staging, self._final)
        return complete

    def _keep(self, done: Iterator[tuple[Result, _Written]]) -> None:
        for _, written in done:
            if written.thumbnails:
                self._thumbnails.write(json.dumps([written.record.path, written.thumbnails]) + "\n")
            self._written.append(replace(written, thumbnails={}))

    def _judged(self, record: CategoryRecord) -> list[ImageRecord]:
        """Return the images' records with ranks, and where there is a threshold with verdicts and regions."""
        scores = self.scores()
        ranks = np.empty(len(scores), int)
        ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
        images = []
        for written, rank in zip(self._written, ranks.tolist(), strict=True):
            image = replace(written.record, rank=rank)
            if record.threshold is not None:
                anomalous = image.score > record.threshold
                regions = self._regions(written, record.region_threshold) if anomalous else []
                verdict = "anomalous" if anomalous else "normal"
                image = replace(image, verdict=verdict, regions=regions if image.map else None)
            images.append(_rounded(image))
        return images

    def _regions(self, written: _Written, threshold: float | None) -> list[Region]:
        if threshold is None or not written.record.map:
            return []
        with Image.open(self._staging / written.record.map) as file:
            return find_regions(np.asarray(file), threshold, written.least_area)

    def _write_image(self, result: Result, last_try: bool) -> _Written:
        record = ImageRecord(str(result.image.relative), result.score, result.raw_score)
        try:
            return self._draw(result, record)
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
        return _Written(record, {}, failure=Failure(record.path, reason))

    def _draw(self, result: Result, record: ImageRecord) -> _Written:
        picture = np.asarray(decode(result.image.path, self._bit_depth))  # [H, W, 3] RGB
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        mask = object_mask(bgr) if self._writing.object_mask else None
        key = result.image.key
        thumbnails: dict[str, str] = {}
        height, width = picture.shape[:2]
        record = replace(record, width=width, height=height)
        if "zsad" in self._writing.formats:
            scores = pixel_map(result.map, picture.shape[:2], result.scale, mask)  # [H, W]
            record = replace(record, map=f"maps/{key}.tiff", overlay_file=f"overlays/{key}.jpg")
            Image.fromarray(scores).save(self._path(record.map), format="TIFF")
            small, overlay = draw_small(bgr, scores)
            self._path(record.overlay_file).write_bytes(jpeg(overlay, 90))
            thumbnails = {"image": thumbnail(small), "overlay": thumbnail(overlay)}
        if "rayan" in self._writing.formats:
            scores = pixel_map(result.map, (SIDE, SIDE), result.scale, mask)
            record = replace(record, json_file=f"{key}_scores.json")
            self._path(record.json_file).write_text(challenge_json(result.score, scores))
        return _Written(record, thumbnails, least_area=int(height * width / result.map.size / 4))

    def _path(self, relative: str) -> Path:
        path = self._staging / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


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

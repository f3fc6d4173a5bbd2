"""The files of single images: map, overlay, pictures of stages, the challenge's JSON; and its defect regions."""

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, TiffImagePlugin  # noqa: F401 - Pillow loads all it knows to find the one for TIFF

from zsad.engine.config import Tiling
from zsad.engine.images.categories import InputImage
from zsad.engine.images.decode import decode, pixels
from zsad.engine.images.loader import held_bytes
from zsad.engine.images.stored import BYTES_PER_PIXEL, ImageError, read_map
from zsad.engine.methods.bitmasks import union
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.tile_grid import tile_grid
from zsad.engine.scores.maps import object_mask, pixel_map
from zsad.engine.scores.verdicts import Bounds, Region, find_regions
from zsad.kernels.files import WholeFile

from .drawing import OVERLAY_SIDE, draw_overlay, draw_stages, jpeg, shrink, stage_pictures
from .formats import Format
from .rayan import ENDING, SIDE, challenge_json
from .records import Failure, ImageRecord

Background = Literal["none", "colour", "stages"]
Pictures = Mapping[str, NDArray[np.uint8]]  # [h, w, 3] BGR each, by name
Done = TypeVar("Done")


@dataclass(frozen=True)
class Writing:
    """How results are written."""

    formats: Sequence[Format]
    background: Background  # what tells it; it gets the lowest score
    keep_stages: bool  # as pictures
    workers: int
    memory_limit: int  # bytes that images on their way may take
    middle_square: bool = False  # maps are of the middle square of each image
    tiling: Tiling = field(default_factory=Tiling)  # of images, whose maps were put together from those of tiles
    cells: int | None = None  # along a tile's side in these; None: as many as pixels


@dataclass(frozen=True)
class Result:
    """What there is to write of one image."""

    index: int  # of the image within its category
    score: float  # in [0, 1]
    raw_score: float
    map: NDArray[np.float32]  # [h, w] in the method's units
    scale: tuple[float, float]  # map values that become 0 and 1
    facts: ArrayLike | None = None  # [D], what scores of the whole category need of the image
    stages: Stages | None = None
    note: str | None = None  # what the user should know of the file
    p_value: float | None = None  # share of normal images that score as high
    seconds: float | None = None  # that reading it and the networks have taken, of methods that judge each by itself
    pixels: NDArray[np.uint8] | None = None  # [H, W, 3] RGB, where they are still there; else they are read again


class Written(NamedTuple):
    """What is kept of an image whose files are written: a line of the journal."""

    number: int  # of the image within its category
    record: ImageRecord
    facts: list[float] | None = None  # of `Result`
    least_area: int = 0  # pixels of a defect region at least: a quarter of a map's cell
    failure: Failure | None = None


class ImageFiles:
    """Writes the files of images into a category's folder, which is there."""

    def __init__(self, folder: Path, writing: Writing, bit_depth: int | None, beside: Executor | None = None) -> None:
        """bit_depth: of grey values in 16-bit files. beside: what draws overlays while maps are written."""
        self._folder, self._writing, self._bit_depth, self._beside = folder, writing, bit_depth, beside

    def write(self, image: InputImage, result: Result, last_try: bool) -> tuple[Written, Pictures]:
        """Write an image's files; returns what is kept of it, and pictures to make thumbnails of.

        Raises OSError, and MemoryError unless it is the last try.
        """
        record = ImageRecord(
            str(image.relative), result.score, result.raw_score, p_value=result.p_value, note=result.note
        )
        facts = None if result.facts is None else np.asarray(result.facts).tolist()
        try:
            record, least_area, pictures = self._draw(result, image, record)
            record = replace(record, sizes=record.sizes_in(self._folder))
            return Written(result.index, record, facts, least_area), pictures
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
        return Written(result.index, record, facts, failure=Failure(record.path, reason)), {}

    def take_over(self, folder: Path, record: ImageRecord) -> None:
        """Take an image's files from a category's finished folder, which keeps them; raises OSError."""
        for file in record.files():
            target = self._path(file)
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to(folder / file)
            except OSError:  # of a file system without links
                shutil.copyfile(folder / file, target)

    def _draw(self, result: Result, image: InputImage, record: ImageRecord) -> tuple[ImageRecord, int, Pictures]:
        """Draw an image's files; returns its record, the least area of a region in pixels, and pictures."""
        rgb = result.pixels  # [H, W, 3]
        if rgb is None:
            rgb = pixels(decode(image.path, self._bit_depth))
        (height, width, _), mask = rgb.shape, self._mask(rgb[:, :, ::-1], result.stages)
        key, pictures = image.key, dict[str, NDArray[np.uint8]]()
        record = replace(record, width=width, height=height)
        shortest = min(height, width)
        seen = (shortest / height, shortest / width) if self._writing.middle_square else (1.0, 1.0)
        covered = None
        if self._writing.tiling:
            grid = tile_grid((height, width), self._writing.tiling, self._writing.cells)
            covered = grid.covered((height, width))
        if "zsad" in self._writing.formats:
            scores = pixel_map(result.map, (height, width), result.scale, mask, seen, covered)  # [H, W]
            record = replace(record, map=f"maps/{key}.tiff", overlay_file=f"overlays/{key}.jpg")
            overlay_file, map_file = self._path(record.overlay_file), self._path(record.map)
            pictures = self._at_once(
                lambda: _with_overlay(_small(rgb), scores, result.stages, overlay_file),
                lambda: _write_map(scores, map_file),
            )
        if self._writing.keep_stages and result.stages is not None:
            files = []
            for name, encoded in stage_pictures(pictures.get("image", _small(rgb)), result.stages):
                files.append(f"stages/{key}-{name}")
                self._path(files[-1]).write_bytes(encoded)
            record = replace(record, stage_files=files)
        if "rayan" in self._writing.formats:
            scores = pixel_map(result.map, (SIDE, SIDE), result.scale, mask, seen, covered)
            record = replace(record, json_file=f"{key}{ENDING}")
            self._path(record.json_file).write_text(challenge_json(result.score, scores))
        return record, int(height * seen[0] * width * seen[1] / result.map.size / 4), pictures

    def _at_once(self, first: Callable[[], Done], second: Callable[[], Any]) -> Done:
        """Do two things, beside each other where there is a thread for it; returns what the first one does."""
        if self._beside is None:
            second()
            return first()
        beside = self._beside.submit(first)
        try:
            second()
        finally:
            wait([beside])
        return beside.result()

    def _mask(self, bgr: NDArray[np.uint8], stages: Stages | None) -> NDArray[np.bool_] | None:
        """Return which pixels [H, W] of an image are no background; None: all of them."""
        if self._writing.background == "colour":
            return object_mask(bgr)
        if self._writing.background == "stages" and stages is not None:
            return union([stages.foreground], stages.size)
        return None

    def _path(self, relative: str) -> Path:
        path = self._folder / relative
        if not path.parent.is_dir():
            # Only below its own folder: if that is gone, it must not come back half empty.
            for folder in reversed(Path(relative).parents[:-1]):
                (self._folder / folder).mkdir(exist_ok=True)
        return path


def bytes_to_write(image: InputImage, result: Result) -> int:
    """Return what an image and its results take while they are written."""
    map_bytes: int = result.map.nbytes
    if result.pixels is None:
        return held_bytes(image.path) + map_bytes
    return BYTES_PER_PIXEL * (result.pixels.size // 3) + map_bytes


def _write_map(scores: NDArray[np.float32], path: Path) -> None:
    """Write a map [H, W] as it is; raises OSError."""
    with WholeFile(path) as file:
        Image.fromarray(scores).save(file, format="TIFF")


def _small(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] at the overlays' size, [h, w, 3] BGR."""
    return cv2.cvtColor(shrink(rgb, OVERLAY_SIDE), cv2.COLOR_RGB2BGR).astype(np.uint8, copy=False)


def _with_overlay(
    small: NDArray[np.uint8], scores: NDArray[np.float32], stages: Stages | None, path: Path
) -> dict[str, NDArray[np.uint8]]:
    """Write a map [H, W] over an image [h, w, 3]; returns the pictures that are shown of it by name."""
    pictures = {"image": small, "overlay": draw_overlay(small, scores)}
    path.write_bytes(jpeg(pictures["overlay"], 90))
    if stages is not None:
        pictures["stages"] = draw_stages(small, stages)
    return pictures


def key_of(facts: Mapping[str, Any]) -> str:
    """Return what an image's results are called, by the facts of its record; nothing where it has none."""
    key = facts["map"].removeprefix("maps/").removesuffix(".tiff") or facts["json_file"].removesuffix("_scores.json")
    return str(key)


def judged(folder: Path, written: Written, bounds: Bounds) -> ImageRecord:
    """Return an image's record with its verdict and, unless it is accepted, its defect regions, read from its map."""
    record, regions = written.record, list[Region]()
    verdict = bounds.verdict(record.score)
    if verdict != "accept" and bounds.region is not None and record.map:
        regions = find_regions(np.asarray(read_map(folder / record.map)), bounds.region, written.least_area)
    return replace(record, verdict=verdict, regions=regions if record.map else None)


def rounded(image: ImageRecord) -> ImageRecord:
    """Return a record with its scores as they are written."""
    return replace(image, score=round(image.score, 6), raw_score=round(image.raw_score, 6))

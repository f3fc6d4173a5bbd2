"""Writes what a run found: scores, maps, overlays, regions, the challenge's JSON, and the record of each category."""

import base64
import csv
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.config import Config
from zsad.engine.images.decode import ImageError, decode
from zsad.engine.images.folders import RECORD, Category
from zsad.engine.pipeline import CategoryScores
from zsad.engine.scores.image_scores import min_max
from zsad.engine.scores.maps import object_mask, pixel_map
from zsad.engine.scores.verdicts import auto_threshold, find_regions, region_threshold

Format = Literal["zsad", "rayan"]

OVERLAY_SIDE = 1024  # pixels at most, so that large images do not make large reports
THUMBNAIL_SIDE = 256
CHALLENGE_SIDE = 224

THUMBNAILS = "thumbnails.json"
NO_FILES = {"map": "", "overlay_file": "", "json_file": ""}  # of an image, relative to its category's folder


class OutputError(Exception):
    """Results that cannot be written; the message says why and what to do."""


@dataclass(frozen=True)
class _ImageWriter:
    """Draws and writes the files of single images of one category."""

    folder: Path
    scored: CategoryScores
    formats: Sequence[Format]
    masked: bool  # background by colour gets the lowest score
    scale: tuple[float, float]  # lowest and highest patch score of the category
    region_threshold: float | None

    def write(self, index: int, anomalous: bool) -> tuple[dict[str, Any], dict[str, str]]:
        """Write one image's files; return what the record says of it and its thumbnails as data URIs."""
        image = self.scored.images[index]
        picture = np.asarray(decode(image.path))  # [h, w, 3] RGB
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        mask = object_mask(bgr) if self.masked else None
        patch_map = self.scored.map_scores[index].reshape(self.scored.grid)
        found: dict[str, Any] = {"width": picture.shape[1], "height": picture.shape[0], **NO_FILES}
        thumbnails: dict[str, str] = {}
        if "zsad" in self.formats:
            scores = pixel_map(patch_map, picture.shape[:2], self.scale, mask)  # [h, w]
            found["map"] = f"maps/{image.key}.tiff"
            found["overlay_file"] = f"overlays/{image.key}.jpg"
            path = self._path(found["map"])
            Image.fromarray(scores).save(path, format="TIFF")
            if self.region_threshold is not None:
                found["regions"] = self._regions(scores) if anomalous else []
            small = _shrink(bgr, OVERLAY_SIDE)
            resized = cv2.resize(scores, small.shape[1::-1], interpolation=cv2.INTER_AREA)
            overlay = draw_overlay(small, resized.astype(np.float32, copy=False))
            self._path(found["overlay_file"]).write_bytes(_jpeg(overlay, 90))
            for name, drawn in (("image", small), ("overlay", overlay)):
                encoded = base64.b64encode(_jpeg(_shrink(drawn, THUMBNAIL_SIDE), 82)).decode()
                thumbnails[name] = f"data:image/jpeg;base64,{encoded}"
        if "rayan" in self.formats:
            scores = pixel_map(patch_map, (CHALLENGE_SIDE, CHALLENGE_SIDE), self.scale, mask)
            content = json.dumps(challenge_record(float(self.scored.scores[index]), scores))
            found["json_file"] = f"{image.key}_scores.json"
            self._path(found["json_file"]).write_text(content)
        return found, thumbnails

    def _path(self, relative: str) -> Path:
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _regions(self, scores: NDArray[np.float32]) -> list[dict[str, Any]]:
        assert self.region_threshold is not None
        patch_area = scores.size / (self.scored.grid[0] * self.scored.grid[1])
        return [asdict(region) for region in find_regions(scores, self.region_threshold, int(patch_area / 4))]


def challenge_record(score: float, scores: NDArray[np.float32]) -> dict[str, object]:
    """Return the challenge's JSON structure for an image score and a map [224, 224], four decimals."""
    return {
        "img_level_score": {"__ndarray__": round(score, 4), "dtype": "float64", "shape": []},
        "pix_level_score": {
            "__ndarray__": [np.round(scores.astype(np.float64), 4).tolist()],
            "dtype": "float64",
            "shape": [1, *scores.shape],
        },
    }


def draw_overlay(bgr: NDArray[np.uint8], scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blend a map [h, w] in [0, 1] over an image [h, w, 3]: fixed colour scale, opacity growing with the score."""
    colours = cv2.applyColorMap((np.clip(scores, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    opacity = (0.12 + 0.58 * np.clip(scores, 0, 1))[:, :, None]
    return (bgr * (1 - opacity) + colours * opacity).astype(np.uint8)


def _shrink(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return bytes(encoded)


def fingerprint(category: Category, config: Config, checkpoints: Mapping[str, str], formats: Iterable[str]) -> str:
    """Return a digest of everything that decides a category's results, to know whether they are still valid."""
    files: list[tuple[str, int, int]] = []
    for image in category.images:
        try:
            status = image.path.stat()
        except OSError:  # decoding will say what is wrong with it
            files.append((str(image.relative), -1, -1))
        else:
            files.append((str(image.relative), status.st_size, status.st_mtime_ns))
    version = importlib.metadata.version("zsad")
    content = json.dumps([version, files, config.as_dict(), dict(checkpoints), sorted(formats)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def finished_record(output: Path, category: Category, wanted: str) -> dict[str, Any] | None:
    """Return the record of a category that an earlier run finished with the same fingerprint, else None.

    A category whose files are no longer all there counts as unfinished.
    """
    folder = output / category.name
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["fingerprint"] != wanted:
            return None
        written = [THUMBNAILS, "scores.csv"]
        written += [image[kind] for image in record["images"] for kind in ("map", "overlay_file", "json_file")]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if all((folder / name).is_file() for name in written if name) else None


def check_output(output: Path, categories: Sequence[Category]) -> None:
    """Make sure, before any work, that results can be written; raises OutputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output, buffering=0) as probe:
            probe.write(bytes(4096))  # a full disk still takes empty files
        taken = [
            folder
            for folder in (output / category.name for category in categories)
            if os.path.lexists(folder) and not (folder / RECORD).is_file()
        ]
    except OSError as error:
        raise OutputError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from error
    if taken:
        raise OutputError(f"{taken[0]}: exists and holds no zsad results; move it away or choose another --output")


def write_category(
    output: Path,
    category: Category,
    scored: CategoryScores,
    config: Config,
    formats: Sequence[Format],
    digest: str,
    workers: int,
) -> dict[str, Any]:
    """Write a category's folder under a temporary name, move it into place, and return its record.

    Raises OSError, naming a file, when the disk refuses; nothing of the category is left behind then.
    """
    threshold = auto_threshold(scored.scores) if isinstance(config.threshold, str) else config.threshold
    anomalous = scored.scores > threshold if threshold is not None else np.zeros(len(scored.scores), bool)
    scale = (float(scored.map_scores.min()), float(scored.map_scores.max()))
    pixels_above = None if threshold is None else region_threshold(min_max(scored.map_scores), anomalous)

    staging = _beside(output / category.name, "partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        writer = _ImageWriter(staging, scored, formats, config.map.object_mask, scale, pixels_above)
        failures = list(scored.failures)

        def write(index: int) -> tuple[dict[str, Any], dict[str, str]]:
            try:
                return writer.write(index, bool(anomalous[index]))
            except ImageError as error:  # readable when it was scored, but not now
                failures.append((str(scored.images[index].relative), f"no map, the file has changed: {error}"))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                failures.append((str(scored.images[index].relative), "no map, its path in the output is too long"))
            return NO_FILES, {}

        with ThreadPoolExecutor(workers, "write") as pool:
            written = list(pool.map(write, range(len(scored.images))))
        ranks = np.empty(len(scored.images), int)
        ranks[np.argsort(-scored.scores, kind="stable")] = np.arange(1, len(scored.images) + 1)
        images = [
            {
                "path": str(image.relative),
                "score": round(float(scored.scores[i]), 6),
                "rank": int(ranks[i]),
                "raw_score": round(float(scored.raw_scores[i]), 6),
                "verdict": None if threshold is None else ("anomalous" if anomalous[i] else "normal"),
                **written[i][0],
            }
            for i, image in enumerate(scored.images)
        ]
        record = {
            "name": category.name,
            "fingerprint": digest,
            "images": images,
            "scale": scale,
            "threshold": threshold,
            "region_threshold": pixels_above,
            "groups": scored.groups,
            "group_size": config.group_size,
            "failures": [{"path": path, "reason": reason} for path, reason in failures],
        }
        _write_tables(staging, images, threshold is not None)
        thumbnails = {str(image.relative): written[i][1] for i, image in enumerate(scored.images)}
        (staging / THUMBNAILS).write_text(json.dumps(thumbnails))
        (staging / RECORD).write_text(json.dumps(record, indent=1))
        _move_into_place(staging, output / category.name)
    except OSError as error:
        # Writing to an open file fails without naming it.
        raise OSError(error.errno, error.strerror or str(error), error.filename or str(staging)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def read_thumbnails(output: Path, category: str) -> dict[str, dict[str, str]]:
    """Return the thumbnails of a finished category by image path."""
    thumbnails: dict[str, dict[str, str]] = json.loads((output / category / THUMBNAILS).read_text())
    return thumbnails


def _write_tables(folder: Path, images: Sequence[Mapping[str, Any]], with_verdicts: bool) -> None:
    columns = ["path", "score", "rank", "raw_score", "map"] + (
        ["verdict", "regions", "defect_area"] if with_verdicts else []
    )
    # Names that are no valid Unicode keep their bytes.
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for image in sorted(images, key=lambda image: int(image["rank"])):
            row = [image["path"], f"{image['score']:.6f}", image["rank"], f"{image['raw_score']:.6f}", image["map"]]
            if with_verdicts:
                regions = image.get("regions", [])
                row += [image["verdict"], len(regions), sum(region["area"] for region in regions)]
            table.writerow(row)
    if not with_verdicts:
        return
    with (folder / "regions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        names = ["x", "y", "width", "height", "area", "peak"]
        table.writerow(["path", *names])
        for image in images:
            table.writerows([image["path"], *(region[name] for name in names)] for region in image.get("regions", []))


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

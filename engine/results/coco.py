"""COCO's files: defect regions as boxes and masks, with scores.

    labels.json     a data set of the images and of what was found in them, which FiftyOne and CVAT import
    results.json    the same findings as a list, as COCO's evaluation reads results, with the numbers of labels.json

Masks are run-length encoded by pycocotools, as large as their images. A region's score is its highest map value. Names
of images are relative to the folder that was scored.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TextIO

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from zsad.engine.config import ConfigError
from zsad.engine.images.folders import Dataset
from zsad.engine.scores.verdicts import labelled_regions
from zsad.kernels.files import parse_json

from .checking import upright_size
from .records import ImageRecord
from .source import Faults, Finished, Report, Source, in_threads

LABELS, RESULTS = "labels.json", "results.json"
DEFECT = {"id": 1, "name": "defect", "supercategory": "defect"}  # what kind of defect it is, nobody knows


NO_REGIONS = "no regions, since the category has no verdicts; give --threshold"


def library() -> Any:
    """Return pycocotools' module of masks; raises ConfigError where it is missing."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ConfigError(f"COCO's files need pycocotools ({error}); run: pip install 'zsad[coco]'") from None
    return mask


def write(folder: Path, source: Source) -> Faults:
    """Write both files; returns what they lack. Raises OSError, ImageError, and ConfigError as `library` does."""
    lacking = Faults()
    with (folder / LABELS).open("w") as labels, (folder / RESULTS).open("w") as results:
        labels.write(f'{{"info": {{"description": "zsad"}}, "categories": [{json.dumps(DEFECT)}], "images": ')
        _write_list(labels, (_image_facts(source.data, *known) for known in enumerate(source.images(lacking), 1)))
        labels.write(', "annotations": ')
        results.write("[")
        _write_list(labels, _annotations(source, lacking, results))
        results.write("\n]\n")
        labels.write("}\n")
    return lacking


def _image_facts(data: Path, number: int, known: tuple[Finished, ImageRecord]) -> dict[str, Any]:
    category, image = known
    name = _name(data, category.root, image.path)
    facts = {"id": number, "file_name": name, "width": image.width, "height": image.height}
    return {**facts, "score": image.score, "verdict": image.verdict}


def _name(data: Path, root: Path, path: str) -> str:
    """Return an image's path below the folder that was scored."""
    return str(PurePosixPath(os.path.relpath(root, data), path))


def _annotations(source: Source, lacking: Faults, results: TextIO) -> Iterator[dict[str, Any]]:
    """Yield what was found, each also written as a result."""

    def jobs() -> Iterator[tuple[ImageRecord, Callable[[], list[tuple[dict[str, Any], int]]]]]:
        for image_id, (category, image) in enumerate(source.images(Faults(), "regions"), 1):
            bound = category.record.region_bound
            if image.regions is None or bound is None:
                lacking.add(NO_REGIONS, category.record.name, once=True)
            else:
                yield image, partial(_found, image_id, category, image, bound)

    every = (one for found in in_threads(jobs()) for one in found)
    for number, (result, area) in enumerate(every, 1):
        results.write(",\n" * (number > 1) + json.dumps(result))
        yield {"id": number, **result, "area": area, "iscrowd": 0}


def _found(image_id: int, category: Finished, image: ImageRecord, threshold: float) -> list[tuple[dict[str, Any], int]]:
    """Return the defect regions of an image as results, with their areas in pixels."""
    if not image.regions:
        return []
    mask, all_found = library(), []
    labels, regions = labelled_regions(category.map(image), threshold, min(region.area for region in image.regions))
    for label, region in regions:
        encoded = mask.encode(np.asfortranarray(labels == label, np.uint8))
        segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
        box = [region.x, region.y, region.width, region.height]
        result = {"image_id": image_id, "category_id": DEFECT["id"], "bbox": box, "score": region.peak}
        all_found.append(({**result, "segmentation": segmentation}, region.area))
    return all_found


def _write_list(file: TextIO, items: Iterable[dict[str, Any]]) -> None:
    """Write a list as it comes: there may be a million."""
    file.write("[")
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))
    file.write("\n]")


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class _Mask:
    size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class _Found:
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: _Mask
    score: Annotated[float, Field(ge=0, le=1)]


_IMAGES, _FOUND = TypeAdapter(_Image), TypeAdapter(_Found)


def check(folder: Path, dataset: Dataset | None, faults: Faults, report: Report) -> int:
    """Look at both files, and at names and sizes where the images are known; returns how many images there are.

    Raises ConfigError as `library` does. Both files are read as a whole.
    """
    masks, done = library(), 0
    labels, results = _read(folder / LABELS, faults), _read(folder / RESULTS, faults)
    of_labels = labels if isinstance(labels, dict) else {}
    images = _images(of_labels.get("images"), faults)
    if dataset is not None:
        _compare(images, dataset, faults, report)
    for name, items in ((LABELS, of_labels.get("annotations")), (RESULTS, results)):
        if not isinstance(items, list):
            faults.add("no list of findings", name)
            continue
        for number, item in enumerate(items, 1):
            report(done + number)
            if (fault := _fault(item, images, masks)) is not None:
                faults.add(f"{fault}, in {name}", f"finding {number}")
        done += len(items)
    if isinstance(results, list) and len(results) * 2 != done:
        faults.add(f"another number of findings than in {LABELS}", RESULTS)
    return len(images)


def _read(file: Path, faults: Faults) -> Any:
    """Read a file; None, and a fault, where there is none or no JSON in it."""
    try:
        return parse_json(file.read_bytes())
    except FileNotFoundError:
        faults.add("missing", file.name)
    except ValueError:
        faults.add("no JSON", file.name)
    return None


def _images(items: Any, faults: Faults) -> dict[int, _Image]:
    """Return the images by their numbers."""
    found: dict[int, _Image] = {}
    for number, item in enumerate(items if isinstance(items, list) else (), 1):
        try:
            image = _IMAGES.validate_python(item)
        except ValidationError:
            faults.add(f"no whole entry of an image, in {LABELS}", f"image {number}")
            continue
        if image.id in found:
            faults.add("a number of two images", image.id)
        found[image.id] = image
    return found


def _compare(images: dict[int, _Image], dataset: Dataset, faults: Faults, report: Report) -> None:
    """Compare names and sizes with those of the images that there are."""
    sizes = {image.file_name: (image.height, image.width) for image in images.values()}
    if len(sizes) < len(images):
        faults.add("images of the same name", LABELS)
    files = (
        (_name(dataset.root, category.root, str(image.relative)), image.path)
        for category in dataset.categories
        for image in category.images
    )
    for number, (name, path) in enumerate(files, 1):
        report(number)
        size, own = sizes.pop(name, None), upright_size(path)
        if size is None:
            faults.add("missing", name)
        elif own is not None and own != size:
            faults.add("another size than its image", name)
    for name in sizes:
        faults.add("not expected", name)


def _fault(item: Any, images: dict[int, _Image], masks: Any) -> str | None:
    """Return what is wrong with a finding; masks: pycocotools' module."""
    try:
        found = _FOUND.validate_python(item)
    except ValidationError as error:
        return f"no whole finding ({error.errors()[0]['loc'][0]})"
    image = images.get(found.image_id)
    if image is None or found.category_id != DEFECT["id"]:
        return "an image_id or category_id that there is not"
    if found.segmentation.size != (image.height, image.width):
        return "a mask of another size than its image"
    try:
        encoded = {"size": list(found.segmentation.size), "counts": found.segmentation.counts.encode("ascii")}
        x, y, width, height = masks.toBbox(encoded).tolist()
        area = int(masks.area(encoded))
    except Exception:  # whatever is not run-length encoded
        return "a mask that cannot be decoded"
    if not area or (x, y, width, height) != found.bbox or x + width > image.width or y + height > image.height:
        return "a box that is not its mask's"
    return None

"""What MVTec AD 2's evaluation server reads: both private test splits of all eight objects, in one archive.

    submission/anomaly_images/<object>/test_private/000_regular.tiff              float16, at the image's size
    submission/anomaly_images/<object>/test_private_mixed/000_mixed.tiff          the same
    submission/anomaly_images_thresholded/<object>/…/000_regular.png              255 in defect regions, else 0
    submission.tar.gz                                                             all of it

Names, counts and types are those that MVTec's own script for checking submissions asks for.
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tifffile import imwrite

from zsad.engine.images.categories import Category
from zsad.engine.images.remote import Location
from zsad.engine.scores.verdicts import region_mask
from zsad.kernels.files import WholeFile

from .checking import Entry, check_names, entries, png_fault, tiff_fault, upright_size
from .records import ImageRecord
from .source import Faults, Finished, Progress, Report, Source, in_threads, place_of

# Images in each of the two splits.
COUNTS = {
    "can": 321,
    "fabric": 314,
    "fruit_jelly": 255,
    "rice": 277,
    "sheet_metal": 142,
    "vial": 276,
    "wallplugs": 232,
    "walnuts": 228,
}
SPLITS = {"test_private": "regular", "test_private_mixed": "mixed"}  # with what names of images end in
MAPS, MASKS = ("anomaly_images", ".tiff"), ("anomaly_images_thresholded", ".png")

FOLDER, ARCHIVE = "submission", "submission.tar.gz"
NO_MASKS = "no thresholded images, since the category has no verdicts; give --threshold"
LARGEST_FILE = 2**30  # bytes of one in the archive


def expected_images() -> Iterator[str]:
    """Yield <object>/<split>/<stem> of all images."""
    for product, count in COUNTS.items():
        for split, ending in SPLITS.items():
            yield from (f"{product}/{split}/{number:03d}_{ending}" for number in range(count))


def _key(root: Path, path: str) -> str | None:
    """Return <object>/<split>/<stem> of an image, None where it lies in no private split."""
    place = place_of(root, path)
    if place is None or place.product not in COUNTS or place.split not in SPLITS or len(place.inner.parts) != 1:
        return None
    return f"{place.product}/{place.split}/{place.inner.stem}"


def write(folder: Path, source: Source) -> Faults:
    """Write the tree and the archive; returns what they lack. Raises OSError, ImageError."""
    lacking, missing = Faults(), dict.fromkeys(expected_images())

    def jobs() -> Iterator[tuple[ImageRecord, Callable[[], None]]]:
        for category, image in source.images(lacking):
            key, named = _key(category.root, image.path), f"{category.record.name}/{image.path}"
            if key is None:
                lacking.add("left out, since it lies in no private split of the eight objects", named)
            elif key not in missing:
                lacking.add("left out, since the server knows no such name", named)
            else:
                del missing[key]
                if category.record.region_bound is None:
                    lacking.add(NO_MASKS, category.record.name, once=True)
                yield image, partial(_write_image, folder / FOLDER, key, category, image)

    for _ in in_threads(jobs()):
        pass
    for name in missing:
        lacking.add("missing, without which the server refuses the archive", name)
    _pack(folder, source.progress)
    return lacking


def _pack(folder: Path, progress: Progress) -> None:
    """Write the archive of the tree; the same files give the same bytes."""
    with (
        (folder / ARCHIVE).open("wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        files = list(entries(folder / FOLDER))
        for number, entry in enumerate(files, 1):
            facts = tarfile.TarInfo(f"{FOLDER}/{entry.name}")
            facts.size = (folder / FOLDER / entry.name).stat().st_size
            with entry.open() as content:
                archive.addfile(facts, content)
            progress("pack", number, len(files))


def _write_image(folder: Path, key: str, category: Finished, image: ImageRecord) -> None:
    """Write the files of an image; without a bound of regions there is no thresholded one."""
    scores = category.map(image)
    with _new_file(folder, MAPS, key) as file:
        imwrite(file, scores.astype(np.float16), photometric="minisblack", metadata=None)
    bound = category.record.region_bound
    if bound is None:
        return
    mask = np.zeros(scores.shape, np.uint8)
    if image.regions:
        found = region_mask(scores, bound, min(region.area for region in image.regions))
        mask = np.uint8(255) * found
    with _new_file(folder, MASKS, key) as file:
        Image.fromarray(mask).save(file, format="PNG")


def _new_file(folder: Path, kind: tuple[str, str], key: str) -> WholeFile:
    path = folder / kind[0] / f"{key}{kind[1]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return WholeFile(path)


def check(place: Path, categories: Iterable[Category] | None, faults: Faults, report: Report) -> int:
    """Look at an archive or a folder as the server would; returns how many files there are."""
    images: dict[str, Location] = {}
    for category in categories or ():
        for image in category.images:
            if (key := _key(category.root, str(image.relative))) is not None:
                images[key] = image.path
    expected = {f"{folder}/{key}{suffix}": key for key in expected_images() for folder, suffix in (MAPS, MASKS)}
    sizes: dict[str, tuple[int, int]] = {}  # of images, else of the first of their files
    number, objects = 0, set(COUNTS)
    found = _packed(place, faults) if place.is_file() else entries(place)
    for number, entry in enumerate(check_names(found, expected, faults), 1):
        report(number)
        key = expected[entry.name]
        size = sizes.get(key)
        if size is None and key in images:
            size = upright_size(images[key])
        with entry.open() as file:
            is_map = entry.name.endswith(MAPS[1])
            fault, own = tiff_fault(file, ("float16",), size) if is_map else png_fault(file, size)
        if fault is not None:
            faults.add(fault, entry.name)
        objects.discard(key.split("/")[0])
        if size is not None or own is not None:
            sizes.setdefault(key, size or own or (0, 0))
    for product in sorted(objects):
        faults.add("an object without any file", product)
    return number


def _packed(archive: Path, faults: Faults) -> Iterator[Entry]:
    """Yield the files of an archive, as they follow each other; they must lie in one folder at its top."""
    top = None
    try:
        with gzip.open(archive) as content, tarfile.open(fileobj=content, mode="r|") as packed:
            for member in packed:
                first, _, name = member.name.partition("/")
                top = top or first
                if member.isdir():
                    continue
                if not member.isfile() or member.size > LARGEST_FILE:
                    faults.add("no file of at most 1 GB", member.name)
                elif first != top or first in (MAPS[0], MASKS[0]) or not name:
                    faults.add("not in one folder at the archive's top", member.name)
                else:
                    file = packed.extractfile(member)
                    assert file is not None
                    yield Entry(name, partial(io.BytesIO, file.read()))
            while content.read(1 << 20):  # up to the end, where the checksum is
                pass
    except Exception as error:  # whatever tarfile and gzip stumble over
        faults.add(f"no whole .tar.gz archive ({error})", archive)

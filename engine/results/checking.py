"""Looking at files of a format as their reader would: what is wrong with each, in words, without its name."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.remote import Location
from zsad.engine.images.stored import ImageError, opened, read_header
from zsad.engine.images.upright import ORIENTATION

from .source import Faults, Report

LARGEST = 2**30  # pixels of a map; what declares more is not decoded

TURNED = (5, 6, 7, 8)  # orientations that make rows of columns

FLOATS = ("float16", "float32", "float64")

Size = tuple[int, int]  # height and width


class Entry(NamedTuple):
    """A file in a folder or an archive."""

    name: str
    open: Callable[[], BinaryIO]


def entries(folder: Path, apart_from: Collection[str] = ()) -> Iterator[Entry]:
    """Yield the files below a folder by their relative paths, sorted; apart_from: names at its top to leave out."""
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(above, name)
            relative = path.relative_to(folder).as_posix()
            if relative not in apart_from:
                yield Entry(relative, partial(_opened, path))


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")


def upright_size(path: Location) -> Size | None:
    """Return the size of an image's map; None where the file cannot be read."""
    with suppress(ImageError), opened(path) as image:
        turned = image.getexif().get(ORIENTATION) in TURNED
        return (image.width, image.height) if turned else (image.height, image.width)
    with suppress(ImageError):
        header = read_header(path)
        return header.rows, header.columns
    return None


def tiff_fault(file: BinaryIO, kinds: Sequence[str], size: Size | None) -> tuple[str | None, Size | None]:
    """Return what is wrong with a map in a TIFF file, and its size; size: that it must have, if one is known."""
    try:
        from tifffile import TiffFile

        with TiffFile(file) as tiff:
            if len(tiff.pages) != 1:
                return "a TIFF file with several pictures", None
            page = tiff.pages[0]
            if len(page.shape) != 2:
                return "a map with more than one channel", None
            found: Size = (page.shape[0], page.shape[1])
            if str(page.dtype) not in kinds:
                return f"a map of {page.dtype}, not of {' or '.join(kinds)}", found
            if size is not None and found != size:
                return "another size than its image", found
            if found[0] * found[1] > LARGEST:
                return "too large to be read", found
            values = page.asarray()
    except Exception:  # whatever tifffile stumbles over
        return "damaged, or no TIFF file", None
    return None if np.isfinite(values).all() else "NaN or infinity in a map", found


def png_fault(file: BinaryIO, size: Size | None) -> tuple[str | None, Size | None]:
    """Return what is wrong with a picture of black and white in a PNG file, and its size."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            found = (image.height, image.width)
            if size is not None and found != size:
                return "another size than its image", found
            if image.mode != "L":
                return "no PNG file of 8-bit grey values", found
            values: NDArray[np.uint8] = np.asarray(image)
    except Exception:  # whatever Pillow stumbles over
        return "damaged, or no PNG file", None
    return None if np.isin(values, (0, 255)).all() else "other values than 0 and 255", found


def check_names(found: Iterable[Entry], expected: Mapping[str, object] | None, faults: Faults) -> Iterator[Entry]:
    """Yield the files that are expected, or where nothing is known all; the others are faults, and what is missing."""
    left = None if expected is None else dict.fromkeys(expected)
    for entry in found:
        if left is None or entry.name in left:
            if left is not None:
                del left[entry.name]
            yield entry
        elif expected is not None:
            faults.add("twice" if entry.name in expected else "not expected", entry.name)
    for name in left or ():
        faults.add("missing", name)


def check_maps(
    files: Iterable[Entry], expected: Mapping[str, Location] | None, faults: Faults, report: Report
) -> Iterator[str]:
    """Look at maps, float TIFF files; yields the names of those that are expected.

    expected: the images' files by the names of their maps, if they are known.
    """
    for number, entry in enumerate(check_names(files, expected, faults)):
        report(number + 1)
        size = None if expected is None else upright_size(expected[entry.name])
        with entry.open() as file:
            fault, _ = tiff_fault(file, FLOATS, size)
        if fault is not None:
            faults.add(fault, entry.name)
        yield entry.name

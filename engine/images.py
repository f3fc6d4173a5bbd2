"""Images in: find them, decode them safely, make the network's input of them."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Preprocessing = Literal["imagenet", "clip"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # JPEG covers the pairs of pictures of stereo cameras

RECORD = "category.json"  # written last into a category's results: a folder that has it is finished

# Names that the results use at the top of the output folder.
RESERVED_NAMES = frozenset({"report.html", "run.json", "metrics.json", "metrics.csv", "demo-data"})

# Longer names leave no room for what the results append to them; file systems take 255 bytes.
LONGEST_NAME = 200
# Folders so named could stand where a result file must go; names that look marked are marked too, to stay distinct.
_AMBIGUOUS_FOLDER = re.compile(r"\.(tiff|jpg|csv|json)$", re.IGNORECASE)
_MARKED = re.compile(r"~[0-9a-f]{8}$")


@dataclass(frozen=True)
class Recipe:
    """How a backbone wants its images: the antialiased filter that resizes them, and what they are normalised with."""

    resampling: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]  # of values in [0, 1]
    deviation: tuple[float, float, float]


# imagenet: DINOv2, and both backbones of the challenge system; clip: MuSc.
RECIPES: dict[Preprocessing, Recipe] = {
    "imagenet": Recipe("bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": Recipe("bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class ImageError(Exception):
    """A file that cannot be scored; the message says why."""


class NothingToScoreError(ImageError):
    """A data folder without images, or that is none; the message says what was looked for."""


@dataclass(frozen=True)
class InputImage:
    """One file of a category and the name that its results are kept under."""

    path: Path
    relative: PurePosixPath  # to the category's folder, for example test/scratch/003.png
    key: PurePosixPath  # `relative` without its suffix, changed where results would clash or names be too long


@dataclass(frozen=True)
class Category:
    """Images of one product, scored against each other."""

    name: str
    root: Path
    images: tuple[InputImage, ...]
    ignored: tuple[Path, ...]  # files that do not claim to be images
    unreadable: tuple[tuple[PurePosixPath, str], ...]  # folders that could not be listed, and why


def scan(data: Path, exclude: Path | None = None) -> list[Category]:
    """Find the categories under a folder and their images, in sorted order.

    A folder with `test/` is one category in MVTec layout (only `test/` is read); a folder with images in it, or with a
    `good` folder, is one category; otherwise every subfolder is one. `exclude` is a folder to leave out, the results of
    this run; those of earlier runs are known by their record and left out too. Raises NothingToScoreError.
    """
    hidden = os.path.realpath(exclude) if exclude is not None else None
    if not os.path.lexists(data):
        raise NothingToScoreError(f"{data}: there is no such folder")
    if not _is(stat.S_ISDIR, data):
        raise NothingToScoreError(f"{data}: must be a folder of images, not a file")
    if os.path.realpath(data) == hidden:
        raise NothingToScoreError(f"{data}: is where the results are to go; choose another --output")
    try:
        entries = sorted(entry for entry in data.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise NothingToScoreError(f"{data}: cannot be listed ({error.strerror})") from error
    folders = [entry for entry in entries if _is(stat.S_ISDIR, entry) and os.path.realpath(entry) != hidden]
    is_category = (
        any(folder.name in ("test", "good") for folder in folders)
        or any(_is_image(entry) and _is(stat.S_ISREG, entry) for entry in entries)
        or not folders
    )
    categories: list[Category] = []
    for folder in [data] if is_category else folders:
        name = _shortened((data.resolve() if is_category else folder).name or "images")
        while name in RESERVED_NAMES or name in [other.name for other in categories]:
            name += "_"
        category = _read_category(name, folder, hidden)
        if category.images or category.unreadable:
            categories.append(category)
    if not any(category.images for category in categories):
        reasons = [f"; {category.root / path} {why}" for category in categories for path, why in category.unreadable]
        looked_for = ", ".join(sorted(SUFFIXES))
        raise NothingToScoreError(f"{data}: there are no images in it (looked for {looked_for}){''.join(reasons[:1])}")
    return categories


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except OSError:  # a link to nothing or in a circle, or in a folder that may not be entered
        return False


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read_category(name: str, root: Path, hidden: str | None) -> Category:
    start = root / "test" if _is(stat.S_ISDIR, root / "test") else root
    files: list[Path] = []
    unreadable: list[tuple[PurePosixPath, str]] = []
    visited: set[str] = set()

    def note(error: OSError) -> None:
        relative = PurePosixPath(os.path.relpath(error.filename, root))
        unreadable.append((relative, f"cannot be listed ({error.strerror})"))

    for folder, subfolders, names in os.walk(start, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in visited or real == hidden or RECORD in names:  # a link back to a folder already read, or results
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "ground_truth")
        files.extend(Path(folder) / name for name in sorted(names) if not name.startswith("."))
    paths = [path for path in files if _is_image(path)]
    relatives = [PurePosixPath(path.relative_to(root).as_posix()) for path in paths]
    return Category(
        name,
        root,
        tuple(map(InputImage, paths, relatives, _result_keys(relatives))),
        tuple(path for path in files if not _is_image(path)),
        tuple(unreadable),
    )


def _result_keys(relatives: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Choose the names that results are kept under, so that no two images and no file and folder share one."""
    stems = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    whole = {str(relative).casefold() for relative in relatives}
    keys = []
    for relative in relatives:
        stem = str(relative.with_suffix("")).casefold()
        key = relative.with_suffix("") if stems[stem] == 1 and stem not in whole else relative
        folders = [_marked(name) if _AMBIGUOUS_FOLDER.search(name) else _shortened(name) for name in key.parent.parts]
        keys.append(PurePosixPath(*folders, _shortened(key.name)))
    return keys


def _shortened(name: str) -> str:
    return _marked(name) if len(os.fsencode(name)) > LONGEST_NAME or _MARKED.search(name) else name


def _marked(name: str) -> str:
    encoded = os.fsencode(name)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"


def printable(text: str, keep: str = "") -> str:
    """Escape what would steer a terminal or is no Unicode, for names that come from a file system."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def decode(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    16-bit grey is divided by 257, alpha is dropped, EXIF orientation applied, of several frames the first is taken.
    Raises ImageError for what is unreadable, truncated, too large (Pillow's decompression bomb limit) or no image.
    """
    with opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file whose pixels are not decoded yet; whatever fails in the context becomes an ImageError."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size == 0:
                raise ImageError("empty file")
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            f"too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; cut it into tiles"
        ) from None
    except UnidentifiedImageError:
        raise ImageError("not a PNG, JPEG, BMP, TIFF or WebP image") from None
    except FileNotFoundError:
        raise ImageError("link to nothing" if path.is_symlink() else "no longer there") from None
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None
    except MemoryError:
        raise ImageError("not enough memory to decode it") from None
    except Exception as error:  # damaged headers make Pillow's readers raise whatever they stumble over
        raise ImageError(f"damaged: {error or type(error).__name__}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open as asked, but return at once for a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float images have no defined range; convert it to 8 or 16 bit")
    if image.mode.startswith("I"):
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("grey values do not fit 16 bits; convert it to 8 or 16 bit")
        # Fixed, not stretched to the image's own range: images of a batch must stay comparable.
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def network_input(image: Image.Image, size: int, recipe: Recipe) -> NDArray[np.float32]:
    """Resize to size × size without keeping the aspect ratio and normalise; returns [3, S, S]."""
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resized = np.asarray(image.resize((size, size), filters[recipe.resampling]), np.float32) / np.float32(255)
    mean, deviation = np.asarray(recipe.mean, np.float32), np.asarray(recipe.deviation, np.float32)
    return np.ascontiguousarray(((resized - mean) / deviation).transpose(2, 0, 1))

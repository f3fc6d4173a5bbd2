"""Images in: find them, decode them safely, make the network's input of them."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Preprocessing = Literal["imagenet", "clip"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP")

# Names that the results use at the top of the output folder.
RESERVED_NAMES = frozenset({"report.html", "run.json", "metrics.json", "metrics.csv", "demo-data"})

_RESAMPLING = {"imagenet": Image.Resampling.BILINEAR, "clip": Image.Resampling.BICUBIC}
_MEAN = {"imagenet": (0.485, 0.456, 0.406), "clip": (0.48145466, 0.4578275, 0.40821073)}
_STD = {"imagenet": (0.229, 0.224, 0.225), "clip": (0.26862954, 0.26130258, 0.27577711)}


class ImageError(Exception):
    """A file that cannot be scored; the message says why."""


@dataclass(frozen=True)
class InputImage:
    """One file of a category and the name that its results are kept under."""

    path: Path
    relative: PurePosixPath  # to the category's folder, for example test/scratch/003.png
    key: PurePosixPath  # `relative` without its suffix, unless two files would then share a name


@dataclass(frozen=True)
class Category:
    """Images of one product, scored against each other."""

    name: str
    root: Path
    images: tuple[InputImage, ...]
    ignored: tuple[Path, ...]  # files that do not claim to be images
    unreadable: tuple[tuple[Path, str], ...]  # folders that could not be listed, and why


def scan(data: Path, exclude: Path | None = None) -> list[Category]:
    """Find the categories under a folder and their images, in sorted order.

    A folder with `test/` is one category in MVTec layout (only `test/` is read); a folder with images in it, or with a
    `good` folder, is one category; otherwise every subfolder is one. `exclude` is a folder to leave out: the results of
    an earlier run. Raises ImageError when there is nothing to score.
    """
    hidden = exclude.resolve() if exclude is not None else None
    if not data.exists():
        raise ImageError(f"{data}: there is no such folder")
    if not data.is_dir():
        raise ImageError(f"{data}: must be a folder of images, not a file")
    try:
        entries = sorted(
            entry for entry in data.iterdir() if not entry.name.startswith(".") and entry.resolve() != hidden
        )
    except OSError as error:
        raise ImageError(f"{data}: cannot be listed ({error.strerror})") from error
    folders = [entry for entry in entries if entry.is_dir()]
    is_category = (
        any(folder.name in ("test", "good") for folder in folders)
        or any(_is_image(entry) and entry.is_file() for entry in entries)
        or not folders
    )
    categories = [_read_category(folder, hidden) for folder in ([data] if is_category else folders)]
    found = [category for category in categories if category.images or category.unreadable]
    if not any(category.images for category in found):
        raise ImageError(f"{data}: there are no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read_category(root: Path, hidden: Path | None) -> Category:
    start = root / "test" if (root / "test").is_dir() else root
    files: list[Path] = []
    unreadable: list[tuple[Path, str]] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(
        start,
        followlinks=True,
        onerror=lambda error: unreadable.append((Path(error.filename), f"cannot be listed ({error.strerror})")),
    ):
        real = os.path.realpath(folder)
        if real in visited or real == str(hidden):  # a link back to a folder already read, or the results
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "ground_truth")
        files.extend(Path(folder) / name for name in sorted(names) if not name.startswith("."))
    relatives = {path: PurePosixPath(path.relative_to(root).as_posix()) for path in files if _is_image(path)}
    shared: dict[str, int] = {}
    for relative in relatives.values():
        stem = str(relative.with_suffix("")).casefold()
        shared[stem] = shared.get(stem, 0) + 1
    images = tuple(
        InputImage(
            path,
            relative,
            relative.with_suffix("") if shared[str(relative.with_suffix("")).casefold()] == 1 else relative,
        )
        for path, relative in relatives.items()
    )
    name = root.resolve().name or "images"
    return Category(
        name + "_" if name in RESERVED_NAMES else name,
        root,
        images,
        tuple(path for path in files if not _is_image(path)),
        tuple(unreadable),
    )


def decode(path: Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    16-bit grey is divided by 257, alpha is dropped, EXIF orientation applied, of several frames the first is taken.
    Raises ImageError for what is unreadable, truncated, too large (Pillow's decompression bomb limit) or no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ImageError(
            f"too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; cut it into tiles"
        ) from None
    except UnidentifiedImageError:
        reason = "empty file" if path.stat().st_size == 0 else "not a PNG, JPEG, BMP, TIFF or WebP image"
        raise ImageError(reason) from None
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None
    except (
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        MemoryError,
    ) as error:  # what damaged headers make Pillow raise
        raise ImageError(f"damaged: {error or type(error).__name__}") from None


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


def network_input(image: Image.Image, size: int, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Resize to size × size without keeping the aspect ratio and normalise; returns [3, S, S].

    `imagenet`: Pillow's antialiased bilinear filter, ImageNet mean and deviation (DINOv2, and both backbones of the
    challenge system). `clip`: bicubic, CLIP's mean and deviation (MuSc).
    """
    resized = np.asarray(image.resize((size, size), _RESAMPLING[preprocessing]), np.float32) / np.float32(255)
    mean, std = np.asarray(_MEAN[preprocessing], np.float32), np.asarray(_STD[preprocessing], np.float32)
    return np.ascontiguousarray(((resized - mean) / std).transpose(2, 0, 1))

"""Image files in: decode them safely, make a network's input of them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Preprocessing = Literal["imagenet", "clip"]


FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP")  # JPEG covers the pairs of pictures of stereo cameras
SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp"]
)  # of files that claim to be images

# What decoding and writing hold per pixel at once: RGB twice, and maps and overlays in floats.
BYTES_PER_PIXEL = 16


@dataclass(frozen=True)
class Recipe:
    """How a network wants its images: resized to size × size, values in [0, 1], normalised."""

    size: int
    resampling: Literal["bilinear", "bicubic"]  # antialiased
    mean: tuple[float, float, float]  # of values in [0, 1]
    deviation: tuple[float, float, float]


class ImageError(Exception):
    """A file that cannot be scored; the message says why."""


class ImageMemoryError(ImageError, MemoryError):
    """A file for whose pixels there is no memory at the moment."""


def recipe(preprocessing: Preprocessing, size: int) -> Recipe:
    """Return what a kind of preprocessing means. imagenet: DINOv2, and both networks of the challenge; clip: MuSc."""
    if preprocessing == "imagenet":
        return Recipe(size, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Recipe(size, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def decode(path: Path, bit_depth: int | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    `bit_depth` is the number of bits that files of 16 bits use (None: all 16, whose grey is divided by 257). Alpha is
    dropped, EXIF orientation applied, of several frames the first is taken.
    Raises ImageError for what is unreadable, truncated, too large (Pillow's decompression bomb limit) or no image.
    """
    with opened(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), bit_depth or 16)


def decoded_bytes(path: Path) -> int:
    """Return about how many bytes decoding an image and writing its results hold at once, from the file's header.

    Raises ImageError where not even the header can be read.
    """
    with opened(path) as image:
        return image.width * image.height * BYTES_PER_PIXEL


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
        raise ImageMemoryError("not enough memory to decode it") from None
    except Exception as error:  # damaged headers make Pillow's readers raise whatever they stumble over
        raise ImageError(f"damaged: {error or type(error).__name__}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open as asked, but return at once for a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _to_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float images have no defined range; convert it to 8 or 16 bit")
    if image.mode.startswith("I"):
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("grey values do not fit 16 bits; convert it to 8 or 16 bit")
        # Fixed, not stretched to the image's own range: images of a batch must stay comparable.
        white = 2**bit_depth - 1
        image = Image.fromarray(np.minimum((values * 255 + white // 2) // white, 255).astype(np.uint8))
    return image.convert("RGB")


def network_input(image: Image.Image, recipe: Recipe) -> NDArray[np.float32]:
    """Resize without keeping the aspect ratio and normalise; returns [3, S, S]."""
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    size = (recipe.size, recipe.size)
    resized = np.asarray(image.resize(size, filters[recipe.resampling]), np.float32) / np.float32(255)
    mean, deviation = np.asarray(recipe.mean, np.float32), np.asarray(recipe.deviation, np.float32)
    return np.ascontiguousarray(((resized - mean) / deviation).transpose(2, 0, 1))

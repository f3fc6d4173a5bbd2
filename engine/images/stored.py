"""Image files as they are stored: every kind that is read, opened safely, with its pixels upright."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from .damage import WatchedJpeg, strip_damage
from .deep import Tiff, is_deep_png, png_bits, png_values, tiff_of_file, tiff_of_pillow, tiff_values
from .limits import ImageError as ImageError
from .limits import ImageMemoryError as ImageMemoryError
from .limits import TimedFile, Timer, check_bytes, check_pixels, too_many_pixels
from .metadata import significant_bits, transparent_grey, without_metadata
from .remote import Location, Remote, RemoteFile
from .upright import ORIENTATION, SIDEWAYS, upright_array, upright_image

_AVIF = "avif" in features.modules and features.check("avif")  # older versions of Pillow warn of what they do not know

# Told by their first bytes. JPEG covers the pairs of pictures of stereo cameras, PPM all of PBM, PGM, PNM and PPM.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM", *(("AVIF",) if _AVIF else ()))
# These have no first bytes of their own: anything may look like them, so the suffix decides too.
BY_SUFFIX = {".tga": "TGA", ".dib": "DIB"}
# Of files that claim to be images.
SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".j2k"),
        *(".pbm", ".pgm", ".pnm", ".ppm", ".tga"),
        *([".avif"] if _AVIF else []),
    )
)

DAMAGE = "damage"  # in the information of an image that is decoded all the same: a sentence on what speaks for it

# That reading an image and writing its results hold at once: mostly RGB in Pillow's four bytes and in NumPy's three,
# and maps of floats. A test measures it.
BYTES_PER_PIXEL = 22
# Of its format where that is more: OpenJPEG has four bytes for each value, twice.
DECODER_BYTES_PER_PIXEL = {"JPEG2000": 36}
# Of progressive JPEG files that are decoded before it is seen whether there is time left: in a few bytes a scan goes
# over the whole image.
PROGRESSIVE_BLOCK = 4096


@dataclass(frozen=True)
class Stored:
    """The first picture of a file, upright."""

    # An image of 8 bits per channel (or of 1, or indexed colours), or levels [h, w] or [h, w, 3] of more.
    values: Image.Image | NDArray[Any]
    transparent: NDArray[np.bool_] | None  # [h, w], pixels without any opacity; None: all have all of it
    format: str  # as Pillow names it
    white_is_zero: bool = False  # levels still to be inverted: which of them is white depends on the bits in use
    unscaled: bool = False  # 16-bit levels that may come from a camera of fewer bits
    said_bits: int | None = None  # how many bits of them the file says are in use
    damage: str | None = None  # a sentence on what speaks for it, of a picture that is decoded all the same

    @property
    def hidden(self) -> NDArray[np.bool_] | None:
        """Pixels [h, w] that cannot be seen, if there are any; where none can be, alpha means something else."""
        found = self.transparent
        return found if found is not None and found.any() and not found.all() else None


@dataclass(frozen=True)
class Header:
    """What a file says of its first picture, turned upright."""

    rows: int
    columns: int
    bytes: int  # about how many reading the image and writing its results hold at once
    deep: bool  # whether it has more than 8 bits per channel, in a format that stores a camera's values as they are


def read_stored(path: Location) -> Stored:
    """Read a file's first picture.

    Raises ImageError for what is unreadable, truncated, too large (Pillow's decompression bomb limit) or no image.
    """
    with regular_file(path) as file:
        try:
            image = _opened(file, path.suffix)
        except UnidentifiedImageError as refusal:
            tiff = _readable_tiff(file, refusal)
            check_bytes(_bytes_of_tiff(tiff))
            return _of_tiff(file, tiff)
        check_bytes(_bytes(image))
        if image.format == "TIFF":
            return replace(_of_opened_tiff(file, image), damage=strip_damage(image, file))
        file.timer.try_elsewhere(file, image)
        image = _loaded(file, image)
        if is_deep_png(image, file):
            # Pillow says better than OpenCV what is wrong; what it has found to be whole is read again with all bits.
            orientation = _orientation(image)
            del image
            values, transparent = png_values(file)
            found = Stored(values, transparent, "PNG", unscaled=True, said_bits=significant_bits(file))
            return _turned(found, orientation)
        return replace(_of_pillow(file, image), damage=image.info.get(DAMAGE))


def read_header(path: Location) -> Header:
    """Read only the header of a file; raises ImageError."""
    with regular_file(path) as file:
        try:
            image = _opened(file, path.suffix)
        except UnidentifiedImageError as refusal:
            tiff = _readable_tiff(file, refusal)
            return Header(*tiff.shape, _bytes_of_tiff(tiff), max(tiff.bits) > 8)
        if image.format == "TIFF":
            deep = max(tiff_of_pillow(image).bits) > 8
        else:
            deep = image.format == "PNG" and png_bits(file) > 8
        rows, columns = image.height, image.width
        if image.format != "TIFF" and _orientation(image) in SIDEWAYS:  # of TIFF Pillow does that
            rows, columns = columns, rows
        return Header(rows, columns, _bytes(image), deep)


def _bytes(image: Image.Image) -> int:
    if image.format == "TIFF":
        return _bytes_of_tiff(tiff_of_pillow(image))
    return image.width * image.height * max(BYTES_PER_PIXEL, DECODER_BYTES_PER_PIXEL.get(image.format or "", 0))


def _bytes_of_tiff(tiff: Tiff) -> int:
    """Of many channels all are decoded, and again without those that do not count."""
    rows, columns = tiff.shape
    stored = tiff.samples * ((max(tiff.bits) + 7) // 8)
    return rows * columns * max(BYTES_PER_PIXEL, 2 * stored)


@contextmanager
def opened(path: Location) -> Iterator[Image.Image]:
    """Open an image file whose pixels are not decoded yet; whatever fails in the context becomes an ImageError."""
    with regular_file(path) as file, _opened(file, path.suffix) as image:
        yield image


def read_map(path: Path) -> Image.Image:
    """Read a map that a run has written, floats in mode F; raises ImageError for whatever else the file is."""
    with regular_file(path) as file:
        return _opened_map(file).convert("F")


def map_size(path: Path) -> tuple[int, int]:
    """Return the height and width of a map by its header; raises ImageError."""
    with regular_file(path) as file:
        image = _opened_map(file)
        return image.height, image.width


def map_values(path: Path) -> NDArray[np.float32]:
    """Read a map [h, w] into an array; where it is stored as a run writes it there is no second one on the way.

    Raises ImageError.
    """
    with regular_file(path) as file:
        image: Any = _opened_map(file)
        if not all(codec == "raw" and kind[0] == "F;32F" for codec, _, _, kind in image.tile):
            return np.array(image.convert("F"))
        values = np.empty((image.height, image.width), np.float32)
        for _, (left, top, right, bottom), offset, _ in image.tile:
            if (left, right) != (0, image.width):
                return np.array(image.convert("F"))
            rows = values[top:bottom].data.cast("B")
            file.seek(offset)
            if file.readinto(rows) < len(rows):
                raise ImageError("damaged: image file is truncated")
        return values


def _opened_map(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=("TIFF",))
    except UnidentifiedImageError:
        raise ImageError("not a TIFF image") from None


@contextmanager
def regular_file(path: Location) -> Iterator[TimedFile]:
    """Open a file with something in it; whatever fails in the context becomes an ImageError, its time being up too."""
    try:
        with _opened_raw(path) as (raw, size, identity):
            if size == 0:
                raise ImageError("empty file")
            with TimedFile(raw, Timer(size, identity)) as file:
                yield file
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(too_many_pixels()) from None
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000" + (", AVIF" if _AVIF else "")
        raise ImageError(f"not a {kinds} or PNM image") from None
    except FileNotFoundError:
        link = isinstance(path, Path) and path.is_symlink()
        raise ImageError("link to nothing" if link else "no longer there") from None
    except MemoryError:
        raise ImageMemoryError("not enough memory to decode it") from None
    except OSError as error:
        if "out of memory" in str(error):  # as Pillow's C decoders say it
            raise ImageMemoryError("not enough memory to decode it") from None
        raise ImageError(error.strerror or f"damaged: {error}") from None
    except Exception as error:  # damaged headers make readers raise whatever they stumble over
        raise ImageError(f"damaged: {error or type(error).__name__}") from None


@contextmanager
def _opened_raw(path: Location) -> Iterator[tuple[Any, int, tuple[int, ...]]]:
    """Open a file; yields it, its size as far as it is known, and what tells it from others."""
    if isinstance(path, Remote):
        with RemoteFile(path) as remote:
            yield remote, len(remote.content), (hash(path), hash(remote.content))
        return
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as raw:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        yield raw, status.st_size, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open as asked, but return at once for a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _opened(file: TimedFile, suffix: str) -> Image.Image:
    """Open an image; what Pillow refuses for its metadata is opened without them."""
    file.seek(0)
    by_suffix = BY_SUFFIX.get(suffix.lower())
    try:
        return Image.open(file, formats=FORMATS if by_suffix is None else (*FORMATS, by_suffix))
    except (Image.DecompressionBombError, ImageError, MemoryError):
        raise
    except Exception as refusal:
        for content in _without_metadata(file):
            with suppress(OSError, SyntaxError, ValueError):
                return Image.open(content, formats=FORMATS)
        raise refusal


def _loaded(file: TimedFile, image: Image.Image) -> Image.Image:
    """Decode the pixels of an open image; what Pillow refuses for its metadata is decoded without them."""
    refusal = _load(file, image)
    if refusal is not None:  # metadata may also follow the pixels
        for content in _without_metadata(file):
            cast(Any, image).im = None  # else the pixels of all tries would be there at once
            with suppress(OSError, SyntaxError, ValueError):
                image = Image.open(content, formats=FORMATS)
                if _load(content, image) is None:
                    return image
        raise refusal
    return image


def _load(file: BinaryIO, image: Image.Image) -> Exception | None:
    """Decode the pixels of an open image; returns why that cannot be, without what was allocated for it."""
    watched = WatchedJpeg(image, file) if image.format in ("JPEG", "MPO") else None
    if image.info.get("progressive"):
        cast(Any, image).decodermaxblock = PROGRESSIVE_BLOCK
    try:
        image.load()
        if watched is not None and (damage := watched.damage()) is not None:
            image.info[DAMAGE] = damage
        return None
    except (Image.DecompressionBombError, ImageError, MemoryError):
        raise
    except Exception as refusal:
        return refusal.with_traceback(None)


def _without_metadata(file: TimedFile) -> Iterator[TimedFile]:
    """Yield a file without profiles and comments, then also without EXIF, if it is of a kind that can be.

    What is the same as before is left out.
    """
    size = file.timer.size
    for with_exif in (True, False):
        bare = without_metadata(file, with_exif)
        if bare is not None and len(bare) < size:
            size = len(bare)
            yield TimedFile(io.BytesIO(bare), file.timer)


def _readable_tiff(file: BinaryIO, refusal: Exception) -> Tiff:
    """Return what the tags say of a TIFF that Pillow does not open; raises its refusal again for all that is none."""
    file.seek(0)
    if file.read(2) not in (b"II", b"MM"):
        raise refusal
    try:
        tiff = tiff_of_file(file)
    except Exception:
        raise refusal from None
    if tiff.signed_or_float:
        raise ImageError("float and signed images have no defined range; convert it to 8 or 16 bit")
    if 0 in tiff.shape:
        raise ImageError("damaged: has no pixels")
    if not tiff.readable:
        raise refusal
    check_pixels(*tiff.shape)
    return tiff


def _of_opened_tiff(file: BinaryIO, image: Image.Image) -> Stored:
    """Read a TIFF that Pillow has opened, which does not mean that it decodes it, or decodes it right."""
    tiff = tiff_of_pillow(image)
    if tiff.beyond_pillow:
        return _of_tiff(file, tiff)
    try:
        image.load()
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception as refusal:
        if not tiff.readable:
            raise
        try:
            return _of_tiff(file, tiff)
        except MemoryError:
            raise
        except Exception:  # then it is damaged
            raise refusal from None
    return _of_pillow(file, image)


def _of_tiff(file: BinaryIO, tiff: Tiff) -> Stored:
    """Read what is beyond Pillow."""
    values, transparent = tiff_values(file, tiff)
    if values.dtype == np.uint8:
        values = 255 - values if tiff.white_is_zero else values
        return Stored(Image.fromarray(np.ascontiguousarray(values)), transparent, "TIFF")
    return Stored(values, transparent, "TIFF", tiff.white_is_zero, unscaled=True, said_bits=tiff.said_bits)


def _of_pillow(file: BinaryIO, image: Image.Image) -> Stored:
    """Take what Pillow has decoded right: 8 bits and fewer, and grey of more."""
    kind, orientation = image.format or "", _orientation(image)
    if image.mode in ("La", "RGBa"):  # premultiplied, which Pillow converts to nothing else
        image = image.convert(image.mode.upper())
    if not image.mode.startswith(("I", "F")):
        return _turned(Stored(image, _transparent(file, image), kind), orientation)
    values = np.asarray(image)
    key = image.info.get("transparency")  # of PNG
    found = Stored(values, values == key if isinstance(key, int) else None, kind, unscaled=kind in ("PNG", "TIFF"))
    if kind == "TIFF":
        tiff = tiff_of_pillow(image)
        found = replace(found, white_is_zero=tiff.white_is_zero and max(tiff.bits) <= 16, said_bits=tiff.said_bits)
    elif kind == "PNG":
        found = replace(found, said_bits=significant_bits(file))
    return _turned(found, orientation)


def _transparent(file: BinaryIO, image: Image.Image) -> NDArray[np.bool_] | None:
    """Return which pixels [h, w] of an image of 8 bits per channel have no opacity; None where all have all of it."""
    if not image.has_transparency_data:
        return None
    if image.format == "PNG" and image.mode in ("1", "L") and (key := transparent_grey(file)) is not None:
        # Pillow scales pixels of fewer than 8 bits, but not all of its versions what it says of them.
        levels, hidden = image.convert("L"), key
    else:
        levels, hidden = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A"), 0
    found: NDArray[np.bool_] = np.asarray(levels) == hidden
    return found


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # EXIF that is damaged says nothing
        # Of a PNG file that is only opened its own method would decode all to see whether EXIF follows the pixels.
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))
    return 1


def _turned(found: Stored, orientation: int) -> Stored:
    """Turn upright what was found."""
    values, hidden = found.values, found.transparent
    turned = (
        upright_image(values, orientation) if isinstance(values, Image.Image) else upright_array(values, orientation)
    )
    return replace(found, values=turned, transparent=None if hidden is None else upright_array(hidden, orientation))

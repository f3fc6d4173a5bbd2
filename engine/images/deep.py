"""More than 8 bits per channel: the kinds of PNG and TIFF whose values Pillow cuts to 8 bits, mixes up or refuses."""

import ctypes
import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

from .upright import ORIENTATION, upright_array

# What is wrong with a file is said once, in the error that refuses it, not by the libraries that were asked.
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, and OpenCV 5; 0: silent
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)
with suppress(AttributeError, OSError):  # a Pillow whose libtiff is built in
    _libtiff = ctypes.CDLL(_imaging.__file__)  # what it is linked with is found through it
    _libtiff.TIFFSetErrorHandler.restype = ctypes.c_void_p
    _libtiff.TIFFSetErrorHandler(None)

SEPARATE = 2  # of TIFF's PlanarConfiguration: one plane after the other
ALPHA = (1, 2)  # of TIFF's ExtraSamples: premultiplied or not
UNSIGNED = (1, 4)  # of TIFF's SampleFormat: said, or left open
_TAGS = {
    "ImageWidth": 256,
    "ImageLength": 257,
    "BitsPerSample": 258,
    "PhotometricInterpretation": 262,
    "ImageDescription": 270,
    "Orientation": ORIENTATION,
    "SamplesPerPixel": 277,
    "MaxSampleValue": 281,
    "PlanarConfiguration": 284,
    "ExtraSamples": 338,
    "SampleFormat": 339,
}


@dataclass(frozen=True)
class Tiff:
    """What the tags of a TIFF's first picture say of its values."""

    shape: tuple[int, int]  # rows, columns
    bits: tuple[int, ...]  # per sample
    samples: int  # per pixel
    signed_or_float: bool
    photometric: int  # 0: grey, white is zero; 1: grey; 2: RGB
    separate: bool  # one plane after the other
    extra: tuple[int, ...]  # what the samples beyond grey or RGB are
    orientation: int
    said_bits: int | None  # of fewer bits in use than there are

    @property
    def white_is_zero(self) -> bool:
        return self.photometric == 0

    @property
    def rgb(self) -> bool:
        return self.photometric == 2

    @property
    def readable(self) -> bool:
        """Whether this is grey or RGB of 8 to 16 bits, which `tiff_values` reads."""
        return (
            8 <= min(self.bits) <= max(self.bits) <= 16
            and not self.signed_or_float
            and self.photometric in (0, 1, 2)
            and self.samples >= (3 if self.rgb else 1)
        )

    @property
    def beyond_pillow(self) -> bool:
        """Whether Pillow cuts the channels to 8 bits, mixes them up or has no mode for them."""
        return self.readable and self.samples > 1 and (max(self.bits) > 8 or (self.separate and not self.rgb))

    @property
    def alpha(self) -> int | None:
        """The sample that says how opaque a pixel is."""
        first = 3 if self.rgb else 1
        for number, kind in enumerate(self.extra[: self.samples - first]):
            if kind in ALPHA:
                return first + number
        return None


def tiff_of_pillow(image: Any) -> Tiff:
    """Return what a TIFF that Pillow has opened says."""
    tags = image.tag_v2

    def values(name: str, default: int) -> tuple[int, ...]:
        found = tags.get(_TAGS[name], default)
        return tuple(found) if isinstance(found, tuple) else (int(found),)

    bits = values("BitsPerSample", 1)
    return Tiff(
        shape=(values("ImageLength", image.height)[0], values("ImageWidth", image.width)[0]),
        bits=bits,
        samples=values("SamplesPerPixel", 1)[0],
        signed_or_float=any(kind not in UNSIGNED for kind in values("SampleFormat", 1)),
        photometric=values("PhotometricInterpretation", 1)[0],
        separate=values("PlanarConfiguration", 1)[0] == SEPARATE,
        extra=values("ExtraSamples", 0) if _TAGS["ExtraSamples"] in tags else (),
        orientation=values("Orientation", 1)[0],
        said_bits=_said_bits(max(bits), max(values("MaxSampleValue", 0)), str(tags.get(_TAGS["ImageDescription"], ""))),
    )


def tiff_of_file(file: BinaryIO) -> Tiff:
    """Return what a TIFF that Pillow does not open says; raises tifffile's errors."""
    from tifffile import TiffFile

    file.seek(0)
    with TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        return Tiff(
            shape=(page.imagelength, page.imagewidth),
            bits=(page.bitspersample,),
            samples=page.samplesperpixel,
            signed_or_float=page.sampleformat not in UNSIGNED,
            photometric=int(page.photometric),
            separate=page.planarconfig == SEPARATE,
            extra=tuple(map(int, page.extrasamples)),
            orientation=int(page.tags.valueof(ORIENTATION, 1)),
            said_bits=_said_bits(
                page.bitspersample, np.max(page.tags.valueof(_TAGS["MaxSampleValue"], 0)), page.description
            ),
        )


def _said_bits(bits: int, largest: int, description: str) -> int | None:
    """Bits in use by BitsPerSample, MaxSampleValue or OME's SignificantBits; None where these say no more than 16."""
    said = [found for found in (bits, int(largest).bit_length()) if 8 < found < 16]
    said += [int(found) for found in re.findall(r'SignificantBits="(\d+)"', description) if 8 < int(found) < 16]
    return min(said, default=None)


def tiff_values(file: BinaryIO, tiff: Tiff) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Read a TIFF; returns its stored values [h, w] or [h, w, 3] (uint8, uint16) and what is fully transparent [h, w].

    Both are upright. OpenCV knows all compressions but few arrangements; tifffile knows all arrangements, and more
    compressions where imagecodecs is installed. Raises ValueError for damaged files, and where imagecodecs is missing.
    """
    few = not tiff.separate and set(tiff.bits) == {16} and tiff.samples in ((3, 4) if tiff.rgb else (1,))
    values = _by_opencv(file, tiff) if few else None  # [h, w, C]
    if values is None:
        values = upright_array(_by_tifffile(file, tiff), tiff.orientation)
    hidden = None if tiff.alpha is None else values[:, :, tiff.alpha] == 0
    return (values[:, :, :3] if tiff.rgb else values[:, :, 0]), hidden


def _by_opencv(file: BinaryIO, tiff: Tiff) -> NDArray[np.uint16] | None:
    """Return values [h, w, C], which OpenCV turns upright itself; None for what it does not read."""
    file.seek(0)
    values = _decoded(file.read())
    rows, columns = tiff.shape[::-1] if tiff.orientation in (5, 6, 7, 8) else tiff.shape
    if values is None or values.dtype != np.uint16 or values.size != rows * columns * tiff.samples:
        return None
    values = values.reshape(rows, columns, tiff.samples)
    return values if tiff.samples == 1 else values[:, :, [2, 1, 0, *range(3, tiff.samples)]]


def _by_tifffile(file: BinaryIO, tiff: Tiff) -> NDArray[Any]:
    """Return values [h, w, C] as they are stored."""
    from tifffile import TiffFile

    end = file.seek(0, 2)
    file.seek(0)
    with TiffFile(file) as pages:
        page: Any = pages.pages[0]
        if any(start + size > end for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise ValueError("image file is truncated")
        try:
            values = np.asarray(page.asarray())
        except (KeyError, ValueError) as error:
            if "imagecodecs" in str(error):
                raise ValueError(
                    f"its {max(tiff.bits)} bits are compressed with {page.compression.name} in an order that needs "
                    "imagecodecs; run: pip install imagecodecs"
                ) from None
            raise
    if tiff.separate:
        return np.moveaxis(values.reshape(tiff.samples, *tiff.shape), 0, -1)
    return values.reshape(*tiff.shape, tiff.samples)


def png_values(file: BinaryIO) -> tuple[NDArray[np.uint16], NDArray[np.bool_] | None]:
    """Read a PNG of 16 bits with colour or alpha; returns as `tiff_values` does. Raises ValueError."""
    file.seek(0)
    values = _decoded(file.read())
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise ValueError("a PNG of 16 bits that OpenCV does not read")
    hidden = values[:, :, 3] == 0 if values.shape[2] == 4 else None
    return values[:, :, 2::-1], hidden


def _decoded(content: bytes) -> NDArray[Any] | None:
    """OpenCV's stored values, channels in the order BGRA; None for what it does not read."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if error.code == -4:  # StsNoMem
            raise MemoryError from None
        return None


def is_deep_png(image: Image.Image, file: BinaryIO) -> bool:
    """Whether Pillow would cut the channels of this PNG to 8 bits."""
    return image.format == "PNG" and png_bits(file) > 8 and not image.mode.startswith("I")


def png_bits(file: BinaryIO) -> int:
    """Return the bits of each channel of a PNG."""
    file.seek(24)
    return ord(file.read(1))

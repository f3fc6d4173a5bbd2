"""Ground truth masks in: whichever way a file encodes its shape, True where the image is anomalous."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.remote import Location
from zsad.engine.images.stored import ImageMemoryError, Stored, read_stored

LOSSY = ("JPEG", "MPO")  # values lie around those that were drawn
# Of other files: more values than that, some close to black and several close to white, are no class numbers.
MANY_VALUES, CLOSE, WHITE = 6, 1 / 8, 128

# A background of another colour than black covers most of the image and nearly all of its border, or nearly all of the
# image and most of its border. By less, black stays the background: defects may be large and touch the border.
MOST, NEARLY_ALL_OF_BORDER, NEARLY_ALL_OF_IMAGE = 0.5, 0.9, 0.8

NEARLY_ALL_OF_DRAWN = 0.8  # pixels that are not black are white, up to soft edges: there is no grey class


class MaskError(ValueError):
    """A mask whose shape cannot be told; the message says why."""


def read_mask(path: Location) -> NDArray[np.bool_]:
    """Read a mask file; returns [h, w], True where the image is anomalous, upright.

    What is transparent, and black, is normal; every other colour, class number or grey value is a defect, whose own
    colour may be any. Where another colour clearly is the background (inverted masks, palettes), all but that colour
    is a defect. Masks of JPEG files, and what has become of them, are cut halfway instead.
    Raises ImageError for a file that is unreadable, MaskError for one that leaves open what is normal, such as one that
    is white all over.
    """
    stored = read_stored(path)
    try:
        return _shape(stored)
    except MemoryError:
        raise ImageMemoryError("not enough memory to tell its shape") from None


def _shape(stored: Stored) -> NDArray[np.bool_]:
    """Return where a mask [h, w] says that the image is anomalous; raises MaskError."""
    try:
        colours = _colours(stored)  # [h, w] or [h, w, 3]
    except MaskError:
        raise
    except ValueError as error:  # a mode that Pillow does not convert
        raise MaskError(str(error)) from None
    seen = None if stored.transparent is None else ~stored.transparent
    if seen is not None and not seen.all():
        codes = _codes(colours)
        shown = codes[seen] if seen.any() else codes.reshape(-1)
        if np.all(shown == shown[0]):
            return seen  # of one colour: the shape is in the alpha channel, also where it is empty
        if seen.any():
            return np.asarray(seen & (codes != 0))
    strength = colours if colours.ndim == 2 else colours.max(axis=2)
    if stored.format in LOSSY or _noisy(strength):
        codes = (strength >= _cut(strength)).astype(np.uint8)
    else:
        codes = _codes(colours)
    return np.asarray(codes != _background(codes))


def _colours(stored: Stored) -> NDArray[Any]:
    """Return what the file says of each pixel: grey values or class numbers [h, w], or colours [h, w, 3], from 0 up.

    They keep the file's type as far as that goes: masks are as large as images. Raises MaskError.
    """
    values = stored.values
    if isinstance(values, Image.Image):
        if values.mode in ("1", "L", "LA"):
            return np.asarray(values.convert("L"))
        colours = np.asarray(values.convert("RGB"))
        if values.mode in ("P", "PA") and np.all(colours == colours[0, 0]):
            # A palette of one colour, which some programs write, hides the class numbers, if there are several.
            indices = np.asarray(values.getchannel(0))
            return indices if colours.any() or np.any(indices != indices[0, 0]) else colours
        return colours
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise MaskError("holds NaN or infinity")
        return np.abs(values.astype(np.float64))
    if stored.white_is_zero:
        return np.asarray(65535 - values.astype(np.uint16))
    return values if values.dtype.kind == "u" else np.abs(values.astype(np.int64))


def _codes(colours: NDArray[Any]) -> NDArray[Any]:
    """Return one number [h, w] for each colour; 0 is black."""
    if colours.ndim == 2:
        return colours
    bits, kind = (8, np.uint32) if colours.dtype == np.uint8 else (16, np.uint64)
    codes: NDArray[Any] = np.zeros(colours.shape[:2], kind)
    for channel in range(3):
        codes <<= kind(bits)
        codes |= colours[:, :, channel]
    return codes


def _noisy(strength: NDArray[Any]) -> bool:
    """Whether grey values look like a mask that once was a JPEG file: noise close to black and close to white."""
    largest = float(strength.max())
    between = strength[(strength > 0) & (strength < largest)]
    if len(np.unique(between)) <= MANY_VALUES or largest < WHITE:
        return False
    low, high = between < CLOSE * largest, between > (1 - CLOSE) * largest
    # Class numbers beside one large number, such as 255 for what is undecided, are close to black only.
    return len(np.unique(between[high])) > 1 and (low | high).mean() > MOST and bool(low.any())


def _cut(strength: NDArray[Any]) -> float:
    """Return where defects begin: half of white, or of the grey that is a class of its own between the two."""
    largest = max(1.0, float(strength.max()))
    drawn = np.count_nonzero(strength > largest / 4)
    white = np.count_nonzero(strength > largest * 3 / 4)
    return largest / 2 if white >= NEARLY_ALL_OF_DRAWN * drawn else largest / 4


def _background(codes: NDArray[Any]) -> Any:
    """Return the code of what is normal; raises MaskError."""
    border = np.concatenate([codes[0], codes[-1], codes[1:-1, 0], codes[1:-1, -1]])
    found, counts = np.unique(border, return_counts=True)
    likely = found[counts.argmax()]
    of_border, of_image = float((border == likely).mean()), float((codes == likely).mean())
    if likely == 0:
        return 0
    if of_image == 1:
        raise MaskError("is of one colour that is not black: all of the image is a defect, or nothing")
    if (of_image > MOST and of_border >= NEARLY_ALL_OF_BORDER) or (
        of_image >= NEARLY_ALL_OF_IMAGE and of_border > MOST
    ):
        return likely
    if (codes == 0).any():
        return 0
    if of_border > MOST and of_image > MOST:
        return likely
    raise MaskError("has no black and no other colour that most of its border and area have: what is normal?")

"""Orientation: pictures that a file holds turned or mirrored, turned upright by their EXIF or TIFF tag."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 274  # tag of EXIF and TIFF
SIDEWAYS = (5, 6, 7, 8)  # numbers of those that turn rows into columns

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_image(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image; as it is where the number is 1 or none of EXIF's."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def upright_array(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Do to an array [h, w, …] what `upright_image` does to an image; returns a view."""
    if orientation not in _TRANSPOSE:
        return values
    if orientation in SIDEWAYS:
        values = np.swapaxes(values, 0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return values[rows, columns]

"""Images in: a file's pixels in 8-bit RGB, and a network's input of them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .remote import Location
from .stored import DAMAGE, ImageError, ImageMemoryError, Stored, read_stored

Preprocessing = Literal["imagenet", "clip", "isnet"]

STRIP = 1 << 20  # values that are interpolated at once
Resize = Literal["squash", "shortest_crop"]  # to a square: the whole image, or its middle with the aspect ratio kept


@dataclass(frozen=True)
class Recipe:
    """How a network wants its images: brought to size × size, values in [0, 1], normalised."""

    size: int
    resampling: Literal["bilinear", "bicubic", "unfiltered"]  # antialiased; unfiltered: bilinear without that
    mean: tuple[float, float, float]  # of values in [0, 1]
    deviation: tuple[float, float, float]
    resize: Resize = "squash"

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns that an image is resized to; the middle size × size of them is the input."""
        if self.resize == "squash":
            return self.size, self.size
        shortest = min(rows, columns)
        return self.size * rows // shortest, self.size * columns // shortest


def recipe(preprocessing: Preprocessing, size: int, resize: Resize = "squash") -> Recipe:
    """Return what a kind of preprocessing means.

    imagenet: DINOv2, the challenge's networks; clip: CLIP elsewhere; isnet: IS-Net.
    """
    if preprocessing == "isnet":
        return Recipe(size, "unfiltered", (0.5, 0.5, 0.5), (1, 1, 1))
    if preprocessing == "imagenet":
        return Recipe(size, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize)
    return Recipe(size, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), resize)


def decode(path: Location, bit_depth: int | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, upright; of several frames the first.

    `bit_depth` is how many bits the values of 16-bit PNG and TIFF files use; None means all 16, which are divided by
    257. Fully transparent pixels are black, whatever colour they hide; where nothing at all is visible, alpha means
    something else and the colours count. Alpha is dropped otherwise. What speaks for damage is in the information.
    Raises ImageError for what is unreadable, truncated, too large (Pillow's decompression bomb limit) or no image.
    """
    stored = read_stored(path)
    values = stored.values
    try:
        image = values if isinstance(values, Image.Image) else Image.fromarray(_eight_bits(stored, bit_depth or 16))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        if (hidden := stored.hidden) is not None:
            rgb.paste((0, 0, 0), mask=Image.fromarray(hidden))
        if stored.damage is not None:
            rgb.info[DAMAGE] = stored.damage
        return rgb
    except MemoryError:
        raise ImageMemoryError("not enough memory to decode it") from None
    except ValueError as error:  # of Pillow, about a mode that it does not convert
        raise ImageError(str(error)) from None


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels [H, W, 3] of an RGB image, part by part: all at once Pillow would hold them twice more."""
    values = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        values[top : top + rows] = np.asarray(part)
    return values


def _eight_bits(stored: Stored, bit_depth: int) -> NDArray[np.uint8]:
    """Scale levels to 8 bits, by their bits and not to the image's own range: images of a batch stay comparable."""
    levels: NDArray[Any] = np.asarray(stored.values)  # [h, w] or [h, w, 3]
    if levels.dtype.kind == "f":
        raise ImageError("32-bit float images have no defined range; convert it to 8 or 16 bit")
    if levels.dtype.itemsize > 2 and (levels.min() < 0 or levels.max() > 65535):
        raise ImageError("grey values do not fit 16 bits; convert it to 8 or 16 bit")
    white = 2 ** (bit_depth if stored.unscaled else 16) - 1
    table = _table(white)
    if stored.white_is_zero:  # inverted within all 16 bits, or within a camera's own
        table = table[::-1] if levels.max() > white else np.pad(table[white::-1], (0, 65535 - white))
    eight = np.empty(levels.shape, np.uint8)
    step = max(1, STRIP // max(levels[:1].size, 1))  # rows at once: NumPy makes eight bytes of each number
    for start in range(0, len(levels), step):
        eight[start : start + step] = table[levels[start : start + step]]
    return eight


@lru_cache
def _table(white: int) -> NDArray[np.uint8]:
    """Return what each of 65536 levels is in 8 bits, rounded to the nearest; `white` and all above it are 255."""
    levels = np.arange(65536)
    return np.minimum((levels * 255 + white // 2) // white, 255).astype(np.uint8)


def network_input(image: Image.Image | NDArray[np.uint8], recipe: Recipe) -> NDArray[np.float32]:
    """Bring an image, or pixels [H, W, 3], to a square and normalise it; returns [3, S, S]."""
    size = recipe.size
    if recipe.resampling == "unfiltered":
        # As IS-Net's code has its images: whole numbers again.
        values = _normalised(np.floor(bilinear(np.asarray(image), (size, size))), recipe)
    else:
        whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
        planes = cv2.split(np.asarray(_square(whole, recipe)))
        out = np.empty((3, size, size), np.float32)
        for plane, table, values in zip(planes, _normalised_levels(recipe), out, strict=True):
            cv2.LUT(plane, table, dst=values)
        return out
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _normalised(values: NDArray[np.float32], recipe: Recipe) -> NDArray[np.float32]:
    """Normalise values from 0 to 255, [..., 3]."""
    mean, deviation = np.asarray(recipe.mean, np.float32), np.asarray(recipe.deviation, np.float32)
    normalised: NDArray[np.float32] = (values / np.float32(255) - mean) / deviation
    return normalised


@lru_cache
def _normalised_levels(recipe: Recipe) -> NDArray[np.float32]:
    """Return what each of 256 levels of each channel is when it is normalised, [3, 256]."""
    levels = np.repeat(np.arange(256, dtype=np.float32)[:, None], 3, axis=1)
    return np.ascontiguousarray(_normalised(levels, recipe).T)


def _square(image: Image.Image, recipe: Recipe) -> Image.Image:
    """Resize an image, or its middle, with an antialiased filter to a square.

    Of what is cropped the longer side comes first, so that no more than its middle is resized along the other one.
    """
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    size, resampling, (rows, columns) = recipe.size, filters[recipe.resampling], recipe.resized(*image.size[::-1])
    if columns > size:
        left = round((columns - size) / 2)
        image = image.resize((columns, image.height), resampling).crop((left, 0, left + size, image.height))
    elif rows > size:
        top = round((rows - size) / 2)
        image = image.resize((image.width, rows), resampling).crop((0, top, image.width, top + size))
    return image.resize((size, size), resampling)


def bilinear(values: NDArray[Any], size: tuple[int, int], rows: slice = slice(None)) -> NDArray[np.float32]:
    """Resize [h, w] or [h, w, C] to [H, W] or [H, W, C] without antialiasing, as PyTorch's `interpolate` does.

    Half-pixel centres, the edges repeated, all in single precision and in PyTorch's order. Where it multiplies and adds
    in one step the last bit can be another. rows: return only these of the H.
    """
    more = (1,) * (values.ndim - 2)
    vertical, (left, right, *horizontal) = map(neighbours, values.shape, size)
    above, below, upper, lower = (of_rows[rows] for of_rows in vertical)
    upper, lower = (weight.reshape(-1, 1, *more) for weight in (upper, lower))
    near, far = (weight.reshape(-1, *more) for weight in horizontal)
    out = np.empty((len(above), size[1], *values.shape[2:]), np.float32)
    step = max(1, STRIP // max(out[:1].size, 1))
    for start in range(0, len(out), step):
        here = slice(start, start + step)
        first = above[here][0]
        strip = values[first : below[here][-1] + 1]
        wide = strip[:, left] * near + strip[:, right] * far
        out[here] = wide[above[here] - first] * upper[here] + wide[below[here] - first] * lower[here]
    return out


def neighbours(source: int, target: int) -> tuple[NDArray[Any], ...]:
    """Return between which two values each of `target` values lies, and what share each of the two has in it."""
    scale = np.float32(source) / np.float32(target)
    positions = np.maximum((np.arange(target) + 0.5) * np.float64(scale) - 0.5, 0).astype(np.float32)
    before = np.minimum(positions.astype(np.intp), source - 1)
    share = positions - before.astype(np.float32)
    return before, np.minimum(before + 1, source - 1), 1 - share, share

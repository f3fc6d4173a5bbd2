"""What there is to compare of one image: its mask and its map, brought to one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.categories import InputImage
from zsad.engine.images.ground_truth import mask_file
from zsad.engine.images.layouts import MASK_FOLDERS, is_test
from zsad.engine.images.stored import ImageError, map_size, map_values
from zsad.engine.scores.maps import upsample

from .masks import MaskError, read_mask
from .metrics import Region, finite
from .saturation import Saturation, saturation_area

# Beside the map itself: its mask and the scores of its normal pixels once more, and what each anomalous one takes while
# curves are drawn; measured.
BYTES_PER_PIXEL, BYTES_PER_POSITIVE = 10, 100

Told = TypeVar("Told")


@dataclass(frozen=True)
class Paper:
    """How the published code of a method compares maps with masks."""

    side: int  # pixels of the square that maps and masks are brought to
    mask_from: int  # grey value from which on a pixel of a mask, resized as 0 and 255, is anomalous
    precision: type[np.floating[Any]]  # of the maps, and so of AUPRO's steps
    ends_coincide: bool  # whether maps are resized back as `upsample` does; else with the masks' filter


# Its masks are truncated to integers: only pixels at full intensity are left.
MUSC = Paper(518, 255, np.float64, ends_coincide=False)


def where_masks_lie(image: InputImage) -> str:
    place = image.relative.with_suffix("")
    if is_test(place.parts[0]):
        place = place.relative_to(place.parts[0])
    first, *others = MASK_FOLDERS
    return (
        f"looked for {first}/{place}_mask.png, also with _label, _GT or nothing for _mask and any image suffix, "
        f"in {', '.join(others)} and beside the image"
    )


@dataclass(frozen=True)
class Pixels:
    """Mask and map of one image, at the protocol's size."""

    mask: NDArray[np.bool_]  # [H, W]
    map: NDArray[np.floating[Any]]  # [H, W]
    regions: Sequence[Region] | None  # None: those of the mask that hang together

    @property
    def bytes(self) -> int:
        """About what it takes until the metrics of all images are known."""
        regions = sum(region.mask.nbytes for region in self.regions or ())
        positives = int(np.count_nonzero(self.mask)) * BYTES_PER_POSITIVE
        return BYTES_PER_PIXEL * self.map.size + positives + regions + (self.map.itemsize - 4) * 2 * self.map.size


@dataclass(frozen=True)
class Source:
    """Where the pixels of a category's images are."""

    root: Path  # of the category's images
    images: Sequence[tuple[InputImage, Path]]  # with their maps
    paper: Paper | None
    saturation: Saturation | None

    @property
    def gives_regions(self) -> bool:
        """Whether regions of anomalous images come from files and need not hang together."""
        return self.saturation is not None or any(image.masks.regions for image, _ in self.images)

    def read(self, number: int) -> Pixels:
        """Read one image's; raises ImageError for an unreadable file, OSError and ValueError for what else is wrong."""
        image, map_path = self.images[number]
        return _load_pixels(self.root, image, map_path, self.paper, self.saturation)

    def complaint(self, number: int, error: Exception) -> str | ImageError:
        """Say that an image is left out, and why."""
        said = f"{self.root / self.images[number][0].relative}: left out of the pixel metrics: {error}"
        return ImageError(said) if isinstance(error, ImageError) else said


def _load_pixels(
    root: Path, image: InputImage, map_path: Path, paper: Paper | None, saturation: Saturation | None
) -> Pixels:
    """Mask and map of one image; ImageError says which file is unreadable, ValueError what else is wrong."""
    if not map_path.is_file():
        raise ValueError(f"its map {map_path} is missing; run `zsad-infer` again")
    mask, regions = _mask(root, image, _map(map_size, map_path), saturation)
    values = _map(map_values, map_path)  # last: telling what a mask shows takes as much as a map
    if not finite(values):
        raise ValueError(f"its map {map_path} holds NaN or infinity; run `zsad-infer` again")
    if paper is not None:
        return _resized(mask, values, paper)
    return Pixels(mask, values, regions)


def _mask(
    root: Path, image: InputImage, size: tuple[int, int], saturation: Saturation | None
) -> tuple[NDArray[np.bool_], list[Region] | None]:
    """Mask [H, W] of one image and its regions, where files say them; raises as `_load_pixels`."""
    if image.anomalous and not image.masks.files:
        raise ValueError(f"its mask is missing: {where_masks_lie(image)}")
    mask = np.zeros(size, np.bool_)
    by_file = image.masks.regions or saturation is not None
    regions: list[Region] = []
    for path in image.masks.files:
        file = mask_file(root, path)
        try:
            part = read_mask(file)  # [H, W]
        except (ImageError, MaskError) as error:
            kind = ImageError if isinstance(error, ImageError) else ValueError
            raise kind(f"its mask {file}: {error}") from None
        if part.shape != mask.shape:
            height, width = mask.shape
            sizes = f"{part.shape[1]}x{part.shape[0]} px, the image {width}x{height} px"
            raise ValueError(f"its mask {file} is {sizes}")
        mask |= part
        if by_file and part.any():
            regions.append(Region(part, saturation_area(file, part, saturation)))
    if bool(mask.any()) != image.anomalous:
        said = "is empty, though the image counts as" if image.anomalous else "is not empty, though the image counts as"
        raise ValueError(f"its mask {mask_file(root, image.masks.files[0])} {said} {image.defect or 'normal'}")
    return mask, regions if by_file else None


def _map(read: Callable[[Path], Told], path: Path) -> Told:
    """Return what is read of a map; raises ImageError that names it."""
    try:
        return read(path)
    except ImageError as error:
        raise ImageError(f"its map {path}: {error}; run `zsad-infer` again") from None


def _resized(mask: NDArray[np.bool_], values: NDArray[np.float32], paper: Paper) -> Pixels:
    square, bilinear = (paper.side, paper.side), Image.Resampling.BILINEAR
    resized_mask = Image.fromarray(mask).convert("L").resize(square, bilinear)  # 0 and 255 before
    if paper.ends_coincide:
        resized = upsample(values, square)
    else:
        resized = np.asarray(Image.fromarray(values).resize(square, bilinear))
    return Pixels(np.asarray(resized_mask) >= paper.mask_from, resized.astype(paper.precision), None)

"""Which file is the mask of which image: told from their names, where data sets keep them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from .layouts import fold, folded_key, is_normal, mask_stem, preference


@dataclass(frozen=True)
class MaskFile:
    """A file in a folder of masks."""

    relative: PurePosixPath  # to the category's folder
    place: PurePosixPath  # where its image would lie below the folder of the images, with the name of the mask


@dataclass(frozen=True)
class Matches:
    """Masks by the number of their image, and those without one."""

    masks: Mapping[int, tuple[PurePosixPath, ...]]
    strays: tuple[PurePosixPath, ...]


def masks_beside(names: Sequence[str]) -> dict[str, str]:
    """Return the masks among the files of a folder of images: `Part0_label.bmp` beside `Part0.jpg`, by their names."""
    stems: dict[str, str] = {}
    for name in names:
        stems.setdefault(fold(PurePosixPath(name).stem), name)
    found = {}
    for name in names:
        stem = mask_stem(PurePosixPath(name).stem)
        if stem is not None and stem in stems:
            found[name] = stems[stem]
    return found


def match_masks(images: Sequence[PurePosixPath], masks: Sequence[MaskFile], by_name_alone: bool) -> Matches:
    """Find the image of every mask.

    images: paths below the folder of the images. A mask `<defect>/000_mask.png` belongs to `<defect>/000.*`, and so do
    `<defect>/000.png` and all files of a folder `<defect>/000`. With `by_name_alone` a mask in a folder that no images
    lie in, or in none, also belongs to the only image of its name that is not among the normal ones.
    """
    keys: dict[tuple[str, ...], list[int]] = defaultdict(list)
    stems: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        key = folded_key(image)
        keys[key].append(index)
        if not (image.parts[1:] and is_normal(image.parts[0])):
            stems[key[-1]].append(index)
    folders = {key[:-1] for key in keys}

    def images_of(mask: MaskFile) -> list[int]:
        *folder, stem = folded_key(mask.place)
        names = [name for name in (stem, mask_stem(mask.place.stem)) if name is not None]
        for key in (*((*folder, name) for name in names), tuple(folder)):
            if key in keys:
                same = keys[key]
                exact = [i for i in same if mask.place.stem.startswith(images[i].stem)]  # a.png beside A.png
                return exact or same
        if by_name_alone and tuple(folder) not in folders:
            return next((stems[name] for name in names if len(stems.get(name, ())) == 1), [])
        return []

    found: dict[int, list[MaskFile]] = defaultdict(list)
    strays = []
    for mask in masks:
        indices = images_of(mask)
        for index in indices:
            found[index].append(mask)
        if not indices:
            strays.append(mask.relative)
    return Matches({index: _chosen(images[index], of_image) for index, of_image in found.items()}, tuple(strays))


def _chosen(image: PurePosixPath, masks: Sequence[MaskFile]) -> tuple[PurePosixPath, ...]:
    """Return the masks of one image that count: all of a folder named after it, or else one."""
    best = min(masks, key=lambda mask: preference(mask.relative))
    parts = [mask for mask in masks if mask.relative.parent == best.relative.parent]
    together = is_folder_of(image, best.relative)
    return tuple(mask.relative for mask in parts) if together else (best.relative,)


def is_folder_of(image: PurePosixPath, mask: PurePosixPath) -> bool:
    """Tell whether a mask is one of several, in a folder named after its image: each file is a region (MVTec LOCO)."""
    return fold(mask.parent.name) == fold(image.stem)

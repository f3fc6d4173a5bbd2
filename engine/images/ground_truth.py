"""Which file is the mask of which image: told from their names, where data sets keep them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .layouts import fold, folded_key, is_normal, mask_stem, preference
from .names import stem_of
from .remote import Location, Remote
from .stored import ImageError, read_stored

LOSSY = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})

# A mask beside its image that has the image's name is known by what is in it: a picture has more values than that.
MOST_CLASSES = 8
SAMPLES = 3  # of a folder


@dataclass(frozen=True)
class MaskFile:
    """A file in a folder of masks."""

    relative: PurePosixPath  # to the category's folder
    place: PurePosixPath  # where its image would lie below the folder of the images, with the name of the mask


@dataclass(frozen=True)
class ImageMasks:
    """The masks of one image."""

    files: tuple[PurePosixPath | Remote, ...] = ()  # relative to the category's folder, or anywhere
    regions: bool = False  # whether every file is one region (MVTec LOCO)
    others: tuple[PurePosixPath, ...] = ()  # that might have been meant instead


def mask_file(root: Path, mask: PurePosixPath | Remote) -> Location:
    """Return where a mask of a category is."""
    return mask if isinstance(mask, Remote) else root / mask


NO_MASKS = ImageMasks()


@dataclass(frozen=True)
class Matches:
    """Masks by the number of their image, and those without one."""

    masks: Mapping[int, ImageMasks]
    strays: tuple[PurePosixPath, ...]


def masks_beside(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the masks among the images of a folder, with the image of each.

    `Part0_label.bmp` beside `Part0.jpg` is one by its name. Where every file that is not JPEG has the stem of one that
    is, as `x.png` beside `x.jpg`, they are masks if that is what is in them.
    """
    marked = {name: stem for name in names if (stem := mask_stem(stem_of(name))) is not None}
    if not marked and len({_suffix(name) in LOSSY for name in names}) < 2:
        return {}  # the usual folder: no pairs to be looked for among its names, which may be a million
    stems: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _suffix(name) not in LOSSY):
        stems.setdefault(fold(stem_of(name)), name)
    found = {name: stems[stem] for name, stem in marked.items() if stem in stems}
    pairs = {name: stems[fold(stem_of(name))] for name in names if _suffix(name) not in LOSSY}
    in_pairs = not found and pairs and all(_suffix(image) in LOSSY for image in pairs.values())
    return pairs if in_pairs and all(_is_drawn(folder / name) for name in list(pairs)[:SAMPLES]) else found


def _suffix(name: str) -> str:
    return name[name.rindex(".") :].lower()


def _is_drawn(path: Path) -> bool:
    try:
        values = np.asarray(read_stored(path).values)
    except ImageError:
        return False
    return len(np.unique(values)) <= MOST_CLASSES


def match_masks(images: Sequence[PurePosixPath], masks: Sequence[MaskFile], by_name_alone: bool) -> Matches:
    """Find the image of every mask.

    images: paths below the folder of the images. A mask `<defect>/000_mask.png` belongs to `<defect>/000.*`, and so do
    `<defect>/000.png` and all files of a folder `<defect>/000`. With `by_name_alone` a mask that lies in no folder also
    belongs to the only image of its name without a mask, if it is not the same as for several defects.
    """
    keys: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        keys[folded_key(image)].append(index)
    found: dict[int, list[tuple[MaskFile, bool]]] = defaultdict(list)
    unmatched = []
    for mask in masks:
        indices, region = _by_place(mask, images, keys)
        for index in indices:
            found[index].append((mask, region))
        if not indices:
            unmatched.append(mask)
    strays = []
    without = _by_stem([index for index in range(len(images)) if index not in found], images)
    for mask in unmatched:
        only = _by_name(mask, without) if by_name_alone else None
        if only is None:
            strays.append(mask.relative)
        else:
            found[only].append((mask, False))
    return Matches({index: _chosen(of_image) for index, of_image in found.items()}, tuple(strays))


def _by_place(
    mask: MaskFile, images: Sequence[PurePosixPath], keys: Mapping[tuple[str, ...], list[int]]
) -> tuple[list[int], bool]:
    """Return the images that lie where the mask says, and whether its folder is named after them."""
    *folder, stem = folded_key(mask.place)
    for name in (stem, mask_stem(mask.place.stem)):
        same = keys.get((*folder, name), []) if name is not None else []
        if same:
            exact = [index for index in same if mask.place.stem.startswith(images[index].stem)]  # a.png beside A.png
            return exact or same, False
    return keys.get(tuple(folder), []), True


def _by_stem(indices: Sequence[int], images: Sequence[PurePosixPath]) -> dict[tuple[str, bool], list[int]]:
    """Return image numbers by folded stem, those of normal and of other images apart."""
    stems: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index in indices:
        normal = len(images[index].parts) > 1 and is_normal(images[index].parts[0])
        stems[fold(images[index].stem), normal].append(index)
    return stems


def _by_name(mask: MaskFile, stems: Mapping[tuple[str, bool], list[int]]) -> int | None:
    *folder, stem = folded_key(mask.place)
    if folder:
        return None
    names = [name for name in (stem, mask_stem(mask.place.stem)) if name is not None]
    for normal in (False, True):
        for name in names:
            candidates = stems.get((name, normal), [])
            if candidates:
                return candidates[0] if len(candidates) == 1 else None
    return None


def _chosen(masks: Sequence[tuple[MaskFile, bool]]) -> ImageMasks:
    """Return the masks of one image that count: all of a folder named after it, or else one."""
    ordered = sorted(masks, key=lambda item: (preference(item[0].relative), item[0].relative))
    (best, region), *rest = ordered
    together = [mask.relative for mask, _ in ordered if region and mask.relative.parent == best.relative.parent]
    others = [mask.relative for mask, _ in rest if mask.relative not in together]
    return ImageMasks(tuple(together) or (best.relative,), region, tuple(others))

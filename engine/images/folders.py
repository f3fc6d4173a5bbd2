"""From a folder to categories: which images are scored together, and what their folders and masks say of them."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .ground_truth import MaskFile, masks_beside, match_masks
from .layouts import fold, holds_images, holds_masks, is_normal, is_split, is_test
from .stored import SUFFIXES, ImageError
from .tree import DEMO, RUN, Folder, is_image, read_tree

# Names that the results use at the top of the output folder.
RESERVED_NAMES = frozenset({"report.html", RUN, "metrics.json", "metrics.csv", DEMO})

# Longer names leave no room for what the results append to them; file systems take 255 bytes.
LONGEST_NAME = 200
# Folders so named could stand where a result file must go; names that look marked are marked too, to stay distinct.
_AMBIGUOUS_FOLDER = re.compile(r"\.(tiff|jpg|csv|json)$", re.IGNORECASE)
_MARKED = re.compile(r"~[0-9a-f]{8}$")

# Pictures beside folders of pictures are strays, such as an overview or a logo, if they are no more than this and than
# this part of the images in the second largest folder; in the same way where there is but one folder.
MOST_STRAYS, STRAYS_TO_FOLDER = 5, 1 / 2
MOST_BESIDE_ONE, STRAYS_TO_ONE = 2, 1 / 8


class NothingToScoreError(ImageError):
    """A data folder without images, or that is none; the message says what was looked for."""


@dataclass(frozen=True)
class InputImage:
    """One file of a category and the name that its results are kept under."""

    path: Path
    relative: PurePosixPath  # to the category's folder, for example test/scratch/003.png
    key: PurePosixPath  # `relative` without its suffix, changed where results would clash or names be too long
    anomalous: bool | None = None  # what the folders say; None where they say nothing
    defect: str | None = None  # the folder's name, of an anomalous image
    masks: tuple[PurePosixPath, ...] = ()  # which pixels are anomalous, relative to the category's folder


@dataclass(frozen=True)
class Category:
    """Images of one product, scored against each other."""

    name: str
    root: Path
    images: tuple[InputImage, ...]
    ignored: Mapping[str, int]  # files that do not claim to be images, by suffix
    unreadable: tuple[tuple[PurePosixPath, str], ...]  # folders that could not be listed, and why
    notes: tuple[str, ...] = ()  # one line each: how the folders were read where that is not plain
    stray_masks: tuple[PurePosixPath, ...] = ()  # masks of no image, relative to the category's folder

    @property
    def has_ground_truth(self) -> bool:
        return any(image.anomalous is not None or image.masks for image in self.images)


@dataclass(frozen=True)
class Dataset:
    """All categories under a folder."""

    root: Path
    categories: tuple[Category, ...]
    notes: tuple[str, ...] = ()  # what lies beside the categories and is not scored

    def all_notes(self) -> list[str]:
        """Return how the folders were read where that is not plain, of the categories with their names in front."""
        return [*self.notes, *(f"{category.name}: {note}" for category in self.categories for note in category.notes)]


@dataclass(frozen=True)
class _Part:
    """Images of one category: what its name adds to the folder's, and the folder below that its images lie in."""

    suffix: str
    start: PurePosixPath
    alone: bool  # no other part shares the folder


_WHOLE = _Part("", PurePosixPath(), True)


def scan(data: Path, exclude: Path | None = None) -> Dataset:
    """Find the categories under a folder and their images, in sorted order.

    A folder is one category if it has a split `test` (only that is read; several such splits are one category each), a
    folder of normal images, or images itself; otherwise every subfolder is one. The layouts: `layouts.py`. Masks are
    never among the images. `exclude` is a folder to leave out, the results of this run; those of earlier runs are known
    by their tables and left out too. Raises NothingToScoreError.
    """
    top = _read(data, exclude)
    base = data.resolve().name or "images"
    notes: list[str] = []
    parts = _parts(top)
    if parts is not None:
        wanted = [(_named(base, part), top, part) for part in parts]
    elif _is_one_category(top):
        wanted = [(base, top, _WHOLE)]
    else:
        wanted = list(_collected(top, "", (), notes))
    categories: list[Category] = []
    for wish, folder, part in wanted:
        name = _shortened(wish)
        while name in RESERVED_NAMES or name in [other.name for other in categories]:
            name += "_"
        category = _read_category(name, folder, part)
        if category.images or category.unreadable:
            categories.append(category)
    if not any(category.images for category in categories):
        raise NothingToScoreError(_why_nothing(data, top, categories))
    return Dataset(data, tuple(categories), tuple(notes))


def _read(data: Path, exclude: Path | None) -> Folder:
    hidden = os.path.realpath(exclude) if exclude is not None else None
    if not os.path.lexists(data):
        raise NothingToScoreError(f"{data}: there is no such folder")
    if not data.is_dir():
        raise NothingToScoreError(f"{data}: must be a folder of images, not a file")
    if os.path.realpath(data) == hidden:
        raise NothingToScoreError(f"{data}: is where the results are to go; choose another --output")
    top = read_tree(data, hidden)
    if top.error is not None:
        raise NothingToScoreError(f"{data}: {top.error}")
    return top


def _named(base: str, part: _Part) -> str:
    return f"{base}_{part.suffix}" if part.suffix else base


def _why_nothing(data: Path, top: Folder, categories: Sequence[Category]) -> str:
    reasons = [f"; {category.root / path} {why}" for category in categories for path, why in category.unreadable]
    masks = [name for name, folder in top.folders.items() if holds_masks(name) and folder.count()]
    if masks and not reasons:
        reasons = [
            f"; what lies in {masks[0]}/ is taken for masks because of its name: "
            f"to score it, run `zsad-infer {data / masks[0]}`"
        ]
    return f"{data}: there are no images in it (looked for {', '.join(sorted(SUFFIXES))}){''.join(reasons[:1])}"


# Which folders are categories


def _parts(folder: Folder, depth: int = 0) -> list[_Part] | None:
    """Return the categories that a folder's layout makes of it, None where it has none of the layouts."""
    tests = _tests(folder)
    if tests and not any(
        _tests(child) for name, child in folder.folders.items() if not (is_split(name) or holds_masks(name))
    ):
        return [_Part(name if len(tests) > 1 else "", _inside(folder, name), len(tests) == 1) for name in tests]
    if any(is_normal(name) for name in folder.folders):
        return [_WHOLE]
    with_images = _with_images(folder)
    if folder.images() or not with_images:
        return None
    if len(with_images) == 1 and holds_images(with_images[0]) and depth < 4:  # links may lead in circles
        below = _parts(folder.folders[with_images[0]], depth + 1)
        if below is None and any(holds_masks(name) for name in folder.folders):
            below = [_WHOLE]
        return below and [_Part(part.suffix, with_images[0] / part.start, part.alone) for part in below]
    if len(with_images) > 1 and all(map(is_split, with_images)):
        return [_Part(name, PurePosixPath(name), False) for name in with_images]
    return None


def _tests(folder: Folder) -> list[str]:
    return [name for name in folder.folders if is_test(name)]


def _with_images(folder: Folder) -> list[str]:
    return [name for name, child in folder.folders.items() if not holds_masks(name) and child.count()]


def _inside(folder: Folder, name: str) -> PurePosixPath:
    """Return where the images of a split lie: in it, or in its only folder if that is called `images`."""
    child = folder.folders[name]
    names = _with_images(child)
    only_images = len(names) == 1 and holds_images(names[0]) and not child.images()
    return PurePosixPath(name, names[0]) if only_images else PurePosixPath(name)


def _is_one_category(folder: Folder) -> bool:
    """Tell whether a folder without a known layout is one category: images in it that are no stray pictures."""
    images, names = len(folder.images()), _with_images(folder)
    if not names:
        return True
    if not images or any(_parts(folder.folders[name]) is not None for name in names):
        return False
    counts = sorted(folder.folders[name].count() for name in names)
    if len(counts) > 1:
        return images > min(MOST_STRAYS, STRAYS_TO_FOLDER * counts[-2])
    return images > min(MOST_BESIDE_ONE, STRAYS_TO_ONE * counts[-1])


def _collected(
    folder: Folder, above: str, path: tuple[int, ...], notes: list[str]
) -> Iterator[tuple[str, Folder, _Part]]:
    """Yield name, folder and part of each category in a folder of categories."""
    stray = folder.images()
    if stray:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        notes.append(
            f"{folder.path / stray[0]}{more} beside folders of images: not scored, since each folder is a category"
        )
    products = any(_tests(child) for name, child in folder.folders.items() if not holds_masks(name))
    for name, child in folder.folders.items():
        if id(child) in path:  # a link back
            continue
        if holds_masks(name) and not (products and _tests(child)):
            if child.count():
                notes.append(f"{child.path}: taken for masks because of its name and not scored")
            continue
        full = f"{above}_{name}" if above else name
        parts = _parts(child)
        if parts is not None:
            yield from ((_named(full, part), child, part) for part in parts)
        elif any(_parts(below) for name, below in child.folders.items() if not holds_masks(name)):
            yield from _collected(child, full, (*path, id(child)), notes)
        else:
            yield full, child, _WHOLE


# What is in a category


def _read_category(name: str, root: Folder, part: _Part) -> Category:
    folders, mask_folders = _divided(root, part)
    ignored: Counter[str] = Counter()
    places: list[PurePosixPath] = []  # of the images, below the start
    owned: dict[PurePosixPath, PurePosixPath] = {}  # masks beside images, by the image's place
    beside = 0
    for path, folder in folders:
        names = folder.images()
        owners = masks_beside(names)
        beside += len(owners)
        for mask, owner in owners.items():
            owned.setdefault(path / owner, part.start / path / mask)
        places += [path / name for name in names if name not in owners]
        ignored.update(PurePosixPath(name).suffix.lower() for name in folder.files if not is_image(name))
    masks = [mask for mask_folder in mask_folders for mask in _masks_in(mask_folder, part)]
    matches = match_masks(places, masks, by_name_alone=part.alone)
    labels = _labels(places, part)
    images = []
    for index, (place, key) in enumerate(
        zip(places, _result_keys([part.start / place for place in places]), strict=True)
    ):
        anomalous, defect = labels.get(place.parts[0] if place.parts[1:] else "", (None, None))
        own = (owned[place],) if place in owned else matches.masks.get(index, ())
        relative = part.start / place
        images.append(InputImage(root.path / relative, relative, key, anomalous, defect, own))
    notes = [
        *_left_out(root, part),
        *_together(folders, part, labels),
        *_about_masks(mask_folders, beside, owned),
        *_about_labels(labels, part),
    ]
    # Masks that several parts share are of another one.
    strays = [path for path in matches.strays if part.alone or path.is_relative_to(part.start)]
    unreadable = tuple((part.start / path, folder.error) for path, folder in folders if folder.error is not None)
    return Category(name, root.path, tuple(images), ignored, unreadable, tuple(notes), tuple(strays))


@dataclass(frozen=True)
class _MaskFolder:
    """A folder of masks: its path within the category's folder, and where it lies below the start."""

    path: PurePosixPath
    place: PurePosixPath
    folder: Folder


def _divided(root: Folder, part: _Part) -> tuple[list[tuple[PurePosixPath, Folder]], list[_MaskFolder]]:
    """Return the folders of images, by their paths below the start, and those of masks."""
    start, mask_folders = root, []
    for depth, step in enumerate(part.start.parts):
        above = PurePosixPath(*part.start.parts[:depth])
        mask_folders += [
            _MaskFolder(above / name, PurePosixPath(), child)
            for name, child in start.folders.items()
            if holds_masks(name)
        ]
        start = start.folders[step]
    with_own_masks = {fold(name) for masks in mask_folders for name in masks.folder.folders}

    def is_masks(path: PurePosixPath) -> bool:
        # A defect may be called `label`: it has masks of its own, then.
        return holds_masks(path.name) and not (len(path.parts) == 1 and fold(path.name) in with_own_masks)

    folders = start.walk(lambda path: not is_masks(path))
    for path, folder in folders:
        mask_folders += [
            _MaskFolder(part.start / path / name, path, child)
            for name, child in folder.folders.items()
            if is_masks(path / name)
        ]
    return folders, mask_folders


def _masks_in(masks: _MaskFolder, part: _Part) -> Iterator[MaskFile]:
    splits = {fold(step) for step in part.start.parts if is_split(step)}
    for path, folder in masks.folder.walk():
        inner = list(path.parts)
        if inner and splits and is_split(inner[0]) and fold(inner.pop(0)) not in splits:
            continue  # masks of another split
        if inner and holds_images(inner[0]):
            inner.pop(0)
        for name in folder.images():
            yield MaskFile(masks.path / path / name, PurePosixPath(masks.place, *inner, name))


def _labels(places: Sequence[PurePosixPath], part: _Part) -> dict[str, tuple[bool, str | None]]:
    """Return what the folders at the start say of the images in them: whether they are anomalous, and the defect."""
    names = {place.parts[0] for place in places if place.parts[1:]}
    normal = {name for name in names if is_normal(name)}
    if any(map(is_test, part.start.parts)) or (normal and normal != names):
        return {name: (False, None) if name in normal else (True, name) for name in names}
    return {}


def _together(
    folders: Sequence[tuple[PurePosixPath, Folder]], part: _Part, labels: Mapping[str, tuple[bool, str | None]]
) -> Iterator[str]:
    """Say that images beside folders of images are compared with those, which may be products of their own."""
    names = sorted({path.parts[0] for path, folder in folders if path.parts and folder.images()})
    if folders[0][1].images() and len(names) > 1 and not labels and not part.start.parts:
        yield f"images beside and in the folders {_listed(names)} are scored together, as one category"


def _about_labels(labels: Mapping[str, tuple[bool, str | None]], part: _Part) -> Iterator[str]:
    if labels and all(anomalous for anomalous, _ in labels.values()):
        yield (
            f"no image of {part.start}/ counts as normal: looked for a folder named good, ok or normal; "
            f"found {_listed(sorted(labels))}"
        )


def _about_masks(
    mask_folders: Sequence[_MaskFolder], beside: int, owned: Mapping[PurePosixPath, PurePosixPath]
) -> Iterator[str]:
    """Say which files are taken for masks, but for those where MVTec's data sets have them."""
    counts = [(masks.path, masks.folder.count()) for masks in mask_folders if fold(masks.path.name) != "ground_truth"]
    said = [f"{count} in {path}/" for path, count in counts if count]
    if beside:
        said.append(f"{beside} beside their images, such as {next(iter(owned.values()))}")
    if said:
        yield f"taken for masks because of their names and not scored: {_listed(said)}"


def _left_out(root: Folder, part: _Part) -> Iterator[str]:
    """Say which images lie beside the split that is scored, but for those of other splits."""
    folder, left = root, []
    for depth, step in enumerate(part.start.parts):
        above = PurePosixPath(*part.start.parts[:depth])
        left += [f"{above / name}/" for name in _with_images(folder) if name != step and not is_split(name)]
        left += [str(above / name) for name in folder.images()]
        folder = folder.folders[step]
    if left:
        yield f"only {part.start}/ is scored; left out: {_listed(left)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# How results are named


def _result_keys(relatives: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Choose the names that results are kept under, so that no two images and no file and folder share one."""
    stems = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    whole = {str(relative).casefold() for relative in relatives}
    keys = []
    for relative in relatives:
        stem = str(relative.with_suffix("")).casefold()
        key = relative.with_suffix("") if stems[stem] == 1 and stem not in whole else relative
        folders = [_marked(name) if _AMBIGUOUS_FOLDER.search(name) else _shortened(name) for name in key.parent.parts]
        keys.append(PurePosixPath(*folders, _shortened(key.name)))
    return keys


def _shortened(name: str) -> str:
    return _marked(name) if len(os.fsencode(name)) > LONGEST_NAME or _MARKED.search(name) else name


def _marked(name: str) -> str:
    encoded = os.fsencode(name)
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"

"""What is in a category: its images, and what folders and masks say of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .ground_truth import NO_MASKS, ImageMasks, MaskFile, Matches, masks_beside, match_masks
from .layouts import fold, holds_images, holds_masks, is_normal, is_split, is_test
from .names import clashing, result_folder, shortened, stem_of
from .remote import Location
from .tree import Folder, is_image

HERE = PurePosixPath()


@dataclass(frozen=True)
class ImageFolder:
    """Where images lie, the same for all of a folder."""

    path: Path
    relative: PurePosixPath  # to the category's folder
    key: PurePosixPath  # the folder that their results are kept in


@dataclass(frozen=True, slots=True)
class InputImage:
    """One file of a category and the name that its results are kept under.

    There may be a million of them: paths, of several hundred bytes each, are made when they are asked for, and not of
    the name as it is, which pathlib would enter into a table.
    """

    folder: ImageFolder
    name: str
    own_key: str | None = None  # the name of its results where that is not its own without suffix
    anomalous: bool | None = None  # what the folders say; None where they say nothing
    defect: str | None = None  # the folder's name, of an anomalous image
    masks: ImageMasks = NO_MASKS  # which pixels are anomalous
    place: Location | None = None  # of the file, where a list says it; None: in the folder

    @property
    def path(self) -> Location:
        return Path(f"{self.folder.path}/{self.name}") if self.place is None else self.place

    @property
    def relative(self) -> PurePosixPath:
        """Return its path below the category's folder, for example test/scratch/003.png."""
        return PurePosixPath(f"{self.folder.relative}/{self.name}")

    @property
    def key(self) -> PurePosixPath:
        """Return `relative` without its suffix, changed where results would clash or names be too long."""
        return self.folder.key / (self.own_key or stem_of(self.name))


@dataclass(frozen=True)
class Category:
    """Images of one product; methods that compare images do so within it."""

    name: str
    root: Path
    images: Sequence[InputImage]
    ignored: Mapping[str, int]  # files that do not claim to be images, by suffix
    unreadable: tuple[tuple[PurePosixPath, str], ...]  # folders that could not be listed, and why
    notes: tuple[str, ...] = ()  # one line each: how the folders were read where that is not plain
    stray_masks: tuple[PurePosixPath, ...] = ()  # masks of no image, relative to the category's folder
    called: str | None = None  # the product, where a list names it and no folder does

    @property
    def product(self) -> str:
        """What the folder of the product is called: of the category's, or if that is in a split, of the one above."""
        if self.called is not None:
            return self.called
        parts = self.root.resolve().parts
        for depth in (1, 2, 3):
            if len(parts) > depth + 1 and is_split(parts[-depth]):
                return parts[-depth - 1]
        return parts[-2] if len(parts) > 2 and (is_normal(parts[-1]) or holds_images(parts[-1])) else parts[-1]

    @property
    def has_ground_truth(self) -> bool:
        return any(image.anomalous is not None or image.masks.files for image in self.images)


@dataclass(frozen=True)
class Part:
    """Which of a folder's images are one category."""

    suffix: str = ""  # what its name adds to the folder's
    start: PurePosixPath = HERE  # the folder below that its images lie in
    # Where the folder has several categories: folded names of the folders that only this one, or others, lie in.
    own: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _MaskFolder:
    """A folder of masks."""

    path: PurePosixPath  # within the category's folder
    place: PurePosixPath  # where it lies below the start
    steps: tuple[str, ...]  # from where it lies to the start, folded; none within the start
    folder: Folder


Label = tuple[bool, str | None]  # whether anomalous, and the defect


def read_category(name: str, root: Folder, part: Part) -> Category:
    """Read the images of a category, those of `part` in the folder `root`."""
    folders, mask_folders = _divided(root, part)
    ignored: Counter[str] = Counter()
    shelves: list[tuple[PurePosixPath, list[str]]] = []  # folders below the start, and the names of their images
    owned: dict[tuple[PurePosixPath, str], PurePosixPath] = {}  # masks beside images, by the image
    beside = 0
    for path, folder in folders:
        names = folder.images()
        owners = masks_beside(folder.path, names)
        beside += len(owners)
        for mask, owner in owners.items():
            owned.setdefault((path, owner), part.start / path / mask)
        if images := [name for name in names if name not in owners]:
            shelves.append((path, images))
        ignored.update(PurePosixPath(name).suffix.lower() for name in folder.files if not is_image(name))
    undecided: Counter[str] = Counter()
    masks = [mask for mask_folder in mask_folders for mask in _masks_in(mask_folder, part, undecided)]
    matches = Matches({}, ())
    if masks:
        places = [path / name for path, names in shelves for name in names]
        matches = match_masks(places, masks, by_name_alone=not part.others)
    labels = _labels({path.parts[0] for path, _ in shelves if path.parts}, part)
    found = tuple(_images(root, part, shelves, labels, owned, matches))
    unreadable = [(part.start / path, folder.error) for path, folder in folders]
    unreadable += [(masks.path / path, folder.error) for masks in mask_folders for path, folder in masks.folder.walk()]
    notes = [
        *_left_out(root, part),
        *_about_points(folders),
        *_together(folders, labels),
        *_about_masks(mask_folders, beside, owned, undecided),
        *_about_several(found),
        *_about_labels(labels, part),
    ]
    return Category(
        name,
        root.path,
        found,
        ignored,
        tuple((path, error) for path, error in unreadable if error is not None),
        tuple(notes),
        matches.strays,
    )


def _images(
    root: Folder,
    part: Part,
    shelves: Sequence[tuple[PurePosixPath, Sequence[str]]],
    labels: Mapping[str, Label],
    owned: Mapping[tuple[PurePosixPath, str], PurePosixPath],
    matches: Matches,
) -> Iterator[InputImage]:
    with_suffix = clashing([(part.start / path, names) for path, names in shelves])
    number = 0
    for path, names in shelves:
        relative = part.start / path
        folder = ImageFolder(root.path / relative, relative, result_folder(relative))
        anomalous, defect = labels.get(path.parts[0] if path.parts else "", (None, None))
        for name in names:
            stem = stem_of(name)
            key = shortened(name if (relative, name) in with_suffix else stem)
            own = (path, name) in owned
            masks = ImageMasks((owned[path, name],)) if own else matches.masks.get(number, NO_MASKS)
            yield InputImage(folder, name, None if key == stem else key, anomalous, defect, masks)
            number += 1


def _divided(root: Folder, part: Part) -> tuple[list[tuple[PurePosixPath, Folder]], list[_MaskFolder]]:
    """Return the folders of images, by their paths below the start, and those of masks."""
    start, mask_folders = root, []
    for depth, step in enumerate(part.start.parts):
        above, steps = PurePosixPath(*part.start.parts[:depth]), tuple(map(fold, part.start.parts[depth:]))
        mask_folders += [
            _MaskFolder(above / name, PurePosixPath(), steps, child)
            for name, child in start.folders.items()
            if holds_masks(name)
        ]
        start = start.folders[step]
    with_own_masks = {fold(name) for masks in mask_folders for name in masks.folder.folders}
    beside_normal = any(is_normal(name) for name in start.folders)

    def is_masks(path: PurePosixPath) -> bool:
        # A defect may be called `label`: it has masks of its own, then.
        return holds_masks(path.name) and not (len(path.parts) == 1 and fold(path.name) in with_own_masks)

    def is_other_split(path: PurePosixPath) -> bool:
        return beside_normal and len(path.parts) == 1 and is_split(path.name)

    folders = start.walk(lambda path: not (is_masks(path) or is_other_split(path)))
    for path, folder in folders:
        mask_folders += [
            _MaskFolder(part.start / path / name, path, (), child)
            for name, child in folder.folders.items()
            if is_masks(path / name)
        ]
    return folders, mask_folders


def _masks_in(masks: _MaskFolder, part: Part, undecided: Counter[str]) -> Iterator[MaskFile]:
    """Yield the files of a folder of masks that may belong to the part's images.

    undecided: counts those that might be of another part as well, by folder.
    """
    shared = not part.own.isdisjoint(masks.steps)  # by several parts
    for path, folder in masks.folder.walk():
        inner, said = list(path.parts), False
        for step in masks.steps:
            if inner and fold(inner[0]) == step:
                inner.pop(0)
                said = True
        if masks.steps and inner and (is_split(inner[0]) or fold(inner[0]) in part.others):
            continue  # of another split or part
        if shared and not said:
            undecided[str(masks.path)] += len(folder.images())
            continue
        for name in folder.images():
            yield MaskFile(masks.path / path / name, PurePosixPath(masks.place, *inner, name))


def _labels(names: Set[str], part: Part) -> dict[str, Label]:
    """Return what the folders at the start, those that have images in them or below, say of these."""
    normal = {name for name in names if is_normal(name)}
    if any(map(is_test, part.start.parts)) or (normal and normal != names):
        return {name: (False, None) if name in normal else (True, name) for name in names}
    return {}


# What is said of how the folders were read


def _left_out(root: Folder, part: Part) -> Iterator[str]:
    """Say which images are not scored because a layout says so, but for those of other splits beside a test."""
    folder, left = root, []
    for depth, step in enumerate(part.start.parts):
        above = PurePosixPath(*part.start.parts[:depth])
        names = [name for name in with_images(folder) if name != step and fold(name) not in part.others]
        left += [f"{above / name}/" for name in names if not is_split(name)]
        left += [str(above / name) for name in folder.images()]
        folder = folder.folders[step]
    if left:
        yield f"only {part.start}/ is scored; left out: {listed(left)}"
    if any(is_normal(name) for name in folder.folders):
        splits = [f"{part.start / name}/" for name in with_images(folder) if is_split(name)]
        if splits:
            yield f"left out as splits of their own: {listed(splits)}"


def _about_points(folders: Sequence[tuple[PurePosixPath, Folder]]) -> Iterator[str]:
    """Say how many files with coordinates are left out, which would pass for images."""
    count = sum(folder.points for _, folder in folders)
    if count:
        yield f"left out as coordinates of what the images beside them show: {counted(count, 'file')} in xyz/"


def _together(folders: Sequence[tuple[PurePosixPath, Folder]], labels: Mapping[str, Label]) -> Iterator[str]:
    """Say that images of several folders are compared with each other, which may be products of their own."""
    names = sorted({path.parts[0] for path, folder in folders if path.parts and folder.images()})
    if len(names) > 1 and not labels:
        yield f"the images in its folders ({listed(names)}) are scored together, as one category"


def _about_masks(
    mask_folders: Sequence[_MaskFolder],
    beside: int,
    owned: Mapping[tuple[PurePosixPath, str], PurePosixPath],
    undecided: Mapping[str, int],
) -> Iterator[str]:
    """Say which files are taken for masks, but for those where MVTec's data sets have them."""
    counts = [(masks.path, masks.folder.count()) for masks in mask_folders if fold(masks.path.name) != "ground_truth"]
    said = [f"{count} in {path}/" for path, count in counts if count]
    if beside:
        said.append(f"{beside} beside their images, such as {next(iter(owned.values()))}")
    if said:
        yield f"taken for masks and not scored: {listed(said)}"
    for path, count in undecided.items():
        if count:
            yield (
                f"{count} masks in {path}/ may be of any split and are not used; "
                f"put them into {path}/<split>/ or <split>/{path}/"
            )


def _about_several(images: Sequence[InputImage]) -> Iterator[str]:
    several = [image.masks for image in images if image.masks.others]
    if several:
        first = several[0]
        yield (
            f"{len(several)} {'image has' if len(several) == 1 else 'images have'} several masks, such as "
            f"{first.files[0]} and {first.others[0]}: the one named first counts"
        )


def _about_labels(labels: Mapping[str, Label], part: Part) -> Iterator[str]:
    if labels and all(anomalous for anomalous, _ in labels.values()):
        yield (
            f"no image of {part.start}/ counts as normal: looked for a folder named good, ok or normal; "
            f"found {listed(sorted(labels))}"
        )


def with_images(folder: Folder) -> list[str]:
    """Return the names of the folders in one that have images in them or below, those of masks left out."""
    return [name for name, child in folder.folders.items() if not holds_masks(name) and child.count()]


def counted(number: int, noun: str) -> str:
    """Say how many there are of something: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Name up to three and count the rest."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

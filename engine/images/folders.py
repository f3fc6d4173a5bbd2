"""From a folder to categories: which images are scored together."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from .categories import Category, Part, counted, listed, read_category, with_images
from .layouts import fold, holds_images, holds_masks, is_normal, is_split, is_test
from .manifest import SUFFIXES as SUFFIXES_OF_LISTS
from .manifest import is_manifest, read_manifest
from .names import shortened
from .remote import Location, Remote
from .stored import SUFFIXES, ImageError
from .tree import DEMO, REPORT_FILES, RUN_FILES, Folder, read_tree

# Names that the results use at the top of the output folder.
RESERVED_NAMES = frozenset({*RUN_FILES, REPORT_FILES, DEMO})

# Pictures beside folders of pictures are strays, such as an overview or a logo, if they are no more than this and than
# this part of the images in the second largest folder; in the same way where there is but one folder.
MOST_STRAYS, STRAYS_TO_FOLDER = 5, 1 / 2
MOST_BESIDE_ONE, STRAYS_TO_ONE = 2, 1 / 8

DEEPEST_WRAPPER = 4  # of folders that only say that images are in them, as Data/Images


class NothingToScoreError(ImageError):
    """A data folder without images, or that is none; the message says what was looked for."""


@dataclass(frozen=True)
class Dataset:
    """All categories under a folder."""

    root: Path
    categories: tuple[Category, ...]
    notes: tuple[str, ...] = ()  # what lies beside the categories and is not scored

    def all_notes(self) -> list[str]:
        """Return how the folders were read where that is not plain, of the categories with their names in front."""
        return [*self.notes, *(f"{category.name}: {note}" for category in self.categories for note in category.notes)]


def scan(data: Location, exclude: Path | None = None) -> Dataset:
    """Find the categories under a folder, or in a list of files, and their images, those of folders in sorted order.

    A folder is one category if it has a split `test` (only that is read; several such splits are one category each), a
    folder of normal images, or images itself; otherwise every subfolder is one. The layouts: `layouts.py`. Masks are
    never among the images. `exclude` is a folder to leave out, the results of this run; those of earlier runs are known
    by their tables and left out too. Raises NothingToScoreError.
    """
    if is_manifest(data):
        try:
            return Dataset(Path(str(data)), tuple(read_manifest(data, sorted(RESERVED_NAMES))))
        except ImageError as error:
            raise NothingToScoreError(str(error)) from None
    if isinstance(data, Remote):
        raise NothingToScoreError(
            f"{data}: at a URL only lists are read ({', '.join(SUFFIXES_OF_LISTS)}); write the URLs of the images into "
            "one, a line for each below a first line that says url"
        )
    top = _read(data, exclude)
    base = data.resolve().name or "images"
    layouts, notes = _Layouts(), list[str]()
    parts = layouts.parts(top)
    if parts is not None:
        wanted = [(_named(base, part), top, part) for part in parts]
    elif layouts.is_one_category(top):
        wanted = [(base, top, Part())]
    else:
        wanted = list(_collected(layouts, top, "", (id(top),), notes))
    categories: list[Category] = []
    nothing: list[str] = []
    names = set(RESERVED_NAMES)
    for wish, folder, part in wanted:
        name = shortened(wish)
        while name in names:
            name += "_"
        category = read_category(name, folder, part)
        if category.images or category.unreadable:
            categories.append(category)
            names.add(name)
        elif folder.count() or category.ignored:
            nothing.append(_why_empty(category, folder, part))
    if not any(category.images for category in categories):
        raise NothingToScoreError(_why_nothing(data, top, categories, nothing))
    return Dataset(data, tuple(categories), (*notes, *nothing))


def _read(data: Path, exclude: Path | None) -> Folder:
    hidden = os.path.realpath(exclude) if exclude is not None else None
    if not os.path.lexists(data):
        kind = "list" if data.suffix.lower() in SUFFIXES_OF_LISTS else "folder"
        raise NothingToScoreError(f"{data}: there is no such {kind}")
    if not os.path.isdir(data):  # noqa: PTH112 - pathlib raises where a folder may not be entered
        raise NothingToScoreError(
            f"{data}: is a file, and folders of images are read; give {data.parent}/, a new folder with a copy of it, "
            f"or a list of files ({', '.join(SUFFIXES_OF_LISTS)})"
        )
    if os.path.realpath(data) == hidden:
        raise NothingToScoreError(f"{data}: is where the results are to go; choose another --output")
    top = read_tree(data, hidden)
    if top.error is not None:
        raise NothingToScoreError(f"{data}: {top.error}")
    return top


def _named(base: str, part: Part) -> str:
    return f"{base}_{part.suffix}" if part.suffix else base


def _why_empty(category: Category, folder: Folder, part: Part) -> str:
    """Say why a folder with something in it is no category."""
    kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(category.ignored.items()))
    elsewhere = [f"{name}/ ({counted(folder.folders[name].count(), 'image')})" for name in with_images(folder)]
    masks = [f"{name}/" for name, child in folder.folders.items() if holds_masks(name) and child.count()]
    reasons = [
        f"other files: {kinds}" if kinds else "",
        f"only {part.start}/ would be scored, not {listed(elsewhere)}" if elsewhere else "",
        f"{listed(masks)} is taken for masks" if masks else "",
    ]
    return f"{category.root}: no images to score ({'; '.join(filter(None, reasons))})"


def _why_nothing(data: Path, top: Folder, categories: list[Category], nothing: list[str]) -> str:
    reasons = [f"; {category.root / path} {why}" for category in categories for path, why in category.unreadable]
    reasons += [f"; {reason}" for reason in nothing]
    masks = [name for name, folder in top.folders.items() if holds_masks(name) and folder.count()]
    if masks:
        reasons.append(
            f"; what lies in {masks[0]}/ is taken for masks because of its name: "
            f"to score it, run `zsad-infer {data / masks[0]}`"
        )
    return f"{data}: there are no images in it (looked for {', '.join(sorted(SUFFIXES))}){''.join(reasons[:3])}"


class _Layouts:
    """Which folders are categories by what is in them, each looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, list[Part] | None] = {}

    def parts(self, folder: Folder, depth: int = 0) -> list[Part] | None:
        """Return the categories that a folder's layout makes of it, None where it has none of the layouts."""
        if id(folder) not in self._known:
            self._known[id(folder)] = None  # links may lead in circles
            self._known[id(folder)] = self._of_tests(folder) or self._of_others(folder, depth)
        return self._known[id(folder)]

    def anywhere(self, folder: Folder) -> bool:
        """Tell whether a folder below has one of the layouts."""
        below = folder.walk(lambda path: not holds_masks(path.name))
        return any(self.parts(child) is not None for _, child in below)

    def is_one_category(self, folder: Folder) -> bool:
        """Tell whether a folder without a layout is one category: images in it that are no stray pictures."""
        names = with_images(folder)
        if not names:
            return True
        return not _are_strays(folder) and not self.anywhere(folder)

    def _of_tests(self, folder: Folder) -> list[Part]:
        tests = _tests(folder)
        others = [name for name in folder.folders if not (is_split(name) or holds_masks(name))]
        if any(_tests(folder.folders[name]) for name in others):  # products, of which one is called test
            return []
        parts = []
        for name in tests:
            suffix = name if len(tests) > 1 else ""
            start = _inside(folder, name)
            inner = folder.folders[start.parts[0]]
            for step in start.parts[1:]:
                inner = inner.folders[step]
            products = [] if any(map(is_normal, inner.folders)) else _with_normal_images(inner)
            parts += [Part("_".join(filter(None, (suffix, product))), start / product) for product in products]
            if not products:
                parts.append(Part(suffix, start))
        return _apart(parts)

    def _of_others(self, folder: Folder, depth: int) -> list[Part] | None:
        products = [name for name in folder.folders if not (is_split(name) or holds_masks(name))]
        if any(map(is_normal, folder.folders)):
            with_layouts = any(self.parts(folder.folders[name]) is not None for name in products)
            return None if with_layouts else [Part()]
        names = with_images(folder)
        if not names or (folder.images() and not _are_strays(folder)):
            return None
        if len(names) == 1 and holds_images(names[0]) and depth < DEEPEST_WRAPPER:
            below = self.parts(folder.folders[names[0]], depth + 1)
            if below is None and any(map(holds_masks, folder.folders)):
                below = [Part()]
            return below and [replace(part, start=names[0] / part.start) for part in below]
        if len(names) > 1 and all(map(is_split, names)):
            return _apart([Part(name, _inside(folder, name)) for name in names])
        return None


def _tests(folder: Folder) -> list[str]:
    return [name for name in folder.folders if is_test(name)]


def _with_normal_images(folder: Folder) -> list[str]:
    """Return the names of the folders in one that tell normal images from others."""
    return [name for name in with_images(folder) if any(map(is_normal, folder.folders[name].folders))]


def _inside(folder: Folder, name: str) -> PurePosixPath:
    """Return where the images of a split lie: in it, or in its only folder if that is called `images`."""
    child = folder.folders[name]
    names = with_images(child)
    only_images = len(names) == 1 and holds_images(names[0]) and not child.images()
    return PurePosixPath(name, names[0]) if only_images else PurePosixPath(name)


def _apart(parts: list[Part]) -> list[Part]:
    """Tell each part the folders of the others: where their ways part."""
    if len(parts) < 2:
        return parts
    steps = Counter(fold(step) for part in parts for step in part.start.parts)
    own = [frozenset(fold(step) for step in part.start.parts if steps[fold(step)] < len(parts)) for part in parts]
    everybody = frozenset().union(*own)
    return [Part(part.suffix, part.start, mine, everybody - mine) for part, mine in zip(parts, own, strict=True)]


def _are_strays(folder: Folder) -> bool:
    """Tell whether the images in a folder are few beside the folders of images in it, or none."""
    images, counts = len(folder.images()), sorted(folder.folders[name].count() for name in with_images(folder))
    if len(counts) > 1:
        return images <= min(MOST_STRAYS, STRAYS_TO_FOLDER * counts[-2])
    return images <= min(MOST_BESIDE_ONE, STRAYS_TO_ONE * counts[-1])


def _collected(
    layouts: _Layouts, folder: Folder, above: str, path: tuple[int, ...], notes: list[str]
) -> Iterator[tuple[str, Folder, Part]]:
    """Yield name, folder and part of each category in a folder of categories; path: of the folders that it lies in."""
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
        parts = layouts.parts(child)
        if parts is not None:
            yield from ((_named(full, part), child, part) for part in parts)
        elif layouts.anywhere(child):
            yield from _collected(layouts, child, full, (*path, id(child)), notes)
        else:
            yield full, child, Part()

"""Known-good images of a category: from the user's folder or list, or drawn from its training split."""

import os
from collections.abc import Collection, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from zsad.kernels.files import file_sha256, read_text

from .categories import HERE, Category, ImageFolder, InputImage
from .layouts import fold, holds_masks, is_hidden, is_normal, is_training
from .remote import Location, digest, stamps
from .stored import ImageError
from .tree import Folder, is_image, read_tree


class NoReferencesError(ImageError):
    """References that cannot be had; the message says where they were looked for and what to do."""


@dataclass(frozen=True)
class References:
    """Images to compare with."""

    images: tuple[InputImage, ...] = ()
    digests: tuple[str, ...] = ()  # sha256 of the files, in the same order
    notes: tuple[str, ...] = ()  # what was left out, and why
    unreadable: tuple[tuple[PurePosixPath, str], ...] = ()  # those of them that cannot be read, and why

    def record(self) -> dict[str, str]:
        """Return the files with their digests, of those that cannot be read with none."""
        digests = {str(image.path): digest for image, digest in zip(self.images, self.digests, strict=True)}
        return {**digests, **{str(path): "" for path, _ in self.unreadable}}


def find_references(
    category: Category, products: Collection[str], reference: str | None, shots: int | None, seed: int
) -> References:
    """Find the known-good images of a category.

    products: names of the folders of all categories, of which others have references of their own. reference: a folder
    (where it has a folder of the category's name, that one; its training split or its folder of normal images, if it
    has such), an image, or a file with a path in each line; None: the category's training split. shots: how many are
    drawn at random; None: all. An image that is itself to be scored is left out, and so are copies of others. Raises
    NoReferencesError.
    """
    return _drawn(category, candidates(category, products, reference), shots, seed)


def count_references(category: Category, products: Collection[str], reference: str | None, shots: int | None) -> int:
    """Return how many known-good images `find_references` finds at most, without reading them; 0 where it fails."""
    try:
        paths = candidates(category, products, reference)
    except NoReferencesError:
        return 0
    return len(paths) if shots is None else min(len(paths), shots)


def candidates(category: Category, products: Collection[str], reference: str | None) -> list[Path]:
    """Return the files that may be references, at least one, see `find_references`; raises NoReferencesError."""
    named = {fold(name) for name in products}
    if reference is None:
        place = category.root
        paths = _training_images(read_tree(place, None))
        looked_for = f"{place / 'train' / 'good'}/ or {place / 'train'}/; give --reference FOLDER"
    elif os.path.isdir(reference):  # noqa: PTH112 - pathlib raises where a folder may not be entered
        place = Path(reference)
        top = read_tree(place, None)
        if top.error is not None:
            raise NoReferencesError(f"the reference folder {place} {top.error}")
        own = next((child for name, child in top.folders.items() if _is_of(name, category)), None)
        if own is None and any(fold(name) in named for name in top.folders):
            raise NoReferencesError(f"{place}/ has folders of other categories, but none called {category.product}")
        paths = _training_images(own or top) or _normal_images(own or top)
        looked_for = f"images in {place}/ and below; give --reference a folder that has some"
    elif is_image(Path(reference).name) and Path(reference).is_file():
        return [Path(reference)]
    else:
        place = Path(reference).parent
        paths = _listed_images(Path(reference), category, named)
        looked_for = f"{reference}, a path in each line"
    if not paths:
        raise NoReferencesError(f"there are no reference images for {category.name}: looked for {looked_for}")
    return list(dict.fromkeys(paths))


def _is_of(name: str, category: Category) -> bool:
    return fold(name) in (fold(category.name), fold(category.product))


def _training_images(folder: Folder) -> list[Path]:
    """Return the normal images of a training split, none where there is no such."""
    return [path for name, child in folder.folders.items() if is_training(name) for path in _normal_images(child)]


def _normal_images(folder: Folder) -> list[Path]:
    """Return the images in a folder, or if it has folders of normal images, those in them."""
    normal = [child for name, child in folder.folders.items() if is_normal(name)]
    return [
        start.path / path / name
        for start in normal or [folder]
        for path, below in start.walk(lambda path: not holds_masks(path.name))
        for name in below.images()
    ]


def _listed_images(file: Path, category: Category, named: Set[str]) -> list[Path]:
    """Return the images of a list, by paths from where the list lies or from where we are.

    named: folded names of the folders of all categories.
    """
    try:
        lines = read_text(file).splitlines()
    except OSError as error:
        raise NoReferencesError(f"the references {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise NoReferencesError(
            f"the references {file} must be a folder, an image, or a UTF-8 text with a path in each line"
        ) from None
    paths = [Path(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    own = [path for path in paths if any(_is_of(part, category) for part in path.parts)]
    found = []
    for path in own or [path for path in paths if named.isdisjoint(map(fold, path.parts))]:
        candidates = [file.parent / path, path, category.root / path]
        found.append(next((candidate for candidate in candidates if candidate.exists()), candidates[0]))
    return [path for path in found if is_image(path.name) and not is_hidden(path.name)]


def _drawn(category: Category, paths: list[Path], shots: int | None, seed: int) -> References:
    digests: dict[Path, str | OSError] = {}
    sizes: set[int] = set()
    for path in paths:
        try:
            if not path.is_file():  # a pipe would be waited for
                raise OSError(0, "there is no such file")
            digests[path] = file_sha256(path)
            sizes.add(path.stat().st_size)
        except OSError as error:
            digests[path] = error
    found = set(digests.values())
    twins: dict[str, InputImage] = {}  # images to score that are a reference, by digest
    for image, (size, _) in zip(category.images, stamps(image.path for image in category.images), strict=True):
        if size in sizes and (content := _digest(image.path)) in found:
            twins.setdefault(content, image)
    notes = []
    usable: dict[str, Path] = {}  # by digest: a copy says nothing more, and of itself that it is usual
    for path, known in digests.items():
        if isinstance(known, OSError):
            notes.append(f"the reference {path} is left out: {known.strerror}")
        elif known in twins:
            twin = twins[known].relative
            notes.append(f"the reference {path} is left out: it is one of the images to score, {twin}")
        elif known in usable:
            notes.append(f"the reference {path} is left out: it is a copy of {usable[known]}")
        else:
            usable[known] = path
    if not usable:
        raise NoReferencesError(f"no reference for {category.name} can be used: {'; '.join(notes[:3])}")
    chosen = list(usable.items())
    if shots is not None:
        if shots > len(chosen):
            notes.append(f"only {len(chosen)} references for {shots} shots: all are taken")
        else:
            numbers = np.random.default_rng(seed).choice(len(chosen), shots, replace=False)
            chosen = [chosen[number] for number in sorted(numbers.tolist())]
    images = tuple(
        InputImage(ImageFolder(path.parent, PurePosixPath(path.parent.as_posix()), HERE), path.name)
        for _, path in chosen
    )
    unreadable = [
        (PurePosixPath(path.as_posix()), str(known.strerror))
        for path, known in digests.items()
        if isinstance(known, OSError)
    ]
    return References(images, tuple(content for content, _ in chosen), tuple(notes), tuple(unreadable))


def _digest(path: Location) -> str:
    """Return the sha256 of a file, nothing for one that cannot be read, which scoring will say."""
    try:
        return digest(path)
    except OSError:
        return ""

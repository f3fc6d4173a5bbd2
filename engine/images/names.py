"""Names of results: no two images, and no file and folder, share one, and none is too long for a file system."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

# Longer names leave no room for what the results append to them; file systems take 255 bytes.
LONGEST_NAME = 200
# Folders so named could stand where a result file must go; names that look marked are marked too, to stay distinct.
_AMBIGUOUS_FOLDER = re.compile(r"\.(tiff|jpg|csv|json)$", re.IGNORECASE)
_MARKED = re.compile(r"~[0-9a-f]{8}$")


def stem_of(image: str) -> str:
    """Return the name of an image without its suffix, which it always has."""
    return image[: image.rindex(".")]


def clashing(folders: Sequence[tuple[PurePosixPath, Sequence[str]]]) -> set[tuple[PurePosixPath, str]]:
    """Return the images whose results must keep the suffix in their names, so that no two results share one.

    folders: with the names of the images in each. What is kept of each image while looking is a few numbers.
    """

    def folded(with_suffix: bool) -> Iterator[str]:
        for folder, names in folders:
            above = str(folder / "_")[:-1].casefold()
            for name in names:
                yield above + (name if with_suffix else stem_of(name)).casefold()

    stems, whole = (np.fromiter(map(hash, folded(with_suffix)), np.int64) for with_suffix in (False, True))
    hashes, counts = np.unique(np.concatenate([stems, np.unique(whole)]), return_counts=True)
    suspects = frozenset(hashes[counts > 1].tolist())
    if not suspects:
        return set()
    same = Counter(text for text in folded(with_suffix=False) if hash(text) in suspects)
    taken = {text for text in folded(with_suffix=True) if hash(text) in suspects}
    images = ((folder, name) for folder, names in folders for name in names)
    return {
        image for image, text in zip(images, folded(with_suffix=False), strict=True) if same[text] > 1 or text in taken
    }


def result_folder(relative: PurePosixPath) -> PurePosixPath:
    """Return the folder that results of the images of a folder are kept in."""
    return PurePosixPath(
        *(marked(name) if _AMBIGUOUS_FOLDER.search(name) else shortened(name) for name in relative.parts)
    )


def shortened(name: str) -> str:
    """Return a name, cut and marked with a digest where it is too long."""
    return marked(name) if len(os.fsencode(name)) > LONGEST_NAME or _MARKED.search(name) else name


def marked(name: str, of: str | None = None) -> str:
    """Return a name, cut where it is too long, with a digest of itself or of something else."""
    encoded = os.fsencode(name)
    digest = hashlib.sha256(encoded if of is None else os.fsencode(of)).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"

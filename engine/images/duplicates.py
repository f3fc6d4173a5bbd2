"""Copies within a batch: images that are compared with their own copies look normal, so that defects hide."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .decode import decode
from .remote import Location, Remote, digest
from .stored import ImageError

SIDE = 32  # pixels of a thumbnail; its filter is a triangle, so that resizing an image by a little leaves it as it is
LARGEST_FILE = 1 << 30  # bytes that are compared; a file may have holes of terabytes behind its picture
ROWS, DISTANCES = 1024, 1 << 24  # at once, at most

# Thumbnails of copies differ by less than this many grey levels, root mean square and largest. Copies at JPEG quality
# 75 or resized by 2 % come to 0.3 and 1.6, different photographs of one part to 1.2 and more; the tests print them.
NEAR_RMS, NEAR_LARGEST = 0.4, 3.0
# And by less than this share of what images of the batch usually differ by: a still camera with little noise makes
# photographs as alike as copies, but then many of them. Usual is what this share of the images comes to, from the
# second nearest on, and for each of the two images its distance to this share of the batch.
NEAR_SHARE, USUAL = 0.6, 0.3


@dataclass(frozen=True)
class Copies:
    """Images of a batch that show the same photograph."""

    indices: tuple[int, ...]  # ascending, at least two
    exact: bool  # every pixel of all of them is equal; else some were encoded or resized again


class Duplicates:
    """Finds copies among the images of one batch; `add` may be called from any thread."""

    def __init__(self) -> None:
        self._files: dict[int, tuple[Location, str]] = {}  # with digests, of large files their paths
        self._thumbnails: dict[int, NDArray[np.float32]] = {}  # [SIDE * SIDE] each
        self._lock = threading.Lock()

    def add(self, index: int, path: Location, image: Image.Image | None) -> None:
        """Take one decoded image, 8-bit RGB; None where its pixels are not in host memory, then its file alone counts.

        Raises OSError where the file cannot be read.
        """
        small = isinstance(path, Remote) or path.stat().st_size <= LARGEST_FILE
        file = (path, digest(path) if small else str(path))
        thumbnail = None if image is None else _thumbnail(image)
        with self._lock:
            self._files[index] = file
            if thumbnail is not None:
                self._thumbnails[index] = thumbnail

    def keep_from(self, first: int) -> None:
        """Forget the images below this number."""
        for known in (self._files, self._thumbnails):
            for index in [index for index in known if index < first]:
                del known[index]

    def groups(self) -> list[Copies]:
        """Return the groups of copies, in the order of their first image."""
        same_file: dict[str, list[int]] = defaultdict(list)
        for index in sorted(self._files):
            same_file[self._files[index][1]].append(index)
        groups = {indices[0]: indices for indices in same_file.values()}
        exact = dict.fromkeys(groups, True)
        group_of = {index: first for first, indices in groups.items() for index in indices}
        # Of equal files one stands for all: their distances say nothing about the batch.
        firsts = [index for index in groups if index in self._thumbnails]
        if len(firsts) > 2:
            for i, j in _near_pairs(np.stack([self._thumbnails[index] for index in firsts])):
                first, second = sorted((group_of[firsts[i]], group_of[firsts[j]]))
                if first != second:
                    both = exact.pop(second) and exact[first]
                    exact[first] = both and self._same_pixels(firsts[i], firsts[j])
                    moved = groups.pop(second)
                    groups[first] = sorted(groups[first] + moved)
                    group_of.update(dict.fromkeys(moved, first))
        return [Copies(tuple(groups[first]), exact[first]) for first in sorted(groups) if len(groups[first]) > 1]

    def _same_pixels(self, i: int, j: int) -> bool:
        """Whether two near copies in different files hold the same pixels; reads them again if they may."""
        if not np.array_equal(self._thumbnails[i], self._thumbnails[j]):
            return False
        try:
            first, second = (decode(self._files[index][0]) for index in (i, j))
        except ImageError:
            return False
        return first.size == second.size and first.tobytes() == second.tobytes()


def _thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """Return grey values [SIDE * SIDE], finer than whole levels."""
    size = (4 * SIDE, 4 * SIDE)
    small = image.convert("L").resize(size, Image.Resampling.BILINEAR).convert("F")
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32).reshape(-1)


def _near_pairs(thumbnails: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of thumbnails [N, T], i < j, that are near copies."""
    centred = thumbnails - thumbnails.mean(axis=0)  # smaller numbers, exacter distances
    squares = np.einsum("nt,nt->n", centred, centred)
    n = len(centred)
    rank = min(int(np.ceil(USUAL * (n - 1))), n - 2)
    usual, second = np.empty(n, np.float32), np.empty(n, np.float32)  # distances
    candidates: list[tuple[int, int, float]] = []
    step = max(1, min(ROWS, DISTANCES // n))
    for start in range(0, n, step):
        rows = np.arange(start, min(start + step, n))
        distances = squares[rows, None] + squares - 2 * centred[rows] @ centred.T  # [R, N], of squares
        distances = np.sqrt(np.maximum(distances, 0) / centred.shape[1])
        distances[np.arange(len(rows)), rows] = np.inf
        nearest = np.partition(distances, sorted({1, rank}), axis=1)
        usual[rows], second[rows] = nearest[:, rank], nearest[:, 1]
        limit = np.minimum(NEAR_SHARE * usual[rows], NEAR_RMS)
        for i, j in np.argwhere(distances < limit[:, None]):
            if start + i < j:
                candidates.append((int(start + i), int(j), float(distances[i, j])))
    limits = NEAR_SHARE * np.minimum(usual, np.quantile(second, USUAL))
    for i, j, distance in candidates:
        if distance < min(limits[i], limits[j]) and np.abs(thumbnails[i] - thumbnails[j]).max() < NEAR_LARGEST:
            yield i, j

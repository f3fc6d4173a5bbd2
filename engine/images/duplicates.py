"""Copies within a batch: images that are compared with their own copies look normal, so that defects hide."""

import hashlib
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.kernels.files import file_sha256


@dataclass(frozen=True)
class Copies:
    """Images of a batch that show the same photograph."""

    indices: tuple[int, ...]  # ascending, at least two
    exact: bool  # every pixel of all of them is equal; else some were encoded or resized again


class Duplicates:
    """Finds copies among the images of one batch; `add` may be called from any thread."""

    def __init__(self) -> None:
        self._files: dict[int, str] = {}
        self._pixels: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def add(self, index: int, path: Path, image: Image.Image | NDArray[np.uint8] | None) -> None:
        """Take one decoded image, 8-bit RGB; None where its pixels are not in host memory, then its file alone counts.

        Raises OSError where the file cannot be read.
        """
        file = file_sha256(path)
        pixels = None
        if image is not None:
            array = np.ascontiguousarray(image)  # [h, w, 3]
            pixels = hashlib.sha256(str(array.shape).encode() + array.data).digest()
        with self._lock:
            self._files[index] = file
            if pixels is not None:
                self._pixels[index] = pixels

    def groups(self) -> list[Copies]:
        """Return the groups of copies, in the order of their first image."""
        same: dict[object, list[int]] = defaultdict(list)
        for index in sorted(self._files):
            same[self._pixels.get(index, self._files[index])].append(index)
        return [Copies(tuple(indices), True) for indices in same.values() if len(indices) > 1]

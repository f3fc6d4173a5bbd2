"""A file that grows by whole pieces: a journal, or a table whose rows come one by one."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.files import written_whole


class Growing:
    """A file that is appended to; what is held of it is where the lines of numbered images begin, in any order."""

    def __init__(self, path: Path, head: bytes = b"", images: int = 0, draft: Path | None = None) -> None:
        """Make the file with its head, or go on with what is there.

        images: how many may have a line. draft: what becomes `path`.
        """
        self.path, self._head = path, head
        self.starts = np.full(images, -1, np.int64)  # -1: no line
        opened = path if draft is None else draft
        self._file = open(opened, "r+b" if opened.exists() else "w+b", buffering=0)  # noqa: SIM115, PTH123
        self.end = self._file.seek(0, os.SEEK_END)
        if self.end < len(head):
            self.cut(0)
            self.append(head)

    def append(self, content: bytes, image: int | None = None) -> None:
        """Write at the end, so that it is there if the run is killed; raises OSError, and then leaves nothing of it.

        image: the number of the one whose line it is.
        """
        left = memoryview(content)
        self._file.seek(self.end)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self.cut(self.end)
            raise
        if image is not None:
            self.starts[image] = self.end
        self.end += len(content)

    def cut(self, end: int) -> None:
        """Remove what follows."""
        self._file.truncate(end)
        self.end = end

    def flush(self) -> None:
        """Wait until all of it is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def read(self, images: NDArray[np.intp]) -> Iterator[bytes]:
        """Yield the lines of these images, which have one."""
        with self.path.open("rb") as file:
            for start in self.starts[images].tolist():
                file.seek(start)
                yield file.readline()

    def part(self, start: int, size: int) -> bytes:
        """Return so many bytes from there on; may be called from any thread."""
        return os.pread(self._file.fileno(), size, start)

    def sort(self) -> None:
        """Bring the lines of a file that is closed into the order of the images, after its head."""
        (images,) = np.nonzero(self.starts >= 0)
        if (np.diff(self.starts[images]) < 0).any():
            with written_whole(self.path) as draft, draft.open("wb") as file:
                file.write(self._head)
                file.writelines(self.read(images))

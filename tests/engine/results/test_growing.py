"""A file that grows: a piece is there as a whole or not at all, and lines are found by their images."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zsad.engine.results.growing import Growing


def test_a_file_that_takes_only_a_part_leaves_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk that fills up."""

        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, content: memoryview) -> int:
            self.writes += 1
            if self.writes > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(content[:3]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    growing = Growing(tmp_path / "table", b"head\n")
    growing._file = Full(growing._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        growing.append(b"a whole line\n")
    assert (tmp_path / "table").read_bytes() == b"head\n"
    growing.close()


def test_lines_are_read_by_their_images_and_sorted(tmp_path: Path) -> None:
    lines = Growing(tmp_path / "lines", b"head\n", images=4)
    for image in (2, 0, 3):
        lines.append(f"image {image}\n".encode(), image)
    assert list(lines.read(np.array([0, 2]))) == [b"image 0\n", b"image 2\n"]
    assert (lines.starts >= 0).tolist() == [True, False, True, True]
    lines.close()
    lines.sort()
    assert (tmp_path / "lines").read_bytes() == b"head\nimage 0\nimage 2\nimage 3\n"
    again = Growing(tmp_path / "lines")
    again.append(b"more\n")
    again.close()
    assert (tmp_path / "lines").read_bytes().endswith(b"image 3\nmore\n")

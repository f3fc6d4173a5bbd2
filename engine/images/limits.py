"""What one image file may cost, in pixels, bytes and seconds: a few bytes can ask for gigabytes and hours."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

# As Pillow has it: more than the largest area cameras have (151), and an image of it takes 4 GB while it is worked on.
MAX_MEGAPIXELS = 178.956970
FILE_TIMEOUT = 20.0  # seconds

# What one image may take beyond a limit of memory, so that ordinary ones (24 megapixels) are read under any limit.
SPARE_BYTES = 512 << 20

# Libraries that decode a whole image in one call, which nothing can end but the end of its process, and how many pixels
# they are trusted with: seconds of work. All others ask for a part of the file at a time, or are fast.
UNINTERRUPTED = {"JPEG2000": 16e6, "AVIF": 64e6}
_TRIAL = """import sys
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
Image.open(sys.argv[1], formats=sys.argv[2:]).load()"""


class ImageError(Exception):
    """A file that cannot be scored; the message says why."""


class ImageMemoryError(ImageError, MemoryError):
    """A file for whose pixels there is no memory at the moment."""


@dataclass(frozen=True)
class Limits:
    """What one image file may cost."""

    megapixels: float = MAX_MEGAPIXELS
    seconds: float = FILE_TIMEOUT  # for reading it
    bytes: int | None = None  # while it is worked on, beside SPARE_BYTES; None: whatever there is


_limits = Limits()
_verdicts: dict[tuple[int, ...], str] = {}  # files that took too long (why), or came through a trial (nothing)


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Hold all files that are read in the context, in any thread, to these limits."""
    global _limits
    before, pixels = _limits, Image.MAX_IMAGE_PIXELS
    _limits, Image.MAX_IMAGE_PIXELS = limits, int(limits.megapixels * 1e6) // 2  # Pillow refuses twice as many
    try:
        yield
    finally:
        _limits, Image.MAX_IMAGE_PIXELS = before, pixels
        _verdicts.clear()


def check_pixels(rows: int, columns: int) -> None:
    """Raise Image.DecompressionBombError, as Pillow does, for an image that has too many pixels."""
    if Image.MAX_IMAGE_PIXELS is not None and rows * columns > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def too_many_pixels() -> str:
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return f"too large: more than {most} million pixels; cut it into tiles, or raise --max-megapixels"


def check_bytes(needed: int) -> None:
    """Raise ImageError for an image that takes more than it may, before anything is allocated."""
    if _limits.bytes is not None and needed > _limits.bytes + SPARE_BYTES:
        raise ImageError(
            f"too large: it takes about {needed / 2**30:.1f} GB, and a single image may take "
            f"{(_limits.bytes + SPARE_BYTES) / 2**30:.1f} GB; cut it into tiles, or free or allow more (--memory-limit)"
        )


class TimedFile(io.BufferedReader):
    """A file whose reader is stopped at its next read once its time is up; raises ImageError."""

    def __init__(self, raw: Any, timer: "Timer") -> None:
        super().__init__(raw)
        self.timer = timer

    def read(self, size: int | None = -1, /) -> bytes:
        self.timer.check()
        if size is None or size < 0:
            check_bytes(self.timer.size)
        return super().read(size)


class Timer:
    """The time that one file has."""

    def __init__(self, size: int, file: tuple[int, ...]) -> None:
        """size: in bytes; file: tells it from all others, and from what it was before it changed."""
        self.size, self._file = size, file
        self._end = time.monotonic() + _limits.seconds
        if said := _verdicts.get(self._file):  # it is asked for its header, its pixels, and again for overlays
            raise ImageError(said)

    def check(self) -> None:
        if time.monotonic() > self._end:
            self._refuse()

    def try_elsewhere(self, file: BinaryIO, image: Image.Image) -> None:
        """Decode an image in a process of its own first, if it could take long in a way that nothing ends here.

        Raises ImageError where it does, and where its decoder crashes; what else may be wrong with it is not told.
        """
        kind = image.format or ""
        if image.width * image.height <= UNINTERRUPTED.get(kind, float("inf")) or self._file in _verdicts:
            return
        name = getattr(file, "name", None)  # of what is no local file there is none
        if not isinstance(name, (str, bytes, os.PathLike)):
            return
        try:
            left = max(0.0, self._end - time.monotonic())
            done = subprocess.run(
                [sys.executable, "-c", _TRIAL, os.fspath(name), kind],
                timeout=left,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            self._refuse()
        else:
            if done.returncode < 0:
                raise ImageError(f"damaged: it makes the decoder of {kind} crash")
            _verdicts[self._file] = ""

    def _refuse(self) -> None:
        _verdicts[self._file] = (
            f"takes more than {_limits.seconds:g} s to read; save it again in another format, or raise --file-timeout"
        )
        raise ImageError(_verdicts[self._file])

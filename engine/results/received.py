"""A category's folder that was written on a machine which does not see the output folder: in parts over the wire."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zsad.engine.images.categories import Category

from .output import UNFINISHED, flush_all, move_into_place, own_folder
from .records import CategoryRecord
from .resume import whole_record

PART = 16 << 20  # bytes of a file that are sent at once


@dataclass(frozen=True)
class FilePart:
    """A part of a file; those of one file follow each other."""

    name: str  # within the category's folder
    content: bytes


def parts(folder: Path) -> Iterator[FilePart]:
    """Yield all that is in a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(PART)
                yield FilePart(str(path.relative_to(folder)), content)
                while content := file.read(PART):
                    yield FilePart(str(path.relative_to(folder)), content)


class Received:
    """Writes a category's folder under a temporary name, part after part; raises OSError."""

    def __init__(self, output: Path, category: Category) -> None:
        self._final, self._category = output / category.name, category
        self._staging = own_folder(self._final, "partial")
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        (self._staging / UNFINISHED).touch()

    def add(self, part: FilePart) -> None:
        path = self._staging / part.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(part.content)

    def finish(self) -> CategoryRecord | None:
        """Move the folder into place and return its record; None where it is not whole, and then it is gone."""
        if whole_record(self._staging, self._category) is None:
            self.drop()
            return None
        flush_all(self._staging)
        (self._staging / UNFINISHED).unlink()
        move_into_place(self._staging, self._final)
        return whole_record(self._final, self._category)

    def drop(self) -> None:
        """Remove what has arrived."""
        shutil.rmtree(self._staging, ignore_errors=True)

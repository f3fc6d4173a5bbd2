"""What is noticed of a category's images and references while they are read, and is to be told: damage and copies."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from PIL import Image

from zsad.kernels.files import printable

from .categories import Category
from .duplicates import Duplicates
from .references import References
from .stored import DAMAGE


class Noticed:
    """What is noticed of images, by their numbers; those of references follow."""

    def __init__(self, category: Category, references: References, copies: bool) -> None:
        """copies: whether they are looked for."""
        self.damaged: dict[int, str] = {}  # what speaks for damage
        self._images, self._references = category.images, references.images
        self._duplicates = Duplicates() if copies else None
        self.copies: list[str] = []  # notes on them, of the groups that have ended

    def see(self, index: int, image: Image.Image | None) -> None:
        """Take a decoded image; None where its pixels are not in host memory. May be called from any thread."""
        if image is not None and DAMAGE in image.info:
            self.damaged[index] = image.info[DAMAGE]
        if self._duplicates is None:
            return
        with suppress(OSError):  # a file that has just gone is no copy of anything
            reference = index - len(self._images)
            path = self._images[index].path if reference < 0 else self._references[reference].path
            self._duplicates.add(index, path, image)

    def sound(self, indices: Sequence[int]) -> list[int]:
        """Return the places of images that are not damaged, by their numbers; where those are too few, of all."""
        sound = [place for place, index in enumerate(indices) if index not in self.damaged]
        return sound if len(sound) > 1 else list(range(len(indices)))

    def end_group(self) -> list[str]:
        """Return notes on the copies among images that were compared with each other, and with the references."""
        if self._duplicates is None:
            return []
        found = list(self._of_copies(self._duplicates))
        self._duplicates.keep_from(len(self._images))
        return found

    def notes(self) -> Iterator[str]:
        """Yield what is to be told: copies, then damage."""
        yield from self.copies
        for index in sorted(self.damaged):
            yield f"{self._named(index)}: {self.damaged[index]}"

    def _of_copies(self, duplicates: Duplicates) -> Iterator[str]:
        for copies in duplicates.groups():
            first, *_, last = copies.indices
            images = len(self._images)
            if first >= images:  # references among themselves hide nothing
                continue
            shown = copies.indices[:3] if last < images else (*copies.indices[:2], *copies.indices[2:][-1:])
            names = [self._named(index) for index in shown]
            more = f" and {len(copies.indices) - 3} more" if len(copies.indices) > 3 else ""
            kind = "the same picture" if copies.exact else "nearly the same picture"
            hidden = "copies of a defect hide it" if last < images else "an image that is a reference too looks normal"
            yield f"{', '.join(names)}{more} are {kind}; {hidden}"

    def _named(self, index: int) -> str:
        """Return what an image or a reference is called."""
        reference = index - len(self._images)
        if reference < 0:
            return printable(str(self._images[index].relative))
        return f"the reference {printable(str(self._references[reference].path))}"

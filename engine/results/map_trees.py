"""Formats that are trees of maps, as the evaluators of MVTec AD, LOCO and 3D-AD read them, and one for VisA.

    mvtec-ad, mvtec-loco, mvtec-3d    <object>/test/<defect>/<stem>.tiff, float32 at the image's size
    visa                              <object>/Data/Images/{Normal,Anomaly}/<stem>.tiff, or as above, and
                                      image_scores.csv with the images' paths as VisA's own tables of splits have them

VisA's metrics take arrays, so there is no layout of files to follow; the table says which map is of which image.
"""

import csv
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from zsad.engine.images.categories import Category
from zsad.engine.images.layouts import fold
from zsad.engine.images.remote import Location
from zsad.engine.images.tree import EXPORT
from zsad.kernels.files import as_cell, from_cell

from .checking import check_maps, entries
from .source import Faults, Report, Source, in_test, linked, place_of

TABLE, COLUMNS = "image_scores.csv", ("object", "image", "score", "map")

Rule = Callable[[Path, str], PurePosixPath | None]  # from a category's root and an image's path to its map's


def _mvtec(root: Path, path: str, without: str = "") -> PurePosixPath | None:
    """Return <object>/test/<defect>/<stem>.tiff; without: a level that the evaluator does not have."""
    place = place_of(root, path)
    if place is None or not in_test(place):
        return None
    *levels, name = place.inner.parts
    if levels and fold(levels[-1]) == without:
        levels.pop()
    return PurePosixPath(place.product, "test", levels[0], name).with_suffix(".tiff") if len(levels) == 1 else None


def _mvtec_3d(root: Path, path: str) -> PurePosixPath | None:
    return _mvtec(root, path, without="rgb")


def _visa(root: Path, path: str) -> PurePosixPath | None:
    whole = Path(os.path.abspath(root)) / path  # noqa: PTH100 - links stay as they are
    *_, product, data, images, kind, name = ("", "", "", "", *whole.parts)
    if (data, images) == ("Data", "Images") and product:
        return PurePosixPath(product, data, images, kind, name).with_suffix(".tiff")
    return _mvtec(root, path)


@dataclass(frozen=True)
class Tree:
    """A tree of maps."""

    rule: Rule
    layout: str  # where images must lie, in words
    with_table: bool = False

    def write(self, folder: Path, source: Source) -> Faults:
        """Write the maps, which are those of the categories under second names, and the table if there is one."""
        lacking, taken = Faults(), set[PurePosixPath]()
        with ExitStack() as held:
            table = None
            if self.with_table:
                file = held.enter_context(
                    (folder / TABLE).open("w", newline="", encoding="utf-8", errors="surrogateescape")
                )
                table = csv.writer(file)
                table.writerow(COLUMNS)
            for category, image in source.images(lacking):
                target = self.rule(category.root, image.path)
                named = f"{category.record.name}/{image.path}"
                if target is None:
                    lacking.add(f"no file, since the image does not lie in {self.layout}", named)
                elif target in taken:
                    lacking.add("no file, since another image has the same name but for its suffix", named)
                else:
                    taken.add(target)
                    linked(category.folder / image.map, folder / target)
                    if table is not None:
                        own = str(target.with_suffix(PurePosixPath(image.path).suffix))
                        row = [as_cell(target.parts[0]), as_cell(own), f"{image.score:.6f}", as_cell(str(target))]
                        table.writerow(row)
        return lacking

    def check(self, folder: Path, categories: Iterable[Category] | None, faults: Faults, report: Report) -> int:
        """Look at all maps, and at their names and sizes where the images are known; returns how many maps there are.

        Raises OSError.
        """
        expected = None if categories is None else self._expected(categories)
        maps = set(check_maps(entries(folder, apart_from=(EXPORT, TABLE)), expected, faults, report))
        for name in sorted(maps):
            if self.rule(Path("/"), name) != PurePosixPath(name):
                faults.add(f"not in {self.layout}", name)
        if self.with_table:
            _check_table(folder, maps, faults)
        return len(maps)

    def _expected(self, categories: Iterable[Category]) -> dict[str, Location]:
        """Return the images' files by the names of their maps."""
        expected: dict[str, Location] = {}
        for category in categories:
            for image in category.images:
                if (target := self.rule(category.root, str(image.relative))) is not None:
                    expected.setdefault(str(target), image.path)
        return expected


def _check_table(folder: Path, maps: set[str], faults: Faults) -> None:
    try:
        with (folder / TABLE).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, restval="")
            if tuple(reader.fieldnames or ()) != COLUMNS:
                faults.add(f"a table without the columns {','.join(COLUMNS)}", TABLE)
                return
            listed = set()
            for row in reader:
                listed.add(from_cell(row["map"]))
                if not _is_share(row["score"]):
                    faults.add(f"a score that is no number in [0, 1], in {TABLE}", from_cell(row["image"]))
    except FileNotFoundError:
        faults.add("missing", TABLE)
        return
    for name in sorted(listed - maps):
        faults.add(f"missing, though {TABLE} names it", name)
    for name in sorted(maps - listed):
        faults.add(f"not named by {TABLE}", name)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


TREES = {
    "mvtec-ad": Tree(_mvtec, "<object>/test/<defect>/"),
    "mvtec-loco": Tree(_mvtec, "<object>/test/<defect>/"),
    "mvtec-3d": Tree(_mvtec_3d, "<object>/test/<defect>/rgb/"),
    "visa": Tree(_visa, "<object>/Data/Images/{Normal,Anomaly}/ or <object>/test/{good,bad}/", with_table=True),
}

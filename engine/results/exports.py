"""What others read, made of finished categories: a folder for each format, which comes into place as a whole.

Each format is a module beside this one. Its `write` makes the files from the records and maps that lie in the
categories' folders, so that a run that goes on after another makes them anew without scoring anything; its `check`
looks at them as their reader would.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from zsad.engine.images.folders import Dataset
from zsad.engine.images.tree import EXPORT, EXPORT_START, RUN
from zsad.kernels.machine import zsad_version

from .formats import Export
from .output import OutputError, flush_all, move_into_place, own_folder
from .source import Faults, Report, Source


class Writer(Protocol):
    """Writes a format into a folder, which is there; returns what it cannot hold. Raises OSError, ImageError."""

    def __call__(self, folder: Path, source: Source) -> Faults: ...


def export(name: Export, output: Path, source: Source) -> list[str]:
    """Make a format's folder in the output folder, in place of an earlier one; returns what it cannot hold.

    Raises OSError, ImageError where a map is gone or damaged.
    """
    final = output / name
    staging = own_folder(final, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        lacking = writer(name)(staging, source)
        facts: dict[str, Any] = {EXPORT_START: name, "version": zsad_version()}
        (staging / EXPORT).write_text(json.dumps({**facts, "lacking": lacking.counts}) + "\n")
        flush_all(staging)
        move_into_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [f"{name}: {line}" for line in lacking.lines()]


def writer(name: Export) -> Writer:
    """Return what writes a format; raises ConfigError where a library for it is missing."""
    from . import coco, map_trees, mvtec_ad2, parquet

    if name in parquet.BITS:
        parquet.library()
        return partial(parquet.write, name=name)
    if name == "coco":
        coco.library()
        return coco.write
    return mvtec_ad2.write if name == "mvtec-ad2" else map_trees.TREES[name].write


class Checked(NamedTuple):
    """What was found in files of a format."""

    place: Path  # where they are
    files: int
    faults: Faults


def check(name: str, out: Path, dataset: Dataset | None, report: Report) -> Checked:
    """Look at a format's files as their reader would; with the images also at what is missing, and at sizes.

    out: what `zsad-infer` wrote, or what is to be handed in itself. Raises OutputError where there is nothing of this
    format, OSError, ConfigError where a library is missing.
    """
    from . import coco, map_trees, mvtec_ad2, parquet, rayan

    categories = None if dataset is None else dataset.categories
    nothing = OutputError(
        f"{out} holds nothing of the format {name}; run `zsad-infer DATA --output {out} --format {name}` first"
    )
    place, faults = _place(name, out), Faults()
    if place == out and name != "rayan" and (out / RUN).is_file():
        raise nothing
    if name == "rayan":
        files = rayan.check(place, categories, faults, report)
    elif name == "mvtec-ad2":
        files = mvtec_ad2.check(place, categories, faults, report)
    elif name in parquet.BITS:
        files = parquet.check(place, name, dataset, faults, report)
    elif name == "coco":
        files = coco.check(place, dataset, faults, report)
    else:
        files = map_trees.TREES[name].check(place, categories, faults, report)
    if not files and not faults:
        raise nothing
    return Checked(place, files, faults)


def _place(name: str, out: Path) -> Path:
    """Return the folder of a format, or the archive; raises OutputError where there is none."""
    if not out.exists():
        raise OutputError(f"{out}: there is no such folder")
    within = out / name
    if name == "mvtec-ad2":
        from .mvtec_ad2 import ARCHIVE, FOLDER

        places = [place for place in (within / ARCHIVE, within / FOLDER, out / ARCHIVE, out / FOLDER) if place.exists()]
        return next(iter(places), out)
    return within if name != "rayan" and within.is_dir() else out

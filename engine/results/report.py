"""The report: a page that works from disk and asks the network for nothing.

Up to some hundreds of images one HTML file holds its data, its script and its pictures. Of more the page stays small,
and reads what it shows from a folder beside it: the data in parts, each a script, since a page from disk may read
nothing else of its own accord, and a file for each picture.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsad.engine.images.categories import Category
from zsad.engine.images.tree import EXPORT, EXPORT_START, REPORT_FILES, is_export
from zsad.engine.scores.verdicts import VERDICTS
from zsad.kernels.files import written_whole
from zsad.kernels.machine import zsad_version

from .category import read_thumbnails
from .output import flush_all, own_folder
from .records import CategoryRecord, RunRecord
from .report_images import NUMBERS, PART, PICTURES, EmbeddedPictures, Listing, PictureFiles, ShownCategory, ShownImage

if TYPE_CHECKING:
    from zsad.engine.evaluation.evaluate import Evaluation

TEMPLATE = Path(__file__).with_name("report_template.html")
SCRIPT = Path(__file__).with_name("report_page.js")

ALONE = 500  # images up to which the page holds everything: about 15 MB
LISTED = 1000  # files without a score that the page names

# What the page's policy allows beside its own style and script: pictures, and what its script loads in turn. Nothing
# that markup could ask for: names come from input files, and even a tag that slipped in could run and load nothing.
EMBEDDED, FROM_FILES = ("data:", ""), ("data: file: 'self'", " 'strict-dynamic'")


def write_report(path: Path, run: RunRecord, categories: Sequence[ShownCategory], refresh: float | None = None) -> None:
    """Write a run's results as a page to `path`, replacing what was there only when it is complete.

    What of it finds no room in the page is in a folder of that page's own, `report_files/N`, so that a page never shows
    files of another one; those of earlier pages go once this one is in place.

    refresh: seconds after which the page loads itself again, of images in the order of their arrival; None: it is done.
    Raises ValueError for a number that is not finite, and OSError if the file cannot be written.
    """
    files = path.with_name(REPORT_FILES)
    if sum(len(category.record.images) for category in categories) <= ALONE:
        listing = Listing(categories, EmbeddedPictures(), as_they_came=refresh is not None)
        data = _data(run, categories, listing, refresh, folder=None)
        _write_page(path, EMBEDDED, [_encode(data), *map(_embedded, listing.parts())])
        kept = None
    else:
        kept = _new_folder(files)
        try:
            address = f"{files.name}/{kept.name}"
            listing = Listing(categories, PictureFiles(kept, address), as_they_came=refresh is not None)
            for name, part in listing.parts():
                (kept / f"{name}.js").write_text(_as_script(name, part), "ascii")
            data = _data(run, categories, listing, refresh, address)
            flush_all(kept)
            _write_page(path, FROM_FILES, [_encode(data)])
        except BaseException:
            shutil.rmtree(kept, ignore_errors=True)
            raise
    _remove_others(files, kept)


def shown_categories(
    output: Path, categories: Sequence[Category], records: Sequence[CategoryRecord], evaluation: Evaluation | None
) -> list[ShownCategory]:
    """Join the records of a run's categories with thumbnails, labels and metrics."""
    shown = []
    for category, record in zip(categories, records, strict=True):
        metrics = evaluation["categories"].get(category.name) if evaluation else None
        images = _shown_images(output, category, record)
        shown.append(ShownCategory(record, images, metrics, evaluation["protocol"] if evaluation else None))
    return shown


def _shown_images(output: Path, category: Category, record: CategoryRecord) -> Iterator[ShownImage]:
    """Join images with their thumbnails and labels, all of which are in the order of the category's images."""
    sources, thumbnails = iter(category.images), read_thumbnails(output, category.name) if record.images else iter(())
    pictured, pictures = next(thumbnails, ("", {}))
    for image in record.images:
        source = next(source for source in sources if str(source.relative) == image.path)
        label = "good" if source.anomalous is False else source.defect
        own = pictures if pictured == image.path else {}
        yield ShownImage(image, label, source.anomalous, {name: own[name] for name in PICTURES if name in own})
        if own:
            pictured, pictures = next(thumbnails, ("", {}))


def _data(
    run: RunRecord, categories: Sequence[ShownCategory], listing: Listing, refresh: float | None, folder: str | None
) -> dict[str, Any]:
    """Return what the page knows at once; folder: where it finds the parts of the rest, None in itself."""
    shown_run = asdict(replace(run, categories=[]))
    del shown_run["categories"]
    room, shown = LISTED, list[dict[str, Any]]()
    for category in categories:
        record = category.record
        listed = record.failures[:room]
        room -= len(listed)
        shown.append(
            {
                "name": record.name,
                "images": len(record.images),
                "failed": len(record.failures),
                "failures": [asdict(failure) for failure in listed],
                "groups": record.groups,
                "group_size": record.group_size,
                "image_sizes": record.image_sizes,
                "bounds": record.bounds and asdict(record.bounds),
                "seconds": record.seconds,
                "metrics": category.metrics,
                "protocol": category.protocol,
            }
        )
    return {
        "run": shown_run,
        "folder": folder,
        "sizes": {"numbers": NUMBERS, "images": PART},  # of parts, in images; those of paths are as those of numbers
        "verdicts": VERDICTS,
        "labels": listing.labels,
        "refresh": refresh,
        "categories": shown,
    }


def _write_page(path: Path, allowed: tuple[str, str], data: Iterator[str] | Sequence[str]) -> None:
    """Write the page with its data, of which each piece after the first is a block of its own."""
    page, script = TEMPLATE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    page = page.replace("{{STYLE_HASH}}", _hash(style)).replace("{{SCRIPT_HASH}}", _hash(script))
    for name, sources in zip(("{{PICTURES}}", "{{SCRIPTS}}"), allowed, strict=True):
        page = page.replace(name, sources)
    before, rest = page.split("{{DATA}}")
    between, after = rest.split("{{SCRIPT}}")
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(before)
        file.writelines(data)
        file.write(between + script + after)


def _embedded(part: tuple[str, Any]) -> str:
    """Return a part of the data as a block that follows another one, whose end is written after it."""
    name, content = part
    return f'</script>\n<script type="application/json" id="{name}">{_encode(content)}'


def _as_script(name: str, content: Any) -> str:
    """Return a part of the data as a script that hands it over as text, which is read faster than as a literal."""
    text = _encode(content).replace("\\", "\\\\").replace("'", "\\'")
    return f"take('{name}', '{text}');\n"


def _encode(data: Any) -> str:
    # Names come from file systems. Pure ASCII without these three can neither end a block nor open another.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """The content security policy's name for a block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _new_folder(files: Path) -> Path:
    """Make a folder for a new page beside those of earlier ones."""
    if not is_export(files):
        draft = own_folder(files, "partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        # Says whose it is, so that nobody takes its pictures for images to be scored.
        facts = {EXPORT_START: "report", "version": zsad_version()}
        (draft / EXPORT).write_text(json.dumps(facts) + "\n")
        draft.rename(files)  # raises OSError where there is something of others
    folder = next(folder for number in count(1) if not (folder := files / str(number)).exists())
    folder.mkdir()
    return folder


def _remove_others(files: Path, kept: Path | None) -> None:
    """Remove what pages before this one have left, where it is ours."""
    if kept is None and is_export(files):
        shutil.rmtree(files, ignore_errors=True)
    elif kept is not None:
        for path in files.iterdir():
            if path.is_dir() and path != kept:
                shutil.rmtree(path, ignore_errors=True)

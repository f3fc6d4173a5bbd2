"""The report: one HTML file that holds its data, its script and its pictures, and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from zsad.engine.images.categories import Category
from zsad.kernels.files import written_whole

from .category import read_thumbnails
from .records import CategoryRecord, ImageRecord, RunRecord

if TYPE_CHECKING:
    from zsad.engine.evaluation.evaluate import Evaluation

TEMPLATE = Path(__file__).with_name("report_template.html")

PICTURED = 4000  # images of a run at most whose pictures are in the page: about 120 MB
BLOCK = 2**27  # characters of a block of data, from where on it ends; browsers read no string above 2**29 - 24


@dataclass(frozen=True)
class ShownImage:
    """What the page shows of an image."""

    record: ImageRecord
    label: str | None  # its defect, or good; None without ground truth
    anomalous: bool | None
    image: str  # data URIs, or empty
    overlay: str
    stages: str = ""  # foreground and tiles


@dataclass(frozen=True)
class ShownCategory:
    """What the page shows of a category."""

    record: CategoryRecord
    images: Iterable[ShownImage]
    metrics: Mapping[str, float | None] | None  # by name
    protocol: str | None


def write_report(path: Path, run: RunRecord, categories: Sequence[ShownCategory], refresh: float | None = None) -> None:
    """Write a run's results as a self-contained page to `path`, replacing what was there only when it is complete.

    refresh: seconds after which the page loads itself again, of images in the order of their arrival; None: it is done.
    Raises ValueError for a number that is not finite, and OSError if the file cannot be written.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    # The page allows these two blocks alone: even markup that slipped in could neither run nor load anything.
    for name, block in (("{{STYLE_HASH}}", "style"), ("{{SCRIPT_HASH}}", "script")):
        page = page.replace(name, _hash_block(page, block))
    before, after = page.split("{{DATA}}")
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(before)
        file.writelines(_data(run, categories, refresh))
        file.write(after)


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
        yield ShownImage(
            image, label, source.anomalous, *(own.get(name, "") for name in ("image", "overlay", "stages"))
        )
        if own:
            pictured, pictures = next(thumbnails, ("", {}))


def _data(run: RunRecord, categories: Sequence[ShownCategory], refresh: float | None) -> Iterator[str]:
    """Yield the page's data, in pieces: pictures of a million images are never held at once.

    Images that find no room in the block of the run follow in blocks of their own.
    """
    counts = [len(category.record.images) for category in categories]
    share = _share(counts)
    room, waiting = BLOCK, list[tuple[int, Iterator[str]]]()
    shown_run = asdict(replace(run, categories=[]))
    del shown_run["categories"]
    pictured = None if share == max(counts, default=0) else share
    yield f'{{"run":{_encode(shown_run)},"pictured":{_encode(pictured)},"refresh":{_encode(refresh)},"categories":['
    for number, category in enumerate(categories):
        fields = asdict(replace(category.record, images=[]))
        del fields["sizes"]
        fields |= {"metrics": category.metrics, "protocol": category.protocol}
        yield "," * (number > 0)
        for key, value in fields.items():
            yield f"{'{' if key == 'name' else ','}{_encode(key)}:"
            if key != "images":
                yield _encode(value)
                continue
            images = _encoded_images(category, share)
            room = yield from _list(images, room)
            waiting.append((number, images))
        yield "}"
    yield "]}"
    for number, images in waiting:
        while (image := next(images, None)) is not None:
            yield f'</script>\n<script type="application/json" class="more">{{"category":{number},"images":'
            yield from _list(chain([image], images), BLOCK)
            yield "}"


def _list(images: Iterator[str], room: int) -> Generator[str, None, int]:
    """Yield a list of images until so many characters are used up; returns how many are left."""
    yield "["
    separator = ""
    while room > 0 and (image := next(images, None)) is not None:
        yield separator + image
        room, separator = room - len(image), ","
    yield "]"
    return room


def _share(counts: Sequence[int]) -> int:
    """Return of how many images of a category at most the page has pictures, for these numbers of images."""
    room = PICTURED
    for number, count in enumerate(sorted(counts)):
        share = room // (len(counts) - number)
        if count > share:
            return share
        room -= count
    return max(counts, default=0)


def _encoded_images(category: ShownCategory, share: int) -> Iterator[str]:
    """Yield what the page has of each image; of more than `share`, only those of both ends have pictures."""
    count = len(category.record.images)
    for image in category.images:
        if share - share // 2 < image.record.rank <= count - share // 2:
            image = replace(image, image="", overlay="", stages="")
        yield _encode(_of_image(category.record.name, image))


def _of_image(category: str, image: ShownImage) -> dict[str, Any]:
    file, facts = image.record.overlay_file, image.record.facts()
    del facts["sizes"]
    if not image.record.rank:
        del facts["rank"]
    return {
        **facts,
        "label": image.label,
        "anomalous": image.anomalous,
        "image": image.image,
        "overlay": image.overlay,
        "stages": image.stages,
        # Quoted and anchored, a name can be neither a query nor another scheme; undecodable bytes keep their value.
        "overlay_file": file and "./" + quote(f"{category}/{file}", errors="surrogateescape"),
    }


def _encode(data: Any) -> str:
    # Names come from file systems. Pure ASCII without these three can neither end the block nor open another.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash_block(page: str, tag: str) -> str:
    """The content security policy's name for the page's one plain `tag` block."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

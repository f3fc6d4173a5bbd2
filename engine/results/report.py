"""The report: one HTML file that holds its data, its script and its pictures, and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zsad.engine.evaluation.evaluate import Evaluation
from zsad.engine.images.categories import Category
from zsad.kernels.files import written_whole

from .category import read_thumbnails
from .records import CategoryRecord, ImageRecord, RunRecord

TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class ShownImage:
    """What the page shows of an image."""

    record: ImageRecord
    label: str | None  # its defect, or good; None without ground truth
    anomalous: bool | None
    image: str  # data URIs, or empty
    overlay: str


@dataclass(frozen=True)
class ShownCategory:
    """What the page shows of a category."""

    record: CategoryRecord
    images: Sequence[ShownImage]
    metrics: Mapping[str, float | None] | None  # by name
    protocol: str | None


def write_report(path: Path, run: RunRecord, categories: Sequence[ShownCategory]) -> None:
    """Write a run's results as a self-contained page to `path`, replacing what was there only when it is complete.

    Raises ValueError for a number that is not finite, and OSError if the file cannot be written.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    # The page allows these two blocks alone: even markup that slipped in could neither run nor load anything.
    for name, block in (("{{STYLE_HASH}}", "style"), ("{{SCRIPT_HASH}}", "script")):
        page = page.replace(name, _hash_block(page, block))
    shown_run = {key: value for key, value in asdict(run).items() if key != "categories"}
    page = page.replace("{{DATA}}", _encode({"run": shown_run, "categories": [_of_category(c) for c in categories]}))

    with written_whole(path) as temporary:
        temporary.write_bytes(page.encode())


def shown_categories(
    output: Path, categories: Sequence[Category], records: Sequence[CategoryRecord], evaluation: Evaluation | None
) -> list[ShownCategory]:
    """Join the records of a run's categories with thumbnails, labels and metrics."""
    shown = []
    for category, record in zip(categories, records, strict=True):
        thumbnails = read_thumbnails(output, category.name) if record.images else {}
        labels = {str(image.relative): (image.defect, image.anomalous) for image in category.images}
        images = []
        for image in record.images:
            pictures = thumbnails.get(image.path, {})
            defect, anomalous = labels.get(image.path, (None, None))
            label = "good" if anomalous is False else defect
            images.append(ShownImage(image, label, anomalous, pictures.get("image", ""), pictures.get("overlay", "")))
        metrics = evaluation["categories"].get(category.name) if evaluation else None
        shown.append(ShownCategory(record, images, metrics, evaluation["protocol"] if evaluation else None))
    return shown


def _of_category(category: ShownCategory) -> dict[str, Any]:
    return {
        **asdict(replace(category.record, images=[])),
        "images": [_of_image(category.record.name, image) for image in category.images],
        "metrics": category.metrics,
        "protocol": category.protocol,
    }


def _of_image(category: str, image: ShownImage) -> dict[str, Any]:
    file = image.record.overlay_file
    return {
        **asdict(image.record),
        "label": image.label,
        "anomalous": image.anomalous,
        "image": image.image,
        "overlay": image.overlay,
        # Quoted and anchored, a name can be neither a query nor another scheme; undecodable bytes keep their value.
        "overlay_file": file and "./" + quote(f"{category}/{file}", errors="surrogateescape"),
    }


def _encode(data: Mapping[str, Any]) -> str:
    # Names come from file systems. Pure ASCII without these three can neither end the block nor open another.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash_block(page: str, tag: str) -> str:
    """The content security policy's name for the page's one plain `tag` block."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

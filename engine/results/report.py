"""The report: one HTML file that holds its data, its script and its pictures, and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from zsad.engine.evaluation.evaluate import Evaluation, ground_truth
from zsad.engine.images.folders import Category
from zsad.kernels.files import written_whole

from .category import read_thumbnails

TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(path: Path, run: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> None:
    """Write a run's results as a self-contained page to `path`, replacing what was there only when it is complete.

    `run` has the keys version, preset, device, started, seconds, images, images_per_second, peak_memory_bytes (or
    None), stages (seconds by name), config, checkpoints (name, sha256) and notes. A category has name, images,
    metrics (values by name, or None), protocol (or None), threshold (or None), failures (path, reason), groups,
    group_size (or None) and seconds. An image has path, score (0 to 1), raw_score, rank (1 is the most anomalous),
    label, anomalous, verdict (each may be None), regions (x, y, width, height, area in pixels, peak 0 to 1), image and
    overlay (data URIs, or empty) and overlay_file (relative to the page). Values are plain Python ones; raises
    TypeError for others, ValueError for a number that is not finite, and OSError if the file cannot be written.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    # The page allows these two blocks alone: even markup that slipped in could neither run nor load anything.
    for name, block in (("{{STYLE_HASH}}", "style"), ("{{SCRIPT_HASH}}", "script")):
        page = page.replace(name, _hash_block(page, block))
    linked = [{**each, "images": [_link_overlay(image) for image in each["images"]]} for each in categories]
    page = page.replace("{{DATA}}", _encode({"run": dict(run), "categories": linked}))

    with written_whole(path) as temporary:
        temporary.write_bytes(page.encode())


def shown_categories(
    output: Path,
    group_size: int | None,
    categories: Sequence[Category],
    records: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
) -> list[dict[str, Any]]:
    """Return what `write_report` shows of a run's categories: their records, thumbnails, labels and metrics."""
    shown = []
    for category, record in zip(categories, records, strict=True):
        thumbnails = read_thumbnails(output, category.name) if record["images"] else {}
        images = []
        for image in record["images"]:
            relative = PurePosixPath(image["path"])
            anomalous, _ = ground_truth(category.root, relative)
            images.append(
                {
                    "regions": [],
                    "image": "",
                    "overlay": "",
                    **image,
                    **thumbnails.get(image["path"], {}),
                    "overlay_file": f"{category.name}/{image['overlay_file']}" if image["overlay_file"] else "",
                    "label": None if anomalous is None else relative.parts[1],
                    "anomalous": anomalous,
                }
            )
        shown.append(
            {
                **{key: record[key] for key in ("name", "threshold", "failures", "groups", "seconds")},
                "group_size": group_size,
                "images": images,
                "metrics": evaluation["categories"].get(category.name) if evaluation else None,
                "protocol": evaluation["protocol"] if evaluation else None,
            }
        )
    return shown


def _link_overlay(image: Mapping[str, Any]) -> dict[str, Any]:
    # Quoted and anchored, a file's name can be neither a query nor another scheme; undecodable bytes keep their value.
    file = image["overlay_file"]
    return {**image, "overlay_file": file and "./" + quote(file, errors="surrogateescape")}


def _encode(data: Mapping[str, Any]) -> str:
    # Names come from file systems. Pure ASCII without these three can neither end the block nor open another.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash_block(page: str, tag: str) -> str:
    """The content security policy's name for the page's one plain `tag` block."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

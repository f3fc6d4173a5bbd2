"""Compare the results of `zsad-infer` with the ground truth that lies among the images: `zsad-eval OUT DATA`."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import TypedDict

import numpy as np

from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.folders import Dataset
from zsad.engine.images.ground_truth import mask_file
from zsad.engine.images.stored import ImageError
from zsad.engine.images.tree import RECORD, REGIONS, RUN, SCORES
from zsad.engine.scores.verdicts import VERDICTS
from zsad.kernels.files import as_cell, from_cell, parse_json

from .localisation import ComparedPixels, Comparison, Protocol, Warn
from .masks import MaskError, read_mask
from .metrics import image_metrics
from .pixels import MUSC, Paper, Source, where_masks_lie
from .saturation import Saturation, read_saturation
from .strict import AUPIMO, SEGMENTATION_F1, DrawnRegions

log = logging.getLogger("zsad")

Values = dict[str, float | None]
# Weights of the Rayan challenge's leaderboard; the keys name and order the metrics everywhere below.
CHALLENGE_WEIGHTS = {
    "image_auroc": 1.2,
    "image_ap": 1.1,
    "image_f1": 1.1,
    "pixel_auroc": 1.0,
    "pixel_aupro": 1.4,
    "pixel_ap": 1.3,
    "pixel_f1": 1.3,
}
METRICS = (*CHALLENGE_WEIGHTS, "challenge")

# Beside them where they are asked for, with what bounds each in its name: MVTec AD 2's AUPRO, of regions that hang
# together; MVTec LOCO's area under the saturated overlap, where there are saturation thresholds; recall where normal
# images have next to no false positives; F1 of the run's own regions.
STRICT_HEADS = {
    "pixel_aupro_0.05": "AUPRO@0.05",
    "pixel_auspro_0.05": "AU-sPRO@0.05",
    f"pixel_{AUPIMO}": "AUPIMO@1e-5..1e-4",
    f"pixel_{SEGMENTATION_F1}": "SegF1@regions",
}


LOOKED_FOR = "looked for test/good/ and test/<defect>/, for good/ beside folders of defects, and for masks"


class Evaluation(TypedDict):
    """Metrics in [0, 1] by the names in METRICS and STRICT_HEADS, None where the ground truth for one is missing."""

    categories: dict[str, Values]
    mean: Values
    protocol: Protocol


class EvaluationError(Exception):
    """Nothing can be evaluated: results or ground truth are missing, or not in the layout that is read."""


def evaluate(
    out: Path,
    dataset: Dataset,
    how: Comparison = Comparison(),  # noqa: B008 - of values only
    warn: Warn = log.warning,
    only: Collection[str] | None = None,
    note: Warn = log.info,
) -> Evaluation:
    """Metrics of every category and their mean over the categories that have a value.

    `out` is what `zsad-infer` wrote, `<category>/scores.csv` and the maps named there. `warn` gets a sentence for each
    thing left out, `note` one for each kind of metric that there cannot be. `only` names the categories to look at,
    where results of others may be stale or have no ground truth. Raises EvaluationError where nothing can be evaluated,
    OSError where temporary files find no room, and ValueError for an AUPRO limit outside (0, 1].

    Protocol `official` compares the maps with the ground truth at full resolution, with the exact AUPRO. `paper`
    follows the published code of the method that the run's record names: each mask goes to a square with Pillow's
    bilinear filter, as torchvision's `Resize` does, and AUPRO takes 200 steps. The codes differ in the rest:

    - MuSc, also where there is no record or one of a method not named here: 518×518; only pixels at full intensity
      count as anomalous, because its code for MVTec AD truncates to integers; the stored map, which has the image's
      resolution, is resized with the filter of the mask, so the two stay aligned.
    - APRIL-GAN, WinCLIP (Accurate-WinCLIP-pytorch): the side of the network's input; pixels above half the intensity
      count; the stored map is brought back to what the method gave, as far as the image has its resolution.
    """
    wanted = {category.name: category for category in dataset.categories if only is None or category.name in only}
    known = {name: category for name, category in wanted.items() if category.has_ground_truth}
    if not known:
        raise EvaluationError(f"{dataset.root} holds no ground truth: {LOOKED_FOR}")
    with_results = {path.parent.name for path in out.glob(f"*/{SCORES}")}
    if only is not None:
        with_results &= set(only)
    if not with_results & known.keys():
        raise EvaluationError(
            f"{out} holds no results for the categories of {dataset.root}: expected "
            f"{out / '<category>' / SCORES}; run `zsad-infer {dataset.root} --output {out}` first"
        )
    for name in sorted(known.keys() - with_results):
        warn(f"{name}: no results in {out / name}, category left out; run `zsad-infer` on {known[name].root}")
    # Beside the results of one category those of others may lie, of other runs.
    one_of_several = any(category.root == dataset.root for category in dataset.categories)
    for name in sorted(with_results - known.keys() if not one_of_several else ()):
        reason = f"no ground truth in {dataset.root}: {LOOKED_FOR}" if name in wanted else f"not in {dataset.root}"
        warn(f"{name}: results in {out / name}, but {reason}; left out")
    paper = _paper(out / RUN) if how.protocol == "paper" else None
    categories = {
        name: evaluate_category(out / name, category, how, paper, warn, note)
        for name, category in known.items()
        if name in with_results
    }
    mean = {key: _mean([values[key] for values in categories.values()]) for key in _keys(how)}
    return {"categories": categories, "mean": mean, "protocol": how.protocol}


def _keys(how: Comparison) -> tuple[str, ...]:
    """Return the names of the metrics that are asked for, in their order."""
    return (*METRICS, *(STRICT_HEADS if how.strict else ()))


def _paper(file: Path) -> Paper:
    """Return the rules of the method that a run's record names; raises EvaluationError."""
    if not file.is_file():
        return MUSC
    try:
        record = parse_json(file.read_bytes())
        method = record.get("method")  # the records of old versions lack it: there was but MuSc
        if method not in ("april_gan", "winclip"):
            return MUSC
        ((_, network),) = record["config"]["networks"].items()
        side = int(network["image_size"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(f"{file} is not the record of a run ({error}): run `zsad-infer` again") from error
    return Paper(side, 128, np.float32 if method == "april_gan" else np.float64, ends_coincide=True)


def evaluate_category(
    results: Path, category: Category, how: Comparison, paper: Paper | None, warn: Warn, note: Warn
) -> Values:
    """Metrics of one category, from the folder of its results and its images; see `evaluate`."""
    rows = _read_scores(results / SCORES)
    images = {image.relative: image for image in labelled(category, warn, note).images}
    for path in sorted(images.keys() - rows.keys()):
        warn(f"{category.root / path}: no result in {results / SCORES}, image left out")
    for mask in category.stray_masks:
        warn(f"{category.root / mask}: a mask without an image, left out")
    usable = {
        relative: score
        for relative, row in rows.items()
        if (score := _usable_score(category.root / relative, images.get(relative), row["score"], warn)) is not None
    }
    labels = [images[relative].anomalous for relative in usable]
    found = image_metrics(np.array(labels, np.bool_), list(usable.values()))
    found = {f"image_{key}": value for key, value in found.items()}
    pixels = None
    if _has_pixels(results, category, images.values(), rows.values(), warn, note):
        with_maps = [(images[relative], results / rows[relative]["map"]) for relative in usable]
        source = Source(category.root, with_maps, paper, _saturation(category, warn))
        pixels = ComparedPixels(source, how, warn)
        found |= {f"pixel_{key}": value for key, value in pixels.metrics.items()}
    _say_what_is_missing(category.name, labels, pixels, note)
    if pixels is not None and how.strict:
        strict = pixels.strict_metrics(_drawn_regions(results), lambda said: note(f"{category.name}: {said}"))
        found |= {f"pixel_{key}": value for key, value in strict.items()}
    _say_verdicts(category.name, labels, [rows[relative].get("verdict", "") for relative in usable], note)
    values = {key: None if math.isnan(value := found.get(key, math.nan)) else value for key in _keys(how)}
    return {**values, "challenge": _challenge(values)}


def _say_what_is_missing(name: str, labels: Sequence[bool | None], pixels: ComparedPixels | None, note: Warn) -> None:
    if len(set(labels)) == 1:
        kind = "anomalous" if labels[0] else "normal"
        note(f"{name}: no image metrics, since all images that are compared ({len(labels)}) count as {kind}")
    if pixels is not None and pixels.images and not pixels.anomalous:
        note(f"{name}: no pixel metrics, since no pixel of the {pixels.images} masks is anomalous")


def _drawn_regions(results: Path) -> DrawnRegions | None:
    """Return what a run has told of regions in its category's record and table; None where it has not."""
    try:
        bound = float(parse_json((results / RECORD).read_bytes())["bounds"]["region"])
        least: dict[PurePosixPath, int] = {}
        with (results / REGIONS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                path, area = PurePosixPath(from_cell(row["path"])), int(row["area"])
                least[path] = min(area, least.get(path, area))
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return None
    return DrawnRegions(bound, least)


def _say_verdicts(name: str, labels: Sequence[bool | None], verdicts: Sequence[str], note: Warn) -> None:
    """Say which verdicts defective and good images have, where there are verdicts."""
    if not any(verdicts):
        return
    judged = list(zip(verdicts, labels, strict=True))
    said = [
        f"{verdict} {judged.count((verdict, True))} of {labels.count(True)} defective, "
        f"{judged.count((verdict, False))} of {labels.count(False)} good images"
        for verdict in VERDICTS
    ]
    note(f"{name}: verdicts: {'; '.join(said)}")


def _usable_score(source: Path, image: InputImage | None, text: str, warn: Warn) -> float | None:
    """Return the score of an image that has a label, else None, after a word on what is missing."""
    if image is None:
        warn(f"{source}: no longer in the data; result left out")
        return None
    if image.anomalous is None:
        warn(f"{source}: without a label ({LOOKED_FOR}); result left out")
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        warn(f"{source}: the score {text!r} is not a number, image left out")
        return None
    return score


def _saturation(category: Category, warn: Warn) -> Saturation | None:
    try:
        return read_saturation(category.root)
    except ValueError as error:
        warn(f"{error}; regions count by their whole area")
        return None


def labelled(category: Category, warn: Warn = log.warning, note: Warn = log.info) -> Category:
    """Return a category with labels for its images: where no folder has any, by masks that are empty or not.

    A label stays None where it cannot be told, of which `warn` hears; `note` hears of images without a mask.
    """
    if not category.has_ground_truth or any(image.anomalous is not None for image in category.images):
        return category
    images, without = [], 0
    for image in category.images:
        try:
            anomalous = any(read_mask(mask_file(category.root, mask)).any() for mask in image.masks.files)
        except (ImageError, MaskError) as error:
            said = f"{category.root / image.relative}: its mask {image.masks.files[0]}: {error}"
            warn(ImageError(said) if isinstance(error, ImageError) else said)
            images.append(image)
            continue
        without += not image.masks.files
        images.append(replace(image, anomalous=anomalous, defect="defect" if anomalous else None))
    if without:
        note(f"{category.name}: {without} of {len(images)} images have no mask and count as normal")
    return replace(category, images=tuple(images))


def _has_pixels(
    results: Path,
    category: Category,
    images: Collection[InputImage],
    rows: Collection[Mapping[str, str]],
    warn: Warn,
    note: Warn,
) -> bool:
    """Tell whether pixels can be compared; if not, say why."""
    anomalous = [image for image in images if image.anomalous]
    if not any(image.masks.files for image in anomalous):
        if anomalous:
            note(f"{category.name}: no masks, so no pixel metrics: {where_masks_lie(anomalous[0])}")
        return False
    if not any(row["map"] for row in rows):
        warn(f"{results}: holds no maps, so there are no pixel metrics; run `zsad-infer` with `--format zsad`")
        return False
    return True


def _read_scores(path: Path) -> dict[PurePosixPath, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, restval="")
            missing = {"path", "score", "map"} - set(reader.fieldnames or ())
            if missing:
                raise EvaluationError(f"{path} lacks the column {', '.join(sorted(missing))}: run `zsad-infer` again")
            return {PurePosixPath(from_cell(row["path"])): row for row in reader}
    except csv.Error as error:
        raise EvaluationError(f"{path} is not a CSV file ({error}): run `zsad-infer` again") from error


def _challenge(values: Mapping[str, float | None]) -> float | None:
    weighted = [(weight, value) for key, weight in CHALLENGE_WEIGHTS.items() if (value := values[key]) is not None]
    if len(weighted) < len(CHALLENGE_WEIGHTS):
        return None
    return sum(weight * value for weight, value in weighted) / sum(CHALLENGE_WEIGHTS.values())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rows(evaluation: Evaluation) -> Iterator[tuple[str, Values]]:
    yield from evaluation["categories"].items()
    yield "mean", evaluation["mean"]


def format_csv(evaluation: Evaluation) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = tuple(evaluation["mean"])
    writer.writerow(("category", "protocol", *keys))
    for name, values in _rows(evaluation):
        writer.writerow((as_cell(name), evaluation["protocol"], *(values[key] for key in keys)))
    return text.getvalue()


def format_table(evaluation: Evaluation, aupro_limit: float) -> str:
    names = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", f"AUPRO@{aupro_limit:g}", "P-AP", "P-F1", "challenge")
    heads = dict(zip(METRICS, names, strict=True)) | STRICT_HEADS
    keys = tuple(evaluation["mean"])
    rows: list[tuple[str, ...]] = [("category", "protocol", *(heads[key] for key in keys))]
    for name, values in _rows(evaluation):
        numbers = ("-" if (value := values[key]) is None else f"{value:.4f}" for key in keys)
        rows.append((name, evaluation["protocol"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, protocol, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), protocol.ljust(widths[1]), *aligned)))
    return "\n".join(lines) + "\n"

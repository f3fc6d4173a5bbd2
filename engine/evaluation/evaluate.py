"""Compare the results of `zsad-infer` with the ground truth that lies among the images: `zsad-eval OUT DATA`."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.folders import Dataset
from zsad.engine.images.ground_truth import mask_file
from zsad.engine.images.layouts import MASK_FOLDERS, is_test
from zsad.engine.images.stored import ImageError, read_map
from zsad.engine.images.tree import RUN, SCORES
from zsad.engine.scores.maps import upsample
from zsad.engine.scores.verdicts import VERDICTS
from zsad.kernels.files import as_cell, from_cell, parse_json

from .masks import MaskError, read_mask
from .metrics import Region, image_metrics, pixel_metrics
from .saturation import Saturation, read_saturation, saturation_area

log = logging.getLogger("zsad")

Protocol = Literal["official", "paper"]
Values = dict[str, float | None]
# Is told what is left out, or, as `note`, what is as it is; a sentence each, as an error where a file is unreadable.
Warn = Callable[[str | ImageError], None]

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
PAPER_STEPS = 200


@dataclass(frozen=True)
class Paper:
    """How the published code of a method compares maps with masks."""

    side: int  # pixels of the square that maps and masks are brought to
    mask_from: int  # grey value from which on a pixel of a mask, resized as 0 and 255, is anomalous
    precision: type[np.floating[Any]]  # of the maps, and so of AUPRO's steps
    ends_coincide: bool  # whether maps are resized back as `upsample` does; else with the masks' filter


# Its masks are truncated to integers: only pixels at full intensity are left.
MUSC = Paper(518, 255, np.float64, ends_coincide=False)

LOOKED_FOR = "looked for test/good/ and test/<defect>/, for good/ beside folders of defects, and for masks"


class Evaluation(TypedDict):
    """Metrics in [0, 1] by the names in `METRICS`, None where the ground truth for one is missing."""

    categories: dict[str, Values]
    mean: Values
    protocol: Protocol


class EvaluationError(Exception):
    """Nothing can be evaluated: results or ground truth are missing, or not in the layout that is read."""


def evaluate(
    out: Path,
    dataset: Dataset,
    protocol: Protocol = "official",
    aupro_limit: float = 0.3,
    warn: Warn = log.warning,
    only: Collection[str] | None = None,
    note: Warn = log.info,
) -> Evaluation:
    """Metrics of every category and their mean over the categories that have a value.

    `out` is what `zsad-infer` wrote, `<category>/scores.csv` and the maps named there. `warn` gets a sentence for each
    thing left out, `note` one for each kind of metric that there cannot be. `only` names the categories to look at,
    where results of others may be stale or have no ground truth. Raises EvaluationError where nothing can be evaluated,
    and ValueError for an AUPRO limit outside (0, 1].

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
    paper = _paper(out / RUN) if protocol == "paper" else None
    categories = {
        name: evaluate_category(out / name, category, paper, aupro_limit, warn, note)
        for name, category in known.items()
        if name in with_results
    }
    mean = {key: _mean([values[key] for values in categories.values()]) for key in METRICS}
    return {"categories": categories, "mean": mean, "protocol": protocol}


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
    results: Path, category: Category, paper: Paper | None, aupro_limit: float, warn: Warn, note: Warn
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
    at_image = image_metrics(np.array(labels, np.bool_), list(usable.values()))

    pixels: list[Pixels] = []
    if _has_pixels(results, category, images.values(), rows.values(), warn, note):
        saturation = _saturation(category, warn)
        for relative in usable:
            try:
                map_path = results / rows[relative]["map"]
                pixels.append(_load_pixels(category.root, images[relative], map_path, paper, saturation))
            except (ImageError, OSError, ValueError) as error:
                said = f"{category.root / relative}: left out of the pixel metrics: {error}"
                warn(ImageError(said) if isinstance(error, ImageError) else said)
    at_pixel = pixel_metrics(
        [of_image.mask for of_image in pixels],
        [of_image.map for of_image in pixels],
        aupro_limit,
        PAPER_STEPS if paper else None,
        [of_image.regions for of_image in pixels],
    )
    _say_what_is_missing(category.name, labels, pixels, note)
    _say_verdicts(category.name, labels, [rows[relative].get("verdict", "") for relative in usable], note)
    found = {f"image_{key}": value for key, value in at_image.items()}
    found |= {f"pixel_{key}": value for key, value in at_pixel.items()}
    values: Values = {key: None if math.isnan(found[key]) else found[key] for key in CHALLENGE_WEIGHTS}
    return {**values, "challenge": _challenge(values)}


def _say_what_is_missing(name: str, labels: Sequence[bool | None], pixels: Sequence[Pixels], note: Warn) -> None:
    if len(set(labels)) == 1:
        kind = "anomalous" if labels[0] else "normal"
        note(f"{name}: no image metrics, since all images that are compared ({len(labels)}) count as {kind}")
    if pixels and not any(of_image.mask.any() for of_image in pixels):
        note(f"{name}: no pixel metrics, since no pixel of the {len(pixels)} masks is anomalous")


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
            note(f"{category.name}: no masks, so no pixel metrics: {_where_masks_lie(anomalous[0])}")
        return False
    if not any(row["map"] for row in rows):
        warn(f"{results}: holds no maps, so there are no pixel metrics; run `zsad-infer` with `--format zsad`")
        return False
    return True


def _where_masks_lie(image: InputImage) -> str:
    place = image.relative.with_suffix("")
    if is_test(place.parts[0]):
        place = place.relative_to(place.parts[0])
    first, *others = MASK_FOLDERS
    return (
        f"looked for {first}/{place}_mask.png, also with _label, _GT or nothing for _mask and any image suffix, "
        f"in {', '.join(others)} and beside the image"
    )


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


@dataclass(frozen=True)
class Pixels:
    """What there is to compare of one image, at the protocol's size."""

    mask: NDArray[np.bool_]  # [H, W]
    map: NDArray[np.floating[Any]]  # [H, W]
    regions: Sequence[Region] | None  # None: those of the mask that hang together


def _load_pixels(
    root: Path, image: InputImage, map_path: Path, paper: Paper | None, saturation: Saturation | None
) -> Pixels:
    """Mask and map of one image; ImageError says which file is unreadable, ValueError what else is wrong."""
    if not map_path.is_file():
        raise ValueError(f"its map {map_path} is missing; run `zsad-infer` again")
    try:
        map_ = read_map(map_path)
    except ImageError as error:
        raise ImageError(f"its map {map_path}: {error}; run `zsad-infer` again") from None
    if not np.isfinite(np.asarray(map_)).all():
        raise ValueError(f"its map {map_path} holds NaN or infinity; run `zsad-infer` again")
    if image.anomalous and not image.masks.files:
        raise ValueError(f"its mask is missing: {_where_masks_lie(image)}")
    mask = np.zeros((map_.height, map_.width), np.bool_)
    by_file = image.masks.regions or saturation is not None
    regions: list[Region] = []
    for path in image.masks.files:
        file = mask_file(root, path)
        try:
            part = read_mask(file)  # [H, W]
        except (ImageError, MaskError) as error:
            kind = ImageError if isinstance(error, ImageError) else ValueError
            raise kind(f"its mask {file}: {error}") from None
        if part.shape != mask.shape:
            size = f"{part.shape[1]}x{part.shape[0]} px, the image {map_.width}x{map_.height} px"
            raise ValueError(f"its mask {file} is {size}")
        mask |= part
        if by_file and part.any():
            regions.append(Region(part, saturation_area(file, part, saturation)))
    if bool(mask.any()) != image.anomalous:
        said = "is empty, though the image counts as" if image.anomalous else "is not empty, though the image counts as"
        raise ValueError(f"its mask {mask_file(root, image.masks.files[0])} {said} {image.defect or 'normal'}")
    if paper is not None:
        return _resized(mask, map_, paper)
    return Pixels(mask, np.asarray(map_), regions if by_file else None)


def _resized(mask: NDArray[np.bool_], map_: Image.Image, paper: Paper) -> Pixels:
    square, bilinear = (paper.side, paper.side), Image.Resampling.BILINEAR
    resized_mask = Image.fromarray(mask).convert("L").resize(square, bilinear)  # 0 and 255 before
    resized = upsample(np.asarray(map_), square) if paper.ends_coincide else np.asarray(map_.resize(square, bilinear))
    return Pixels(np.asarray(resized_mask) >= paper.mask_from, resized.astype(paper.precision), None)


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
    writer.writerow(("category", "protocol", *METRICS))
    for name, values in _rows(evaluation):
        writer.writerow((as_cell(name), evaluation["protocol"], *(values[key] for key in METRICS)))
    return text.getvalue()


def format_table(evaluation: Evaluation, aupro_limit: float) -> str:
    heads = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", f"AUPRO@{aupro_limit:g}", "P-AP", "P-F1", "challenge")
    rows: list[tuple[str, ...]] = [("category", "protocol", *heads)]
    for name, values in _rows(evaluation):
        numbers = ("-" if (value := values[key]) is None else f"{value:.4f}" for key in METRICS)
        rows.append((name, evaluation["protocol"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, protocol, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), protocol.ljust(widths[1]), *aligned)))
    return "\n".join(lines) + "\n"

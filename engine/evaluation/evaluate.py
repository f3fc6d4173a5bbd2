"""Compare the results of `zsad-infer` with ground truth in the MVTec layout: `zsad-eval OUT DATA`."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.images.decode import SUFFIXES

from .masks import MaskError, read_mask
from .metrics import image_metrics, pixel_metrics

Protocol = Literal["official", "paper"]
Values = dict[str, float | None]
Warn = Callable[[str], None]

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
PAPER_SIZE = 518
PAPER_STEPS = 200


class Evaluation(TypedDict):
    """Metrics in [0, 1] by the names in `METRICS`, None where the ground truth for one is missing."""

    categories: dict[str, Values]
    mean: Values
    protocol: Protocol


class EvaluationError(Exception):
    """Nothing can be evaluated: results or ground truth are missing, or not in the layout that is read."""


def ground_truth(category_root: Path, relative: PurePosixPath) -> tuple[bool | None, Path | None]:
    """Label and mask path of an image, from its path relative to the category's folder.

    The label is True for an anomalous image, False for one in `test/good`, and None where the path is not
    `test/<defect>/…`. Only an anomalous image has a mask path, which need not exist.
    """
    if len(relative.parts) < 3 or relative.parts[0] != "test":
        return None, None
    if relative.parts[1] == "good":
        return False, None
    return True, category_root.joinpath("ground_truth", *relative.parts[1:-1], f"{relative.stem}_mask.png")


def evaluate(
    out: Path,
    data: Path,
    protocol: Protocol = "official",
    aupro_limit: float = 0.3,
    warn: Warn = lambda message: print(message, file=sys.stderr),
    only: Collection[str] | None = None,
) -> Evaluation:
    """Metrics of every category and their mean over the categories that have a value.

    `out` is what `zsad-infer` wrote, `<category>/scores.csv` and the maps named there; `data` holds the categories, or
    is one. `warn` gets a sentence for each thing left out. `only` names the categories to look at, where results of
    others may be stale. Raises EvaluationError where nothing can be evaluated, and ValueError for an AUPRO limit
    outside (0, 1].

    Protocol `official` compares the maps with the ground truth at full resolution, with the exact AUPRO. `paper`
    follows MuSc's published MVTec tables: each mask goes to 518×518 with Pillow's bilinear filter, as torchvision's
    `Resize` does, and only pixels that are at full intensity then count as anomalous, because the reference truncates
    to integers; AUPRO takes 200 steps. The reference upsamples its patch grid to 518×518; here the stored map, which
    has the image's resolution, goes there with the same filter as the mask, so the two stay aligned.
    """
    roots = _category_roots(data)
    with_results = {path.parent.name for path in out.glob("*/scores.csv")}
    if only is not None:
        roots = {name: root for name, root in roots.items() if name in only}
        with_results &= set(only)
    if not with_results & roots.keys():
        raise EvaluationError(
            f"{out} holds no results for the categories of {data}: expected {out / '<category>' / 'scores.csv'}; "
            f"run `zsad-infer` on {data} first"
        )
    for name in sorted(roots.keys() - with_results):
        warn(f"{name}: no results in {out / name}, category left out; run `zsad-infer` on {roots[name]}")
    if not (data / "test").is_dir():
        for name in sorted(with_results - roots.keys()):
            warn(f"{name}: results in {out / name}, but {data} has no such category with a test folder; left out")
    categories = {
        name: evaluate_category(out / name, root, protocol, aupro_limit, warn)
        for name, root in roots.items()
        if name in with_results
    }
    mean = {key: _mean([values[key] for values in categories.values()]) for key in METRICS}
    return {"categories": categories, "mean": mean, "protocol": protocol}


def evaluate_category(results: Path, category_root: Path, protocol: Protocol, aupro_limit: float, warn: Warn) -> Values:
    """Metrics of one category, from the folder of its results and the folder of its data; see `evaluate`."""
    rows = _read_scores(results / "scores.csv")
    images = set(_relative_files(category_root, "test", SUFFIXES))
    for path in sorted(images - rows.keys()):
        warn(f"{category_root / path}: no result in {results / 'scores.csv'}, image left out")
    expected_masks = {ground_truth(category_root, path)[1] for path in images}
    masks = {category_root / path for path in _relative_files(category_root, "ground_truth", {".png"})}
    for mask in sorted(masks - expected_masks):
        warn(f"{mask}: a mask without an image, left out")

    with_pixels = bool(masks & expected_masks)
    if with_pixels and not any(row["map"] for row in rows.values()):
        warn(f"{results}: holds no maps, so there are no pixel metrics; run `zsad-infer` with `--format zsad`")
        with_pixels = False

    labels: list[bool] = []
    scores: list[float] = []
    pixels: list[tuple[NDArray[np.bool_], NDArray[np.float32]]] = []
    for relative, row in rows.items():
        anomalous, mask_path = ground_truth(category_root, relative)
        source = category_root / relative
        if anomalous is None or relative not in images:
            reason = "not in test/<defect>/, so without a label" if anomalous is None else "no longer in the data"
            warn(f"{source}: {reason}; result left out")
            continue
        try:
            score = float(row["score"])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            warn(f"{source}: the score {row['score']!r} in {results / 'scores.csv'} is not a number, image left out")
            continue
        labels.append(anomalous)
        scores.append(score)
        if not with_pixels:
            continue
        try:
            pixels.append(_load_pixels(mask_path, results / row["map"], protocol))
        except (OSError, ValueError) as error:
            warn(f"{source}: left out of the pixel metrics: {error}")

    at_image = image_metrics(labels, scores)
    steps = PAPER_STEPS if protocol == "paper" else None
    at_pixel = pixel_metrics([mask for mask, _ in pixels], [map_ for _, map_ in pixels], aupro_limit, steps)
    found = {f"image_{key}": value for key, value in at_image.items()}
    found |= {f"pixel_{key}": value for key, value in at_pixel.items()}
    values: Values = {key: None if math.isnan(found[key]) else found[key] for key in CHALLENGE_WEIGHTS}
    return {**values, "challenge": _challenge(values)}


def _category_roots(data: Path) -> dict[str, Path]:
    if (data / "test").is_dir():
        return {data.resolve().name: data}
    if not data.is_dir():
        raise EvaluationError(f"{data} is not a folder: pass the folder that zsad-infer was given")
    roots = {path.parent.name: path.parent for path in sorted(data.glob("*/test")) if path.is_dir()}
    if not roots:
        raise EvaluationError(
            f"{data} holds no ground truth: expected {data}/<category>/test/<defect>/ or {data}/test/<defect>/, "
            "with the normal images in test/good"
        )
    return roots


def _read_scores(path: Path) -> dict[PurePosixPath, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, restval="")
            missing = {"path", "score", "map"} - set(reader.fieldnames or ())
            if missing:
                raise EvaluationError(f"{path} lacks the column {', '.join(sorted(missing))}: run `zsad-infer` again")
            return {PurePosixPath(row["path"]): row for row in reader}
    except csv.Error as error:
        raise EvaluationError(f"{path} is not a CSV file ({error}): run `zsad-infer` again") from error


def _relative_files(root: Path, folder: str, suffixes: frozenset[str] | set[str]) -> Iterator[PurePosixPath]:
    """Files under `<root>/<folder>/<defect>/` with one of the suffixes, relative to `root`."""
    for path in (root / folder).glob("*/**/*"):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)  # as for scoring
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            yield PurePosixPath(relative.as_posix())


def _load_pixels(
    mask_path: Path | None, map_path: Path, protocol: Protocol
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Mask and map of one image, both [H, W] at the protocol's size; ValueError or OSError says what is wrong."""
    if not map_path.is_file():
        raise ValueError(f"its map {map_path} is missing; run `zsad-infer` again")
    with Image.open(map_path) as image:
        map_ = image.convert("F")
    if not np.isfinite(np.asarray(map_)).all():
        raise ValueError(f"its map {map_path} holds NaN or infinity; run `zsad-infer` again")
    if mask_path is None:
        mask = Image.new("L", map_.size)
    elif not mask_path.is_file():
        raise ValueError(f"its mask {mask_path} is missing")
    else:
        try:
            mask = Image.fromarray(read_mask(mask_path)).convert("L")  # 0 and 255, for the paper's resizing
        except MaskError as error:
            raise ValueError(f"its mask {mask_path}: {error}") from None
    if mask.size != map_.size:
        raise ValueError(
            f"its mask {mask_path} is {mask.width}x{mask.height} px, the image {map_.width}x{map_.height} px"
        )
    if protocol == "paper":
        size, bilinear = (PAPER_SIZE, PAPER_SIZE), Image.Resampling.BILINEAR
        mask, map_ = mask.resize(size, bilinear), map_.resize(size, bilinear)
    return np.asarray(mask) == 255, np.asarray(map_)


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
        writer.writerow((name, evaluation["protocol"], *(values[key] for key in METRICS)))
    return text.getvalue()


def format_table(evaluation: Evaluation, aupro_limit: float) -> str:
    heads = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", f"AUPRO@{aupro_limit:g}", "P-AP", "P-F1", "challenge")
    rows: list[tuple[str, ...]] = [("category", "protocol", *heads)]
    for name, values in _rows(evaluation):
        percent = ("-" if (value := values[key]) is None else f"{100 * value:.2f}" for key in METRICS)
        rows.append((name, evaluation["protocol"], *percent))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, protocol, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), protocol.ljust(widths[1]), *numbers)))
    return "\n".join(lines) + "\n"

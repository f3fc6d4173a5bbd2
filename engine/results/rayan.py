"""The JSON files of the Rayan challenge: one per image, beside its other results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.images.categories import Category
from zsad.kernels.files import parse_json

from .checking import check_names, entries
from .source import Faults, Report

ENDING = "_scores.json"

SIDE = 224  # pixels of the maps


def challenge_json(score: float, scores: NDArray[np.float32]) -> str:
    """Return the challenge's JSON for an image score and a map [224, 224], four decimals."""
    return json.dumps(
        {
            "img_level_score": {"__ndarray__": round(score, 4), "dtype": "float64", "shape": []},
            "pix_level_score": {
                "__ndarray__": [np.round(scores.astype(np.float64), 4).tolist()],
                "dtype": "float64",
                "shape": [1, *scores.shape],
            },
        }
    )


def read_challenge(text: str | bytes) -> dict[str, Any]:
    """Return what the challenge's JSON of an image holds; raises ValueError where it is none, or not all of one."""
    content = parse_json(text)
    if not (isinstance(content, dict) and content.keys() == {"img_level_score", "pix_level_score"}):
        raise ValueError("not the JSON of the Rayan challenge")
    return content


def with_score(text: str, score: float) -> str:
    """Return the challenge's JSON with another image score; raises ValueError as `read_challenge` does."""
    content = read_challenge(text)
    content["img_level_score"]["__ndarray__"] = round(score, 4)
    return json.dumps(content)


def check(folder: Path, categories: Iterable[Category] | None, faults: Faults, report: Report) -> int:
    """Look at the files in a folder of results; returns how many there are. Raises OSError.

    Names are compared where the images are known.
    """
    expected = None
    if categories is not None:
        expected = {
            f"{category.name}/{image.key}{ENDING}": None for category in categories for image in category.images
        }
    files = (entry for entry in entries(folder) if entry.name.endswith(ENDING))
    number = 0
    for number, entry in enumerate(check_names(files, expected, faults), 1):
        report(number)
        with entry.open() as file:
            fault = _fault(file.read())
        if fault is not None:
            faults.add(fault, entry.name)
    return number


def _fault(text: bytes) -> str | None:
    """Return what is wrong with the challenge's JSON of an image."""
    try:
        content = read_challenge(text)
        arrays = [np.asarray(content[key]["__ndarray__"], np.float64) for key in ("img_level_score", "pix_level_score")]
        said = [(content[key]["dtype"], content[key]["shape"]) for key in ("img_level_score", "pix_level_score")]
    except (ValueError, LookupError, TypeError):
        return "not the JSON of the Rayan challenge"
    shapes = [[], [1, SIDE, SIDE]]
    if said != [("float64", shape) for shape in shapes] or [list(array.shape) for array in arrays] != shapes:
        return f"no score and map of float64 and {SIDE} by {SIDE} pixels"
    if not all(np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1 for array in arrays):
        return "scores that are not in [0, 1]"
    return None

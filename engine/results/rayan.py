"""The JSON files of the Rayan challenge: one per image, beside its other results."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.files import parse_json

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


def read_challenge(text: str) -> dict[str, Any]:
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

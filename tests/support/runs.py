"""Small whole runs of zsad-infer: what goes in and what comes out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def draw(folder: Path, count: int) -> Path:
    """Alike images of several sizes, the last one with a defect."""
    rng = np.random.default_rng(5)
    base = rng.integers(40, 200, (6, 8, 3)).astype(np.uint8)
    folder.mkdir(parents=True)
    for index in range(count):
        picture = np.asarray(Image.fromarray(base).resize((90 + 7 * (index % 3), 80), Image.Resampling.BICUBIC))
        noisy = (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
        if index == count - 1:
            noisy[20:50, 30:60] = (255, 0, 0)
        Image.fromarray(noisy).save(folder / f"{index:02d}.png")
    return folder


def record(output: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((Path(output) / "run.json").read_text())
    return run


def scores_and_maps(output: str, category: str = "data") -> tuple[NDArray[np.float64], list[NDArray[np.float32]]]:
    found = json.loads((Path(output) / category / "category.json").read_text())["images"]
    ordered = sorted(found, key=lambda image: image["path"])
    maps = [np.asarray(Image.open(Path(output) / category / image["map"])) for image in ordered]
    return np.array([image["score"] for image in ordered]), maps

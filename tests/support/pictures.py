"""Small pictures in folders of any layout."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour image, so that lossy formats stay close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def touch_images(root: Path, *names: str, seed: int = 0) -> None:
    """Draw an image for every name, in the format PNG whatever the suffix; those of a call differ by their seeds."""
    for number, name in enumerate(names, seed):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, format="PNG")


def save_pictures(folder: str, *pictures: NDArray[np.uint8]) -> None:
    """Write pictures [H, W, 3] as 0.png, 1.png, … into a new folder."""
    Path(folder).mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(f"{folder}/{number}.png")

"""Checkpoint files of the tiny towers with which the golden arrays of the text-guided methods were made."""

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

ARRAYS = Path(__file__).resolve().parents[3] / "shared" / "golden" / "text"


def text_arrays(name: str) -> np.lib.npyio.NpzFile:
    """Return the arrays of a file without its suffix; skips the test where they are absent."""
    file = ARRAYS / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"needs {file}, which is not part of the repository")
    return np.load(file)


def normalised(pictures: np.ndarray) -> np.ndarray:
    """Return CLIP's input [..., 3, S, S] of pictures [..., S, S, 3] in 8 bits."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (pictures / 255 - np.array(mean)) / np.array(deviation)
    return np.moveaxis(pixels, -1, -3).astype(np.float32)


def clip_state(name: str) -> dict[str, np.ndarray]:
    """Return both towers of `clip_tiny` or `april` in open_clip's names, as float32."""
    stored = text_arrays(f"{name}_weights")
    return {key: stored[key].astype(np.float32) for key in stored.files}


@functools.cache
def _content(name: str) -> bytes:
    return save(clip_state(name))


def write_clip(folder: Path, name: str) -> Path:
    """Write both towers of `clip_tiny` or `april` as `folder`/NAME.safetensors and return the file."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(_content(name))
    return path

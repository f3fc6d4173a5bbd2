"""Image towers that zsad's own native code runs on a CPU, from the files that `native_weights.py` writes."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.kernels.cpu.arrays import CACHE_LINE, aligned_empty
from zsad.kernels.cpu.native import _cpu
from zsad.kernels.machine import available_cores

from .options import WINDOWS

Array = NDArray[np.float32]

# What the time of a tower goes to: activations count with the layer before them, layout is whatever brings values into
# the order and the codes that products want them in.
PARTS: tuple[str, ...] = () if _cpu is None else tuple(_cpu.tower_parts())
TYPES = {"F32": np.float32, "I32": np.int32, "I8": np.int8}  # of the arrays, as safetensors calls them


class NativeTower:
    """An image tower, ready to run. inputs, outputs: their shapes, without the batch."""

    def __init__(self, path: Path, threads: int | None = None, instruction_set: str = "") -> None:
        """threads: as many as there are cores, if not given. instruction_set: the best that there is."""
        facts, arrays = _mapped(path)
        self.inputs, self.outputs = (
            {name: tuple(shape) for name, shape in facts[end].items()} for end in ("inputs", "outputs")
        )
        self._norm = arrays["class_norm.weight"], arrays["class_norm.bias"]
        self._projection: Array | None = arrays.get("projection")
        self._eps, self._width = facts["eps"], facts["width_and_heads"][0]
        sizes = {f"block{index}.hidden": hidden for index, hidden in enumerate(facts["hidden"])}
        self._tower = _cpu.ImageTower(
            tuple(facts["width_and_heads"]),
            tuple(facts["patch_and_grid"]),
            facts["front"],
            facts["eps"],
            facts["activation"],
            facts["int8"],
            len(sizes),
            {**arrays, **sizes},
        )
        self._depth = facts["depth"], facts["only_first"]
        self._how = threads or available_cores(), instruction_set
        self._taps, self._normed = facts["taps"], facts["normed"]
        self._windows: dict[str, NDArray[np.int32]] = {
            name: arrays[name + ".tokens"] for name in WINDOWS if name in self.outputs
        }

    def run(self, images: Array, seconds: NDArray[np.float64] | None = None) -> dict[str, Array]:
        """Return the outputs for images [B, 3, S, S].

        seconds: one for each of `PARTS`, which what a thread spends on it in the mean is added to.
        """
        images = np.ascontiguousarray(images, np.float32)
        outputs = {
            name: np.empty((len(images), *shape), np.float32)
            for name, shape in self.outputs.items()
            if name in ("tokens", "patches")
        }
        grid_tokens = outputs.get("tokens")
        if grid_tokens is None:
            size = self._tower.patches
            grid_tokens = np.empty((len(images), 0, size, self._width), np.float32)
        classes = np.empty((len(images), self._width), np.float32) if "embedding" in self.outputs else None
        windows = {
            name: (rows, np.empty((len(images), len(rows), self._width), np.float32))
            for name, rows in self._windows.items()
        }
        patches, own = outputs.get("patches"), list(windows.values())
        self._tower.forward(
            images, self._taps, self._normed, grid_tokens, patches, classes, *self._depth, own, *self._how, seconds
        )
        if classes is not None:
            vectors = self._vectors(classes[:, None])[:, 0]
            lengths = 1 if self._projection is None else np.linalg.norm(vectors, axis=1, keepdims=True)
            outputs["embedding"] = np.asarray(vectors / lengths, np.float32)
        outputs |= {name: self._vectors(raw) for name, (_, raw) in windows.items()}
        return {name: outputs[name] for name in self.outputs}

    def _vectors(self, classes: Array) -> Array:
        """The class tokens [B, N, C] normed, and projected where there is a projection: [B, N, D].

        That is a product for each image, whose last bits would depend on the others in one for all.
        """
        centred = classes - classes.mean(axis=-1, keepdims=True)
        weight, bias = self._norm
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self._eps))
        normed: Array = centred / deviation * weight + bias
        return normed if self._projection is None else normed @ self._projection


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what a file says of its tower, and the arrays where they lie in the file, mapped into memory."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    facts = json.loads(header.pop("__metadata__")["tower"])
    arrays = {}
    for name, array in header.items():
        size, offset = math.prod(array["shape"]), start + array["data_offsets"][0]
        found = np.frombuffer(content, TYPES[array["dtype"]], size, offset).reshape(array["shape"])
        arrays[name] = _aligned(found) if offset % CACHE_LINE else found
    return facts, arrays


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy

"""Image towers that zsad's own native code runs on a CPU, from the files that `native_weights.py` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from zsad.kernels.cpu.arrays import aligned_empty
from zsad.kernels.cpu.native import _cpu
from zsad.kernels.machine import available_cores

from .options import WINDOWS

Array = NDArray[np.float32]


class NativeTower:
    """An image tower, ready to run. inputs, outputs: their shapes, without the batch."""

    def __init__(self, path: Path, threads: int | None = None, instruction_set: str = "") -> None:
        """threads: as many as there are cores, if not given. instruction_set: the best that there is."""
        with safe_open(str(path), framework="numpy") as file:
            facts = json.loads(file.metadata()["tower"])
            arrays = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, no mapping
        self.inputs, self.outputs = (
            {name: tuple(shape) for name, shape in facts[end].items()} for end in ("inputs", "outputs")
        )
        self._norm = arrays["class_norm.weight"], arrays["class_norm.bias"]
        self._projection: Array | None = arrays.get("projection")
        self._eps, self._width = facts["eps"], facts["width_and_heads"][0]
        sizes = {name: int(array[0]) for name, array in arrays.items() if name.endswith(".hidden")}
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

    def run(self, images: Array) -> dict[str, Array]:
        """Return the outputs for images [B, 3, S, S]."""
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
            images, self._taps, self._normed, grid_tokens, patches, classes, *self._depth, own, *self._how
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


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy

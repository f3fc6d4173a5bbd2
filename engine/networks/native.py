"""Image towers in zsad's own code, on a CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsad.export.native_tower import NativeTower

from .network import TensorSpec


class NativeGraph:
    """A tower from one file (see `Graph`)."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self._tower = NativeTower(path)
        self.inputs, self.outputs = (
            {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
            for shapes in (self._tower.inputs, self._tower.outputs)
        )
        self.largest_batch = batch_size

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Graph.run."""
        return self._tower.run(inputs["images"])

"""The patch-to-image distances that mutual scoring hands back to its caller."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .task import Task

Array = NDArray[np.float32]
ReturnMinima = Literal[False, True, "each"]


class ReturnedMinima:
    """The patch-to-image distances that a call hands back; no memory where it hands none back.

    `of` gives the distances [P, N] of one image, layer and degree, which are added to with the weight `share`.
    """

    def __init__(self, kind: ReturnMinima, images: int, task: Task, references: int = 0) -> None:
        """kind: True averages over layers and degrees, [N, P, N + K]; "each" does not, [L, R, N, P, N + K]; False: no.

        images: N, that are scored; references: K, that they are compared with beside each other.
        """
        if kind not in (False, True, "each"):
            raise ValueError(f"return_minima must be False, True or 'each', not {kind!r}")
        self.each = kind == "each"
        layers, degrees = task.layers, len(task.degrees)
        self.share = 1.0 if self.each else 1.0 / (layers * degrees)
        one = (images, task.patches, images + references)
        self._shape = ((layers, degrees, *one) if self.each else one) if kind else None
        self.bytes = 4 * math.prod(self._shape) if self._shape else 0
        self.array: Array | None = None

    def allocate(self) -> None:
        self.array = None  # of an earlier attempt
        if self._shape:
            self.array = np.zeros(self._shape, np.float32)
            image = np.arange(self._shape[-3])
            self.array[..., image, :, image] = np.inf  # an image is no reference of its own

    def of(self, layer: int, degree: int, image: int) -> Array | None:
        """degree: its position among the degrees."""
        if self.array is None:
            return None
        found: Array = self.array[layer, degree, image] if self.each else self.array[image]
        return found

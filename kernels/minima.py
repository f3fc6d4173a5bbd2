"""The patch-to-image distances that mutual scoring hands back to its caller."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .machine import scratch
from .task import Task

Array = NDArray[np.float32]
ReturnMinima = Literal[False, True, "each", "smallest degree"]


class ReturnedMinima:
    """The patch-to-image distances that a call hands back; no memory where it hands none back.

    They are one or several arrays [N, P, N + K]; each adds up the distances of layers and degrees by its weights.
    """

    def __init__(self, kind: ReturnMinima, images: int, task: Task, references: int = 0) -> None:
        """kind: what is handed back.

        True: averages over layers and degrees, [N, P, N + K]. "smallest degree": these, and averages over layers of the
        smallest degree alone, [2, N, P, N + K]. "each": every layer and degree, [L, R, N, P, N + K]. False: nothing.
        images: N, that are scored; references: K, that they are compared with beside each other.
        """
        if kind not in (False, True, "each", "smallest degree"):
            raise ValueError(f"return_minima must be False, True, 'each' or 'smallest degree', not {kind!r}")
        layers, degrees = task.layers, len(task.degrees)
        every = np.ones((layers, degrees), np.float32)
        smallest = np.zeros((layers, degrees), np.float32)
        smallest[:, task.degrees.index(min(task.degrees))] = 1 / layers
        one = (images, task.patches, images + references)
        weights, self._shape = {
            False: ([], None),
            True: ([every / every.size], one),
            "smallest degree": ([every / every.size, smallest], (2, *one)),
            "each": (np.eye(every.size).reshape(-1, layers, degrees), (layers, degrees, *one)),
        }[kind]
        self.weights: NDArray[np.float32] = np.array(weights, np.float32).reshape(-1, layers, degrees)  # [arrays, L, R]
        # Whether products that only choose the winners (int8) are not enough for any of the distances.
        self.measured = kind in (True, "each")
        self.bytes = 4 * math.prod(self._shape) if self._shape else 0
        self.array: Array | None = None

    def allocate(self, in_memory: bool) -> None:
        """Make room, or drop what an earlier attempt has left and make it again.

        in_memory: else in a temporary file, which is there as long as the array. Raises OSError on a full disk.
        """
        self.array = None
        if self._shape:
            with scratch(self._shape, in_memory) as array:
                self.array = array
            self.array[...] = 0
            image = np.arange(self._shape[-3])
            self.array[..., image, :, image] = np.inf  # an image is no reference of its own

    def of(self, image: int) -> Iterator[tuple[NDArray[np.float32], Array]]:
        """Yield the weights [L, R] of every array and its distances [P, N] of one image, which are added to."""
        if self.array is not None:
            yield from zip(self.weights, self.array.reshape(-1, *self.array.shape[-3:])[:, image], strict=True)

"""Batches that do not fit, on any runtime."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_graph import images

from zsad.engine.networks.network import TensorSpec, run_in_parts

FACTOR = np.full(1, 2, np.float32)


class Narrow:
    """A graph whose memory holds a few images at once."""

    inputs: ClassVar = {
        "images": TensorSpec((3, 70, 70), np.dtype(np.float32)),
        "factor": TensorSpec((1,), np.dtype(np.float32), batched=False),
    }

    def __init__(self, room: int, largest_batch: int) -> None:
        self.room, self.largest_batch = room, largest_batch
        self.tried: list[int] = []

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        self.tried.append(len(inputs["images"]))
        if len(inputs["images"]) > self.room:
            raise MemoryError("no room")
        return {"scaled": inputs["images"] * inputs["factor"]}


def test_a_batch_that_does_not_fit_halves_itself_and_stays_small() -> None:
    narrow = Narrow(room=3, largest_batch=8)
    batch = images(8)
    for _ in range(2):
        found = np.zeros_like(batch)
        for part, outputs in run_in_parts(narrow, {"images": batch, "factor": FACTOR}):  # type: ignore[arg-type]
            found[part] = outputs["scaled"]
        np.testing.assert_array_equal(found, batch * 2)
    assert narrow.tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    with pytest.raises(MemoryError, match="no room"):
        list(run_in_parts(Narrow(room=0, largest_batch=8), {"images": batch, "factor": FACTOR}))  # type: ignore[arg-type]

"""A network: graphs with named arrays in and named arrays out, in whatever library runs them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zsad.engine.config import NetworkSpec
from zsad.export.options import Preprocessing

log = logging.getLogger("zsad")

Array = Any  # a NumPy array, or an array on the device


@dataclass(frozen=True)
class GraphRequest:
    """A graph that a method asks of one of its preset's networks."""

    network: str  # NAME of [networks.NAME]
    graph: str = "image"  # of GRAPHS
    outputs: tuple[str, ...] = ("tokens",)  # of an image tower some of IMAGE_OUTPUTS; other graphs have but theirs
    on_demand: bool = False  # loaded when it is used first
    rows: int | None = None  # of a batch at most; None: as many as images are read at once


@dataclass(frozen=True)
class TensorSpec:
    """Shape, without the batch, and type of a graph's input or output."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    batched: bool = True  # False: an input that all rows of the others share; `shape` is all of it

    def whole(self, rows: int) -> tuple[int, ...]:
        """Return the shape for a batch of so many rows."""
        return (rows, *self.shape) if self.batched else self.shape


class Graph(Protocol):
    """One graph in one library, on a CPU or on a device."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    largest_batch: int  # falls where memory turns out to be short

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the outputs for at most `largest_batch` rows.

        On a device this only queues, and the results are valid until the next call. Raises MemoryError where the batch
        does not fit.
        """


@dataclass(frozen=True)
class Network:
    """The graphs of one checkpoint."""

    spec: NetworkSpec
    checkpoint: str
    sha256: str  # of the checkpoint file
    preprocessing: Preprocessing  # the configuration's, else the architecture's own
    graphs: Mapping[str, Graph]
    libraries: frozenset[str] = frozenset()  # that run them


def batch_rows(specs: Mapping[str, TensorSpec], inputs: Mapping[str, Array]) -> int:
    """Return how many rows a batch of inputs has; specs: the graph's."""
    return next(len(inputs[name]) for name, spec in specs.items() if spec.batched)


def run_in_parts(graph: Graph, inputs: Mapping[str, Array]) -> Iterator[tuple[slice, Mapping[str, Array]]]:
    """Run a batch in parts that fit; yield which rows, and their outputs. Inputs without a batch go with every part.

    A part that does not fit is halved, and later ones stay that small. Raises MemoryError where one row is too much.
    """
    start, rows = 0, batch_rows(graph.inputs, inputs)
    while start < rows:
        part = slice(start, min(start + graph.largest_batch, rows))
        try:
            outputs = graph.run(
                {name: array[part] if graph.inputs[name].batched else array for name, array in inputs.items()}
            )
        except MemoryError as error:
            size = part.stop - part.start
            if size == 1:
                raise
            graph.largest_batch = size // 2
            log.warning("%d rows at once do not fit (%s); going on with %d", size, error, size // 2)
            continue
        yield part, outputs
        start = part.stop

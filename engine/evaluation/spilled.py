"""Pixels that memory does not hold: each image's scores as sorted runs in a temporary file, read range by range.

The metrics need, for each positive, how many pixels score higher. So ranges of scores with a bounded number of
positives are taken one after the other, the highest first; of every run only what lies in the range is read, and
carried along are no more than the counts of what was before. Nothing is rounded: the result is that of memory, but for
the order in which sums are taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .metrics import GIVEN, FloatArray, Piece, Split

# Positives that a range has, about; every how many-th score of a run stays in memory, to find those of a range; scores
# that are counted at once. Together a few MB, and a byte for every 1000 pixels.
RANGE, STRIDE, POSITIVE_STRIDE, BATCH = 2**16, 4096, 64, 2**16


class _Column:
    """Numbers in a file, in the order in which they were given."""

    def __init__(self, file: BinaryIO, values: NDArray[Any]) -> None:
        self._descriptor, self._start = file.fileno(), file.seek(0, os.SEEK_END)
        self.dtype, self.size = values.dtype, values.size
        file.write(np.ascontiguousarray(values).data)
        file.flush()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        width = self.dtype.itemsize
        content = os.pread(self._descriptor, (stop - start) * width, self._start + start * width)
        return np.frombuffer(content, self.dtype)


class _Scores(_Column):
    """Ascending scores."""

    def __init__(self, file: BinaryIO, values: FloatArray, stride: int) -> None:
        super().__init__(file, values)
        self.stride, self.every = stride, values[::stride].copy()
        self.ends = values[[0, -1]] if values.size else values

    def above(self, low: np.floating[Any] | None, stop: int) -> FloatArray:
        """Scores above `low`, or all, as far as they lie before the index `stop`."""
        block = 0 if low is None else max(0, int(np.searchsorted(self.every, low, side="right")) - 1)
        values = self.read(min(block * self.stride, stop), stop)
        return values if low is None else values[np.searchsorted(values, low, side="right") :]


@dataclass(frozen=True)
class _Run:
    """The pixels of one image, ascending."""

    negatives: _Scores
    positives: _Scores  # each once
    counts: _Column  # of each of them
    weights: Mapping[str, _Column]
    weight: Mapping[str, float]  # of all of them


class Spilled:
    """A sample of pixels in a temporary file; images are added one by one, in any order and by several threads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, Lock()
        self._by_number: dict[int, _Run] = {}
        self.positive_count = self.negative_count = 0

    def add(self, number: int, pixels: Split) -> None:
        """Add the pixels of the image with this number; raises OSError on a full disk.

        Its negatives are in one piece, ascending: see `split_pixels`, in place. They are let go.
        """
        with self._lock:
            negatives = _Scores(self._file, pixels.negatives.pop(), STRIDE)
        positives, inverse, counts = np.unique(pixels.positives, return_inverse=True, return_counts=True)
        weights = {kind: np.bincount(inverse, of, positives.size) for kind, of in pixels.weights.items()}
        with self._lock:
            self._by_number[number] = _Run(
                negatives,
                _Scores(self._file, positives, POSITIVE_STRIDE),
                _Column(self._file, counts),
                {kind: _Column(self._file, of) for kind, of in weights.items()},
                {kind: float(of.sum()) for kind, of in weights.items()},
            )
            self.positive_count += pixels.positives.size
            self.negative_count += negatives.size

    @cached_property
    def _runs(self) -> list[_Run]:
        """Of all images, in their order, whichever came first: so sums are the same each time."""
        return [run for _, run in sorted(self._by_number.items())]

    @cached_property
    def _weight(self) -> dict[str, float]:
        return {kind: sum(run.weight[kind] for run in self._runs) for kind in self._runs[0].weight}

    @property
    def extremes(self) -> tuple[np.floating[Any], np.floating[Any]]:
        ends = [scores.ends for run in self._runs for scores in (run.negatives, run.positives) if scores.size]
        every = np.concatenate(ends)
        return every.min(), every.max()

    def pieces(self) -> Iterator[Piece]:
        beyond = found = 0  # negatives and positives of the ranges before
        negative_stops = [run.negatives.size for run in self._runs]
        positive_stops = [run.positives.size for run in self._runs]
        for low in (*self._limits()[::-1], None):
            values, counts, weights = self._positives(low, positive_stops)
            tally = _Tally(values)
            for index, run in enumerate(self._runs):
                negatives = run.negatives.above(low, negative_stops[index])
                negative_stops[index] -= negatives.size
                tally.add(negatives)
            above, at_least, total = tally.result()
            if values.size:
                yield Piece(
                    counts,
                    weights,
                    found + np.cumsum(counts[::-1])[::-1],
                    (beyond + above) / self.negative_count,
                    (beyond + at_least) / self.negative_count,
                )
            beyond += total
            found += int(counts.sum())

    def above(self, thresholds: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        negatives, weight = np.zeros(thresholds.size, np.int64), np.zeros(thresholds.size)
        for run in self._runs:
            values = run.negatives.above(None, run.negatives.size)
            negatives += values.size - np.searchsorted(values, thresholds, side="right")
            values = run.positives.above(None, run.positives.size)
            covered = np.append(np.cumsum(run.weights[GIVEN].read(0, values.size)[::-1])[::-1], 0)
            weight += covered[np.searchsorted(values, thresholds, side="right")]
        return negatives, weight / self._weight[GIVEN]

    def _limits(self) -> FloatArray:
        """Ascending scores that cut the positives into ranges of about RANGE."""
        every = np.sort(np.concatenate([run.positives.every for run in self._runs]))
        step = RANGE // POSITIVE_STRIDE
        return np.unique(every[step::step])

    def _positives(
        self, low: np.floating[Any] | None, stops: list[int]
    ) -> tuple[FloatArray, NDArray[Any], dict[str, NDArray[np.float64]]]:
        """The next positives, above `low` and before `stops`, which go down: scores, each once, counts and weights."""
        scores: list[FloatArray] = []
        counts: list[NDArray[Any]] = []
        weights: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in self._weight}
        for index, run in enumerate(self._runs):
            stop = stops[index]
            scores.append(run.positives.above(low, stop))
            stops[index] = start = stop - scores[-1].size
            counts.append(run.counts.read(start, stop))
            for kind, column in run.weights.items():
                weights[kind].append(column.read(start, stop))
        values, inverse = np.unique(np.concatenate(scores), return_inverse=True)

        def summed(parts: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
            return np.bincount(inverse, np.concatenate(parts), values.size).astype(np.float64)

        of_kinds = {kind: summed(parts) / (self._weight[kind] or 1) for kind, parts in weights.items()}
        return values, summed(counts), of_kinds


class _Tally:
    """Counts scores that lie above and at ascending thresholds [T]."""

    def __init__(self, thresholds: FloatArray) -> None:
        self._thresholds, self._total = thresholds, 0
        self._waiting: list[FloatArray] = []
        self._size = 0
        # How many scores have that many thresholds below them, and below or at them: [T + 1].
        self._below, self._up_to = (np.zeros(thresholds.size + 1, np.int64) for _ in range(2))

    def add(self, scores: FloatArray) -> None:
        """Add ascending scores."""
        self._total += scores.size
        for start in range(0, scores.size if self._thresholds.size else 0, BATCH):
            part = scores[start : start + BATCH]
            self._waiting.append(part)
            self._size += part.size
            if self._size >= BATCH:
                self._count()

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the numbers above and at or above each threshold, and of all."""
        self._count()
        above, at_least = (np.cumsum(of[::-1])[::-1][1:] for of in (self._below, self._up_to))
        return above, at_least, self._total

    def _count(self) -> None:
        if not self._waiting:
            return
        scores = np.concatenate(self._waiting)
        self._waiting, self._size = [], 0
        for counts, side in ((self._below, "left"), (self._up_to, "right")):
            counts += np.bincount(np.searchsorted(self._thresholds, scores, side=side), minlength=counts.size)  # type: ignore[call-overload]

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
# that are counted at once; positives that are handed on at once, since metrics take several numbers for each. Together
# a few MB, and some bytes for every 1000 pixels.
RANGE, STRIDE, POSITIVE_STRIDE, BATCH, PIECE = 2**16, 4096, 128, 2**16, 2**13


class _Column:
    """Numbers in a file, in the order in which they were given."""

    __slots__ = ("_descriptor", "_start", "dtype", "size")  # there are several for each image

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

    __slots__ = ("ends", "every", "stride")

    def __init__(self, file: BinaryIO, values: FloatArray, stride: int) -> None:
        super().__init__(file, values)
        self.stride, self.every = stride, values[::stride].copy()
        self.ends = values[[0, -1]] if values.size else values

    def first_above(self, low: np.floating[Any] | None) -> int:
        """Return the index of the first score above `low`, or of all."""
        if low is None:
            return 0
        start = self.stride * max(0, int(np.searchsorted(self.every, low, side="right")) - 1)
        values = self.read(start, min(start + self.stride, self.size))
        return start + int(np.searchsorted(values, low, side="right"))

    def parts(self, start: int, stop: int) -> Iterator[FloatArray]:
        """Yield the scores from one index to another, few enough at once not to matter."""
        for first in range(start, stop, BATCH):
            yield self.read(first, min(first + BATCH, stop))


@dataclass(frozen=True, slots=True)
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
            tally, total = _Tally(values), 0
            for index, run in enumerate(self._runs):
                start, stop = run.negatives.first_above(low), negative_stops[index]
                negative_stops[index] = start
                total += stop - start
                for scores in run.negatives.parts(start, stop) if values.size else ():
                    tally.add(scores)
            above, at_least = tally.result()
            reached = found + np.cumsum(counts[::-1])[::-1]
            for first in range(0, values.size, PIECE):
                part = slice(first, first + PIECE)
                yield Piece(
                    counts[part],
                    {kind: of[part] for kind, of in weights.items()},
                    reached[part],
                    (beyond + above[part]) / self.negative_count,
                    (beyond + at_least[part]) / self.negative_count,
                )
            beyond += total
            found += int(counts.sum())

    def above(self, thresholds: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        negatives, weight = np.zeros(thresholds.size, np.int64), np.zeros(thresholds.size)
        for run in self._runs:
            for values in run.negatives.parts(0, run.negatives.size):
                negatives += values.size - np.searchsorted(values, thresholds, side="right")
            values = run.positives.read(0, run.positives.size)
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
            start, stop = run.positives.first_above(low), stops[index]
            stops[index] = start
            scores.append(run.positives.read(start, stop))
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
        self._thresholds = thresholds
        self._waiting: list[FloatArray] = []
        self._size = 0
        # How many scores have that many thresholds below them, and below or at them: [T + 1].
        self._below, self._up_to = (np.zeros(thresholds.size + 1, np.int64) for _ in range(2))

    def add(self, scores: FloatArray) -> None:
        """Add ascending scores."""
        self._waiting.append(scores)
        self._size += scores.size
        if self._size >= BATCH:
            self._count()

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers above and at or above each threshold."""
        self._count()
        above, at_least = (np.cumsum(of[::-1])[::-1][1:] for of in (self._below, self._up_to))
        return above, at_least

    def _count(self) -> None:
        if not self._waiting:
            return
        scores = np.concatenate(self._waiting)
        self._waiting, self._size = [], 0
        for counts, side in ((self._below, "left"), (self._up_to, "right")):
            counts += np.bincount(np.searchsorted(self._thresholds, scores, side=side), minlength=counts.size)  # type: ignore[call-overload]

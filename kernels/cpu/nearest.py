"""Nearest neighbours on a CPU: products of chunks, and a pass that keeps the best of every query.

unit vectors [Q, C] → chunk by chunk of the bank: product, running best [Q, K] of each of G runs of chunks
→ candidates [Q, G · K] → those near enough to the best measured again in fp32, one vector with another → the k best

Of the matrix [Q, M] every worker has the products of one chunk of queries with one of the bank. Chunks have the same
shape whatever the memory limit, and what is handed back was measured without them, so that results do not depend on it.
Where bounds spare most products of a bank in memory (bounds.py), the few others are measured at once instead.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from zsad.kernels.machine import available_cores, default_memory_limit

from .arrays import Array, aligned_empty, multiply, product_bytes
from .bounds import LEAST_CHANNELS, Basis, Groups, grouped_bytes, taken_share

try:
    from . import _cpu
except ImportError:  # installed without a working compiler
    _cpu = None  # type: ignore[assignment]

Indices = NDArray[np.int32]
Rows = slice | NDArray[np.integer[Any]]
T = TypeVar("T")
R = TypeVar("R")
Read = Callable[[Rows, Array], None]  # fills an array [n, C] with the unit vectors of n rows of the bank

QUERY_ROWS, BANK_ROWS = 1536, 1024  # rows of a product: few enough for the cache, many enough to be worth packing
CHUNKS_AT_ONCE = 64  # of the bank that queries pass by in one call, which Ctrl-C has to wait for
LEAST_QUERY_ROWS = 256  # with which a product still reaches four fifths of its speed
RUNS = 2  # pieces of work for each of several workers at least, where there is as much
UNIT_GAP = 0.01  # of the square of a length from 1: what is stored in fp16 or int8 is that near
ALIGNED_ROWS = 16  # to which chunks are filled up, so that products compute all columns alike
MEASURED_ROWS = 1024  # vectors of the bank that a worker measures at a time
MEAN_ROWS = 1024  # from which int8 takes the mean vector of the bank
BASIS_ROWS = 2048  # from which the basis of bounds is found, and how many products they leave
MOST_TAKEN = 0.01  # estimated share of products up to which taking them by bounds pays
GIVEN_UP = 16  # a query that comes near more than this part of the bank meets all of it
LOWEST = float(np.finfo(np.float32).min)
FP32_ERROR = 2e-6  # of a cosine from an fp32 product; up to 5e-7 was seen at 2048 channels
ERROR_DEVIATIONS = 6.0  # of an int8 product's error, which one product in 10^9 exceeds


@dataclass(frozen=True)
class Best:
    """The largest products of some queries, and the chunks of the bank that may raise them."""

    values: Array  # [n, K]
    numbers: Indices  # [n, K]
    first: int  # number of the chunks' first vector in the bank
    columns: int  # their vectors
    wanted: int  # k
    margins: Array | None  # [n], less than the k-th largest by which a product is of no use; None: not known


@dataclass(frozen=True)
class Held:
    """Vectors in memory of lengths near 1, or zero."""

    vectors: Array  # [M, C]
    inverse: Array  # [M] inverse lengths; anything for zero vectors

    @staticmethod
    def of(vectors: NDArray[Any]) -> "Held | None":
        """Return vectors [M, C] so; None where they are elsewhere or of other lengths."""
        if isinstance(vectors, np.memmap) or not vectors.flags.c_contiguous:
            return None
        squares = np.empty(len(vectors))
        for at in _runs(len(vectors), BANK_ROWS):
            np.einsum("nc,nc->n", vectors[at], vectors[at], dtype=np.float64, out=squares[at])
        if not ((np.abs(squares - 1) < UNIT_GAP) | (squares == 0)).all():
            return None
        return Held(vectors, (1 / np.sqrt(np.where(squares > 0, squares, 1))).astype(np.float32))


class Product(Protocol):
    """How chunks of unit vectors are multiplied."""

    spare: int  # candidates beyond k
    written: bool  # whether products go into the room for them

    @property
    def query_rows(self) -> int:
        """Return how many queries a product has at most."""

    @staticmethod
    def chunk_bytes(rows: int, channels: int) -> int:
        """Return the size of a prepared chunk."""

    def prepare(self, units: Array, is_bank: bool) -> NDArray[Any]:
        """Return unit vectors [rows, C] as `multiply` takes them."""

    def raise_best(self, left: NDArray[Any], right: NDArray[Any], products: Array, best: Best) -> None:
        """Raise the best of the rows of a prepared chunk by the rows of several [n, ...].

        products: room for [rows of left, rows of one of them] where they are written.
        """

    def errors(self, left: NDArray[Any], rows: int) -> Array:
        """Return by how much the products of each row of a prepared chunk with the bank may be off."""


class Fp32Product:
    """A product in fp32."""

    spare = 4  # for cosines that differ by less than its rounding
    written = True

    @property
    def query_rows(self) -> int:
        return QUERY_ROWS

    @staticmethod
    def chunk_bytes(rows: int, channels: int) -> int:
        return 4 * rows * channels

    def prepare(self, units: Array, is_bank: bool) -> NDArray[Any]:
        return units

    def raise_best(self, left: NDArray[Any], right: NDArray[Any], products: Array, best: Best) -> None:
        for chunk, at in zip(right, _runs(best.columns, BANK_ROWS), strict=True):
            multiply(left, chunk, products)
            running_top(products[:, : at.stop - at.start], best.first + at.start, best.values, best.numbers)

    def errors(self, left: NDArray[Any], rows: int) -> Array:
        return np.full(rows, FP32_ERROR, np.float32)


class Int8Product:
    """A product of int8 codes, quantised around the mean of the bank, which only chooses candidates.

    Rounding to steps of s moves the product with a vector of length r by a deviation of s · r / √12.
    """

    spare = 47  # of banks of tens of thousands of patches up to 45 were within two errors of the nearest
    written = False
    query_rows = 704  # whose codes stay in the second-level cache; fewer would read the bank more often

    def __init__(self, mean: Array) -> None:
        self.mean = mean  # [C]
        self._lock = threading.Lock()
        self._bank_scale = self._bank_length = 0.0  # largest of all chunks so far

    @staticmethod
    def chunk_bytes(rows: int, channels: int) -> int:
        return _cpu.int8_bytes(rows, channels)

    def prepare(self, units: Array, is_bank: bool) -> NDArray[Any]:
        codes = aligned_empty((self.chunk_bytes(*units.shape),), np.uint8)
        _cpu.int8_quantise(units, self.mean, codes)
        if is_bank:
            scales, lengths = _scales_and_lengths(codes, len(units))
            with self._lock:
                self._bank_scale = max(self._bank_scale, float(scales.max()))
                self._bank_length = max(self._bank_length, float(lengths.max()))
        return codes

    def raise_best(self, left: NDArray[Any], right: NDArray[Any], products: Array, best: Best) -> None:
        _cpu.int8_running_top(
            left,
            right,
            best.columns,
            best.first,
            best.values,
            best.numbers,
            margins=best.margins,
            wanted=best.wanted,
        )

    def errors(self, left: NDArray[Any], rows: int) -> Array:
        scales, lengths = _scales_and_lengths(left, rows)
        deviations = np.hypot(scales * self._bank_length, lengths * self._bank_scale) / np.sqrt(12)
        return np.asarray(ERROR_DEVIATIONS * deviations + FP32_ERROR, np.float32)


def _scales_and_lengths(codes: NDArray[np.uint8], rows: int) -> tuple[Array, Array]:
    """Read the steps of quantised unit vectors and their distances from the mean, both [rows]."""
    padded = -(-rows // _cpu.PANEL) * _cpu.PANEL
    header = codes[: 8 * padded].view(np.float32)
    scales, mean_terms = header[:rows], header[padded : padded + rows]
    return scales, np.sqrt(np.maximum(1 - 2 * mean_terms, 0))


@dataclass(frozen=True)
class Workers:
    """Threads that share what is to do, or without a pool the one that asks for it."""

    count: int
    pool: ThreadPoolExecutor | None

    @property
    def pieces(self) -> int:
        """Return how many pieces of work keep all of them busy."""
        return 1 if self.pool is None else RUNS * self.count

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return what a function makes of items, in their order."""
        return list(map(function, items) if self.pool is None else self.pool.map(function, items))


ALONE = Workers(1, None)


class Search:
    """Searches a bank of unit vectors on the CPU."""

    def __init__(
        self,
        vectors: int,
        channels: int,
        k: int,
        precision: str,
        read: Read,
        memory_limit: int | None,
        held: Held | None = None,
    ) -> None:
        """Prepare the bank, where that fits into the limit beside the work; else it is read again for every search.

        held: the bank itself where it can be measured as it is, without reading it; of int8 only.
        precision: "fp32", which "auto" stands for, or "int8". Raises ValueError where it is not to be had, MemoryError
        for a limit below the least, and what `read` raises.
        """
        self.precision = checked_precision(precision)
        self._vectors, self._channels, self._k, self._read = vectors, channels, k, read
        self._limit = default_memory_limit() if memory_limit is None else memory_limit
        least = needed(vectors, channels, k, precision, resident=False)
        if self._limit < least:
            raise MemoryError(
                f"searching {vectors} vectors of {channels} channels takes at least {least} bytes, "
                f"but the limit is {self._limit}; raise memory_limit"
            )
        self._exact: Product = Fp32Product()
        self._product = self._exact if self.precision == "fp32" else Int8Product(self._mean())
        self._chunks: NDArray[Any] | None = None  # prepared, one behind the other
        self._bank: Array | None = None  # all unit vectors, where chunks are parts of them
        self._held = held if self.precision == "int8" else None
        self._groups: Groups | None = None  # where bounds spare most products
        self._halves: NDArray[np.uint16] | None = None  # of their vectors, where these are 16-bit floats
        if needed(vectors, channels, k, precision, resident=True) <= self._limit:
            with all_workers() as workers:
                if self._product is self._exact:
                    self._bank = aligned_empty((self._chunk_count * chunk_rows(vectors), channels), np.float32)
                    self._chunks = self._all_prepared(workers)
                self._groups = self._grouped()
                bank, _ = self._measured()
                self._halves = None if self._groups is None or bank is None else self._groups.halves(bank)
                if self._chunks is None and self._groups is None:
                    self._chunks = self._all_prepared(workers)

    @property
    def _chunk_count(self) -> int:
        return -(-self._vectors // BANK_ROWS)

    def _sample(self, count: int) -> Array:
        """Return up to so many unit vectors of the bank, from all over it."""
        rows = np.arange(0, self._vectors, -(-self._vectors // count))
        units = np.empty((len(rows), self._channels), np.float32)
        self._read(rows, units)
        return units

    def _mean(self) -> Array:
        mean: Array = self._sample(MEAN_ROWS).mean(axis=0)
        return mean

    def _all_prepared(self, workers: Workers) -> NDArray[Any]:
        if self._bank is not None:
            workers.map(lambda chunk: self._prepared(self._product, chunk), range(self._chunk_count))
            return self._bank.reshape(self._chunk_count, -1, self._channels)
        # One array, for which the system may have large pages.
        size = self._product.chunk_bytes(chunk_rows(self._vectors), self._channels)
        codes = aligned_empty((self._chunk_count, size), np.uint8)

        def fill(chunk: int) -> None:
            codes[chunk] = self._prepared(self._product, chunk)

        workers.map(fill, range(self._chunk_count))
        return codes

    def _grouped(self) -> Groups | None:
        """Return a bank in memory in groups, if bounds leave few of its products."""
        in_memory = self._bank is not None or self._held is not None
        if not (has_native_kernels() and in_memory and may_be_bounded(self._vectors, self._channels)):
            return None
        sample = self._sample(BASIS_ROWS)
        basis = Basis.of(sample)
        if taken_share(basis, sample[::2], sample[1::2]) > MOST_TAKEN:
            return None
        return Groups.of(basis, self._vectors, self._read, self._channels)

    def _prepared(self, product: Product, chunk: int) -> NDArray[Any]:
        """Prepare a chunk of the bank; what is beyond its end is zero."""
        first = chunk * BANK_ROWS
        count = min(BANK_ROWS, self._vectors - first)
        if product is self._exact and self._bank is not None:
            units = self._bank[first : first + BANK_ROWS]
        else:
            units = aligned_empty((chunk_rows(self._vectors), self._channels), np.float32)
        self._read(slice(first, first + count), units[:count])
        units[count:] = 0
        return product.prepare(units, is_bank=True)

    def search(self, count: int, read: Read, workers: Workers | None = None) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest of `count` queries; returns cosines [Q, k] and indices [Q, k].

        read: fills an array [n, C] with the unit vectors of n of them. workers: those that several searches share.
        """
        cosines, indices = np.empty((count, self._k), np.float32), np.empty((count, self._k), np.int64)
        resident = 0 if self._chunks is None else self._chunks.nbytes
        per_query = _query_bytes(self._channels, self._k, self.precision)
        free = self._limit - resident - _worker_bytes(self._vectors, self._channels, self.precision)
        group = max(1, free // per_query // QUERY_ROWS) * QUERY_ROWS
        with all_workers() if workers is None else nullcontext(workers) as workers:
            for first in range(0, count, group):
                doubtful = self._first_search(workers, slice(first, min(first + group, count)), read, cosines, indices)
                exact = self._product is self._exact and self._groups is None
                if not exact and doubtful.any():
                    rows = first + np.flatnonzero(doubtful)
                    again, units = (cosines[rows], indices[rows]), self._unit_queries(workers, rows, len(rows), read)
                    self._search(workers, self._exact, units, *again)
                    cosines[rows], indices[rows] = again
        return cosines, indices

    def _first_search(
        self, workers: Workers, queries: slice, read: Read, cosines: Array, indices: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Search for a run of queries; returns for which of them a nearer vector may have been missed."""
        if self._groups is not None:
            shares = [
                slice(queries.start + at.start, queries.start + at.stop)
                for at in _shares(queries.stop - queries.start, workers.count)
            ]
            return np.concatenate(
                workers.map(lambda at: self._bounded_search(at, read, cosines[at], indices[at]), shares)
            )

        def search(at: slice, workers: Workers) -> NDArray[np.bool_]:
            units = self._unit_queries(workers, at, at.stop - at.start, read)
            return self._search(workers, self._product, units, cosines[at], indices[at])

        count = queries.stop - queries.start
        parts = -(-count // self._product.query_rows)
        if self._chunks is None or parts < workers.count:
            return search(queries, workers)
        # As many for each worker, which from the first step to the last need not wait for the others.
        parts = -(-parts // workers.count) * workers.count
        shares = [slice(queries.start + at.start, queries.start + at.stop) for at in _runs(count, -(-count // parts))]
        return np.concatenate(workers.map(lambda at: search(at, ALONE), shares))

    def _bounded_search(
        self, queries: slice, read: Read, cosines: Array, indices: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Fill cosines and indices [n, k] of some queries; returns those that come near too much of the bank, [n]."""
        assert self._groups is not None
        units = self._unit_queries(ALONE, queries, len(cosines), read)
        heads, terms, tails = self._groups.basis.coordinates(units)
        squares = self._groups.squares(heads)
        queue = np.argsort(squares.argmin(axis=1), kind="stable")  # queries that meet the same groups follow each other
        given_up = np.empty(len(units), np.bool_)
        bank, inverse = self._measured()
        assert bank is not None
        _cpu.bounded_bank(
            units,
            (heads, terms, tails),
            queue.astype(np.int32),
            squares,
            self._groups.radii,
            bank[: self._vectors],
            inverse,
            self._groups.order,
            self._groups.codes,
            self._groups.lengths,
            max(self._vectors // GIVEN_UP, self._k),
            cosines,
            indices,
            given_up,
            self._halves,
        )
        np.clip(cosines, -1, 1, out=cosines)
        return given_up

    def _measured(self) -> tuple[Array | None, Array | None]:
        """Return what vectors are measured from, where that is in memory, and their inverse lengths; None: 1."""
        return (self._bank, None) if self._held is None else (self._held.vectors, self._held.inverse)

    def _unit_queries(self, workers: Workers, rows: Rows, count: int, read: Read) -> Array:
        """Return the unit vectors of so many queries [n, C]."""
        units = aligned_empty((count, self._channels), np.float32)

        def fill(at: slice) -> None:
            read(slice(rows.start + at.start, rows.start + at.stop) if isinstance(rows, slice) else rows[at], units[at])

        workers.map(fill, _shares(count, workers.count))
        return units

    def _search(
        self,
        workers: Workers,
        product: Product,
        queries: Array,
        cosines: Array,
        indices: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Fill cosines and indices [Q, k]; returns for which queries a nearer vector may have been missed, [Q]."""
        chunks = _runs(len(queries), self._query_rows(workers, product, len(queries)))
        prepared = workers.map(lambda at: product.prepare(queries[at], is_bank=False), chunks)
        # Once the whole bank was seen; before that what is known of errors is no bound.
        errors = None if self._resident(product) is None else self._errors(product, chunks, prepared)
        values, numbers = self._candidates(workers, product, chunks, prepared, errors)
        if errors is None:
            errors = self._errors(product, chunks, prepared)
        doubtful = np.zeros(len(queries), np.bool_)

        bank, inverse = self._measured()
        every = values.shape[2] == self._vectors  # nothing was left out

        def finish(at: slice) -> None:
            found = queries[at], values[:, at], numbers[:, at], errors[at]
            if has_native_kernels() and bank is not None:
                _cpu.measured_best(*found, bank, inverse, every, cosines[at], indices[at], doubtful[at])
            else:
                self._finish(*found, cosines[at], indices[at])
                if not every:
                    doubtful[at] = values[:, at].min(axis=2).max(axis=0) + errors[at] >= cosines[at, -1]
                np.clip(cosines[at], -1, 1, out=cosines[at])

        workers.map(finish, _shares(len(queries), workers.count))
        return doubtful

    def _resident(self, product: Product) -> NDArray[Any] | None:
        """Return the whole bank as a product takes it, where that is held."""
        return self._chunks if product is self._product else None

    def _errors(self, product: Product, chunks: list[slice], prepared: list[NDArray[Any]]) -> Array:
        """Return by how much the products of each query with the bank may be off, [Q]."""
        return np.concatenate(
            [product.errors(codes, at.stop - at.start) for codes, at in zip(prepared, chunks, strict=True)]
        )

    def _query_rows(self, workers: Workers, product: Product, queries: int) -> int:
        """Return the queries of a product: fewer where otherwise workers would have nothing to do."""
        size = min(product.query_rows, queries)
        while size > LEAST_QUERY_ROWS and self._chunk_count * -(-queries // size) < 2 * workers.pieces:
            size = -(-size // 2)
        return size

    def _candidates(
        self,
        workers: Workers,
        product: Product,
        chunks: list[slice],
        prepared: list[NDArray[Any]],
        errors: Array | None,
    ) -> tuple[Array, Indices]:
        """Return the K largest products of every query with each of G runs of chunks, and their numbers, [G, Q, K].

        Where there are fewer, lowest floats and numbers −1 are behind them. What is left out is at most as large as the
        smallest of them, or further than two errors [Q], if these are known, from the k-th.
        """
        queries, kept = chunks[-1].stop, min(self._k + product.spare, self._vectors)
        resident = self._resident(product)
        margins = None if errors is None else 2 * errors
        # A chunk that has to be prepared first meets all queries at once.
        shares = [[i] for i in range(len(chunks))] if resident is not None else [list(range(len(chunks)))]
        runs = _runs(self._chunk_count, -(-self._chunk_count // -(-workers.pieces // len(shares))))
        values = np.full((len(runs), queries, kept), LOWEST, np.float32)
        numbers = np.full(values.shape, -1, np.int32)
        work = deque((run, share) for share in shares for run in range(len(runs)))
        at_once = 1 if resident is None else CHUNKS_AT_ONCE

        def scan(_: int) -> None:
            products = aligned_empty((QUERY_ROWS if product.written else 0, chunk_rows(self._vectors)), np.float32)
            while True:
                try:
                    run, share = work.popleft()
                except IndexError:
                    return
                for first in range(runs[run].start, runs[run].stop, at_once):
                    some = slice(first, min(first + at_once, runs[run].stop))
                    bank = self._prepared(product, first)[None] if resident is None else resident[some]
                    begin, end = some.start * BANK_ROWS, min(some.stop * BANK_ROWS, self._vectors)
                    for i in share:
                        at = chunks[i]
                        of_rows = None if margins is None else margins[at]
                        best = Best(values[run, at], numbers[run, at], begin, end - begin, self._k, of_rows)
                        product.raise_best(prepared[i], bank, products[: at.stop - at.start], best)

        try:
            workers.map(scan, range(workers.count))
        except BaseException:  # Ctrl-C included: do not start what is still to do
            work.clear()
            raise
        return values, numbers

    def _finish(
        self, queries: Array, values: Array, numbers: Indices, errors: Array, cosines: Array, indices: NDArray[np.int64]
    ) -> None:
        """Fill cosines and indices [Q, k] with the best of candidates [G, Q, K], whose vectors are read for it."""
        found, of_found = np.concatenate(list(values), axis=1), np.concatenate(list(numbers), axis=1)  # [Q, G · K]
        # At least k vectors reach the k-th candidate less its error: only these can be among the k nearest.
        kth = np.partition(found, -self._k, axis=1)[:, -self._k].copy()
        of_worth = _compact(of_found, found + errors[:, None] >= (kth - errors)[:, None])
        cosines[:], indices[:] = largest(self._measure(queries, of_worth), of_worth, self._k)

    def _measure(self, queries: Array, numbers: Indices) -> Array:
        """Return the cosines [Q, K] of candidates, the lowest float for those of number −1."""
        cosines = np.full(numbers.T.shape, LOWEST, np.float32)
        places = np.ascontiguousarray(numbers.T)
        met = np.zeros(self._vectors + 1, np.bool_)
        met[places] = True  # those of −1 are the last
        (rows,) = np.nonzero(met[:-1])
        position = np.full(len(met), -1, np.int32)
        position[rows] = np.arange(len(rows), dtype=np.int32)
        places = position[places]
        units = np.empty((min(MEASURED_ROWS, len(rows)), self._channels), np.float32)
        for first in range(0, len(rows), MEASURED_ROWS):
            part = rows[first : first + MEASURED_ROWS]
            self._read(part, units[: len(part)])
            measure(queries, units[: len(part)], first, places, cosines)
        return np.ascontiguousarray(cosines.T)


def _compact(numbers: Indices, worth: NDArray[np.bool_]) -> Indices:
    """Return the numbers [Q, K] that are worth it at the beginning of their rows, [Q, fewer], and −1 behind them."""
    counts = np.count_nonzero(worth, axis=1)
    out = np.full((len(numbers), counts.max(initial=0)), -1, np.int32)
    out[np.arange(out.shape[1]) < counts[:, None]] = numbers[worth]
    return out


def largest(values: Array, numbers: Indices, k: int) -> tuple[Array, Indices]:
    """Return the k largest of every row of values [Q, K], which are overwritten, and their numbers, both [Q, k].

    They descend; of equal values the lower number comes first.
    """
    best, of_best, rows = (
        np.empty((len(values), k), np.float32),
        np.empty((len(values), k), np.int32),
        np.arange(len(values)),
    )
    for rank in range(k):
        best[:, rank] = values.max(axis=1)
        equal = np.where(values == best[:, rank, None], numbers, np.iinfo(np.int32).max)
        at = equal.argmin(axis=1)
        of_best[:, rank] = equal[rows, at]
        values[rows, at] = LOWEST
    return best, of_best


def has_native_kernels() -> bool:
    """Tell whether the native module was built."""
    return _cpu is not None


def unit_vectors(vectors: Array, out: Array) -> NDArray[np.float64]:
    """Fill out [n, C] with the vectors [n, C] divided by their lengths; returns these, not finite where one is not.

    Zero vectors stay zero. Squares are added in float64, where no float32 is too large or too small.
    """
    lengths = np.empty(len(vectors))
    if has_native_kernels() and vectors.strides[1] == vectors.itemsize and out.flags.c_contiguous:
        _cpu.unit_vectors(vectors, out, lengths)
        return lengths
    np.sqrt(np.einsum("nc,nc->n", vectors, vectors, dtype=np.float64), out=lengths)
    np.divide(vectors, np.where(lengths > 0, lengths, 1)[:, None], out=out, casting="same_kind")
    return lengths


def running_top(products: Array, first: int, values: Array, indices: Indices) -> None:
    """Raise the largest values [P, K] of every row, descending, and their columns, by products [P, n].

    Columns count from `first` on; of equal values the first to come stays before. Without the native pass the products
    are overwritten.
    """
    if has_native_kernels():
        _cpu.running_top(products, first, values, indices)
        return
    rows = np.arange(len(products))
    found: list[tuple[Array, Indices]] = [(values, indices)]
    for _ in range(min(values.shape[1], products.shape[1])):
        column = products.argmax(axis=1)
        best = products[rows, column]
        if not (best > values[:, -1]).any():
            break
        found.append((best[:, None], (column[:, None] + first).astype(np.int32)))
        products[rows, column] = LOWEST
    all_values, all_indices = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.argsort(-all_values, axis=1, kind="stable")[:, : values.shape[1]]
    values[:] = np.take_along_axis(all_values, order, axis=1)
    indices[:] = np.take_along_axis(all_indices, order, axis=1)


def measure(queries: Array, units: Array, first: int, places: Indices, cosines: Array) -> None:
    """Fill cosines [K, Q] of queries [Q, C] with those candidates whose place is among `first`, `first` + 1, ...

    units: [n, C], the vectors at these places.
    """
    if has_native_kernels():
        _cpu.winner_cosines(queries, units[:, None], first, places, np.zeros_like(places), cosines)
        return
    rank, query = np.nonzero((places >= first) & (places < first + len(units)))
    chosen = units[places[rank, query] - first]
    cosines[rank, query] = np.einsum("nc,nc->n", queries[query], chosen)


def checked_precision(precision: str) -> str:
    """Return the precision that is meant; raises ValueError where it is not to be had."""
    if precision in ("auto", "fp32"):
        return "fp32"
    if precision != "int8":
        raise ValueError(f"precision {precision!r} is not available on a CPU; use precision fp32 or int8")
    if not has_native_kernels():
        raise ValueError(
            "precision int8 needs the native kernel, which was not built; use precision fp32, or install a C++17 "
            "compiler and reinstall zsad"
        )
    return "int8"


def fast_precision() -> str:
    """Return the precision in which this processor searches fastest: int8 where it has instructions for it."""
    fastest = _cpu.instruction_sets("int8")[0] if has_native_kernels() else ""
    return "int8" if "vnni" in fastest or "amx" in fastest else "fp32"


def chunk_rows(vectors: int) -> int:
    """Return the rows of each chunk of a bank."""
    return min(BANK_ROWS, -(-vectors // ALIGNED_ROWS) * ALIGNED_ROWS)


def may_be_bounded(vectors: int, channels: int) -> bool:
    """Tell whether a bank is large enough for bounds of its products to pay."""
    return vectors >= BASIS_ROWS and channels >= LEAST_CHANNELS


def needed(vectors: int, channels: int, k: int, precision: str, resident: bool) -> int:
    """Return the bytes that a search takes beside bank, queries and results, with one chunk of queries at a time.

    resident: with the prepared bank.
    """
    precision = checked_precision(precision)
    kind = Fp32Product if precision == "fp32" else Int8Product
    total = _worker_bytes(vectors, channels, precision) + QUERY_ROWS * _query_bytes(channels, k, precision)
    if resident:
        total += -(-vectors // BANK_ROWS) * kind.chunk_bytes(chunk_rows(vectors), channels)
        if has_native_kernels() and may_be_bounded(vectors, channels):
            total += grouped_bytes(vectors, channels)
    return total


def _worker_bytes(vectors: int, channels: int, precision: str) -> int:
    """Count what all workers hold, however many the queries are."""
    rows = chunk_rows(vectors)
    products = 4 * QUERY_ROWS * rows + product_bytes(QUERY_ROWS, rows, channels)
    chunk = 4 * rows * channels + (Int8Product.chunk_bytes(rows, channels) if precision == "int8" else 0)
    read = 8 * max(rows, MEASURED_ROWS) * channels  # rows of the bank, and their unit vectors to be measured
    return available_cores() * (products + chunk + read)


def _query_bytes(channels: int, k: int, precision: str) -> int:
    """Count what a query takes: its unit vector, codes, and the candidates of every worker while they are merged."""
    kind = Fp32Product if precision == "fp32" else Int8Product
    units = 4 * channels
    codes = 0 if precision == "fp32" else Int8Product.chunk_bytes(ALIGNED_ROWS, channels) // ALIGNED_ROWS
    again = 0 if precision == "fp32" else units  # the doubtful are searched again in fp32
    # Each run of chunks has candidates; where they are merged without native code, 40 bytes more are held for each.
    return units + codes + again + (k + kind.spare) * (RUNS * available_cores() * (8 + 40) + 48)


def _runs(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _shares(count: int, workers: int) -> list[slice]:
    """Divide queries among workers."""
    return _runs(count, -(-count // workers))


@contextmanager
def all_workers() -> Iterator[Workers]:
    """Yield as many workers as there are cores, each of which multiplies by itself."""
    with threads("work", available_cores()) as pool, one_blas_thread():
        yield Workers(available_cores(), pool)


@contextmanager
def threads(name: str, count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield so many threads, which end with the context, or with that of `kept_threads` around it.

    What they do must not wait for others of the same name.
    """
    if _kept is not None:
        yield _kept.setdefault((name, count), ThreadPoolExecutor(count, name))  # which starts none before it has to
        return
    with ThreadPoolExecutor(count, name) as pool:
        yield pool


@contextmanager
def kept_threads() -> Iterator[None]:
    """Keep threads for what follows: to start them takes a good part of the time that one image takes of them."""
    global _kept
    _kept, before = {}, _kept
    try:
        yield
    finally:
        _kept, kept = before, _kept
        for pool in kept.values():
            pool.shutdown()


_kept: dict[tuple[str, int], ThreadPoolExecutor] | None = None


def one_blas_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS makes every product in the thread that asks for it."""
    limits: AbstractContextManager[Any] = _libraries().limit(limits=1, user_api="blas")
    return limits


_libraries = cache(ThreadpoolController)  # looks through all that is loaded

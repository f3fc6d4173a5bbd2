"""Nearest neighbours by cosine in a bank of vectors, for methods that remember what good images look like."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cpu import nearest as cpu
from .cuda import nearest as cuda
from .cuda.device import Device, open_device

Array = NDArray[np.float32]

MAX_NEIGHBOURS = 16


class _Search(Protocol):
    """What the CPU half and the CUDA half have in common."""

    precision: str  # resolved

    def search(self, count: int, read: cpu.Read) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest of `count` queries; returns cosines [Q, k] and indices [Q, k].

        read: fills an array [n, C] with the unit vectors of n of them.
        """


class Nearest:
    """A bank of vectors that is searched for the nearest by cosine.

        cosines, indices = Nearest(bank, k=3).search(queries)  # [M, C], [Q, C] -> [Q, 3], [Q, 3]

    A zero vector has cosine 0 with every other.
    """

    def __init__(
        self,
        bank: NDArray[Any],
        k: int = 1,
        precision: str = "auto",
        device: str | Device = "cpu",
        memory_limit: int | None = None,
    ) -> None:
        """Prepare a bank [M, C] of float32 vectors of any length, in memory or a memory map.

        It must not change while it is searched: winners are measured again from it.

        k: how many nearest are wanted, 1 to 16 and at most M.
        precision: "fp32" on a CPU; "int8" there: int8 products choose candidates, which are measured again in fp32, and
            queries whose candidates leave a doubt are searched again in fp32. It pays on processors with AVX-512 VNNI,
            most on those with AMX. "fp16" on a CUDA device: fp16 unit vectors and fp32 sums. "auto" is fp32 on a CPU
            and fp16 on a device.
        device: "cpu", "cuda", "cuda:N", or a device that is open.
        memory_limit: bytes that preparing and searching may use on the CPU or on the device, beside bank, queries and
            results; by default a share of what is free. Where the prepared bank does not fit, every search prepares it
            anew, chunk by chunk; the results are the same.

        Raises ValueError for arguments that make no sense and a bank that is empty or not finite (which for a bank that
        is not held shows in `search`), MemoryError for a limit below `needed`.
        """
        _check("the bank", bank)
        if not len(bank):
            raise ValueError("the bank is empty, so that nothing is nearest; give it at least one vector")
        (vectors, channels), self._k = bank.shape, k
        self._channels = channels
        _check_neighbours(k, vectors)
        read = partial(_read, "vector", bank)
        self._search: _Search
        if device == "cpu":
            held = cpu.Held.of(bank) if precision == "int8" else None
            self._search = cpu.Search(vectors, channels, k, precision, read, memory_limit, held)
        else:
            opened = open_device(device) if isinstance(device, str) else device
            self._search = cuda.Search(opened, vectors, channels, k, precision, read, memory_limit)
        self.precision = self._search.precision

    @staticmethod
    def needed(
        vectors: int, channels: int, k: int = 1, precision: str = "auto", device: str = "cpu", resident: bool = False
    ) -> int:
        """Return the least memory in bytes with which a bank [vectors, channels] is searched.

        resident: the least with which its prepared vectors are held, so that a search does not prepare them again.
        On the CPU it is host memory, otherwise memory of the device. Raises ValueError as the constructor does.
        """
        if min(vectors, channels) < 1:
            raise ValueError(f"a bank needs vectors and channels, not {vectors} vectors of {channels} channels")
        _check_neighbours(k, vectors)
        needed = cpu.needed if device == "cpu" else cuda.needed
        return needed(vectors, channels, k, precision, resident)

    def search(self, queries: NDArray[Any], workers: cpu.Workers | None = None) -> tuple[Array, NDArray[np.int64]]:
        """Find the k nearest vectors of the bank to each of the queries [Q, C], float32 of any length.

        Returns cosines [Q, k] float32, descending, and indices [Q, k] int64; of equal cosines the lower index comes
        first. Raises ValueError for queries that do not fit the bank or are not finite.

        workers: threads of the CPU that several searches share.
        """
        _check("queries", queries)
        if queries.shape[1] != self._channels:
            raise ValueError(f"queries must have the {self._channels} channels of the bank, not {queries.shape[1]}")
        if not len(queries):
            return np.empty((0, self._k), np.float32), np.empty((0, self._k), np.int64)
        read = partial(_read, "query", queries)
        if isinstance(self._search, cpu.Search):
            return self._search.search(len(queries), read, workers)
        return self._search.search(len(queries), read)


def search_all(banks: Sequence[Nearest], queries: Sequence[NDArray[Any]]) -> list[tuple[Array, NDArray[np.int64]]]:
    """Search each of several banks for queries of its own; see `Nearest.search`.

    On a CPU side by side: no processor waits while others end a search.
    """
    if not all(isinstance(bank._search, cpu.Search) for bank in banks):
        return [bank.search(own) for bank, own in zip(banks, queries, strict=True)]
    with cpu.all_workers() as workers, cpu.threads("ask", len(banks)) as asking:
        return list(asking.map(lambda bank, own: bank.search(own, workers), banks, queries))


def _check(what: str, vectors: NDArray[Any]) -> None:
    if getattr(vectors, "ndim", None) != 2 or vectors.shape[1] == 0:
        shape = getattr(vectors, "shape", None)
        raise ValueError(f"{what} must be vectors [N, C] of at least one channel, not {shape}")
    if vectors.dtype != np.float32:
        raise ValueError(f"{what} must be float32, not {vectors.dtype}")


def _check_neighbours(k: int, vectors: int) -> None:
    if not 1 <= k <= MAX_NEIGHBOURS:
        raise ValueError(f"k must be 1 to {MAX_NEIGHBOURS}, not {k}")
    if k > vectors:
        raise ValueError(f"k is {k}, but the bank has only {vectors} vectors; use k=min(k, len(bank))")


def _read(what: str, vectors: NDArray[Any], rows: cpu.Rows, out: Array) -> None:
    """Fill out [n, C] with the unit vectors of some rows."""
    lengths = cpu.unit_vectors(np.asarray(vectors[rows]), out)
    if not np.isfinite(lengths).all():
        number = int(np.argmin(np.isfinite(lengths)))
        number = rows.start + number if isinstance(rows, slice) else int(rows[number])
        raise ValueError(
            f"{what} {number} is not finite: the network that made it overflows in its precision; run it in fp32 "
            "(zsad-infer --network-precision fp32)"
        )

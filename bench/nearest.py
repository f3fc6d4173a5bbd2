"""Time of a search for nearest neighbours in a bank, against the bare product of queries and bank.

    python -m zsad.bench.nearest [--queries 1369] [--bank 50000] [--channels 1024] [--neighbours 1] [--device cuda]
                                 [--refcheck]

All variants run in turn in one process on the same vectors, so that they see the same machine; medians and the medians
of the round-by-round ratios are kept, also of the time that processors spent, which others on the machine change less:

    zsad        zsad.kernels.nearest.Nearest in fp32: search of a prepared bank, queries normalised
    zsad int8   the same with precision="int8", where the installation has it
    streamed    zsad in fp32 with the least memory: the bank is normalised again for every search
    floor       the bare fp32 product alone, on as many threads as zsad uses, into an array of all cosines

Validates first: cosines and indices of every variant against the float64 reference.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from zsad.kernels import reference
from zsad.kernels.machine import available_cores
from zsad.kernels.nearest import Nearest

from .records import RESULTS, append, environment

Array = NDArray[np.float32]

# Deviation of a cosine, and difference of cosines above which the index must be the reference's, on CPU and GPU.
GAPS = {"cpu": 1e-6, "cuda": 1e-3}
CHECKED_BANK, CHECKED_QUERIES = 5000, 300


def make_vectors(count: int, channels: int, seed: int) -> Array:
    """Vectors [N, C] like a memory bank's: around a few hundred centres, with strong channels and a common mean."""
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres = shared.normal(size=(300, channels)).astype(np.float32) + shared.normal(size=channels)
    strength = np.exp(0.5 * shared.normal(size=channels)).astype(np.float32)
    own = rng.normal(size=(count, channels)).astype(np.float32)
    own += centres[rng.integers(0, len(centres), count)].astype(np.float32)
    own *= strength
    return own


def variants(bank: Array, k: int, device: str) -> dict[str, Nearest]:
    """Prepare the bank in every way that can run here, by name."""
    found = {"zsad": Nearest(bank, k, device=device)}
    try:
        found["zsad int8"] = Nearest(bank, k, "int8", device)
    except ValueError as error:
        print(f"zsad int8: not measured ({error})")
    least = Nearest.needed(len(bank), bank.shape[1], k, device=device)
    found["streamed"] = Nearest(bank, k, device=device, memory_limit=least)
    return found


def validate(channels: int, k: int, device: str) -> dict[str, float]:
    """Compare every variant with the float64 reference; SystemExit where one is off."""
    queries, bank = make_vectors(CHECKED_QUERIES, channels, 1), make_vectors(CHECKED_BANK, channels, 2)
    exact, numbers = reference.nearest(queries, bank, k + 1)
    gap = GAPS[device.partition(":")[0]]
    clear = (np.diff(-exact, axis=1) > gap).all(axis=1)
    deviations = {}
    for name, search in variants(bank, k, device).items():
        cosines, indices = search.search(queries)
        deviations[name] = float(np.abs(cosines - exact[:, :k]).max())
        wrong = int((indices != numbers[:, :k])[clear].sum())
        print(f"check: {name:<10} largest deviation from float64 {deviations[name]:.1e}, {wrong} indices wrong")
        if wrong or not deviations[name] <= gap:
            raise SystemExit(f"{name} does not find what the reference finds: nothing was timed")
    return deviations


Times = dict[str, list[float]]


def measure(arguments: argparse.Namespace) -> tuple[Times, Times]:
    """Time all variants in turn; returns the milliseconds of every counted round, and those of all its processors."""
    queries = make_vectors(arguments.queries, arguments.channels, 3)
    bank = make_vectors(arguments.bank, arguments.channels, 4)
    cosines = np.empty((len(queries), len(bank)), np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    for name, search in variants(bank, arguments.neighbours, arguments.device).items():
        runs[name] = partial(search.search, queries)
    runs["floor"] = lambda: np.matmul(queries, bank.T, out=cosines)
    milliseconds: Times = {name: [] for name in runs}
    of_processors: Times = {name: [] for name in runs}
    with threadpool_limits(available_cores(), user_api="blas"):
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter(), time.process_time()
                run()
                if repeat:  # the first round warms up
                    milliseconds[name].append(1e3 * (time.perf_counter() - start[0]))
                    of_processors[name].append(1e3 * (time.process_time() - start[1]))
    return milliseconds, of_processors


def times_the_product(milliseconds: Times) -> dict[str, float]:
    """Return the median of the round-by-round ratios."""
    return {
        name: statistics.median(floor / own for floor, own in zip(milliseconds["floor"], times, strict=True))
        for name, times in milliseconds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.nearest", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--queries", type=int, default=1369, help="(default %(default)s, the patches of an image)")
    parser.add_argument("--bank", type=int, default=50_000, help="vectors (default %(default)s)")
    parser.add_argument("--channels", type=int, default=1024, help="(default %(default)s)")
    parser.add_argument("--neighbours", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default %(default)s); the floor is the CPU's")
    parser.add_argument("--refcheck", action="store_true", help="validate only, time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "nearest.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.nearest", argv, ["numpy", "zsad"])
    deviations = validate(arguments.channels, arguments.neighbours, arguments.device)
    if arguments.refcheck:
        return 0
    milliseconds, of_processors = measure(arguments)
    products = 2 * arguments.queries * arguments.bank * arguments.channels
    speed, processor_speed = times_the_product(milliseconds), times_the_product(of_processors)
    print(f"\n{arguments.queries} queries, {arguments.bank} vectors of {arguments.channels} channels:")
    for name, times in milliseconds.items():
        median = statistics.median(times)
        print(
            f"  {name:<10}{median:9.1f} ms {products / median / 1e6:8.0f} GFLOP/s {speed[name]:6.2f} × the product, "
            f"{processor_speed[name]:.2f} by the time of the processors"
        )
    sizes = {name: getattr(arguments, name) for name in ("device", "queries", "bank", "channels", "neighbours")}
    result = {
        "milliseconds": milliseconds,
        "processor_milliseconds": of_processors,
        "times_the_product": speed,
        "times_the_product_by_processors": processor_speed,
        "largest_deviation": deviations,
    }
    append(arguments.output, {**record, **sizes, **result})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time and memory from few images to many: compared with each other at once, in groups, and with a bank.

    python -m zsad.bench.growth [--counts 50 100 … 3200] [--side 6] [--group-size 100] [--bank 5000]

Tokens of images of 84 pixels, one layer, each way over ever more of the same images. Kept are seconds, and by how much
the process grew at most meanwhile; printed also the powers of the number of images that fit them. Validates first, as
`zsad.bench.mutual_scoring` does.
"""

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from zsad.engine.category_pass import deal_groups
from zsad.engine.methods.bank import Memory
from zsad.kernels import mutual_scores
from zsad.kernels.cpu.comparers import unit_features
from zsad.kernels.machine import peak_memory

from .memory import forget_peak_memory
from .mutual_scoring import INTERVAL, make_tokens, validate
from .records import RESULTS, append, environment

Array = NDArray[np.float32]
Series = Mapping[str, float]  # by the number of images, as JSON has it


def exponent(series: Series) -> float:
    """Return the power of the number of images that fits what was measured."""
    known = [(int(count), value) for count, value in series.items() if value]  # for few images memory may not grow
    if len(known) < 2:
        return 0.0
    counts, values = np.log(known).T
    return float(np.polyfit(counts, values, 1)[0])


def in_groups(tokens: Array, side: int, degrees: Sequence[int], size: int | None) -> None:
    """Score images in groups of so many; None: all at once."""
    for group in deal_groups(len(tokens), size, seed=0):
        part = tokens if size is None else tokens[group]
        mutual_scores(part, (side, side), degrees, INTERVAL)


def by_bank(tokens: Array, memory: Memory) -> None:
    for image in tokens:
        memory.distances(image)


def make_bank(side: int, channels: int, degrees: Sequence[int], size: int) -> Memory:
    """Return a bank of so many patches of other images."""
    images = make_tokens(-(-size // side**2), side, channels, seed=1)[:, 0]
    units = np.stack([unit_features(image, (side, side), degrees) for image in images], axis=1)  # [R, N, P, C]
    return Memory(list(units.reshape(len(degrees), -1, channels)[:, :size]), degrees, 1, "cpu")


def measured(run: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds of a run, and the bytes by which the process grew at most."""
    gc.collect()
    forget_peak_memory()
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    run()
    return time.perf_counter() - start, max(peak_memory() - before, 0)


def grow(arguments: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Measure all ways over ever more images, and append a record."""
    side, degrees, size = arguments.side, arguments.degrees, arguments.group_size
    tokens = make_tokens(max(arguments.counts), side, arguments.channels)
    memory = make_bank(side, arguments.channels, degrees, arguments.bank)
    ways: Mapping[str, Callable[[Array], None]] = {
        "one batch": partial(in_groups, side=side, degrees=degrees, size=None),
        f"groups of {size}": partial(in_groups, side=side, degrees=degrees, size=size),
        f"a bank of {arguments.bank} patches": partial(by_bank, memory=memory),
    }
    seconds: dict[str, dict[str, float]] = {name: {} for name in ways}
    grown: dict[str, dict[str, float]] = {name: {} for name in ways}
    for name, way in ways.items():
        way(tokens[: min(arguments.counts)])  # warms up
        for count in arguments.counts:
            took, grew = measured(partial(way, tokens[:count]))
            seconds[name][str(count)], grown[name][str(count)] = took, grew
            print(f"{name:<24} N {count:5d} {1e3 * took / count:9.2f} ms per image {grew / 2**20:8.0f} MiB")
        print(f"{name}: time grows as N^{exponent(seconds[name]):.2f}, memory as N^{exponent(grown[name]):.2f}")
    about = {"patches": side**2, "channels": arguments.channels, "degrees": list(degrees)}
    append(arguments.output, {**record, **about, "seconds": seconds, "memory_bytes": grown})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.growth", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    default = [50, 100, 200, 400, 800, 1600, 3200]
    add("--counts", type=int, nargs="+", default=default, help="of images (default: 50 to 3200, doubling)")
    add("--side", type=int, default=6, help="of the patch grid (default %(default)s)")
    add("--channels", type=int, default=384, help="(default %(default)s)")
    add("--degrees", type=lambda text: [int(part) for part in text.split(",")], default=[1, 3], help="(default 1,3)")
    add("--group-size", type=int, default=100, help="(default %(default)s)")
    add("--bank", type=int, default=5000, help="patches per degree (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "growth.jsonl", help="JSON lines to append to (default %(default)s)")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.growth", argv, ["numpy", "zsad"])
    validate(make_tokens(4, arguments.side, arguments.channels, seed=1), arguments.side, arguments.degrees)
    grow(arguments, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

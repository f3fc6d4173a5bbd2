"""What images per batch and threads of a network do to the time of an image, on a CPU.

    python -m zsad.bench.batches [--preset small] [--batches 1 2 4] [--rounds 5]

Every image network of the preset in every runtime that is installed: with one thread; with a thread for each core, in
batches; and as many networks as there are cores side by side, of one thread each. All take turns in the same rounds.
By itself zsad takes one image at once on a CPU, and a thread for each core. Validates first: an image gives the same in
every batch and with any number of threads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, NetworkPrecision, load_config
from zsad.engine.methods.method import method_class
from zsad.engine.networks.build import graph_precision, load_graph
from zsad.engine.networks.network import Graph, GraphRequest
from zsad.engine.networks.runtime import Runtime
from zsad.engine.presets.names import preset_names
from zsad.export.agreement import check_agreement, sample_images
from zsad.kernels.machine import available_cores, use_cores

from .products import image_requests
from .records import RESULTS, append, environment
from .runtimes import runtimes
from .throughput import PAUSE
from .untrained import use_random_weights


@dataclass(frozen=True)
class Way:
    """One way to take images through a network."""

    name: str
    images: int  # of a call
    run: Callable[[], Sequence[Mapping[str, NDArray[Any]]]]  # returns the outputs of all its graphs


def ways(
    config: Config, request: GraphRequest, runtime: Runtime, precision: NetworkPrecision, batches: Sequence[int]
) -> list[Way]:
    """Load the graphs of all ways of a runtime; batches: images per call with a thread for each core."""
    chosen = config.model_copy(update={"network_precision": precision})
    cores, image = available_cores(), sample_images(config.specs[request.network].side)

    def graph(threads: int, batch: int = 1) -> tuple[Graph, Mapping[str, NDArray[np.float32]]]:
        use_cores(threads)
        try:
            return load_graph(chosen, request, runtime, batch), {"images": np.repeat(image, batch, axis=0)}
        finally:
            use_cores(cores)

    def calls(graphs: Sequence[tuple[Graph, Any]]) -> Sequence[Mapping[str, NDArray[Any]]]:
        with ThreadPoolExecutor(len(graphs)) as pool:
            return list(pool.map(lambda each: each[0].run(each[1]), graphs))

    found = [Way("one thread", 1, partial(calls, [graph(1)]))]
    found += [Way(f"{cores} threads, batch {batch}", batch, partial(calls, [graph(cores, batch)])) for batch in batches]
    return [*found, Way(f"{cores} networks of one thread", cores, partial(calls, [graph(1) for _ in range(cores)]))]


def check(found: Sequence[Way], precision: str) -> None:
    """Compare all images of every way with that of the first; raises CheckpointError."""
    (expected,) = ({name: np.asarray(array) for name, array in outputs.items()} for outputs in found[0].run())
    for way in found:
        for outputs in way.run():
            for row in range(len(next(iter(outputs.values())))):
                own = {name: np.asarray(array)[row : row + 1] for name, array in outputs.items()}
                check_agreement(own, expected, precision, "a single image with one thread")


def measure(found: Mapping[str, Sequence[Way]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds that an image takes each way in each runtime, of rounds in which all run in turn.

    Each round another way is first: after a pause a processor does not run at its full clock at once.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {way.name: [] for way in own} for name, own in found.items()}
    for number in range(rounds):
        for name, own in found.items():
            time.sleep(PAUSE)
            first = number % len(own)
            for way in (*own[first:], *own[:first]):
                start = time.perf_counter()
                way.run()
                seconds[name][way.name].append((time.perf_counter() - start) / way.images)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.batches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="small", choices=preset_names(), help="(default %(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    parser.add_argument("--image-size", type=int, help="(default: the preset's; of auto the largest)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "batches.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.batches", argv, ["numpy", "onnxruntime", "openvino"])
    overrides = {} if arguments.image_size is None else {"image_size": arguments.image_size}
    config = load_config(arguments.preset, arguments.config, overrides, method_of=method_class)
    config = config.sized({name: config.networks[name].side for name in config.unsized})
    with tempfile.TemporaryDirectory() as folder:
        config, weights = use_random_weights(config, Path(folder))
        for request in (each for each in image_requests(config) if each.graph == "image"):
            found = {}
            for name, runtime, precision in runtimes("cpu"):
                if graph_precision(request, precision) == precision:
                    found[name] = ways(config, request, runtime, precision, arguments.batches)
                    check(found[name], precision)
            seconds = measure(found, arguments.rounds)
            print(f"{request.network} ({weights[request.network]}), {config.specs[request.network].side} px:")
            for name, own in seconds.items():
                times = ", ".join(f"{way}: {1e3 * statistics.median(values):.0f} ms" for way, values in own.items())
                print(f"  {name}, an image, {times}")
            facts: dict[str, Any] = {"network": request.network, "weights": weights[request.network]}
            facts |= {"preset": config.preset, "image_size": config.specs[request.network].side}
            append(arguments.output, {**record, **facts, "seconds": seconds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

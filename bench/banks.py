"""What it takes to compare an image with a bank, beside the network that the image goes through first.

    python -m zsad.bench.banks [--preset small] [--image-size 518] [--images 24 96] [--size 20000]
    python -m zsad.bench.banks --watch [--arrivals 15]

All run in turn in one process on the same image: the preset's network, and what `--bank` does with its tokens, by banks
of so many patches per tap and degree from few and from many images, and of 1, 10 and 100 % of the patches of the many.
Medians and medians of the round-by-round ratios are kept. The images are drawn, and their patches thinned as a bank's
are: the nearer the patches of a bank are to each other, the more have to be measured again.

With --watch `zsad-infer --watch` runs with a bank of the fewest of --images, thinned to --size. More arrive one by one,
and between any two the network alone runs in this process; how long it takes from an image's arrival to its line
is measured from outside. Of that its own process tells the parts: reading the image, the network, pooling its tokens,
searching the bank, drawing map and overlay, waiting for the disk. What is left, "told", is mostly until it knows of the
image: at once only with the library watchfiles.

Validates first: distances to a small bank against the float64 reference.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.commands.start import infer
from zsad.engine.config import load_config
from zsad.engine.demo import draw_demo, draw_image
from zsad.engine.images.decode import network_input, recipe
from zsad.engine.images.loader import HostInputs
from zsad.engine.methods.bank import BankMethod, Memory
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import Network
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.results.image_files import ImageFiles
from zsad.engine.results.stream import Stream
from zsad.engine.watch import Told
from zsad.kernels import reference
from zsad.kernels.coverage import farthest_first, project
from zsad.kernels.cpu.comparers import unit_features
from zsad.kernels.mutual_scoring import square_grid

from .records import RESULTS, append, environment
from .untrained import use_random_weights

Array = NDArray[np.float32]

SHARES = (0.01, 0.1, 1.0)
PAUSE = 0.3  # seconds between images that arrive: the page of those before is being written
NETWORK = "network"
PARTS: dict[str, tuple[type, str]] = {  # of a line
    "image": (HostInputs, "read"),
    "pool": (Memory, "units"),
    "search": (Memory, "measured"),
    "files": (ImageFiles, "write"),
    "disk": (Stream, "settle"),
}
CHECKED, GAP = 2000, 1e-4  # patches of the bank that is validated; int8 products find the nearest, fp32 measures it


def inputs_of(network: Network, count: int) -> Iterator[Array]:
    """Yield drawn images as a network takes them, [1, 3, S, S]."""
    way = recipe(network.preprocessing, network.spec.side)
    for number in range(count):
        picture, _ = draw_image(np.random.default_rng([7, number]), None)
        yield network_input(Image.fromarray(picture), way)[None]


def features_of(tokens: Sequence[Array], degrees: Sequence[int], size: int) -> list[Array]:
    """Return unit features [size, C] by taps, then degrees, of images' tokens [L, P, C], thinned as banks are."""
    found = []
    for layer in range(len(tokens[0])):
        for degree in degrees:
            units = [units_of(image[layer], degree) for image in tokens]
            rows, channels = units[0].shape
            projected = project(len(units), rows, channels, units.__getitem__)
            found.append(np.concatenate(units)[farthest_first(projected, size)])
    return found


def units_of(layer: Array, degree: int) -> Array:
    """Return the unit features [P, C] of an image's tokens [P, C] of one tap."""
    units: Array = unit_features(layer, square_grid(len(layer)), (degree,))[0]
    return units


def validate(tokens: Sequence[Array], degrees: Sequence[int]) -> float:
    """Compare distances with the float64 reference; SystemExit where one is off."""
    *known, new = tokens
    features = features_of(known, degrees, min(CHECKED, len(known) * new.shape[1]))
    expected = np.zeros(new.shape[1])
    units = [units_of(layer, degree) for layer in new for degree in degrees]
    for own, vectors in zip(units, features, strict=True):
        cosines, _ = reference.nearest(own, vectors, 1)
        expected += np.sqrt(np.maximum(2 - 2 * cosines[:, 0], 0)) / len(features)
    off = float(np.abs(Memory(features, degrees, 1, "cpu").distances(new) - expected).max())
    print(f"check: largest deviation from float64 {off:.1e}")
    if not off <= GAP:
        raise SystemExit("a bank does not say what the reference says: nothing was timed")
    return off


def measure(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every counted round; the first one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def timed_infer() -> int:
    """Run zsad-infer; with --watch each line of JSON has `parts`, the seconds of each, of one image at a time."""
    laps = dict.fromkeys((*PARTS, NETWORK), 0.0)

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if part == "image":  # the first part
                laps.update(dict.fromkeys(laps, 0.0))
            start = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                laps[part] += time.perf_counter() - start

        return run

    def with_parts(told: Told) -> str:
        line = {**json.loads(as_it_is(told)), "parts": {**laps, NETWORK: laps[NETWORK] - laps["pool"] - laps["search"]}}
        return json.dumps(line)

    as_it_is = Told.to_json
    Told.to_json = with_parts  # type: ignore[assignment, method-assign]
    for part, (owner, name) in {**PARTS, NETWORK: (BankMethod, "_patch_scores")}.items():
        setattr(owner, name, timed(part, getattr(owner, name)))
    return infer()


def sizes_of(images: Sequence[int], patches: int, size: int) -> dict[str, tuple[int, int]]:
    """Return by names the images that a bank is of, and its patches per tap and degree."""
    found = {f"{size} of {count} images": (count, min(size, count * patches)) for count in images}
    most = max(images)
    return found | {f"{100 * share:g} % of {most} images": (most, round(share * most * patches)) for share in SHARES}


def watched(arguments: argparse.Namespace, alone: Callable[[], Any]) -> dict[str, list[float]]:
    """Return the seconds from an image's arrival to its line, by parts too, and of the network alone before it."""
    start = [sys.executable, "-c", "import sys; from zsad.bench.banks import timed_infer; sys.exit(timed_infer())"]
    found: dict[str, list[float]] = {"network": [], "line": []}
    found |= {f"line: {part}": [] for part in (*PARTS, NETWORK, "told")}
    with tempfile.TemporaryDirectory(prefix="zsad-bench-") as name:
        folder, bank = Path(name), Path(name, "part.zsad")
        good = draw_demo(folder / "good", count=min(arguments.images), defects=0) / "test" / "good"
        new = sorted((draw_demo(folder / "new", 1, arguments.arrivals + 1, 0) / "test" / "good").iterdir())
        (folder / "in").mkdir()
        options = ["--device", "cpu", "--network-precision", arguments.precision, "-q"]
        making = ["--reference", str(good), "--save-bank", str(bank), "--bank-size", str(arguments.size)]
        making += ["--image-size", str(arguments.image_size)]
        subprocess.run([*start, *making, *options], check=True)
        watch = ["--watch", str(folder / "in"), "--bank", str(bank), "--output", str(folder / "out"), "--json"]
        with subprocess.Popen([*start, *watch, *options], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for number, path in enumerate(new):
                laps = [time.perf_counter()]
                alone()
                laps.append(time.perf_counter())
                path.rename(folder / "in" / path.name)
                line = json.loads(process.stdout.readline())
                if "score" not in line:
                    raise SystemExit("an image that arrived has no score: nothing was timed")
                laps.append(time.perf_counter())
                if number:  # the first one waits for the command to start
                    before, whole = np.diff(laps).tolist()
                    parts = {**line["parts"], "told": whole - sum(line["parts"].values())}
                    for key, seconds in zip(found, [before, whole, *parts.values()], strict=True):
                        found[key].append(seconds)
                time.sleep(PAUSE)
            process.send_signal(signal.SIGTERM)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.banks", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--preset", default="small", help="one that compares images, of one network (default %(default)s)")
    add("--image-size", type=int, default=518, help="(default %(default)s)")
    add("--images", type=int, nargs="+", default=[24, 96], help="that banks are of (default 24 96)")
    add("--size", type=int, default=20_000, help="patches per tap and degree (default %(default)s)")
    add("--precision", choices=("fp32", "int8"), default="fp32", help="of the network (default %(default)s)")
    add("--watch", action="store_true", help="measure images that arrive instead")
    add("--arrivals", type=int, default=15, help="of images with --watch (default %(default)s)")
    add("--repeats", type=int, default=7, help="counted rounds (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "banks.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.banks", argv, ["numpy", "onnxruntime", "openvino", "watchfiles", "zsad"])
    overrides = {"image_size": arguments.image_size, "network_precision": arguments.precision}
    config = load_config(arguments.preset, None, overrides, method_of=method_class)
    with tempfile.TemporaryDirectory() as folder:
        config, weights = use_random_weights(config, Path(folder))
        ((name, network),) = load_networks(config, graph_requests(config), choose_runtime("cpu"), 1).items()
    about = {"preset": arguments.preset, "image_size": arguments.image_size, "precision": arguments.precision}
    about |= {"weights": weights[name]}
    (arrive if arguments.watch else compare)(network, config.settings, arguments, {**record, **about})
    return 0


def arrive(network: Network, settings: Any, arguments: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Measure images that arrive, and append a record."""
    if record["weights"] != network.checkpoint:
        raise SystemExit(
            f"--watch takes the real weights of {arguments.preset}: zsad-export --preset {arguments.preset}"
        )
    graph, (image, *others) = network.graphs["image"], inputs_of(network, 4)
    validate([np.array(graph.run({"images": other})["tokens"][0]) for other in (image, *others)], settings.degrees)
    alone = partial(graph.run, {"images": image})
    seconds = watched(arguments, alone)
    beyond = statistics.median(line - own for own, line in zip(seconds["network"], seconds["line"], strict=True))
    for name, times in seconds.items():
        print(f"  {name:<24}{1e3 * statistics.median(times):8.1f} ms")
    print(f"a line comes {1e3 * beyond:.0f} ms later than the network alone")
    append(arguments.output, {**record, "watch": True, "patches": arguments.size, "seconds": seconds})


def compare(network: Network, settings: Any, arguments: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Measure banks of several sizes, and append a record."""
    assert isinstance(settings, Settings)
    graph, counts = network.graphs["image"], sorted(arguments.images)
    inputs = list(inputs_of(network, counts[-1] + 1))
    tokens = [np.array(graph.run({"images": image})["tokens"][0]) for image in inputs]  # [L, P, C] each
    deviation = validate(tokens[:4], settings.degrees)
    *known, new = tokens
    sizes = sizes_of(counts, new.shape[1], arguments.size)
    runs: dict[str, Callable[[], Any]] = {"network": partial(graph.run, {"images": inputs[-1]})}
    for label, (images, size) in sizes.items():
        features = features_of(known[:images], settings.degrees, size)
        runs[label] = partial(Memory(features, settings.degrees, 1, "cpu").distances, new)
    seconds = measure(runs, arguments.repeats)
    for label, times in seconds.items():
        print(f"  {label:<24}{1e3 * statistics.median(times):8.1f} ms")
    about = {"watch": False, "taps": len(new), "degrees": list(settings.degrees), "sizes": sizes}
    append(arguments.output, {**record, **about, "seconds": seconds, "largest_deviation": deviation})


if __name__ == "__main__":
    raise SystemExit(main())

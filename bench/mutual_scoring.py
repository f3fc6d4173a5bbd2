"""Time of mutual scoring per image pair and layer, against the reference's arithmetic and the bare product.

    python -m zsad.bench.mutual_scoring [--channels 1024] [--degrees 1,3,5] [--images 12] [--refcheck] [--output FILE]
    python -m zsad.bench.mutual_scoring --preset small [--images 40]
    python -m zsad.bench.mutual_scoring --references [--images 200] [--side 20] [--channels 384] [--degrees 1,3]

All variants run in turn in one process on the same features, so that they see the same machine; medians and the medians
of the round-by-round ratios are kept:

    reference   every degree in both directions: torch.cdist, then the minimum (needs PyTorch)
    product     every degree in both directions: one product of unit features, then the maximum
    zsad        zsad.kernels.mutual_scores in fp32, complete: normalisation, all pairs, interval average
    zsad int8   the same with precision="int8", where the installation has it
    floor       one bare product per pair and layer, on as many threads as zsad uses
    floor int8  the same of int8 codes, which lie ready: what is beyond it is the pass, preparing and measuring again

Tokens are random ones around a smooth structure, which have no directions in common; with `--preset` those
of a preset's network for its first tap, over drawn images. How many products bounds spare hangs on them.

What clean references cost beyond that is a stage of its own, with `--references`: scoring two layers as preset `small`
does, without them, with the minima that are handed back for them, and what follows from these.

Validates first: the scores of every variant against the float64 reference.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from zsad.engine.config import load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.scores.clean_references import clean_scores
from zsad.kernels import mutual_scores, reference
from zsad.kernels.cpu.arrays import aligned_empty, box_sum, empty_gram, inverse_lengths, layer_normalise
from zsad.kernels.cpu.native import _cpu
from zsad.kernels.machine import available_cores
from zsad.kernels.mutual_scoring import square_grid

from .banks import inputs_of
from .records import RESULTS, append, environment
from .untrained import use_random_weights

Array = NDArray[np.float32]

INTERVAL = (0.0, 0.3)
IMAGE_SIZE = 518  # of a network's tokens
CHECKED_IMAGES, CHECKED_SIDE = 12, 16  # of a network's tokens that are validated, the corner of their grid
# Largest deviation of a patch score from float64 that is accepted before anything is timed.
TOLERANCE = {"reference": 1e-3, "product": 1e-4, "zsad": 1e-4, "zsad int8": 2e-3}


def make_tokens(images: int, side: int, channels: int, seed: int = 0) -> Array:
    """Tokens [N, 1, side², C] that share a smooth structure across images as a network's do, with strong channels."""
    rng = np.random.default_rng(seed)
    patches = side * side
    coarse = rng.normal(size=(side // 4 + 2, side // 4 + 2, channels)).astype(np.float32)
    shared = np.kron(coarse, np.ones((4, 4, 1), np.float32))[:side, :side].reshape(patches, channels)
    own = rng.normal(size=(images, 1, patches, channels)).astype(np.float32)
    return (shared + 0.6 * own) * np.exp(0.5 * rng.normal(size=channels)).astype(np.float32)


def unit_features(tokens: Array, side: int, degrees: Sequence[int]) -> list[list[Array]]:
    """Aggregated unit features [P, C] per degree and image of tokens [N, 1, P, C]."""
    normalised = [layer_normalise(image) for image in tokens[:, 0]]
    pooled = [[box_sum(x, (side, side), degree) for x in normalised] for degree in degrees]
    return [[x * inverse_lengths(x)[:, None] for x in images] for images in pooled]


def scores_by_pairs(features: list[list[Array]], nearest: Callable[[Array, Array], Array]) -> Array:
    """Score images by a function that gives each left patch's smallest distance [P] to a right image's patches."""
    images = len(features[0])
    first, last = reference.interval_ranks(images - 1, INTERVAL)
    per_degree = []
    for of_degree in features:
        distances = np.stack(
            [[nearest(of_degree[i], of_degree[j]) for j in range(images) if j != i] for i in range(images)]
        )  # [N, N-1, P]
        per_degree.append(np.sort(distances, axis=1)[:, first:last].mean(axis=1))
    scores: Array = np.mean(per_degree, axis=0)
    return scores


def nearest_by_product(left: Array, right: Array) -> Array:
    cosines: Array = (left @ right.T).max(axis=1)
    return np.sqrt(np.maximum(2 - 2 * cosines, 0))


def nearest_by_cdist() -> Callable[[Array, Array], Array] | None:
    """The reference's own operation, or None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(available_cores())

    def nearest(left: Array, right: Array) -> Array:
        distances = torch.cdist(torch.from_numpy(left), torch.from_numpy(right))
        smallest: Array = distances.min(dim=1)[0].numpy()
        return smallest

    return nearest


def bare_products(tokens: Array) -> None:
    """One product per pair, threads over pairs as in zsad, each into a Gram of its own."""
    images, _, patches, _ = tokens.shape
    workers = available_cores()
    pairs = [(i, j) for i in range(images) for j in range(i + 1, images)]

    def run(worker: int) -> None:
        gram = np.empty((patches, patches), np.float32)
        for i, j in pairs[worker::workers]:
            np.matmul(tokens[i, 0], tokens[j, 0].T, out=gram)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(workers)))


def bare_int8_products(tokens: Array) -> Callable[[], None]:
    """Return what does the same with zsad's int8 product, of codes that are made here."""
    images, _, patches, channels = tokens.shape
    workers, codes = available_cores(), []
    mean = np.mean([layer_normalise(image).mean(axis=0) for image in tokens[:, 0]], axis=0)
    for image in tokens[:, 0]:
        codes.append(aligned_empty((_cpu.int8_bytes(patches, channels),), np.uint8))
        _cpu.int8_quantise(layer_normalise(image), mean, codes[-1])
    pairs = [(i, j) for i in range(images) for j in range(i + 1, images)]

    def work(worker: int) -> None:
        gram = empty_gram(patches)
        for i, j in pairs[worker::workers]:
            _cpu.int8_multiply(codes[i], codes[j], gram)

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))

    return run


def variants(tokens: Array, side: int, degrees: Sequence[int]) -> dict[str, Callable[[], Array | None]]:
    """Every way to score the tokens that can run here, by name; the floor gives no scores."""
    features = unit_features(tokens, side, degrees)
    found: dict[str, Callable[[], Array | None]] = {}
    cdist = nearest_by_cdist()
    if cdist is not None:
        found["reference"] = lambda: scores_by_pairs(features, cdist)
    found["product"] = lambda: scores_by_pairs(features, nearest_by_product)
    for name, precision in (("zsad", "fp32"), ("zsad int8", "int8")):
        try:
            mutual_scores(tokens[:2, :, :4, :8].copy(), (2, 2), degrees, precision=precision)
        except ValueError as error:
            print(f"{name}: not measured ({error})")
            continue

        def run(precision: str = precision) -> Array:
            return mutual_scores(tokens, (side, side), degrees, INTERVAL, precision=precision)

        found[name] = run
    found["floor"] = lambda: bare_products(tokens)
    if "zsad int8" in found:
        found["floor int8"] = bare_int8_products(tokens)
    return found


def network_tokens(preset: str, images: int) -> tuple[Array, Sequence[int], dict[str, Any]]:
    """Return the first tap of drawn images, [N, 1, P, C], the degrees of a preset, and what a record says of both."""
    config = load_config(preset, None, {"image_size": IMAGE_SIZE}, method_of=method_class)
    settings = config.settings
    assert isinstance(settings, Settings)
    with tempfile.TemporaryDirectory() as folder:
        config, weights = use_random_weights(config, Path(folder))
        ((name, network),) = load_networks(config, graph_requests(config), choose_runtime("cpu"), 1).items()
    graph = network.graphs["image"]
    tokens = [np.array(graph.run({"images": image})["tokens"][:, :1]) for image in inputs_of(network, images)]
    return np.concatenate(tokens), settings.degrees, {"preset": preset, "weights": weights[name]}


def validate(tokens: Array, side: int, degrees: Sequence[int]) -> dict[str, float]:
    """Compare every variant with the float64 reference on a few images; SystemExit where one is off."""
    expected = reference.mutual_scores(tokens, (side, side), degrees, INTERVAL)
    deviations = {}
    for name, run in variants(tokens, side, degrees).items():
        scores = run()
        if scores is None:
            continue
        deviations[name] = float(np.abs(scores - expected).max())
        print(f"check: {name:<10} largest deviation from float64 {deviations[name]:.1e}")
        if not deviations[name] <= TOLERANCE[name]:
            raise SystemExit(f"{name} deviates by more than {TOLERANCE[name]:.0e}: nothing was timed")
    return deviations


def compare(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time all variants in turn and append one record."""
    side, degrees = arguments.side, arguments.degrees
    of_tokens: dict[str, Any] = {}
    if arguments.preset:
        tokens, degrees, of_tokens = network_tokens(arguments.preset, arguments.images)
        side, few = square_grid(tokens.shape[2])[0], min(CHECKED_SIDE, square_grid(tokens.shape[2])[0])
        corners = tokens[:CHECKED_IMAGES].reshape(-1, 1, side, side, tokens.shape[3])[:, :, :few, :few]
        deviations = validate(corners.reshape(len(corners), 1, few * few, -1), few, degrees)
    else:
        tokens = make_tokens(arguments.images, side, arguments.channels)
        deviations = validate(make_tokens(4, side, arguments.channels, seed=1), side, degrees)
    if arguments.refcheck:
        return
    channels = tokens.shape[3]
    runs = variants(tokens, side, degrees)
    pairs = arguments.images * (arguments.images - 1) // 2
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            if name == "reference" and repeat not in (0, 1, arguments.repeats):
                continue  # the slowest by far: two counted rounds
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                milliseconds[name].append(1e3 * (time.perf_counter() - start) / pairs)
    useful = 2 * side**4 * channels  # one product per pair and layer
    median = {name: statistics.median(times) for name, times in milliseconds.items()}
    print(f"\nP {side**2}, C {channels}, degrees {degrees}, {arguments.images} images; per pair and layer:")
    for name, value in median.items():
        against = f"{median['reference'] / value:7.1f} × reference" if "reference" in median else ""
        print(
            f"  {name:<10}{value:9.2f} ms {useful / value / 1e6:8.0f} GFLOP/s useful "
            f"{100 * median['floor'] / value:5.0f} % of the product {against}"
        )
    if "floor int8" in milliseconds:
        times = _ratio(milliseconds["zsad int8"], milliseconds["floor int8"])
        print(f"zsad int8 takes {times:.2f} times its own product")
    append(
        arguments.output,
        {
            **record,
            **of_tokens,
            "patches": side**2,
            "channels": channels,
            "degrees": list(degrees),
            "images": arguments.images,
            "ms_per_pair_and_layer": milliseconds,
            "over_floor": {name: _ratio(times, milliseconds["floor"]) for name, times in milliseconds.items()},
            "largest_deviation": deviations,
        },
    )


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the round-by-round ratios, where both have as many rounds; else the ratio of the medians."""
    if len(times) == len(others):
        return statistics.median(a / b for a, b in zip(times, others, strict=True))
    return statistics.median(times) / statistics.median(others)


def references(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time what clean references add to scoring a batch of two layers, and append one record."""
    side, images = arguments.side, arguments.images
    validate(make_tokens(4, side, arguments.channels, seed=1), side, arguments.degrees)
    if arguments.refcheck:
        return
    settings = load_config("small", method_of=method_class).settings
    assert isinstance(settings, Settings)
    rule = settings.clean_rule(None)
    assert rule is not None
    tokens = np.concatenate([make_tokens(images, side, arguments.channels, seed) for seed in (0, 1)], axis=1)
    seconds: dict[str, list[float]] = {"scoring": [], "scoring, minima handed back": [], "references": []}
    for repeat in range(arguments.repeats + 1):
        laps = [time.perf_counter()]
        mutual_scores(tokens, (side, side), arguments.degrees, INTERVAL)
        laps.append(time.perf_counter())
        _, minima = mutual_scores(tokens, (side, side), arguments.degrees, INTERVAL, return_minima="smallest degree")
        laps.append(time.perf_counter())
        clean_scores(minima, rule)
        laps.append(time.perf_counter())
        if repeat:  # the first round warms up
            for times, before, after in zip(seconds.values(), laps, laps[1:], strict=False):
                times.append(after - before)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    alone, minima_back, passes = median.values()
    print(f"\nN {images}, P {side**2}, C {arguments.channels}, 2 layers, degrees {arguments.degrees}; seconds:")
    for name, value in median.items():
        print(f"  {name:<28}{value:9.2f} s {100 * value / alone:7.1f} % of scoring")
    print(f"clean references add {100 * ((minima_back + passes) / alone - 1):.1f} % to scoring")
    append(
        arguments.output,
        {
            **record,
            "images": images,
            "patches": side**2,
            "channels": arguments.channels,
            "degrees": list(arguments.degrees),
            "seconds": seconds,
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zsad.bench.mutual_scoring", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--side", type=int, help="side of the patch grid (default 37; 20 with --references)")
    parser.add_argument("--channels", type=int, help="(default 1024; 384 with --references)")
    parser.add_argument("--degrees", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--images", type=int, help="(default 12; 40 with --preset; 200 with --references)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--preset", help="whose network tokens are of, with its degrees (default: random tokens)")
    parser.add_argument("--references", action="store_true", help="time what clean references add instead")
    parser.add_argument("--refcheck", action="store_true", help="validate only, time nothing")
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    small = arguments.references
    arguments.side = arguments.side or (20 if small else 37)
    arguments.channels = arguments.channels or (384 if small else 1024)
    arguments.degrees = arguments.degrees or ([1, 3] if small else [1, 3, 5])
    arguments.images = arguments.images or (200 if small else 40 if arguments.preset else 12)
    name = "clean_references" if small else "mutual_scoring"
    arguments.output = arguments.output or RESULTS / f"{name}.jsonl"
    record = environment("zsad.bench.mutual_scoring", argv, ["numpy", "torch", "zsad"])
    (references if small else compare)(arguments, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

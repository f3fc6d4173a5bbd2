"""Time of mutual scoring on a CUDA device, against the reference's arithmetic and the device's product peak.

    python -m zsad.bench.mutual_scoring_cuda [--images 200] [--channels 1024] [--degrees 1,3,5] [--pairs 2,8]
                                             [--products gram,tiled] [--unrecorded] [--refcheck]

All variants run in turn in one process on the same device; those of one kind in interleaved rounds:

    reference   every degree in both directions: torch.cdist in fp32, then the minimum, on a few pairs (needs PyTorch)
    product     every degree in both directions: fp16 product of unit features, then the maximum, on the same pairs
    zsad        mutual_scores, complete, on all pairs, one fp16 product for all degrees
                (products="gram"); tokens already on the device
    zsad fused  the same with a fused fp16 product per degree (products="fused")
    zsad tiled  the same with one fp16 product in tiles that are filtered where they are (products="tiled")
    zsad int8   the same with precision="int8"
    floor       one fp16 product with fp32 sums per pair and layer, as zsad queues them, nothing else
    peak        a large fp16 product with fp32 sums: the rate that the shares are taken of

With --products, of zsad only these variants run; with --pairs, each also with so many image pairs per launch; with
--unrecorded, each also with a layer's launches queued one by one instead of replayed as CUDA graphs.

Validates first: scores of a few images by every zsad variant against the float64 reference.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zsad.kernels import reference
from zsad.kernels.cuda.comparers import degrees_mask
from zsad.kernels.cuda.device import Device, open_device
from zsad.kernels.cuda.model import Filtered
from zsad.kernels.cuda.plan import Sizes, plan_mutual_scoring
from zsad.kernels.cuda.scoring import Options
from zsad.kernels.mutual_scoring import MutualScoring

from .mutual_scoring import INTERVAL, make_tokens, unit_features
from .records import RESULTS, append, environment

# [variant] -> what selects it, and the largest deviation of a patch score from float64 that is accepted
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "zsad": ({"products": "gram"}, 2e-3),
    "zsad fused": ({"products": "fused"}, 2e-3),
    "zsad tiled": ({"products": "tiled"}, 2e-3),
    "zsad int8": ({"precision": "int8"}, 2e-3),
}
PRODUCTS = {next(iter(options.values())): name for name, (options, _) in VARIANTS.items()}
PEAK_SIDE = 8192


def seconds(device: Device, runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time all runs in turn with the device idle before and after each; the first, uncounted round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            device.synchronise()
            start = time.perf_counter()
            run()
            device.synchronise()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def score(
    tokens: Any,  # [N, L, P, C]
    side: int,
    degrees: Sequence[int],
    device: Device,
    variant: str,
    timings: Any = None,
    **how: Any,
) -> Any:
    """Score tokens on one device; returns [N, P]. how: further fields of `Options`."""
    selected, _ = VARIANTS[variant]
    precision, options = selected.get("precision", "auto"), Options(selected.get("products"), **how)
    layers, channels = tokens.shape[1], tokens.shape[3]
    scoring = MutualScoring((side, side), layers, channels, degrees, INTERVAL, precision, [device], options)
    return scoring.scores(tokens, timings=timings)


def validate(
    device: Device, side: int, channels: int, degrees: Sequence[int], variants: Sequence[str]
) -> dict[str, float]:
    """Compare five images' scores by every variant with the float64 reference; SystemExit where they are off."""
    tokens = make_tokens(5, side, channels, seed=1)
    expected = reference.mutual_scores(tokens, (side, side), degrees, INTERVAL)
    deviations = {}
    for name in variants:
        _, tolerance = VARIANTS[name]
        scores = score(tokens, side, degrees, device, name)
        deviations[name] = float(np.abs(scores - expected).max())
        print(f"check: {name:<10} largest deviation from float64 {deviations[name]:.1e}")
        if not deviations[name] <= tolerance:
            raise SystemExit(f"{name} deviates by more than {tolerance:.0e}: nothing was timed")
    return deviations


def peak_flops(device: Device, repeats: int) -> float:
    """FLOP/s of a large fp16 product with fp32 sums."""
    # Random bits cost what data cost; zeros would run faster.
    row = np.random.default_rng(0).normal(size=(1, PEAK_SIDE)).astype(np.float16)
    factors = [device.to_device(np.repeat(row, PEAK_SIDE, axis=0)) for _ in range(2)]
    out = device.empty((1, PEAK_SIDE, PEAK_SIDE), np.float32)

    def multiply() -> None:
        with device.producing(0):
            for _ in range(10):
                device.product(factors[0], factors[1][None], out)
        with device.consuming(0):
            pass

    return 10 * 2 * PEAK_SIDE**3 / statistics.median(seconds(device, {"peak": multiply}, repeats)["peak"])


def bare_products(device: Device, features: Any, pairs: int) -> Callable[[], None]:
    """Every pair's product of features [N, P, C], a few pairs at a time."""
    images, patches, _ = features.shape
    workspace = device.empty((pairs, patches, -(-patches // 32) * 32), np.float32)

    def run() -> None:
        with device.producing(0):
            for i in range(images):
                for start in range(i + 1, images, pairs):
                    device.product(features[i], features[start : start + pairs], workspace)
        with device.consuming(0):
            pass

    return run


def by_pairs(side: int, channels: int, degrees: Sequence[int]) -> dict[str, Callable[[], None]]:
    """The arithmetic of the reference, and of plain products, for both directions of one pair at every degree."""
    try:
        import torch
    except ImportError:
        print("reference, product: not measured (PyTorch is not installed)")
        return {}
    features = [
        [torch.from_numpy(x).cuda() for x in images]
        for images in unit_features(make_tokens(2, side, channels), side, degrees)
    ]
    halves = [[x.half() for x in images] for images in features]

    def cdist() -> None:
        for left, right in features:
            torch.cdist(left, right).min(dim=1)
            torch.cdist(right, left).min(dim=1)
        torch.cuda.synchronize()

    def product() -> None:
        for left, right in halves:
            (left @ right.T).max(dim=1)
            (right @ left.T).max(dim=1)
        torch.cuda.synchronize()

    return {"reference": cdist, "product": product}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def named_variants(text: str) -> list[str]:
    unknown = [product for product in text.split(",") if product not in PRODUCTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PRODUCTS)}")
    return [PRODUCTS[product] for product in text.split(",")]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.mutual_scoring_cuda")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--side", type=int, default=37, help="of the patch grid (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--degrees", type=numbers, default=[1, 3, 5])
    parser.add_argument("--pairs", type=numbers, default=[], help="image pairs per launch to try beside the planned")
    parser.add_argument(
        "--products", type=named_variants, default=list(VARIANTS), help=f"some of {','.join(PRODUCTS)} (default: all)"
    )
    parser.add_argument("--unrecorded", action="store_true", help="also without CUDA graphs, launch by launch")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--refcheck", action="store_true", help="validate only, time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "mutual_scoring_cuda.jsonl")
    return parser.parse_args(argv)


def tokens_on(device: Device, images: int, layers: int, side: int, channels: int) -> tuple[Any, Any]:
    """Make tokens [N, L, P, C] on the device, and features [N, P, C] in fp16 of the first layer."""
    some = device.to_device(make_tokens(8, side, channels))  # [8, 1, P, C]
    device.synchronise()  # what CuPy does by itself is on another stream
    tokens = device.empty((images, layers, side * side, channels), np.float32)
    for i in range(images):
        # Shifting the channels keeps the statistics and makes every image and layer differ.
        for layer in range(layers):
            tokens[i, layer] = some[(i + layer) % 8, 0][:, np.roll(np.arange(channels), 7 * i)]
    return tokens, device.adopt(tokens[:, 0].astype(np.float16))  # waits for the tokens too


def ways(arguments: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, variant and options of every way in which zsad runs."""
    for variant in arguments.products:
        yield variant, variant, {}
        for pairs in arguments.pairs:
            yield f"{variant}, {pairs} pairs", variant, {"pairs": pairs}
        if arguments.unrecorded:
            yield f"{variant}, launch by launch", variant, {"recorded": False}


def print_times(milliseconds: Mapping[str, Sequence[float]], useful: float, peak: float) -> None:
    """Print the medians; useful: operations of a pair and layer."""
    median = {name: statistics.median(times) for name, times in milliseconds.items()}
    for name, value in median.items():
        share = 100 * useful / (value * 1e-3) / peak
        faster = f"{median['reference'] / value:6.1f} × reference" if "reference" in median else ""
        print(f"  {name:<20}{1e3 * value:10.1f} µs per pair and layer {share:6.1f} % of the peak {faster}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    side, channels, degrees = arguments.side, arguments.channels, arguments.degrees

    record = environment("zsad.bench.mutual_scoring_cuda", argv, ["numpy", "cupy-cuda12x", "cupy-cuda13x", "torch"])
    device = open_device(arguments.device)
    record["gpu"] = device.name
    print(f"gpu: {device.name}")
    record["largest_deviation"] = validate(device, side, channels, degrees, arguments.products)
    if arguments.refcheck:
        return 0

    images, layers, patches = arguments.images, arguments.layers, side * side
    tokens, features = tokens_on(device, images, layers, side, channels)
    compared = layers * images * (images - 1) // 2
    filtered = Filtered((side, side), degrees_mask(sorted(set(degrees))))
    sizes = Sizes(images, patches, channels, len(set(degrees)), filtered=filtered)
    plan = plan_mutual_scoring(sizes, device.free_bytes(), device.card)

    stages: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], Any]] = {"floor": bare_products(device, features, plan.pairs)}
    of_run = {"floor": compared // layers}  # pairs
    for name, variant, how in ways(arguments):
        stages[name], of_run[name] = {}, compared
        runs[name] = partial(score, tokens, side, degrees, device, variant, stages[name], **how)
    milliseconds = {
        name: [1e3 * s / of_run[name] for s in times]
        for name, times in seconds(device, runs, arguments.repeats).items()
    }
    short = seconds(device, by_pairs(side, channels, degrees), 10 * arguments.repeats)
    milliseconds |= {name: [1e3 * s for s in times] for name, times in short.items()}
    peak = peak_flops(device, arguments.repeats)

    print(f"\npeak {peak / 1e12:.0f} TFLOP/s; {images} images, {layers} layers, P {patches}, C {channels}, {degrees}:")
    print_times(milliseconds, 2 * patches**2 * channels, peak)
    append(
        arguments.output,
        {
            **record,
            "patches": patches,
            "channels": channels,
            "degrees": list(degrees),
            "images": images,
            "layers": layers,
            "peak_flops": peak,
            "ms_per_pair_and_layer": milliseconds,
            "stages_s": {
                name: {stage: value / (arguments.repeats + 1) for stage, value in taken.items()}
                for name, taken in stages.items()
            },
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of all four pixel metrics: exact curves here against the 200-step loop and scikit-learn of the references.

    python -m zsad.bench.metrics [--maps 83] [--size 518] [--reference-maps K] [--refcheck] [--output FILE]

Validates first: AUROC, AP and F1 against scikit-learn, the 200-step AUPRO against the loop, the exact AUPRO against a
loop with twenty times as many steps. Then times both sides in one process on the same maps. The loop labels regions
with OpenCV, which is faster than what the references use, so the ratio errs on the low side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from zsad.engine.evaluation.metrics import aupro, pixel_metrics

from .records import RESULTS, append, environment

STEPS = 200
LIMIT = 0.3
OWN_REPEATS = 5


def make_maps(count: int, size: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Synthetic masks and maps [count, size, size]: elliptic defects in three images of four, on smooth noise."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), np.uint8)
    maps = np.empty((count, size, size), np.float32)
    for index, (mask, map_) in enumerate(zip(masks, maps, strict=True)):
        if index % 4:
            for _ in range(rng.integers(1, 4)):
                centre = tuple(int(v) for v in rng.integers(size // 8, size - size // 8, 2))
                axes = tuple(int(v) for v in rng.integers(size // 50 + 1, size // 12 + 2, 2))
                cv2.ellipse(mask, centre, axes, float(rng.integers(180)), 0, 360, 1, -1)
        noise = cv2.resize(rng.normal(size=(37, 37)).astype(np.float32), (size, size))
        map_[:] = noise + 3 * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), size / 40)
    return masks, (maps - maps.min()) / (maps.max() - maps.min())


def aupro_loop(masks: NDArray[np.uint8], maps: NDArray[np.float32], steps: int = STEPS, limit: float = LIMIT) -> float:
    """AUPRO as the references compute it: every threshold visits every image and labels its regions anew."""
    overlaps, rates = [], []
    normal_pixels = np.count_nonzero(masks == 0)
    for threshold in np.arange(maps.min(), maps.max(), (maps.max() - maps.min()) / steps):
        detected = maps > threshold  # [N, H, W]
        overlap = []
        for mask, hit in zip(masks, detected, strict=True):
            count, region, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            for label in range(1, count):
                left, top, width, height, area = stats[label]
                box = np.s_[top : top + height, left : left + width]
                rows, columns = np.nonzero(region[box] == label)
                overlap.append(hit[box][rows, columns].sum() / area)
        overlaps.append(np.mean(overlap))
        rates.append(np.logical_and(1 - masks, detected).sum() / normal_pixels)
    rate, mean_overlap = np.array(rates), np.array(overlaps)
    below = rate < limit
    rescaled = (rate[below] - rate[below].min()) / (rate[below].max() - rate[below].min())
    return float(auc(rescaled, mean_overlap[below]))


def classification_sklearn(masks: NDArray[np.uint8], maps: NDArray[np.float32]) -> dict[str, float]:
    truth, score = masks.ravel(), maps.ravel()
    precision, recall, _ = precision_recall_curve(truth, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return {
        "auroc": float(roc_auc_score(truth, score)),
        "ap": float(average_precision_score(truth, score)),
        "f1": float(f1.max()),
    }


def reference_metrics(masks: NDArray[np.uint8], maps: NDArray[np.float32]) -> dict[str, float]:
    return {**classification_sklearn(masks, maps), "aupro": aupro_loop(masks, maps)}


def compare(own: dict[str, float], reference: dict[str, float], tolerance: float) -> None:
    """Prints both sides; raises SystemExit where they differ by more than the tolerance."""
    for name, value in reference.items():
        difference = abs(own[name] - value)
        print(f"  {name:<6} {own[name]:.8f}  reference {value:.8f}  difference {difference:.1e}")
        if not difference <= tolerance:
            raise SystemExit(f"{name} differs by {difference:.1e}, more than {tolerance:.0e}: nothing was timed")


def validate() -> None:
    masks, maps = make_maps(8, 128, seed=1)
    # Coarse scores tie positives with negatives, where a wrong definition shows.
    for title, scores in (("distinct scores", maps), ("tied scores", np.round(maps, 2))):
        print(f"check, 8 maps of 128x128, {title}: scikit-learn and the {STEPS}-step loop")
        compare(pixel_metrics(masks, scores, LIMIT, STEPS), reference_metrics(masks, scores), 1e-6)
    print("check, exact AUPRO: a loop of 4000 steps")
    compare({"aupro": aupro(masks, maps, LIMIT)}, {"aupro": aupro_loop(masks, maps, 20 * STEPS)}, 2e-3)


def timed(function: Callable[[], dict[str, float]], repeats: int) -> tuple[list[float], dict[str, float]]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.metrics", description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=83, help="number of maps (default %(default)s)")
    parser.add_argument("--size", type=int, default=518, help="side of a map in pixels (default %(default)s)")
    parser.add_argument(
        "--reference-maps", type=int, metavar="K", help="compare on the first K maps only (default: all; 0: not at all)"
    )
    parser.add_argument("--refcheck", action="store_true", help="validate only, time nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "metrics.jsonl", help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    packages = ["numpy", "opencv-python-headless", "pillow", "scikit-learn"]
    record = environment("zsad.bench.metrics", argv, packages)
    validate()
    if arguments.refcheck:
        return 0

    masks, maps = make_maps(arguments.maps, arguments.size)
    count = arguments.maps if arguments.reference_maps is None else min(arguments.reference_maps, arguments.maps)
    pixel_metrics(masks, maps, LIMIT)  # warm-up
    own, _ = timed(lambda: pixel_metrics(masks, maps, LIMIT), OWN_REPEATS)
    print(f"all four metrics, {arguments.maps} maps of {arguments.size}x{arguments.size}")
    print(f"  exact      {statistics.median(own):8.3f} s  median of {len(own)}, {min(own):.3f} to {max(own):.3f} s")
    record |= {"maps": arguments.maps, "size": arguments.size, "exact_s": own}
    if count:
        subset = masks[:count], maps[:count]
        same, _ = timed(lambda: pixel_metrics(*subset, LIMIT), OWN_REPEATS)
        reference, expected = timed(lambda: reference_metrics(*subset), 1)
        ratio = statistics.median(reference) / statistics.median(same)
        print(f"  reference  {reference[0]:8.3f} s  one run on {count} maps")
        print(f"  ratio      {ratio:8.0f}    on those {count} maps")
        print("values of the timed run, with the 200-step AUPRO on both sides")
        compare(pixel_metrics(*subset, LIMIT, STEPS), expected, 1e-6)
        record |= {"reference_maps": count, "exact_on_reference_maps_s": same, "reference_s": reference}
    append(arguments.output, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of all four pixel metrics: exact curves here against the 200-step loop and scikit-learn of the references.

    python -m zsad.bench.metrics [--maps 83] [--size 518] [--reference-maps K] [--refcheck] [--output FILE]
    python -m zsad.bench.metrics --memory [--maps 200] [--size 1024]

Validates first: AUROC, AP and F1 against scikit-learn, the 200-step AUPRO against the loop, the exact AUPRO against a
loop with twenty times as many steps. Then times both sides in one process on the same maps. The loop labels regions
with OpenCV, which is faster than what the references use, so the ratio errs on the low side.

--memory measures instead what `zsad-eval` holds while it compares that many maps, in memory and beyond its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.evaluation.metrics import aupro, pixel_metrics
from zsad.kernels.machine import available_cores

from .records import RESULTS, append, environment

STEPS = 200
LIMIT = 0.3
OWN_REPEATS = 5
SMALL = 64  # side of the maps of the run that tells what all but the pixels takes


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
    from sklearn.metrics import auc  # takes long to import

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
    from sklearn import metrics

    truth, score = masks.ravel(), maps.ravel()
    precision, recall, _ = metrics.precision_recall_curve(truth, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return {
        "auroc": float(metrics.roc_auc_score(truth, score)),
        "ap": float(metrics.average_precision_score(truth, score)),
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


def write_results(root: Path, count: int, size: int) -> None:
    """Write a category with masks into `data` and its maps into `out`, ten at a time."""
    rows = ["path,score,rank,raw_score,map"]
    for start in range(0, count, 10):
        masks, maps = make_maps(min(10, count - start), size, seed=start)
        for index, (mask, map_) in enumerate(zip(masks, maps, strict=True), start):
            name = f"{'bad' if mask.any() else 'good'}/{index:04d}"
            files = {
                root / f"data/part/test/{name}.png": np.zeros((1, 1), np.uint8),  # only its name is read
                root / f"out/part/maps/{name}.tiff": map_,
            }
            if mask.any():
                files[root / f"data/part/ground_truth/{name}_mask.png"] = 255 * mask
            for path, values in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
            rows.append(f"test/{name}.png,{map_.max()},1,{map_.max()},maps/{name}.tiff")
    (root / "out/part/scores.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


PEAK_OF_EVALUATION = """from zsad.engine.commands.evaluate import main
from zsad.kernels.machine import peak_memory
code = main()
print(peak_memory())
raise SystemExit(code)"""


def peak_of_evaluation(root: Path, *options: str) -> tuple[int, float, dict[str, Any]]:
    """Peak memory in bytes and seconds of `zsad-eval` in a process of its own, and the metrics of the category."""
    start = time.perf_counter()
    command = [sys.executable, "-c", PEAK_OF_EVALUATION, str(root / "out"), str(root / "data"), "-q", *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    values = json.loads((root / "out/metrics.json").read_bytes())["categories"]["part"]
    return int(printed.split()[-1]), seconds, values


def measure_memory(count: int, size: int) -> dict[str, Any]:
    """Peak memory of `zsad-eval` without and with a limit; raises SystemExit where its metrics differ."""
    with tempfile.TemporaryDirectory(prefix="zsad-bench-") as folder:
        small, many = Path(folder, "small"), Path(folder, "many")
        write_results(small, count, SMALL)
        write_results(many, count, size)
        idle, _, _ = peak_of_evaluation(small, "--memory-limit", "1MB")
        in_memory, in_memory_s, expected = peak_of_evaluation(many)
        limited, limited_s, found = peak_of_evaluation(many, "--memory-limit", "1MB")
    compare(found, expected, 1e-12)
    workers = available_cores()
    print(f"peak memory of zsad-eval, {count} maps of {size}x{size}; of {SMALL}x{SMALL} {idle / 2**20:.0f} MB")
    for name, peak, seconds in (("in memory", in_memory, in_memory_s), ("beyond the limit", limited, limited_s)):
        maps = (peak - idle) / (4 * size * size) / workers
        print(f"  {name:<16} {peak / 2**20:6.0f} MB, {maps:6.1f} maps more per worker, {seconds:.1f} s")
    return {
        "maps": count,
        "size": size,
        "workers": workers,
        "small_size": SMALL,
        "small_bytes": idle,
        "in_memory_bytes": in_memory,
        "in_memory_s": in_memory_s,
        "limited_bytes": limited,
        "limited_s": limited_s,
    }


def measure_time(total: int, size: int, reference_maps: int | None) -> dict[str, Any]:
    """Seconds of all four metrics, here and of the references on the first maps; all of them if None."""
    masks, maps = make_maps(total, size)
    count = total if reference_maps is None else min(reference_maps, total)
    pixel_metrics(masks, maps, LIMIT)  # warm-up
    own, _ = timed(lambda: pixel_metrics(masks, maps, LIMIT), OWN_REPEATS)
    print(f"all four metrics, {total} maps of {size}x{size}")
    print(f"  exact      {statistics.median(own):8.3f} s  median of {len(own)}, {min(own):.3f} to {max(own):.3f} s")
    found: dict[str, Any] = {"maps": total, "size": size, "exact_s": own}
    if count:
        subset = masks[:count], maps[:count]
        same, _ = timed(lambda: pixel_metrics(*subset, LIMIT), OWN_REPEATS)
        reference, expected = timed(lambda: reference_metrics(*subset), 1)
        ratio = statistics.median(reference) / statistics.median(same)
        print(f"  reference  {reference[0]:8.3f} s  one run on {count} maps")
        print(f"  ratio      {ratio:8.0f}    on those {count} maps")
        print("values of the timed run, with the 200-step AUPRO on both sides")
        compare(pixel_metrics(*subset, LIMIT, STEPS), expected, 1e-6)
        found |= {"reference_maps": count, "exact_on_reference_maps_s": same, "reference_s": reference}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.metrics", description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, help="number of maps (default 83, of --memory 200)")
    parser.add_argument("--size", type=int, help="side of a map in pixels (default 518, of --memory 1024)")
    parser.add_argument(
        "--reference-maps", type=int, metavar="K", help="compare on the first K maps only (default: all; 0: not at all)"
    )
    parser.add_argument("--refcheck", action="store_true", help="validate only, time nothing")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of zsad-eval, time nothing else")
    parser.add_argument(
        "--output", type=Path, help="(default metrics.jsonl in results/, of --memory metrics_memory.jsonl)"
    )
    arguments = parser.parse_args(argv)
    packages = ["numpy", "opencv-python-headless", "pillow", "scikit-learn"]
    record = environment("zsad.bench.metrics", argv, packages)
    if arguments.memory:
        append(
            arguments.output or RESULTS / "metrics_memory.jsonl",
            record | measure_memory(arguments.maps or 200, arguments.size or 1024),
        )
        return 0
    validate()
    if not arguments.refcheck:
        found = measure_time(arguments.maps or 83, arguments.size or 518, arguments.reference_maps)
        append(arguments.output or RESULTS / "metrics.jsonl", record | found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

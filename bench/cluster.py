"""What a run on a Ray cluster costs: start-up, time per job, and two workers against one process with two threads.

    python -m zsad.bench.cluster

Both score the same drawn categories by preset small, each in groups, on two processors: one process with two threads,
and a local Ray of two workers with one processor each. They take turns, in processes of their own. Efficiency is the
time of the process over that of the workers, from the moment at which the first networks are loaded. What a job costs
beside its work is measured by jobs that do nothing. Start-up is all from the command's begin to the first job.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .records import RESULTS, append, environment

PROCESSORS = 2
CALLS = 300  # that do nothing

# In a process of its own, since a Ray, threads and networks stay where they have been.
_RUN = """
import json, sys, time
begin = time.perf_counter()
import zsad.engine.run as runs
from zsad.engine.cluster.team import Team
from zsad.engine.commands.infer import main
from zsad.kernels.machine import use_cores
use_cores(int(sys.argv[1]))
def timed(kind):
    score, marks = kind.score, []
    def scored(self, *given):
        marks.append(time.perf_counter())
        yield from score(self, *given)
        marks.append(time.perf_counter())
    kind.score = scored
    return marks
marks = timed(Team if "--ray" in sys.argv else runs.Here)
code = main(sys.argv[2:])
print(json.dumps({"start_s": marks[0] - begin, "score_s": marks[1] - marks[0]}))
sys.exit(code)
"""


def draw(folder: Path, categories: int, images: int, side: int) -> Path:
    """Write categories of images of noise over a common picture each; returns their folder."""
    rng = np.random.default_rng(0)
    for category in range(categories):
        base = Image.fromarray(rng.integers(40, 200, (7, 7, 3)).astype(np.uint8))
        usual = np.asarray(base.resize((side, side), Image.Resampling.BICUBIC), np.float64)
        (folder / f"part{category}").mkdir(parents=True)
        for number in range(images):
            noisy = (usual + rng.normal(0, 10, usual.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"part{category}" / f"{number:04d}.jpg", quality=90)
    return folder


def measured(data: Path, output: Path, options: Sequence[str]) -> dict[str, float]:
    """Run over the data; returns seconds until the first job, and from there to the last result."""
    command = [sys.executable, "-c", _RUN, str(PROCESSORS), str(data), "--output", str(output), "--device", "cpu", "-q"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def per_call() -> float:
    """Return the seconds from asking a worker for nothing to its outcome, the median of many."""
    from zsad.engine.cluster.ledger import Ledger
    from zsad.engine.cluster.team import AHEAD, LOCAL, connected

    ray, _ = connected(LOCAL)
    ledger = ray.remote(Ledger).options(num_cpus=0).remote()

    class Idle:
        def do(self) -> Any:
            yield ray.get(ledger.begin.remote(""))

    try:
        worker, seconds = ray.remote(Idle).remote(), []
        for _ in range(CALLS):
            begin = time.perf_counter()
            waits = worker.do.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD).remote()
            ray.wait([waits], num_returns=1)
            ray.get(next(waits))
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)
    finally:
        ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=64, help="of each category (default: %(default)s)")
    parser.add_argument("--side", type=int, default=280, help="of the images and the networks' input (default: 280)")
    parser.add_argument("--group-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turn (default: %(default)s)")
    parser.add_argument("--config", type=Path, help="other networks than those of preset small")
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster.jsonl", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.cluster", argv, ["numpy", "onnxruntime", "ray"])
    options = ["--image-size", str(arguments.side), "--group-size", str(arguments.group_size)]
    options += ["--config", str(arguments.config)] if arguments.config is not None else []
    ways = {"process": options, "workers": [*options, "--workers", "1", "--ray"]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="zsad-bench-") as folder:
        data = draw(Path(folder, "data"), arguments.categories, arguments.images, arguments.side)
        for number in range(-1, arguments.rounds):  # the first makes graphs and fills caches
            for name, own in ways.items():
                seconds = measured(data, Path(folder, f"{name}{number}"), own)
                if number >= 0:
                    runs[name].append(seconds)
                    print(name, seconds)
    medians = {
        name: {key: statistics.median(s[key] for s in found) for key in found[0]} for name, found in runs.items()
    }
    figures = {
        "efficiency": medians["process"]["score_s"] / medians["workers"]["score_s"],
        "job_s": per_call(),
        "start_s": medians["workers"]["start_s"],
        "start_alone_s": medians["process"]["start_s"],
    }
    print(figures)
    record |= {name: getattr(arguments, name) for name in ("categories", "images", "side", "group_size", "rounds")}
    append(arguments.output, {**record, "runs": runs, **figures})


if __name__ == "__main__":
    main()

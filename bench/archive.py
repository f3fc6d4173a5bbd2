"""Time and memory per image of runs in groups, from few images to many: is the cost linear, and memory flat?

    python -m zsad.bench.archive --counts 200,2000,20000

Each run is a process of its own over a list of drawn images of 112 pixels, no two alike, scored by preset small at 112
px in groups of 200. What counts is processors' time, which other work on the machine moves less, without that of a run
over few images, which is starting; and the largest resident memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .records import RESULTS, append, environment

SIDE, GROUP = 112, 200
START = 20  # images of the run that tells what starting takes


def draw(folder: Path, count: int) -> Path:
    """Write images and a list of them; returns the list."""
    rng = np.random.default_rng(0)
    base = rng.integers(40, 200, (7, 7, 3)).astype(np.uint8)
    usual = np.asarray(Image.fromarray(base).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    with (folder / "list.csv").open("w") as table:
        table.write("path\n")
        for number in range(count):
            noisy = (usual + rng.normal(0, 10, usual.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{number:07d}.jpg", quality=90)
            table.write(f"{number:07d}.jpg\n")
    return folder / "list.csv"


def measured(count: int) -> dict[str, float]:
    """Run over so many images; returns seconds of processors and of the clock, and the peak of memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="zsad-bench-") as folder:
        listed, output = draw(Path(folder), count), Path(folder, "out")
        command = [sys.executable, "-c", "import sys; from zsad.engine.commands.infer import main; sys.exit(main())"]
        command += [str(listed), "--output", str(output), "--image-size", str(SIDE), "--group-size", str(GROUP), "-q"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((output / "run.json").read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"images": count, "cpu_s": cpu, "wall_s": record["seconds"], "peak_bytes": record["peak_memory_bytes"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="200,2000,20000", help="images of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "archive.jsonl", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.archive", argv, ["numpy", "onnxruntime"])
    measured(START)  # after which all is in the cache that later runs find there
    record |= {"side": SIDE, "group": GROUP, "start": measured(START), "runs": []}
    for count in map(int, arguments.counts.split(",")):
        record["runs"].append(measured(count))
        print(record["runs"][-1])
    append(arguments.output, record)


if __name__ == "__main__":
    main()

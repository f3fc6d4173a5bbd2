"""Time from the start of a process to its end, of a second run over two images or more, beside what its networks take.

    python -m zsad.bench.startup [--images 60] [--against COMMIT] [--precision int8] [--rounds 5]

Each round runs `zsad-infer` over a folder of drawn images, without ground truth, in a process of its own, with a cache
that an earlier run has filled, and the network over as many images in this process, where it has run before. What a
process takes beyond that is starting, reading, scoring, writing and ending. With --against another commit takes its
turns in the same rounds; both are then installed into temporary folders and run from these.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from zsad.engine.config import load_config
from zsad.engine.demo import draw_demo
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.runtime import choose_runtime
from zsad.export.agreement import sample_images

from .records import RESULTS, append, environment

PRESET, SIDE = "small", 518
PACKAGES = sysconfig.get_path("purelib")
# Without `site` no editable install stands before the folder that is asked for.
START = "import sys; sys.path[:0] = [{0!r}]; sys.path += [{1!r}]; from zsad.engine.commands.start import infer; "
START += "sys.exit(infer())"


@contextmanager
def installed(commit: str | None) -> Iterator[Path]:
    """Install a commit, or the clone as it is, into a temporary folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zsad-bench-")))
        source = Path.cwd()
        if commit is not None:
            source = folder / "tree"
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(source), commit], check=True)
            remove = ["git", "worktree", "remove", "--force", str(source)]
            stack.callback(subprocess.run, remove, check=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
        subprocess.run([*install, str(folder / "packages"), str(source)], check=True)
        yield folder / "packages"


def parts(folder: Path, images: int) -> Path:
    """Draw as many images into one folder, a quarter of them defective, and return it."""
    drawn = draw_demo(folder / "drawn", count=images, defects=max(1, images // 4))
    data = folder / "data"
    data.mkdir()
    for number, image in enumerate(sorted((drawn / "test").rglob("*.png"))):
        image.rename(data / f"{number:03d}.png")
    return data


def process(packages: Path | None, data: Path, output: Path, precision: str) -> Callable[[], tuple[float, float]]:
    """Return what runs `zsad-infer` in a process and gives its seconds by the clock and of processors."""
    start = ["-c", "import sys; from zsad.engine.commands.start import infer; sys.exit(infer())"]
    if packages is not None:
        start = ["-S", "-c", START.format(str(packages), PACKAGES)]
    command = [sys.executable, *start, str(data), "--output", str(output), "--preset", PRESET, "--device", "cpu"]
    command += ["--image-size", str(SIDE), "--network-precision", precision, "--precision", precision, "-q"]

    # Compiled modules are kept, as they are unless somebody says otherwise.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run() -> tuple[float, float]:
        before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, cwd=data, env=surroundings)
        seconds, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def networks(precision: str, images: int) -> Callable[[], float]:
    """Return what runs the preset's network over as many images, one at a time, and gives the seconds."""
    overrides = {"image_size": SIDE, "network_precision": precision}
    config = load_config(PRESET, overrides=overrides, method_of=method_class)
    (request,) = graph_requests(config)
    graph = load_networks(config, [request], choose_runtime("cpu"), 1)[request.network].graphs[request.graph]
    image = {"images": sample_images(SIDE)}

    def run() -> float:
        start = time.perf_counter()
        for _ in range(images):
            graph.run(image)
        return time.perf_counter() - start

    return run


def measured(runs: Mapping[str, Callable[[], tuple[float, float]]], alone: Callable[[], float], rounds: int) -> Any:
    """Return the seconds of each, by the clock and of processors, and those of the networks, of rounds in turn."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    backbone = []
    for counted in range(rounds + 1):
        laps = {name: run() for name, run in runs.items()}
        lap = alone()
        if counted:  # the first one fills the cache and warms up
            backbone.append(lap)
            for name, values in laps.items():
                seconds[name].append(values)
    return {"networks_s": backbone, "runs_s": seconds}


def said(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each that ran."""
    backbone = record["networks_s"]
    yield f"networks, {record['images']} images: {statistics.median(backbone):.2f} s"
    for name, values in record["runs_s"].items():
        clock, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        beyond = statistics.median(lap - alone for (lap, _), alone in zip(values, backbone, strict=True))
        yield f"{name}: {clock:.2f} s from start to end, {beyond:.2f} s beyond the networks, {cpu:.2f} s of processors"
    for name, ratio in times_faster(record).items():
        yield f"here {ratio:.2f} times as fast as {name}"


def times_faster(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the medians of the round-by-round ratios of other commits' seconds and this one's."""
    here, *others = record["runs_s"].items()
    return {
        name: statistics.median(lap / own for (lap, _), (own, _) in zip(values, here[1], strict=True))
        for name, values in others
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--against", metavar="COMMIT", help="a commit that takes its turns in the same rounds")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones (default %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.startup", argv, ["numpy", "onnxruntime"])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zsad-bench-")))
        data = parts(folder, arguments.images)
        commits: dict[str, Path | None] = {"here": None}
        if arguments.against is not None:
            commits["here"] = stack.enter_context(installed(None))
            commits[arguments.against] = stack.enter_context(installed(arguments.against))
        runs = {
            name: process(packages, data, folder / f"out{number}", arguments.precision)
            for number, (name, packages) in enumerate(commits.items())
        }
        record |= {"preset": PRESET, "image_size": SIDE, "images": arguments.images, "precision": arguments.precision}
        record |= measured(runs, networks(arguments.precision, arguments.images), arguments.rounds)
    for line in said(record):
        print(line)
    append(arguments.output, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Watching for long, and being killed while at it: nothing leaks, nothing is lost, nothing is scored twice."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest
from PIL import Image
from runs import draw

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workplace")]

IMAGES = int(os.environ.get("ZSAD_IMAGES", "300"))
RUNS = int(os.environ.get("ZSAD_RUNS", "2"))  # kills
SEED = int(os.environ.get("ZSAD_SEED", "0"))
SECONDS = 120  # without a line after which a watch hangs
AHEAD = 200  # files that wait at most
LEAST, OF_EACH = 24 << 20, 200  # bytes that memory may grow by, and by each image more


@pytest.fixture
def command(tiny: Path, tmp_path: Path) -> list[str]:
    """A watch over `in` by a small bank."""
    draw(tmp_path / "good", 12)
    start = [sys.executable, "-c", "import sys; from zsad.engine.commands.start import infer; sys.exit(infer())"]
    bank = ["--reference", "good", "--save-bank", "part.zsad", "--config", str(tiny / "config.toml")]
    runtime = ["--device", "cpu", "--runtime", "onnxruntime"]  # else it is found out first which is faster
    subprocess.run([*start, *bank, *runtime, "-q"], check=True)
    (tmp_path / "in").mkdir()
    return [*start, "--watch", "in", "--bank", "part.zsad", *runtime, "--json", "-q"]


class Feeder:
    """Writes small images, each in one of the ways in which they come."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.fed: list[str] = []

    def feed(self) -> None:
        number = len(self.fed)
        folder = Path("in", f"{number // 1000:02d}")
        folder.mkdir(exist_ok=True)
        name = f"{number:05d}.png"
        draft = folder / f".{name}"
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(draft, format="PNG")
        way = self.rng.randrange(3)
        if way == 0:
            draft.rename(folder / name)
        else:
            content = draft.read_bytes()
            cut = self.rng.randrange(len(content)) if way == 1 else len(content)
            with (folder / name).open("wb", buffering=0) as file:  # in one piece or in two
                file.write(content[:cut])
                file.write(content[cut:])
            draft.unlink()
        self.fed.append(f"{folder.name}/{name}")


def scored() -> list[str]:
    with Path("out/in/scores.csv").open(newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


def next_path(lines: IO[str]) -> str:
    told = json.loads(lines.readline())
    assert "error" not in told, told
    return str(told["path"])


def test_watching_for_long_leaks_nothing(command: list[str]) -> None:
    """An hour at full speed in short: memory is measured after a sixtieth of the images, and at the end."""
    feeder, told, measured = Feeder(), list[str](), list[int]()
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            while len(told) < IMAGES:
                while len(feeder.fed) < min(len(told) + AHEAD, IMAGES):
                    feeder.feed()
                told.append(next_path(process.stdout))
                if len(told) in (max(IMAGES // 60, AHEAD + 50), IMAGES):
                    memory = psutil.Process(process.pid).memory_info()
                    measured.append(memory.rss)
                    seconds = time.monotonic() - begun
                    print(f"{len(told)} images, {seconds:.0f} s, {memory.rss / 2**20:.1f} MiB")
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
    assert sorted(told) == sorted(scored()) == feeder.fed
    first, last = measured
    assert last - first < LEAST + OF_EACH * IMAGES


def test_killed_watches_go_on_without_scoring_twice(command: list[str]) -> None:
    feeder = Feeder()
    for number in range(RUNS + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(40):
                feeder.feed()
            ends: tuple[int, ...] = (0, -signal.SIGKILL)
            try:
                if number < RUNS:
                    for _ in range(before := feeder.rng.randrange(30)):
                        next_path(process.stdout)
                    time.sleep(feeder.rng.uniform(0, 0.2))
                    if not before:  # it may not watch yet, only start
                        ends = (*ends, 130, -signal.SIGTERM)
                    process.send_signal(feeder.rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                else:
                    while len(scored()) < len(feeder.fed):
                        next_path(process.stdout)
                    process.send_signal(signal.SIGINT)
                assert process.wait(SECONDS) in ends
            finally:
                process.kill()
    assert sorted(scored()) == feeder.fed
    hidden = [path for path in Path("out").iterdir() if path.name.startswith(".")]
    assert all("lock" in path.name for path in hidden), hidden

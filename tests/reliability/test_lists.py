"""Lists of any length: read row after row, and a run over many of their images takes the memory of one over few."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import draw

pytestmark = pytest.mark.slow

ROWS = int(os.environ.get("ZSAD_ROWS", "20000"))
IMAGES = int(os.environ.get("ZSAD_IMAGES", "300"))
FEW = 100
LEAST, OF_EACH = 12 << 20, 250  # bytes that a list may take, and for each row
ARROW = 64 << 20  # of pyarrow's threads and buffers, however long the list
SIDE = 160  # pixels: 25 times as many bytes as an image may take
OF_IMAGE = 3000  # bytes that a run may take more for each image

READS = """import sys
from pathlib import Path
from zsad.engine.images.manifest import read_manifest
if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet
fact = lambda name: 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = fact("VmRSS")
(category,) = read_manifest(Path(sys.argv[1]), [])
print(len(category.images), fact("VmHWM") - before)"""


def rows(count: int) -> Iterator[tuple[str, int]]:
    return ((f"images/{number // 1000}/image{number:07d}.png", number % 2) for number in range(count))


def write(path: Path, count: int) -> Path:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        paths, labels = zip(*rows(count), strict=True)
        parquet.write_table(arrow.table({"path": paths, "label": labels}), path)
        return path
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("path,label\n")
            file.writelines(f"{name},{label}\n" for name, label in rows(count))
        else:
            file.writelines(json.dumps({"path": name, "label": label}) + "\n" for name, label in rows(count))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what memory a process has had")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_list_is_never_held_whole(tmp_path: Path, kind: str) -> None:
    taken = []
    for count in (ROWS, 3 * ROWS):
        listed = write(tmp_path / f"list.{kind}", count)
        said = subprocess.run([sys.executable, "-c", READS, listed], check=True, capture_output=True, text=True).stdout
        images, bytes_taken = map(int, said.split())
        print(f"{kind}: {images} rows, {bytes_taken / 2**20:.1f} MiB while they are read")
        assert images == count
        taken.append(bytes_taken)
    assert taken[0] < LEAST + OF_EACH * ROWS + ARROW * (kind == "parquet")
    assert kind == "parquet" or taken[1] - taken[0] < OF_EACH * 2 * ROWS  # rows held whole take twice as much


@pytest.mark.long
@pytest.mark.usefixtures("workplace")
def test_a_run_over_many_images_takes_the_memory_of_one_over_few(tiny: Path, tmp_path: Path) -> None:
    draw(tmp_path / "good", 12)
    start = [sys.executable, "-c", "import sys; from zsad.engine.commands.start import infer; sys.exit(infer())"]
    # Else the fastest runtime is found out at first, which takes more memory than the run.
    common = ["--device", "cpu", "--runtime", "onnxruntime", "-q"]
    making = ["--reference", "good", "--save-bank", "part.zsad", "--config", str(tiny / "config.toml")]
    subprocess.run([*start, *making, *common], check=True)
    (tmp_path / "images").mkdir()
    rng, peaks = np.random.default_rng(0), list[int]()
    for number in range(IMAGES):
        noise = rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{number:06d}.png")
    for count in (FEW, IMAGES):
        Path("list.csv").write_text("\n".join(["path", *(f"images/{number:06d}.png" for number in range(count))]))
        scoring = ["list.csv", "--bank", "part.zsad", "--output", f"out{count}"]
        subprocess.run([*start, *scoring, *common], check=True)
        peaks.append(json.loads(Path(f"out{count}/run.json").read_text())["peak_memory_bytes"])
        print(f"{count} images of a list: {peaks[-1] / 2**20:.1f} MiB")
    assert peaks[1] - peaks[0] < LEAST + OF_IMAGE * IMAGES

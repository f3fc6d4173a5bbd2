"""Time and memory per image of runs in groups, from few images to many: is the cost linear, and memory flat?

    python -m zsad.bench.archive --counts 200,2000,20000

Each run is a process of its own over a list of drawn images of 112 pixels (the same few hundred files under many names,
as links), scored by preset small at 112 px in groups of 200, without pictures of the report where there are many. The
table says seconds per image of all but starting, and the largest resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DRAWN, SIDE, GROUP = 200, 112, 200
MILLION = 1_000_000


def draw(folder: Path, count: int) -> Path:
    """Write images, links to them, and a list; returns the list."""
    rng = np.random.default_rng(0)
    base = rng.integers(40, 200, (7, 7, 3)).astype(np.uint8)
    usual = np.asarray(Image.fromarray(base).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    files = folder / "files"
    files.mkdir()
    for number in range(DRAWN):
        noisy = (usual + rng.normal(0, 10, usual.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(files / f"{number}.png")
    with (folder / "list.csv").open("w") as table:
        table.write("path\n")
        for number in range(count):
            (folder / f"{number:07d}.png").hardlink_to(files / f"{number % DRAWN}.png")
            table.write(f"{number:07d}.png\n")
    return folder / "list.csv"


def measured(count: int, options: Sequence[str]) -> dict[str, float]:
    """Run over so many images; returns seconds of all and of starting, and the peak of memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="zsad-bench-") as folder:
        listed, output = draw(Path(folder), count), Path(folder, "out")
        command = [sys.executable, "-c", "import sys; from zsad.engine.commands.infer import main; sys.exit(main())"]
        command += [str(listed), "--output", str(output), "--image-size", str(SIDE), "--group-size", str(GROUP), "-q"]
        subprocess.run([*command, *options], check=True)
        record = json.loads((output / "run.json").read_text())
    return {
        "images": count,
        "seconds": record["seconds"] - record["stages"]["load"],
        "peak": record["peak_memory_bytes"],
        **{stage: seconds / count * 1000 for stage, seconds in record["stages"].items() if stage != "load"},
    }


def table(rows: Sequence[dict[str, float]]) -> str:
    """Return the table, and what it comes to for a million images."""
    stages = [name for name in rows[0] if name not in ("images", "seconds", "peak")]
    lines = [f"| images | ms per image | peak MB | {' | '.join(f'{stage}, ms' for stage in stages)} |"]
    lines.append("|---" * (3 + len(stages)) + "|")
    for row in rows:
        of_stages = " | ".join(f"{row.get(stage, 0):.2f}" for stage in stages)
        each = 1000 * row["seconds"] / row["images"]
        lines.append(f"| {row['images']:,} | {each:.2f} | {row['peak'] / 2**20:.0f} | {of_stages} |")
    hours = MILLION * rows[-1]["seconds"] / rows[-1]["images"] / 3600
    lines.append(
        f"\nExtrapolated, not measured: {MILLION:,} images would take {hours:.1f} hours at the last row's rate."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="200,2000,20000", help="images of each run (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="more for zsad-infer, after --")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores; images of {SIDE} px, groups of {GROUP}, preset small\n")
    print(table([measured(int(count), arguments.options) for count in arguments.counts.split(",")]))


if __name__ == "__main__":
    main()

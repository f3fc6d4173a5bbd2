"""What tiles find of small defects in large images, and whole images do not.

    python -m zsad.bench.tiles SETS [--only NAME ...] [--ways whole aligned pooled] [--images 8] [--width 2000] …

SETS is laid out as MVTec AD is, or in another way that `zsad-eval` reads. Of each set some normal images are enlarged
twice, mirrored until they fill the width and height, and given noise, so that planted defects are not all that is
sharp. Into half of them discs of 4, 8 and 16 pixels, brighter or darker, are planted at random places; preset `small`
scores them whole, in aligned and in pooled tiles. Found is a defect as far as its map's highest value, no further away
than NEAR, is above the highest one of a whole clean image: over all pairs of the two this is an AUROC, as if each
defect were alone in its image. Nothing at all was found where it is near 0. Each set and way is a record of its own.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from zsad.engine.config import load_config
from zsad.engine.evaluation.evaluate import labelled
from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.decode import decode
from zsad.engine.images.depth import batch_bit_depth
from zsad.engine.images.folders import scan
from zsad.engine.images.stored import read_map
from zsad.engine.methods.method import method_class
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.run import run
from zsad.engine.workplace import Options

from .records import RESULTS, append, environment

SIZES = (4, 8, 16)  # pixels across
OF_EACH = 3  # in an image with defects
CONTRAST, NOISE = 60, 4  # grey levels, out of 255
NEAR = 32  # pixels from a defect's middle
TRIES = 10_000  # of places
APART = 160  # pixels between two defects, and a fifth of that to the border


@dataclass(frozen=True)
class Defect:
    """A disc that was planted into an image."""

    y: int
    x: int
    size: int  # pixels across


def enlarged(image: Image.Image, width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return an image [height, width, 3], enlarged twice, mirrored until it is large enough, and with noise."""
    twice = image.convert("RGB").resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    both = np.concatenate([np.asarray(twice), np.asarray(ImageOps.mirror(twice))], axis=1)
    whole = np.concatenate([both, both[::-1]])
    rows, columns = (-(-side // extent) for side, extent in zip((height, width), whole.shape, strict=False))
    filled = np.tile(whole, (rows, columns, 1))[:height, :width].astype(np.float32)
    return filled + rng.normal(0, NOISE, filled.shape).astype(np.float32)


def places(width: int, height: int, rng: np.random.Generator) -> list[Defect]:
    """Draw where defects go, far from each other."""
    found: list[Defect] = []
    border = APART // 5
    for _ in range(TRIES):
        y, x = (int(rng.integers(border, max(side - border, border + 1))) for side in (height, width))
        if all(max(abs(y - other.y), abs(x - other.x)) >= APART for other in found):
            found.append(Defect(y, x, SIZES[len(found) % len(SIZES)]))
        if len(found) == OF_EACH * len(SIZES):
            return found
    raise SystemExit(f"{width} × {height} pixels have no room for that many defects; give a larger --width or --height")


def plant(image: NDArray[np.float32], defects: Sequence[Defect], rng: np.random.Generator) -> None:
    """Draw discs into an image [H, W, 3], with edges a pixel wide."""
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    for defect in defects:
        here = slice(defect.y - NEAR, defect.y + NEAR), slice(defect.x - NEAR, defect.x + NEAR)
        distance = np.hypot(rows[here[0]] - defect.y + 0.5, columns[:, here[1]] - defect.x + 0.5)
        cover = np.clip(defect.size / 2 - distance + 0.5, 0, 1)
        image[here] += float(rng.choice([-CONTRAST, CONTRAST])) * cover[:, :, None]


def detection(maps: Sequence[NDArray[np.float32]], defects: Mapping[int, Sequence[Defect]]) -> dict[str, float]:
    """Return by the defects' sizes how often one is above a whole clean image; defects: of images by number."""
    clean = np.array([values.max() for number, values in enumerate(maps) if number not in defects])
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for number, planted in defects.items():
        for one in planted:
            near = maps[number][max(one.y - NEAR, 0) : one.y + NEAR, max(one.x - NEAR, 0) : one.x + NEAR]
            found[one.size].append(float(near.max()))
    return {
        f"{size}": round(float(np.mean([np.mean(value > clean) + np.mean(value == clean) / 2 for value in values])), 4)
        for size, values in found.items()
    }


def draw(
    sources: Sequence[InputImage], bits: int | None, folder: Path, width: int, height: int
) -> dict[int, list[Defect]]:
    """Write large images, every second one with defects; returns these by the images' numbers."""
    folder.mkdir(parents=True)
    defects = {}
    for number, source in enumerate(sources):
        rng = np.random.default_rng(number)
        values = enlarged(decode(source.path, bits), width, height, rng)
        if number % 2:
            defects[number] = places(width, height, rng)
            plant(values, defects[number], rng)
        Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return defects


def ways(tile: int) -> dict[str, dict[str, Any]]:
    """Return what is measured, with options of the configuration."""
    return {
        "whole": {},
        "aligned": {"tile": tile, "tile_batches": "aligned"},
        "pooled": {"tile": tile, "tile_batches": "pooled"},
    }


def measure(category: Category, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield ways, and by sizes of defects how many of a set's are found."""
    normal = [image for image in labelled(category).images if image.anomalous is False]
    bits = batch_bit_depth(image.path for image in normal).bits
    sources = normal[: arguments.images]
    with tempfile.TemporaryDirectory(prefix="zsad-") as name:
        data = Path(name) / "data"
        defects = draw(sources, bits, data, arguments.width, arguments.height)
        for way in arguments.ways:
            options = ways(arguments.tile)[way]
            overrides = {"image_size": arguments.image_size, **options} if arguments.image_size else options
            config = load_config("small", arguments.config, overrides, method_of=method_class)
            output = Path(name) / way
            run(data, config, choose_runtime(arguments.device), Options(output), lambda *_: None)
            files = sorted((output / "data" / "maps").glob("*.tiff"))
            yield way, detection([np.asarray(read_map(file)) for file in files], defects)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.tiles", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("sets", type=Path, metavar="SETS", help="a folder of sets with labels")
    add("--only", nargs="+", metavar="NAME", help="sets (default: all)")
    add("--ways", nargs="+", choices=ways(0), default=list(ways(0)), help="of cutting images (default: all)")
    add("--images", type=int, default=8, help="of each set, half of them with defects (default %(default)s)")
    add("--width", type=int, default=2000, help="of images in pixels (default %(default)s)")
    add("--height", type=int, default=2000, help="(default %(default)s)")
    add("--tile", type=int, default=518, help="side in pixels (default %(default)s)")
    add("--image-size", type=int, help="of the network's input (default: as large as images and tiles are)")
    add("--config", type=Path, metavar="FILE.toml", help="values that replace the preset's")
    add("--device", default="cpu", help="auto, cpu or cuda:N (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "tiles.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    facts = {key: getattr(arguments, key) for key in ("images", "width", "height", "tile")}
    said = ["SETS", *(["--only", *arguments.only] if arguments.only else []), "--ways", *arguments.ways]
    for key, value in facts.items():
        said += [f"--{key}", str(value)]
    said += ["--image-size", str(arguments.image_size)] if arguments.image_size else []
    record = environment("zsad.bench.tiles", said, ["numpy", "onnxruntime", "zsad"])
    categories = [category for category in scan(arguments.sets).categories if category.has_ground_truth]
    for category in categories:
        if arguments.only is not None and category.name not in arguments.only:
            continue
        for way, found in measure(category, arguments):
            print(f"{category.name}, {way}: {found}", flush=True)
            about = {**facts, "of_each": OF_EACH, "contrast": CONTRAST, "set": category.name, "way": way}
            append(arguments.output, {**record, **about, "found": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

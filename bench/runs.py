"""Whole runs of a preset: every stage alone, and all together."""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from zsad.engine.category_pass import CategoryJob, run_category
from zsad.engine.config import Config
from zsad.engine.demo import draw_demo
from zsad.engine.images.categories import Category
from zsad.engine.images.folders import scan
from zsad.engine.images.loader import Batch
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Group, Scored
from zsad.engine.networks.runtime import Runtime
from zsad.engine.workplace import Options, Workplace, set_up
from zsad.kernels.machine import peak_memory

from .memory import forget_peak_memory
from .scenes import draw_scenes

FINDERS = ("foreground", "masks")  # stages within what a method does with an image


def measure_run(config: Config, runtime: Runtime, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the stages alone and together."""
    with tempfile.TemporaryDirectory() as folder:
        (output := Path(folder) / "out").mkdir()
        options = Options(output, batch_size=arguments.batch_size, strict=True)
        workplace = set_up(config, runtime, options, {})
        data = arguments.data or draw(config, arguments.images, Path(folder) / "data")
        (category, *_) = scan(data).categories
        category = replace(category, images=category.images[: arguments.images])

        def run(images: int) -> tuple[float, float, dict[str, float]]:
            part, start, busy = replace(category, images=category.images[:images]), time.perf_counter(), processors()
            workplace.timings.clear()
            run_category(CategoryJob(part, config, options), workplace, lambda *_: None)
            return time.perf_counter() - start, processors() - busy, dict(workplace.timings)

        run(1 if config.components else 2)  # warms up
        alone, found = stages_alone(category, runtime, workplace)
        forget_peak_memory()
        together, busy, stages = run(len(category.images))
        alone["write"] = stages["write"]  # nothing runs beside it
        host, device = peak_memory(), None if runtime.device is None else runtime.device.used_bytes()
    return {
        "runtime": runtime.describe(workplace.libraries),
        "precision": [workplace.record["network_precision"], workplace.record["settings"].get("precision")],
        "image_size": config.image_size,
        "decoder": config.decoder,
        "images": len(category.images),
        "batch": workplace.loader.batch_size,
        "found": found and {"masks": len(found.parts), "tiles": len(found.tiles)},
        "seconds_alone": alone,
        "seconds_together": together,
        "seconds_of_processors": busy,
        "flops_of_pairs": flops_of_pairs(workplace, len(category.images)),
        "overlap": sum(alone.values()) / together,
        "peak_host_bytes": host,
        "peak_device_bytes": device,
    }


class Clock:
    """Seconds of the stages, each measured alone with the device idle before and after."""

    def __init__(self, runtime: Runtime) -> None:
        self.device, self.seconds = runtime.device, dict[str, float]()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        if self.device is not None:
            self.device.synchronise()
        start = time.perf_counter()
        yield
        if self.device is not None:
            self.device.synchronise()
        self.seconds[stage] = time.perf_counter() - start


def stages_alone(category: Category, runtime: Runtime, workplace: Workplace) -> tuple[dict[str, float], Stages | None]:
    """Run every stage of a category by itself over all images; returns seconds by stage, and what was found in one."""
    clock, count = Clock(runtime), len(category.images)
    loader, method = workplace.loader, workplace.method

    def batches(members: range) -> Iterator[Batch]:
        return loader.batches(category.images, members, None, lambda *_: None)

    with clock.measure("decode"):
        for _ in batches(range(count)):
            pass
    method.start(Group(count, category.root.name))
    workplace.timings.clear()
    taken: list[Scored] = []
    # Every batch runs on the input of the first one, so that nothing else is timed.
    for first in batches(range(min(loader.batch_size, count))):
        with clock.measure("networks"):
            for start in range(0, count, loader.batch_size):
                inputs = {recipe: images[: count - start] for recipe, images in first.inputs.items()}
                indices = list(range(start, min(start + loader.batch_size, count)))
                taken += method.take(Batch(indices, inputs, [], first.images[: count - start]))
    spent = clock.seconds.pop("networks")
    clock.seconds |= {stage: workplace.timings[stage] for stage in FINDERS if stage in workplace.timings}
    clock.seconds["networks"] = spent - sum(workplace.timings.get(stage, 0) for stage in FINDERS)
    with clock.measure("scoring"):
        scored = list(method.finish(lambda *_: None))
    if scored:
        with clock.measure("rescoring"):
            method.image_scores(scored)
    return clock.seconds, taken[0].stages if taken else None


def flops_of_pairs(workplace: Workplace, images: int) -> float:
    """Return the operations of one product for each pair of images and layer, the least that comparing them takes."""
    if not workplace.method.compares:
        return 0.0
    towers = [network.graphs["image"] for network in workplace.networks.values() if "image" in network.graphs]
    shapes = [tower.outputs["tokens"].shape for tower in towers if "tokens" in tower.outputs]
    return sum(images * (images - 1) / 2 * layers * 2.0 * patches**2 * width for layers, patches, width in shapes)


def processors() -> float:
    """Return the seconds that all processors together have worked for this process."""
    spent = os.times()
    return spent.user + spent.system


def draw(config: Config, count: int, folder: Path) -> Path:
    """Draw images for whole runs and return their folder."""
    if config.components:
        return draw_scenes(folder, count)
    drawn = draw_demo(folder, count=count, defects=count // 4)
    if config.decoder == "nvimgcodec":
        for path in drawn.glob("**/test/*/*.png"):
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()
    return drawn


def print_run(preset: str, measured: Mapping[str, Any]) -> None:
    """Print what was measured of whole runs."""
    count, alone, together = (measured[key] for key in ("images", "seconds_alone", "seconds_together"))
    host, device, found = (measured[key] for key in ("peak_host_bytes", "peak_device_bytes", "found"))
    print(f"\nwhole runs: preset {preset}, {count} images, {measured['runtime']}, {measured['precision'][0]}")
    for stage, value in alone.items():
        print(f"  {stage:<12}{value:9.2f} s alone {1e3 * value / count:9.1f} ms per image")
    print(
        f"  together    {together:9.2f} s       {1e3 * together / count:9.1f} ms per image, "
        f"{count / together:.2f} images/s, overlap efficiency {measured['overlap']:.2f}"
    )
    if found is not None:
        print(f"  {found['tiles']} tiles in the first image, {found['masks']} masks that are parts of objects")
    print(
        f"  peak memory {host / 2**30:.2f} GiB"
        + (f", on the device {device / 2**30:.2f} GiB" if device is not None else "")
    )

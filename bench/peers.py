"""Whole runs of zsad against the steps of the published MuSc code, on the same images with the same weights.

    python -m zsad.bench.peers [--images 60] [--image-size 518] [--repeats 5]

All in turn in one process; medians and medians of the round-by-round ratios are kept:

    reference   the steps of MuSc's code, stated anew with PyTorch's own operations: images one after another, a forward
                pass through all blocks for the tokens and another for the class token, neighbourhoods of each degree
                unfolded and averaged, torch.cdist from every image to all others for each layer and degree, the
                interval by topk, maps to the size of the images, RsCIN; nothing is written
    zsad        preset small with its taps and degrees, and its interval over all images: from files to scores, maps,
                overlays and report
    zsad int8   the same with networks and products in int8

The reference is neither MuSc's code nor quite its tensors: it leaves out what that does beside the arithmetic
(progress bars, moving tensors, printing), which makes it a little faster.

Validates first: raw maps of all three on the same images, of which each must agree with the reference's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.config import Config, load_config
from zsad.engine.demo import draw_demo
from zsad.engine.images.decode import network_input, recipe
from zsad.engine.images.stored import read_map
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.build import graph_options
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.run import run
from zsad.engine.scores.image_scores import rscin
from zsad.engine.scores.maps import upsample
from zsad.engine.workplace import Options
from zsad.export.builders import ImageTowerBuilder, read_builder
from zsad.export.checkpoints import find_checkpoint
from zsad.export.options import ExportOptions
from zsad.kernels import reference
from zsad.kernels.machine import available_cores
from zsad.kernels.mutual_scoring import square_grid

from .records import RESULTS, append, environment
from .throughput import PAUSE
from .untrained import use_random_weights

Array = NDArray[np.float32]

RSCIN = (1, 2, 3)
PRECISIONS = {"zsad": "fp32", "zsad int8": "int8"}
LEAST_CORRELATION = {"zsad": 0.9999, "zsad int8": 0.99}  # of all patches of the maps, which runs scale to [0, 1]
CHECKED = 6  # images that are validated


class Published:
    """The steps of MuSc's code, with the settings of a configuration."""

    def __init__(self, config: Config) -> None:
        import torch

        torch.set_num_threads(available_cores())
        (request, *_), (spec, *_) = graph_requests(config), config.networks.values()
        assert isinstance(config.settings, Settings)
        self._torch, self._settings, self._side = torch, config.settings, spec.side
        options = graph_options(spec, request, "fp32", "fused")
        assert isinstance(options, ExportOptions)
        # With the embedding among the outputs a pass goes through all blocks, as both of the published code do.
        builder = read_builder(find_checkpoint(spec.checkpoint)[0], replace(options, outputs=("tokens", "embedding")))
        assert isinstance(builder, ImageTowerBuilder)
        self._forward, self._recipe = builder.forward(), recipe(builder.preprocessing, spec.side)

    def __call__(self, files: Sequence[Path]) -> tuple[Array, Array, Array]:
        """Return patch scores [N, P], maps [N, S, S] and, in [0, 1], image scores [N] of images."""
        torch, taken = self._torch, []
        for file in files:
            with Image.open(file) as image:
                pixels = self._forward.tensor(network_input(image.convert("RGB"), self._recipe)[None])
            tokens = self._forward(pixels)["tokens"][0]  # [L, P, C]
            taken.append((tokens, self._forward(pixels)["embedding"][0]))
        tokens, embeddings = (torch.stack(values) for values in zip(*taken, strict=True))  # [N, L, P, C], [N, D]
        with torch.inference_mode():
            scores = torch.stack([self._of_degree(tokens, degree) for degree in self._settings.degrees]).mean(dim=0)
            grid = square_grid(scores.shape[1])
            maps = torch.nn.functional.interpolate(
                scores.reshape(-1, 1, *grid), (self._side, self._side), mode="bilinear", align_corners=True
            )[:, 0].numpy()
        images = rscin(maps.max(axis=(1, 2)), embeddings.numpy(), RSCIN).astype(np.float32)
        return scores.numpy(), maps, images

    def _of_degree(self, tokens: Any, degree: int) -> Any:
        """Return the mean over layers of patch scores [N, P] of tokens [N, L, P, C]."""
        layers = [self._pooled(tokens[:, layer], degree) for layer in range(tokens.shape[1])]
        return self._torch.stack([self._mutual(features) for features in layers]).mean(dim=0)

    def _pooled(self, tokens: Any, degree: int) -> Any:
        """Return unit features [N, P, C] of tokens [N, P, C]: each image's normalised, its neighbourhoods averaged."""
        functional, (_, patches, channels) = self._torch.nn.functional, tokens.shape
        grid, found = square_grid(patches), []
        for image in tokens:
            x = functional.layer_norm(image, image.shape).T.reshape(1, channels, *grid)
            parts = functional.unfold(x, degree, padding=degree // 2)  # [1, C · r², P], channel after channel
            x = functional.adaptive_avg_pool1d(parts[0].T, channels)  # [P, C]
            found.append(functional.normalize(x, dim=-1))
        return self._torch.stack(found)

    def _mutual(self, features: Any) -> Any:
        """Return patch scores [N, P] of features [N, P, C]."""
        torch, (images, patches, _) = self._torch, features.shape
        first, last = reference.interval_ranks(images - 1, self._settings.interval)
        scores = []
        for number in range(images):
            distances = torch.cdist(features[number], features.flatten(0, 1))  # [P, N · P]
            nearest = distances.reshape(patches, images, patches).amin(dim=2)  # [P, N]
            others = torch.cat([nearest[:, :number], nearest[:, number + 1 :]], dim=1)
            scores.append(others.topk(last, dim=1, largest=False).values[:, first:].mean(dim=1))
        return torch.stack(scores)


def config_of(config: Config, precision: str) -> Config:
    """Return the configuration of a run of zsad with networks and products in a precision."""
    settings = config.settings.model_copy(update={"precision": precision})
    return config.model_copy(update={"network_precision": precision, "settings": settings})


def score(data: Path, config: Config, output: Path) -> None:
    """Run zsad from files to results; SystemExit where an image has none."""
    record = run(data, config, choose_runtime("cpu"), Options(output), lambda *_: None)
    if record.failed:
        raise SystemExit(f"{record.failed} images could not be scored: nothing was timed")


def correlation(scores: Array, maps: Sequence[Path]) -> float:
    """Return how the reference's patch scores [N, P], enlarged, correlate with maps of the same images."""
    found = np.stack([np.asarray(read_map(file)) for file in maps])  # [N, H, W]
    grid = square_grid(scores.shape[1])
    expected = np.stack([upsample(image.reshape(grid), found.shape[1:]) for image in scores])
    return float(np.corrcoef(expected.ravel(), found.ravel())[0, 1])


def validate(data: Path, files: Sequence[Path], config: Config, folder: Path) -> dict[str, float]:
    """Compare maps of a few images with the reference's; SystemExit where they are others."""
    part = folder / "part"
    for file in files[:CHECKED]:
        copy = part / file.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    scores, _, _ = Published(config)(files[:CHECKED])
    found = {}
    for name, precision in PRECISIONS.items():
        score(part, config_of(config, precision), folder / precision)
        maps = folder / precision / part.name / "maps"
        paths = [(maps / file.relative_to(data)).with_suffix(".tiff") for file in files[:CHECKED]]
        found[name] = correlation(scores, paths)
        print(f"check: {name:<10} correlation with the reference's maps {found[name]:.6f}")
        if not found[name] >= LEAST_CORRELATION[name]:
            raise SystemExit(f"{name} does not find what the reference finds: nothing was timed")
    return found


def measure(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run_all in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run_all()
            seconds[name].append(time.perf_counter() - start)
            print(f"  {name:<12}{seconds[name][-1]:9.1f} s", flush=True)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsad.bench.peers", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=60, help="drawn ones (default %(default)s)")
    add("--image-size", type=int, default=518, help="(default %(default)s)")
    add("--repeats", type=int, default=5, help="rounds (default %(default)s)")
    add("--output", type=Path, default=RESULTS / "peers.jsonl", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.peers", argv, ["numpy", "onnxruntime", "torch", "zsad"])
    overrides = {"image_size": arguments.image_size, "references": "all"}
    config = load_config("small", None, overrides, method_of=method_class)
    with tempfile.TemporaryDirectory(prefix="zsad-") as name:
        folder = Path(name)
        config, weights = use_random_weights(config, folder)
        data = draw_demo(folder, count=arguments.images, defects=arguments.images // 4)
        files = sorted(data.glob("test/*/*.png"))
        agreement = validate(data, files, config, folder)
        runs: dict[str, Callable[[], Any]] = {"reference": partial(Published(config), files)}
        for way, precision in PRECISIONS.items():
            runs[way] = partial(score, data, config_of(config, precision), folder / f"out-{precision}")
        seconds = measure(runs, arguments.repeats)
    faster = {
        way: statistics.median(own / other for own, other in zip(seconds["reference"], seconds[way], strict=True))
        for way in PRECISIONS
    }
    for way, ratio in faster.items():
        print(f"{way}: {ratio:.1f} times faster than the reference's steps")
    about = {"images": arguments.images, "image_size": arguments.image_size, "weights": weights}
    result = {"seconds": seconds, "times_faster": faster, "correlation": agreement}
    append(arguments.output, {**record, **about, **result})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a GPU's product rate allows: a lower bound of the time of a whole run, where nothing could be measured.

    python -m zsad.bench.roofline

Counted are the products of the networks (see `products.py`) and of mutual scoring (one per image pair and layer) at the
rate below; decoding, copies, the passes over the Grams, what is done with masks and everything on the host come on top.
Presets that look for objects are taken to find so many tiles in an image as the drawn scenes have objects.
"""

import math
from dataclasses import dataclass

from zsad.engine.config import Config, load_config
from zsad.engine.methods import vvv
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.network import GraphRequest
from zsad.engine.text.prompts import prompt_set
from zsad.kernels.cuda.plan import Sizes, plan_mutual_scoring

from .products import read_products
from .scenes import PLACES
from .towers import SHAPES

# [degrees as bits: bit k stands for degree 2k + 1] -> instructions that a thread of filter_max.cu executes on an entry
# at most, counted in the machine code by tests/kernels/cuda/test_compile.py
INSTRUCTIONS = {0b1: 10, 0b11: 28, 0b111: 62}
IMAGES = 200
TILES = len(PLACES)  # of an image, of presets that look for objects
PRESETS = ("challenge", "musc", "small", "winclip", "april-gan", "vvv")


@dataclass(frozen=True)
class Gpu:
    """Dense fp16 products with fp32 sums, from the vendor's data sheet; memory; second-level cache."""

    name: str
    flops: float  # per second
    memory: int
    cache: int


GPUS = (Gpu("RTX 4090", 165.2e12, 24 * 2**30, 72 * 2**20), Gpu("H200", 989.5e12, 141 * 10**9, 50 * 2**20))


@dataclass(frozen=True)
class Estimate:
    """Of one preset on one GPU."""

    gpu: str
    preset: str
    network_seconds: float
    scoring_seconds: float
    bytes: int  # weights, tokens, inputs and the scoring's working set, without the runtime's own


def estimate(preset: str, gpu: Gpu, images: int = IMAGES) -> Estimate:
    """Return the lower bound for a preset at its own image size, or the largest that it chooses itself."""
    config, products = load_config(preset, method_of=method_class), read_products()
    forward = 0.0
    side = next(iter(config.networks.values())).side
    bytes_needed = 2 * 8 * 3 * side**2 * 4  # two batches of inputs
    for request in graph_requests(config):
        if not request.on_demand:
            own = products[preset, request.network, request.graph]
            forward += images * rows_of_an_image(config, request) * own.flops_per_row
            bytes_needed += 2 * own.weights
    scoring, needed = _mutual_scoring(config, gpu, images)
    return Estimate(gpu.name, preset, forward / gpu.flops, scoring / gpu.flops, bytes_needed + needed)


def rows_of_an_image(config: Config, request: GraphRequest) -> int:
    """Return how many rows an image brings into a graph."""
    if request.network not in config.networks:  # it finds the foreground
        return config.stages.masks.points_per_side**2 if request.graph == "sam_masks" else 1
    tiles = TILES if config.components else 1
    if request.graph != "clipseg_decoder":
        return tiles
    assert isinstance(config.settings, vvv.Settings)
    prompts, _ = vvv.counted_prompts(prompt_set(config.settings.prompt_name).localising, config.settings.deduplicate)
    return tiles * len(prompts)


def _mutual_scoring(config: Config, gpu: Gpu, images: int) -> tuple[float, int]:
    """Return the operations of mutual scoring, and the bytes that tokens and scoring take; of other methods none."""
    flops, tokens, working_set = 0.0, 0, 0
    if not isinstance(config.settings, Settings):
        return flops, tokens
    for spec in config.networks.values():
        shape = SHAPES[spec.checkpoint]
        patches = (spec.side // shape.patch_size) ** 2
        flops += math.comb(images, 2) * len(spec.taps) * 2 * shape.width * patches**2
        tokens += 2 * images * len(spec.taps) * patches * shape.width
        sizes = Sizes(images, patches, shape.width, len(set(config.settings.degrees)))
        working_set = max(working_set, plan_mutual_scoring(sizes, gpu.memory, gpu.cache).peak_bytes)
    return flops, tokens + working_set


def main() -> int:
    print(f"Estimates, nothing measured: lower bounds for {IMAGES} images")
    for gpu in GPUS:
        for preset in PRESETS:
            bound = estimate(preset, gpu)
            print(
                f"  {bound.gpu:<9} {bound.preset:<10} networks {bound.network_seconds:6.2f} s, scoring "
                f"{bound.scoring_seconds:6.2f} s, {bound.bytes / 2**30:5.1f} GiB"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

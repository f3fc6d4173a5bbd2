"""What a GPU's product rate allows, and what a model of its launches expects, where nothing could be measured.

    python -m zsad.bench.roofline

Counted are the products of the networks (see `products.py`) and of mutual scoring (one per image pair and layer) at the
rate below; decoding, copies, the passes over the Grams, what is done with masks and everything on the host come on top.
Presets that look for objects are taken to find so many tiles in an image as the drawn scenes have objects.

Beside these bounds of whole runs stands, for a pair of images and a layer, the model by which launches are planned
(kernels/cuda/model.py): waves of product blocks and of the pass's, whose instructions are counted in the machine code.
What `mutual_scoring_cuda` has measured on a GPU of that name is printed in the last column.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsad.engine.config import Config, load_config
from zsad.engine.methods import vvv
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.network import GraphRequest
from zsad.engine.text.prompts import prompt_set
from zsad.kernels.cuda.card import Card
from zsad.kernels.cuda.comparers import degrees_mask, gram_stride
from zsad.kernels.cuda.model import INSTRUCTIONS, TENSOR_RATE, Filtered, pass_cycles, product_cycles
from zsad.kernels.cuda.plan import Sizes, plan_mutual_scoring

from .products import read_products
from .records import RESULTS
from .scenes import PLACES
from .towers import SHAPES

IMAGES = 200
TILES = len(PLACES)  # of an image, of presets that look for objects
PRESETS = ("challenge", "musc", "small", "winclip", "april-gan", "vvv")


@dataclass(frozen=True)
class Gpu:
    """Dense fp16 products with fp32 sums and memory, from the vendor's data sheet, and what launches are cut for."""

    name: str
    flops: float  # per second
    memory: int
    card: Card

    @property
    def clock(self) -> float:
        """Cycles per second, at which the multiprocessors' rates add up to `flops`."""
        return self.flops / (self.card.multiprocessors * TENSOR_RATE[self.card.compute_capability])


GPUS = (
    Gpu("RTX 4090", 165.2e12, 24 * 2**30, Card("8.9", 128, 72 * 2**20, 100 * 2**10)),
    Gpu("H200", 989.5e12, 141 * 10**9, Card("9.0", 132, 50 * 2**20, 228 * 2**10)),
)
GRID = (37, 37)  # of the model, at 518 px
MODELLED = ((1024, (1, 3, 5)), (1024, (1, 3)), (384, (1, 3)))  # channels and degrees: of musc, challenge, small


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
        degrees = sorted(set(config.settings.degrees))
        filtered = Filtered((math.isqrt(patches),) * 2, degrees_mask(degrees))
        sizes = Sizes(images, patches, shape.width, len(degrees), filtered=filtered)
        working_set = max(working_set, plan_mutual_scoring(sizes, gpu.memory, gpu.card).peak_bytes)
    return flops, tokens + working_set


@dataclass(frozen=True)
class PairModel:
    """Of a pair of images and a layer on one GPU, in seconds; all but the bound and what was measured is a model."""

    gpu: str
    channels: int
    degrees: tuple[int, ...]
    pairs: int  # per launch
    instructions: int  # of the pass on an entry
    cache_share: float  # of L2 that two launches' Grams take
    bound: float  # the product at the peak rate
    product: float  # in whole waves of blocks
    pass_: float
    measured: float | None

    @property
    def peak_share(self) -> float:
        return self.bound / (self.product + self.pass_)


def model_pair(gpu: Gpu, channels: int, degrees: tuple[int, ...], measured: Sequence[Mapping[str, Any]]) -> PairModel:
    """Model a pair at GRID; measured: records of `mutual_scoring_cuda`."""
    filtered = Filtered(GRID, degrees_mask(degrees))
    patches, card = filtered.patches, gpu.card
    sizes = Sizes(IMAGES, patches, channels, len(degrees), filtered=filtered)
    pairs = plan_mutual_scoring(sizes, gpu.memory, card).pairs
    own = [
        statistics.median(record["ms_per_pair_and_layer"]["zsad"]) / 1e3
        for record in measured
        if gpu.name in record["gpu"]
        and (record["patches"], record["channels"], tuple(record["degrees"])) == (patches, channels, degrees)
    ]
    return PairModel(
        gpu.name,
        channels,
        degrees,
        pairs,
        INSTRUCTIONS[filtered.mask],
        2 * pairs * 4 * patches * gram_stride(patches) / card.cache_bytes,
        2 * patches**2 * channels / gpu.flops,
        product_cycles(patches, channels, pairs, card) / pairs / gpu.clock,
        pass_cycles(filtered, pairs, card) / pairs / gpu.clock,
        own[-1] if own else None,
    )


def model_pairs(results: Path = RESULTS) -> list[PairModel]:
    """Model all GPUs and settings, with what the results say of them."""
    file = results / "mutual_scoring_cuda.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    measured = [json.loads(line) for line in lines]
    return [model_pair(gpu, channels, degrees, measured) for gpu in GPUS for channels, degrees in MODELLED]


def main() -> int:
    print(f"Estimates, nothing measured: lower bounds for {IMAGES} images")
    for gpu in GPUS:
        for preset in PRESETS:
            bound = estimate(preset, gpu)
            print(
                f"  {bound.gpu:<9} {bound.preset:<10} networks {bound.network_seconds:6.2f} s, scoring "
                f"{bound.scoring_seconds:6.2f} s, {bound.bytes / 2**30:5.1f} GiB"
            )
    print(f"Model of a pair of images and a layer, {GRID[0]} x {GRID[1]} patches")
    for pair in model_pairs():
        said = "not measured" if pair.measured is None else f"measured {1e6 * pair.measured:.1f} us"
        print(
            f"  {pair.gpu:<9} C {pair.channels:<4} degrees {','.join(map(str, pair.degrees)):<5} bound "
            f"{1e6 * pair.bound:5.1f} us, product {1e6 * pair.product:5.1f} us, pass {1e6 * pair.pass_:5.1f} us "
            f"({pair.instructions} instructions an entry, {pair.pairs} pairs a launch, {100 * pair.cache_share:.0f} % "
            f"of L2): {100 * pair.peak_share:.0f} % of the peak; {said}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

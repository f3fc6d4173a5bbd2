"""What a GPU's product rate allows: a lower bound of the time of a whole run, where nothing could be measured.

    python -m zsad.bench.roofline

Counted are the products of the networks and of mutual scoring (one per image pair and layer) at the rate below;
decoding, copies, the passes over the Grams and everything on the host come on top.
"""

import math
from dataclasses import dataclass

from zsad.engine.config import load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.build import export_options
from zsad.kernels.cuda.plan import Sizes, plan_mutual_scoring

from .towers import SHAPES

IMAGES = 200


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
    """Return the lower bound for a preset at its own image size."""
    config = load_config(preset, method_of=method_class)
    forward = scoring = 0.0
    weights = tokens = plan_bytes = 0
    settings = config.settings
    assert isinstance(settings, Settings)
    degrees = len(set(settings.degrees))
    for request in graph_requests(config):
        spec = config.networks[request.network]
        shape, graph = SHAPES[spec.checkpoint], export_options(spec, request, "fp16", "standard")
        patches = (config.image_size // shape.patch_size) ** 2
        forward += images * shape.flops(graph)
        scoring += math.comb(images, 2) * len(spec.taps) * 2 * shape.width * patches**2
        weights += 2 * shape.weights(graph)
        tokens += 2 * images * len(spec.taps) * patches * shape.width
        plan = plan_mutual_scoring(Sizes(images, patches, shape.width, degrees), gpu.memory, gpu.cache)
        plan_bytes = max(plan_bytes, plan.peak_bytes)
    inputs = 2 * 8 * 3 * config.image_size**2 * 4
    return Estimate(gpu.name, preset, forward / gpu.flops, scoring / gpu.flops, weights + tokens + inputs + plan_bytes)


def main() -> int:
    print(f"Estimates, nothing measured: lower bounds for {IMAGES} images")
    for gpu in GPUS:
        for preset in ("challenge", "musc", "small"):
            bound = estimate(preset, gpu)
            print(
                f"  {bound.gpu:<9} {bound.preset:<10} networks {bound.network_seconds:6.2f} s, scoring "
                f"{bound.scoring_seconds:6.2f} s, {bound.bytes / 2**30:5.1f} GiB"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

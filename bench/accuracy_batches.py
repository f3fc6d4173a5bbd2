"""Sets of images for `accuracy`: through the network once, compared with each other once, and then kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from zsad.engine.config import Config, load_config
from zsad.engine.evaluation.evaluate import labelled
from zsad.engine.evaluation.masks import read_mask
from zsad.engine.evaluation.metrics import image_metrics, pixel_metrics
from zsad.engine.images.categories import Category, InputImage
from zsad.engine.images.decode import decode, network_input, recipe
from zsad.engine.images.depth import batch_bit_depth
from zsad.engine.methods.arrays import DeviceArrays, HostArrays
from zsad.engine.methods.method import graph_requests, method_class
from zsad.engine.methods.musc import Settings
from zsad.engine.networks.build import load_networks
from zsad.engine.networks.network import run_in_parts
from zsad.engine.networks.runtime import Runtime
from zsad.engine.scores.clean_references import clean_scores, salient_features
from zsad.engine.scores.image_scores import rscin
from zsad.engine.scores.maps import upsample
from zsad.kernels.mutual_scoring import MutualScoring, square_grid

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Metrics = dict[str, float]

TAPS, DEGREES = (2, 5, 8, 11), (1, 3, 5)  # of all rows together
SMALL_TAPS, SMALL_DEGREES = (5, 8), (1, 3)  # of preset small
INTERVAL = (0.0, 0.3)
WITH_EMBEDDINGS = {"rscin": (1, 2, 3)}
SIDE = 256  # of masks and maps when they are compared


@cache
def small_settings() -> Settings:
    settings = load_config("small", method_of=method_class).settings
    assert isinstance(settings, Settings)
    return settings


@dataclass(frozen=True)
class Batch:
    """Images that are compared with each other."""

    tokens: Array  # [N, L, P, C]
    embeddings: Array  # [N, D]
    each: Array  # [L, R, N, P, N + K] distances to the nearest patch of each image, and of K references
    taps: tuple[int, ...]  # L block numbers
    degrees: tuple[int, ...]  # R

    def of(self, members: Sequence[int] | NDArray[Any], references: Sequence[int] | NDArray[Any] = ()) -> "Batch":
        """Return a batch of fewer images: distances between two images depend on no third.

        references: images that these are compared with beside each other; they have no scores, and the last columns.
        """
        chosen = np.asarray(members)
        each = self.each[:, :, chosen][..., np.concatenate([chosen, np.asarray(references, np.intp)])]
        return replace(self, tokens=self.tokens[chosen], embeddings=self.embeddings[chosen], each=each)

    def minima(self, taps: Sequence[int], degrees: Sequence[int]) -> Array:
        """Return what some taps and degrees have measured, [l, r, N, P, N + K]."""
        return self.each[np.ix_([self.taps.index(tap) for tap in taps], [self.degrees.index(r) for r in degrees])]

    def tokens_of(self, taps: Sequence[int]) -> Array:
        """Return the tokens of some taps, [N, l, P, C]."""
        return self.tokens[:, [self.taps.index(tap) for tap in taps]]


class Reader:
    """Takes images through the network and compares them."""

    def __init__(self, checkpoint: str, image_size: int, runtime: Runtime) -> None:
        """Raises CheckpointError and ConfigError."""
        self._checkpoint, self.image_size = checkpoint, image_size
        config = self.config({"taps": TAPS, "degrees": DEGREES, "references": "all"} | WITH_EMBEDDINGS)
        (network,) = load_networks(config, graph_requests(config), runtime, 8 if runtime.device else 1).values()
        self._graph, self._devices = network.graphs["image"], runtime.devices
        self._arrays = (DeviceArrays if runtime.device else HostArrays)(runtime.devices, None)
        self._recipe = recipe(network.preprocessing, image_size)

    def config(self, overrides: Mapping[str, Any]) -> Config:
        """Return preset small with this checkpoint and size, and other values."""
        preset = load_config("small", None, {"image_size": self.image_size, **overrides}, method_of=method_class)
        ((name, spec),) = preset.networks.items()
        return preset.model_copy(update={"networks": {name: spec.model_copy(update={"checkpoint": self._checkpoint})}})

    def tokens(self, images: Iterator[Image.Image]) -> tuple[Array, Array]:
        """Return tokens [N, L, P, C] and embeddings [N, D]."""
        found: dict[str, list[Array]] = {"tokens": [], "embedding": []}
        for image in images:
            inputs = self._arrays.send(network_input(image, self._recipe)[None])
            for _, outputs in run_in_parts(self._graph, {"images": inputs}):
                for name, values in found.items():
                    values.append(np.array(self._arrays.fetch(outputs[name])))
        return np.concatenate(found["tokens"]), np.concatenate(found["embedding"])

    def batch(
        self,
        tokens: Array,
        embeddings: Array,
        taps: tuple[int, ...] = TAPS,
        degrees: tuple[int, ...] = DEGREES,
        window: int | None = None,
    ) -> Batch:
        """Compare images with each other; tokens: of these taps alone; window: as of `mutual_scores`."""
        _, layers, patches, channels = tokens.shape
        compared = square_grid(patches), layers, channels, degrees, INTERVAL
        scoring = MutualScoring(*compared, devices=self._devices, window=window)
        return Batch(tokens, embeddings, scoring.scores(tokens, return_minima="each")[1], taps, degrees)


@dataclass(frozen=True)
class ImageSet:
    """One set: its labelled images and what is kept of them."""

    name: str
    images: Sequence[InputImage]
    root: Any
    bit_depth: int | None
    tokens: Array  # [N, L, P, C] of TAPS
    embeddings: Array  # [N, D]
    reader: Reader

    @cached_property
    def batch(self) -> Batch:
        """All of its images, compared with each other once."""
        return self.reader.batch(self.tokens, self.embeddings)

    @cached_property
    def anomalous(self) -> Bools:
        return np.array([image.anomalous for image in self.images])

    @cached_property
    def masks(self) -> list[Bools] | None:
        """Masks [SIDE, SIDE] of all images; None where anomalous ones have none."""
        if not any(image.masks.files for image in self.images):
            return None
        return [resized(self.mask(image)) for image in self.images]

    def mask(self, image: InputImage) -> Bools:
        """Return the mask of an image in its own size; of one without files nothing, [1, 1]."""
        parts = [read_mask(self.root / file) for file in image.masks.files]
        return np.logical_or.reduce(parts) if parts else np.zeros((1, 1), np.bool_)

    def picture(self, image: InputImage) -> Image.Image:
        return decode(image.path, self.bit_depth)


def read_set(category: Category, reader: Reader) -> ImageSet:
    """Take a set through the network; images without a label are left out."""
    images = [image for image in labelled(category).images if image.anomalous is not None]
    bits = batch_bit_depth(image.path for image in images).bits
    tokens = reader.tokens(decode(image.path, bits) for image in images)
    return ImageSet(category.name, images, category.root, bits, *tokens, reader)


@dataclass(frozen=True)
class Scored:
    """What a row says of a batch."""

    images: Floats  # [N]
    maps: Floats  # [N, P]
    raw: Floats  # [N] before other images' scores join in


def clean_scored(minima: Array, tokens: Array, blends: Sequence[float]) -> Iterator[Scored]:
    """Yield what clean references say with each blend of the image score; maps have half of them, and all with 1.

    minima: [2, N, P, N + K], means over all degrees and of the smallest alone; tokens: [N, l, P, C].
    """
    settings = small_settings()
    rule = settings.clean_rule(None)
    assert rule is not None
    clean = clean_scores(minima, rule)
    features = salient_features(tokens[np.arange(len(clean.salient)), :, clean.salient])
    for blend in blends:
        map_blend = 1.0 if blend == 1 else settings.map_blend
        blended = replace(clean, rule=replace(clean.rule, image_blend=blend, map_blend=map_blend))
        raw = blended.image_scores
        yield Scored(rscin(raw, features, settings.salient_rscin), blended.patch_maps, raw)


def metrics_of(images: ImageSet, scored: Scored, members: Sequence[int] | None = None) -> Metrics:
    """Return image metrics, and pixel metrics where there are masks; members: those that were scored, None: all."""
    chosen = range(len(images.images)) if members is None else members
    found = {f"image_{key}": value for key, value in image_metrics(images.anomalous[chosen], scored.images).items()}
    if images.masks is not None:
        grid = square_grid(scored.maps.shape[1])
        maps = [upsample(map_.reshape(grid), (SIDE, SIDE)) for map_ in scored.maps]
        masks = [images.masks[i] for i in chosen]
        found |= {f"pixel_{key}": value for key, value in pixel_metrics(masks, maps).items()}
    return {key: round(value, 5) for key, value in found.items()}


def resized(mask: Bools, side: int = SIDE) -> Bools:
    # Without EXACT the corners of pixels would count instead of their middles: masks would be half a pixel off.
    return np.asarray(cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST_EXACT)) > 0


def defects(images: ImageSet, count: int) -> list[tuple[Image.Image, Image.Image]]:
    """Return defects to plant: a picture, and as a grey picture of its size where its defect is.

    Those of `count` images whose masks are neither the smallest nor the largest; where there are no masks, drawn ones.
    """
    if images.masks is None:
        return [drawn_defect(seed) for seed in range(count)]
    areas = np.array([mask.mean() for mask in images.masks])
    order = np.argsort(areas, kind="stable")[np.count_nonzero(areas == 0) :]
    chosen = order[[round((len(order) - 1) * (k + 1) / (count + 1)) for k in range(count)]]
    return [
        (images.picture(images.images[i]), Image.fromarray(255 * images.mask(images.images[i]).astype(np.uint8)))
        for i in chosen
    ]


def drawn_defect(seed: int, side: int = SIDE) -> tuple[Image.Image, Image.Image]:
    """Draw a dark scratch of a few bends."""
    rng = np.random.default_rng(seed)
    start, steps = rng.uniform(0.25, 0.75, 2), rng.uniform(-0.12, 0.12, (4, 2))
    points = side * np.clip(start + np.cumsum(np.vstack([np.zeros(2), steps]), axis=0), 0.05, 0.95)
    where = Image.new("L", (side, side))
    ImageDraw.Draw(where).line([tuple(point) for point in points.tolist()], 255, width=side // 64)
    return Image.new("RGB", (side, side), (25, 25, 25)), where


def planted(image: Image.Image, defect: tuple[Image.Image, Image.Image]) -> Image.Image:
    """Return an image with a defect at the place that it has in its own picture."""
    source, where = (part.resize(image.size, Image.Resampling.BILINEAR) for part in defect)
    return Image.composite(source, image, where)

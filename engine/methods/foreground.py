"""What of an image shows the object: by its colour, by IS-Net, or masks of SAM that lie in what IS-Net finds.

image [H, W, 3] → IS-Net: dichotomous segmentation [H, W] → SAM: masks of parts → those that it covers, united
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from zsad.engine.config import Config, ForegroundSettings
from zsad.engine.images.decode import bilinear, network_input, recipe
from zsad.engine.networks.network import GraphRequest, Network
from zsad.engine.scores.maps import object_mask
from zsad.kernels.machine import stopwatch

from .arrays import Arrays
from .bitmasks import BitMask, Box, overlap, pack, union

if TYPE_CHECKING:
    from .mask_generation import MaskGenerator

Rule = Literal["sam", "dichotomous", "whole"]  # united masks, the dichotomous foreground as it is, the whole image
POINTS = 16  # of SAM's mask decoder at once: 64 take a CPU twice the time for each, and four times the memory


def foreground_requests(config: Config) -> list[GraphRequest]:
    """Return which graphs find the foreground that a configuration asks for."""
    requests = []
    if config.foreground in ("isnet", "isnet+sam"):
        requests.append(GraphRequest("isnet", "isnet", ("foreground",), rows=1))
    if config.foreground == "isnet+sam":
        requests.append(GraphRequest("sam", "sam_image", ("embedding",), rows=1))
        requests.append(GraphRequest("sam", "sam_masks", ("logits", "iou"), rows=POINTS))
    return requests


@dataclass(frozen=True)
class Stages:
    """What led to the results of an image, to be looked at."""

    foreground: BitMask
    size: tuple[int, int]  # height and width of the image
    parts: Sequence[BitMask] = ()  # of the object, from which its foreground was put together
    tiles: Sequence[tuple[Box, float]] = ()  # with their scores


@dataclass(frozen=True, eq=False)
class Foreground:
    """Which pixels show the object, and how that was found."""

    pixels: NDArray[np.bool_]  # [H, W]
    rule: Rule
    parts: Sequence[BitMask]  # the masks that are kept

    def stages(self, tiles: Sequence[tuple[Box, float]] = ()) -> Stages:
        """Return what there is to be looked at; tiles: with their scores."""
        return Stages(pack(self.pixels), self.pixels.shape, self.parts, tiles)


def dichotomous(values: NDArray[np.float32], size: tuple[int, int], min_peak: float) -> NDArray[np.bool_]:
    """Return the foreground [H, W] that a network's values [S, S] in [0, 1] say an image of this size has.

    Enlarged, then scaled to [0, 1], at least one half. Nothing is foreground where the highest value is below
    `min_peak`, of which the scaling would make an object, or where all are the same.
    """
    enlarged = bilinear(values, size)
    lowest, highest = enlarged.min(), enlarged.max()
    if not (highest >= min_peak and highest > lowest):
        return np.zeros(size, bool)
    enlarged -= lowest
    enlarged /= highest - lowest
    return np.asarray(enlarged >= 0.5)


def is_too_small(dichotomous: NDArray[np.bool_], min_foreground: float) -> bool:
    """Whether a foreground [H, W] is that of a texture or a close-up: masks then change nothing."""
    return bool(np.count_nonzero(dichotomous) < min_foreground * dichotomous.size)


def combined(dichotomous: NDArray[np.bool_], masks: Sequence[BitMask], settings: ForegroundSettings) -> Foreground:
    """Return the union of the masks that the dichotomous foreground [H, W] covers for the most part.

    If it covers none, it is taken as it is; if it is too small, the whole image. Empty masks are never kept.
    """
    if is_too_small(dichotomous, settings.min_foreground):
        return Foreground(np.ones(dichotomous.shape, bool), "whole", ())
    bits = pack(dichotomous)
    parts = [mask for mask in masks if mask.area and overlap(mask, bits) / mask.area >= settings.coverage]
    if not parts:
        return Foreground(dichotomous, "dichotomous", ())
    return Foreground(union(parts, dichotomous.shape), "sam", parts)


class Foregrounds:
    """Finds the foreground of images as a configuration says."""

    def __init__(
        self,
        config: Config,
        networks: Mapping[str, Network],
        arrays: Arrays,
        timings: MutableMapping[str, float],
    ) -> None:
        """networks: those of `foreground_requests`. timings: seconds by stage."""
        self._by, self._stages, self._arrays, self._timings = config.foreground, config.stages, arrays, timings
        self._networks = networks
        self._masks: MaskGenerator | None = None
        if config.foreground == "isnet+sam":
            from . import mask_generation

            graphs = networks["sam"].graphs
            self._masks = mask_generation.MaskGenerator(
                graphs["sam_image"], graphs["sam_masks"], arrays, config.stages.masks
            )

    def find(self, image: NDArray[np.uint8]) -> Foreground:
        """Return the foreground of an image [H, W, 3]."""
        size, settings = image.shape[:2], self._stages.foreground
        if self._by == "none":
            return Foreground(np.ones(size, bool), "whole", ())
        if self._by == "colour":
            return combined(object_mask(image[:, :, ::-1]), (), settings)
        with stopwatch(self._timings, "foreground"):
            found = self._dichotomous(image)
        if self._masks is None or is_too_small(found, settings.min_foreground):
            return combined(found, (), settings)
        with stopwatch(self._timings, "masks"):
            masks = self._masks.generate(image).masks
        return combined(found, masks, settings)

    def _dichotomous(self, image: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return what IS-Net takes for the object [H, W] in an image [H, W, 3]."""
        network = self._networks["isnet"]
        prepared = network_input(image, recipe(network.preprocessing, network.spec.side))
        outputs = network.graphs["isnet"].run({"images": self._arrays.send(prepared[None])})
        (values,) = self._arrays.fetch(outputs["foreground"]).astype(np.float32)  # [S, S]
        return dichotomous(values, image.shape[:2], self._stages.foreground.min_peak)

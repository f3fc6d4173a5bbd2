"""WinCLIP and WinCLIP+ (Jeong et al., CVPR 2023): windows of an image against words, and against known-good images.

batch → network: embedding [B, D], windows of 2×2 and 3×3 patches [B, W, D] → probabilities of the abnormal class →
harmonic means over the windows that cover a patch, and over both scales and the image → maps [g, g]
references → memories of windows and patches → half the cosine distance to the nearest → the same way, added
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import GraphRequest
from zsad.engine.scores.maps import enlarged
from zsad.engine.text.vectors import abnormal_probability
from zsad.export.options import WINDOWS

from .method import Place, Scored
from .text_guided import Outputs, TextGuided, TextSettings, chosen_prompts, tower_requests

Maps = NDArray[np.float64]


class Settings(TextSettings):
    """Which of the published implementations is followed, and where to differ from it."""

    variant: Literal["anomalib", "acc", "paper"] = "anomalib"
    tau: float = Field(0.07, gt=0, description="above 0")  # what cosines are divided by
    align_corners: bool = Field(False, description="true or false")  # of maps that are enlarged
    patches: Literal["ln_post", "last_block"] | None = None  # patch features of the memory; None: the variant's
    fusion: Literal["mean", "sum"] | None = None  # of the maps of words and references; None: the variant's

    @property
    def prompt_name(self) -> str:
        return self.prompts or ("paper22" if self.variant == "paper" else "anomalib21")

    @property
    def patch_output(self) -> str:
        feature = self.patches or ("last_block" if self.variant == "acc" else "ln_post")
        return "patches" if feature == "ln_post" else "tokens"

    @property
    def share(self) -> float:
        """What the sum of the two maps is multiplied with."""
        return 1.0 if (self.fusion or ("sum" if self.variant == "acc" else "mean")) == "sum" else 0.5


class WinCLIP(TextGuided):
    """See `Method`."""

    Settings = Settings
    rescores = False
    text_mean = "raw"

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        super().__init__(config, place, config.settings.prompt_name, (*WINDOWS, config.settings.patch_output))
        self._settings = config.settings
        self.map_range = (0.0, 2 * self._settings.share if self._few_shot else 1.0)

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        assert isinstance(config.settings, Settings)
        patches = (config.settings.patch_output,) if config.few_shot else ()
        for name, spec in config.networks.items():
            if "tokens" in patches and len(spec.taps) != 1:
                raise ConfigError(f"[networks.{name}] taps must be the number of the last block, counted from 0")
        chosen_prompts(config.settings.prompt_name)  # a mistake is found before weights are fetched
        return tower_requests(config, ("embedding", *WINDOWS, *patches))

    def take(self, batch: Batch) -> Iterator[Scored]:
        for part, outputs in self._run(batch):
            scores = abnormal_probability(outputs["embedding"], self._classes, self._settings.tau)  # [B]
            scales = [self._word_map(outputs[output], side) for output, side in WINDOWS.items()]  # [B, g, g] each
            maps = _harmonic_mean([*scales, np.broadcast_to(scores[:, None, None], scales[0].shape)])
            if self._memories:
                visual = self._reference_map(outputs)  # [B, g, g]
                maps = self._settings.share * (maps + visual)
                scores = (scores + visual.max(axis=(1, 2))) / 2
            for index, score, grid_map in zip(batch.indices[part], scores.tolist(), maps, strict=True):
                yield Scored(index, score, enlarged(grid_map, self._size, self._settings.align_corners))

    def _word_map(self, windows: NDArray[Any], side: int) -> Maps:
        """Return the probabilities of windows [B, W, D] as maps [B, g, g]."""
        return aggregated(abnormal_probability(windows, self._classes, self._settings.tau), side)

    def _reference_map(self, outputs: Outputs) -> Maps:
        """Return the distances to what the references have: maps [B, g, g] in [0, 1]."""
        maps = [
            aggregated(self._distances(output, outputs[output]), side) for output, side in WINDOWS.items()
        ]  # [B, g, g] each
        patches = self._distances(self._settings.patch_output, outputs[self._settings.patch_output])  # [B, P]
        return (patches.reshape(maps[0].shape) + sum(maps)) / 3

    def _distances(self, output: str, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Return half the cosine distance [B, V] of vectors [B, (1,) V, C] to the nearest of the memory."""
        (memory,) = self._memories[output]
        cosines, _ = memory.search(vectors.reshape(-1, vectors.shape[-1]))
        # What is in the memory itself comes out as a tiny negative number, whose reciprocal would rule a mean.
        distances: NDArray[np.float64] = np.maximum(1 - cosines[:, 0].astype(np.float64), 0) / 2
        return distances.reshape(len(vectors), -1)


def aggregated(values: NDArray[np.float64], side: int) -> Maps:
    """Spread values [B, W] of all windows of side × side patches over the patches: [B, g, g].

    A patch gets the harmonic mean of the windows that cover it, 0 where one of them is 0 (WinCLIP, equation 5).
    """
    positions = math.isqrt(values.shape[1])
    assert positions**2 == values.shape[1]
    grid = positions + side - 1
    with np.errstate(divide="ignore"):
        inverse = 1 / values.reshape(-1, positions, positions)  # [B, g - side + 1, g - side + 1]
    total, count = np.zeros((len(values), grid, grid)), np.zeros((grid, grid))
    for row in range(side):
        for column in range(side):
            total[:, row : row + positions, column : column + positions] += inverse
            count[row : row + positions, column : column + positions] += 1
    return count / total


def _harmonic_mean(maps: Sequence[Maps]) -> Maps:
    """Return the harmonic mean of maps [B, g, g], 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        inverse: Maps = np.add.reduce([1 / one for one in maps])
    return len(maps) / inverse

"""Variance Vigilance Vanguard (Baugh et al., VAND challenge 2023): tiles of an image's objects against words.

images, which are tiles of components (see `ComponentWise`) → CLIP: probability of the abnormal class, one per tile;
CLIPSeg: logits of the localising prompts [K, S, S] → their harmonic mean, times the tile's probability
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.decode import recipe
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import GraphRequest, run_in_parts
from zsad.engine.text.vectors import abnormal_probability

from .method import Group, Place, Scored
from .text_guided import TextGuided, TextSettings, chosen_prompts, tower_requests

TOWER, SEGMENTER = "clip", "clipseg"  # the networks by the names that a preset gives them
PROMPTS = 6  # of the decoder at once: more leave the caches of a CPU
LOWEST = -80.0  # of logits: their exponential stays finite in single precision, and so does a sum of many


class Settings(TextSettings):
    """What the report leaves open of scores and maps; the rest is in [stages]."""

    tau: float = Field(0.01, gt=0, description="above 0")  # what mean cosines are divided by
    deduplicate: bool = Field(False, description="true or false")  # localising prompts that are there twice count once

    @property
    def prompt_name(self) -> str:
        return self.prompts or "vvv"


class VVV(TextGuided):
    """See `Method`."""

    Settings = Settings
    takes_references = False
    rescores = False
    map_range = (0.0, 1.0)
    text_mean = "unit_norenorm"

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        super().__init__(config, place, config.settings.prompt_name, tower=TOWER)
        self._settings = config.settings
        segmenter = place.networks[SEGMENTER]
        self._image_graph, self._decoder = segmenter.graphs["clipseg_image"], segmenter.graphs["clipseg_decoder"]
        self._segmenter_recipe = recipe(segmenter.preprocessing, segmenter.spec.side, config.settings.resize)
        self.inputs = [self._recipe, self._segmenter_recipe]
        self._conditions: Any = None  # [K, D] of the localising prompts, where the decoder reads them
        self._counts = np.zeros(0, np.float32)  # how often each counts

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        assert isinstance(config.settings, Settings)
        if set(config.networks) != {TOWER, SEGMENTER}:
            raise ConfigError(f"method vvv takes [networks.{TOWER}] and [networks.{SEGMENTER}], not others")
        if not chosen_prompts(config.settings.prompt_name).localising:
            raise ConfigError("method vvv needs localising texts; add them to the file of --prompts")
        return [
            *tower_requests(config, ("embedding",), TOWER),
            GraphRequest(SEGMENTER, "clipseg_image", ("activations",)),
            GraphRequest(SEGMENTER, "clipseg_decoder", ("logits",), rows=PROMPTS),
            GraphRequest(SEGMENTER, "text", ("embedding",), on_demand=True),
        ]

    def start(self, group: Group) -> None:
        super().start(group)
        prompts, self._counts = counted_prompts(self._prompts.localising, self._settings.deduplicate)
        self._conditions = self._place.arrays.send(self._place.text.of(SEGMENTER, prompts))

    def take(self, batch: Batch) -> Iterator[Scored]:
        scores = np.concatenate(
            [abnormal_probability(out["embedding"], self._classes, self._settings.tau) for _, out in self._run(batch)]
        )  # [B]
        images = {"images": batch.inputs[self._segmenter_recipe]}
        for part, outputs in run_in_parts(self._image_graph, images):
            for row, index in enumerate(batch.indices[part]):
                score = float(scores[part][row])
                yield Scored(index, score, np.float32(score) * self._map(outputs["activations"][row]))

    def _map(self, activations: Any) -> NDArray[np.float32]:
        """Return the harmonic mean over the prompts, [S, S], for an image's activations [3, T, C]."""
        inputs = {"activations": activations, "conditions": self._conditions}
        parts = run_in_parts(self._decoder, inputs)
        logits = np.concatenate([self._place.arrays.fetch(outputs["logits"]) for _, outputs in parts])  # [K, S, S]
        return harmonic_mean(logits, self._counts)


def counted_prompts(prompts: Sequence[str], deduplicate: bool) -> tuple[list[str], NDArray[np.float32]]:
    """Return each of some prompts once, and how often it counts [K], so that no network runs over it twice."""
    counts = Counter(prompts)
    return list(counts), np.array([1 if deduplicate else count for count in counts.values()], np.float32)


def harmonic_mean(logits: NDArray[Any], counts: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return the harmonic mean [...] of the probabilities of logits [K, ...]; counts: of each of the K, [K].

    The reciprocal of a sigmoid is 1 + exp(-logit): K / Σ (1 + exp(-logit)), in single precision.
    """
    if counts is None:
        counts = np.ones(len(logits), np.float32)
    total = np.zeros(logits.shape[1:], np.float32)
    for logit, count in zip(logits, counts, strict=True):  # one at a time: as much memory as one of them
        inverse = np.exp(-np.maximum(logit, np.float32(LOWEST), dtype=np.float32))
        inverse += 1
        inverse *= count
        total += inverse
    means: NDArray[np.float32] = np.float32(counts.sum()) / total
    return means

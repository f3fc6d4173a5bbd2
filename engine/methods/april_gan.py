"""APRIL-GAN (Chen et al., 2023): tokens through trained linear heads against words, and against known-good images.

batch → network: embedding [B, D], tokens of several blocks [B, L, P, C] → heads [C → D] → logits [L, g, g], enlarged
→ probabilities of the abnormal class, summed over the blocks: maps [S, S]
references → memories of each block's tokens → cosine distances to the nearest, enlarged and added
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from zsad.engine.config import Config, ConfigError, rising
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import GraphRequest
from zsad.engine.scores.image_scores import min_max
from zsad.engine.scores.maps import enlarged
from zsad.engine.text.vectors import abnormal_probability, sigmoid
from zsad.export.checkpoints import find_checkpoint
from zsad.export.linear_heads import read_linear_heads

from .method import Place, Scored
from .text_guided import TextGuided, TextSettings, chosen_prompts, tower_requests


class Settings(TextSettings):
    """The trained part, and how image scores come about with references."""

    head: str = Field(description="a name of the manifest or a file of trained linear layers")
    # What cosines are divided by: in the published code this, whatever the checkpoint has learned.
    tau: float = Field(0.01, gt=0, description="above 0")
    align_corners: bool = Field(True, description="true or false")  # of maps that are enlarged
    # Lowest and highest map maximum, saved from an earlier run: then images are scored one by one.
    score_range: Annotated[tuple[float, float], AfterValidator(rising)] | None = Field(
        None, description="two numbers, low < high"
    )
    # What map maxima are brought to [0, 1] by: the category's own, the score_range, or all that maps can hold, so that
    # scores depend on no other image either. None: score_range where there is one, else class_batch.
    minmax_scope: Literal["class_batch", "calibrated", "off"] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (*super().files, self.head)

    @property
    def prompt_name(self) -> str:
        return self.prompts or "april35"

    @property
    def scope(self) -> str:
        """The minmax_scope in force."""
        return self.minmax_scope or ("class_batch" if self.score_range is None else "calibrated")


class AprilGAN(TextGuided):
    """See `Method`."""

    Settings = Settings
    text_mean = "unit"

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        super().__init__(config, place, config.settings.prompt_name, ("tokens",))
        self._settings = config.settings
        layers, _, channels = self._graph.outputs["tokens"].shape
        (width,) = self._graph.outputs["embedding"].shape
        file, self._head_sha256 = find_checkpoint(self._settings.head)
        self._heads = read_linear_heads(file, layers, channels, width)
        self.rescores = self._few_shot and self._settings.scope == "class_batch"
        # Of each block a probability, and with references a cosine distance: above 1 only for opposed tokens.
        self.map_range = (0.0, float(layers * (2 if self._few_shot else 1)))
        self._score_range = self._settings.score_range or self.map_range

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        assert isinstance(config.settings, Settings)
        for name, spec in config.networks.items():
            if not spec.taps:
                raise ConfigError(f"[networks.{name}] taps must be block numbers, counted from 0, not {spec.taps!r}")
        # Mistakes are found before weights are fetched.
        chosen_prompts(config.settings.prompt_name)
        scope, score_range = config.settings.scope, config.settings.score_range
        if config.components and config.few_shot and scope == "class_batch":
            raise ConfigError(
                "--components: with known-good images scores depend on other images; leave it out, or set "
                '[april_gan] minmax_scope = "off" or a score_range'
            )
        if (scope == "calibrated") != (score_range is not None):
            takes = "a score_range = [low, high]" if score_range is None else "no score_range; leave it out"
            raise ConfigError(f"[april_gan] minmax_scope {scope!r} takes {takes}")
        return tower_requests(config, ("embedding", "tokens"))

    def record(self) -> dict[str, Any]:
        return {**super().record(), "head_sha256": self._head_sha256}

    def take(self, batch: Batch) -> Iterator[Scored]:
        for part, outputs in self._run(batch):
            probabilities = abnormal_probability(outputs["embedding"], self._classes, self._settings.tau)  # [B]
            for index, probability, tokens in zip(
                batch.indices[part], probabilities.tolist(), outputs["tokens"], strict=True
            ):
                yield self._scored(index, probability, tokens)

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        facts = chain.from_iterable(np.asarray(image.facts).tolist() for image in scored)
        values = np.fromiter(facts, np.float64).reshape(-1, 2)  # [N, 2]: probability, map maximum
        scores: NDArray[np.float64] = (values[:, 0] + min_max(values[:, 1])) / 2
        return scores

    def _scored(self, index: int, probability: float, tokens: NDArray[np.float32]) -> Scored:
        """Score one image by its tokens [L, P, C]."""
        side = math.isqrt(tokens.shape[1])
        pixels = np.zeros((self._size, self._size), np.float32)
        for layer, (weight, bias) in zip(tokens, self._heads, strict=True):
            pixels += self._word_map(layer @ weight.T + bias, side)
        for layer, memory in zip(tokens, self._memories.get("tokens", ()), strict=bool(self._memories)):
            cosines, _ = memory.search(layer)  # [P, 1]
            pixels += self._enlarged(np.maximum(1 - cosines[:, 0], 0), side)
        if not self._memories:
            return Scored(index, probability, pixels)
        highest = float(pixels.max())
        if self.rescores:
            return Scored(index, (probability + highest) / 2, pixels, np.array([probability, highest]))
        low, high = self._score_range
        return Scored(index, (probability + min(max((highest - low) / (high - low), 0.0), 1.0)) / 2, pixels)

    def _word_map(self, features: NDArray[np.float32], side: int) -> NDArray[np.float32]:
        """Return the abnormal class's probability [S, S] from features [P, D]; it is the logits that are enlarged."""
        units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        cosines = units @ self._classes.T  # [P, 2]
        # The softmax over two classes depends on the difference of their logits alone, and enlarging is linear.
        return sigmoid(self._enlarged((cosines[:, 1] - cosines[:, 0]) / self._settings.tau, side))

    def _enlarged(self, values: NDArray[Any], side: int) -> NDArray[np.float32]:
        """Enlarge values [P] of a grid to [S, S]."""
        return enlarged(values.reshape(side, side), self._size, self._settings.align_corners)

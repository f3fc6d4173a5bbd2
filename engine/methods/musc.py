"""MuSc (Li et al., ICLR 2024): the images of a group are scored against each other, without anything else.

batch → networks: tokens [B, L, P, C], embedding [B, D] → kept for the whole group [n, …] → mutual scoring: patch scores
[n, P] → maps [g, g] of one network, raw image scores of the same or another one; for a whole category RsCIN
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from zsad.engine.config import Config, ConfigError, Precision, Table, rising
from zsad.engine.images.decode import recipe
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import Graph, GraphRequest, TensorSpec, run_in_parts
from zsad.engine.scores.image_scores import ScoreRule, image_scores, min_max, rscin
from zsad.kernels.mutual_scoring import MutualScoring

from .method import Group, Place, Progress, Scored

log = logging.getLogger("zsad")


def _odd(degree: int) -> int:
    if degree % 2 == 0:
        raise ValueError(degree)
    return degree


Degree = Annotated[int, Field(ge=1), AfterValidator(_odd)]
Bound = Annotated[float, Field(ge=0)]


class Settings(Table):
    """What mutual scoring compares, and how patch scores become image scores."""

    degrees: tuple[Degree, ...] = Field(min_length=1, description="odd numbers")
    interval: Annotated[tuple[Bound, Bound], AfterValidator(rising)] = Field(
        description="two finite bounds, 0 <= low < high"
    )
    map_network: str = Field(description="the name of one of the networks")
    image_network: str = Field(description="the name of one of the networks")
    image_rule: ScoreRule = "map_maximum"
    rscin: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="neighbour counts")  # none: no rescoring
    precision: Precision = "auto"  # of the products; auto: fp32 on a CPU, fp16 on a GPU


@dataclass
class _Kept:
    """What one network has given for a group, wherever that lies."""

    tokens: Any  # [n, L, P, C]
    embeddings: Any  # [n, D], or None


class MuSc:
    """See `Method`."""

    Settings = Settings
    takes_references = False
    compares = rescores = True
    map_range = None

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        self._settings, self._place = config.settings, place
        self._recipes = {
            name: recipe(network.preprocessing, network.spec.side) for name, network in place.networks.items()
        }
        self.inputs = list(dict.fromkeys(self._recipes.values()))
        self._graphs = {name: network.graphs["image"] for name, network in place.networks.items()}
        try:
            self._scorings = {name: self._scoring(graph) for name, graph in self._graphs.items()}
        except ValueError as error:  # a precision or a grid that this installation or device cannot do
            raise ConfigError(str(error)) from None
        self._group = ExitStack()
        self._kept: dict[str, _Kept] = {}
        self._members: list[int] = []
        self._memory_left = 0

    @staticmethod
    def graph_requests(config: Config) -> list[GraphRequest]:
        assert isinstance(config.settings, Settings)
        settings = config.settings
        for key in ("map_network", "image_network"):
            if getattr(settings, key) not in config.networks:
                names = ", ".join(config.networks)
                raise ConfigError(f"[musc] {key} must be one of {names}, not {getattr(settings, key)!r}")
        for name, spec in config.networks.items():
            if not spec.taps:
                raise ConfigError(f"[networks.{name}] taps must be block numbers, counted from 0, not {spec.taps!r}")
        with_embedding = settings.image_network if settings.rscin else None
        return [
            GraphRequest(name, "image", ("tokens", "embedding") if name == with_embedding else ("tokens",))
            for name in config.networks
        ]

    def record(self) -> dict[str, Any]:
        precisions = {scoring.precision for scoring in self._scorings.values()}
        return {**self._settings.model_dump(), "precision": precisions.pop()}

    def _scoring(self, graph: Graph) -> MutualScoring:
        layers, patches, channels = graph.outputs["tokens"].shape
        return MutualScoring(
            _grid(patches),
            layers,
            channels,
            self._settings.degrees,
            self._settings.interval,
            self._settings.precision,
            self._place.arrays.devices,
        )

    def needed(self, images: int, references: int) -> int:
        return max(scoring.needed(images) for scoring in self._scorings.values())

    def start(self, group: Group) -> None:
        self._group.close()
        self._members = []
        images = group.images
        arrays = self._place.arrays
        size = sum(_bytes(graph.outputs["tokens"], images) for graph in self._graphs.values())
        kept, self._memory_left = arrays.share(size, arrays.limit(), self.needed(images, 0))
        if not kept:
            log.debug("the tokens of %d images are too many to stay resident and are read in chunks", images)
        for name, graph in self._graphs.items():
            rooms = {
                output: self._group.enter_context(
                    arrays.room((images, *spec.shape), spec.dtype, kept or output == "embedding")
                )
                for output, spec in graph.outputs.items()
            }
            self._kept[name] = _Kept(rooms["tokens"], rooms.get("embedding"))

    def take(self, batch: Batch) -> Iterable[Scored]:
        first = len(self._members)
        for name, graph in self._graphs.items():
            kept = self._kept[name]
            for part, outputs in run_in_parts(graph, {"images": batch.inputs[self._recipes[name]]}):
                rows = slice(first + part.start, first + part.stop)
                self._place.arrays.put(outputs["tokens"], kept.tokens[rows])
                if kept.embeddings is not None:
                    self._place.arrays.put(outputs["embedding"], kept.embeddings[rows])
        self._members += batch.indices
        return ()

    def finish(self, progress: Progress) -> Iterator[Scored]:
        settings, images = self._settings, len(self._members)
        try:
            embeddings = self._kept[settings.image_network].embeddings
            self._place.arrays.complete()
            vectors = None if embeddings is None else self._place.arrays.fetch(embeddings[:images])  # [n, D]
            scores = {
                name: scoring.scores(
                    self._kept[name].tokens[:images],
                    self._memory_left,
                    progress=partial(progress, f"scoring {name}"),
                    timings=self._place.timings,
                )
                for name, scoring in self._scorings.items()
            }  # [n, P] each
        finally:
            self._kept.clear()
            self._group.close()
        image_network = settings.image_network
        raw = image_scores(
            scores[image_network],
            _grid(scores[image_network].shape[1]),
            settings.image_rule,
            self._place.networks[image_network].spec.side,
        )  # [n]
        maps = scores[settings.map_network]
        for row, index in enumerate(self._members):
            vector = None if vectors is None else vectors[row]
            yield Scored(index, float(raw[row]), maps[row].reshape(_grid(maps.shape[1])), vector)

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        scored = list(scored)
        raw = np.array([image.raw_score for image in scored])  # [N]
        if not self._settings.rscin:
            return min_max(raw)
        return rscin(raw, np.array([image.facts for image in scored]), self._settings.rscin)

    def bounds(self) -> None:
        return None


def _grid(patches: int) -> tuple[int, int]:
    """Return rows and columns of the patch grid of a square input."""
    side = math.isqrt(patches)
    assert side * side == patches
    return side, side


def _bytes(spec: TensorSpec, images: int) -> int:
    return images * math.prod(spec.shape) * spec.dtype.itemsize

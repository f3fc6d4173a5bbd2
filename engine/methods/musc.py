"""MuSc (Li et al., ICLR 2024): the images of a group are scored against each other, without anything else.

batch → networks: tokens [B, L, P, C], embedding [B, D] → kept for the whole group [n, …] → mutual scoring: patch scores
[n, P] → maps [g, g] of one network, raw image scores of the same or another one; for a whole category RsCIN

Scored by clean references, mutual scoring hands back every patch's distances to every image, and the group says by
itself which images these are averaged over (scores/clean_references.py), for each network by itself: maps are of the
one, image scores and what they are rescored by of the other.

Known-good images are compared with beside the others and have no scores. Their tokens lie behind those of the group,
for all groups of a category. Where they are enough for bounds of image scores they are scored all the same, each as one
more image, and nothing but the bounds is told of that. Scores of few images are not relative to these but to known-good
ones (scores/known_good.py).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from zsad.engine.config import Config, ConfigError, Precision, Share, Table, rising
from zsad.engine.images.decode import recipe
from zsad.engine.images.loader import Batch
from zsad.engine.networks.network import Graph, GraphRequest, TensorSpec, run_in_parts
from zsad.engine.scores.clean_references import CleanScores, Rule, clean_scores, fitting_blend, salient_features
from zsad.engine.scores.conformal import FALSE_ALARMS
from zsad.engine.scores.image_scores import FEW_IMAGES, ScoreRule, image_scores, min_max, rscin, rscin_beside
from zsad.engine.scores.known_good import HALF_UNLIKE, Calibration, calibration_counts, known_bounds, measured_count
from zsad.engine.scores.verdicts import Bounds
from zsad.kernels.machine import stopwatch
from zsad.kernels.minima import ReturnMinima
from zsad.kernels.mutual_scoring import MutualScoring, square_grid
from zsad.kernels.snamd import similarity_pooled

from .method import Group, Place, Progress, Scored

log = logging.getLogger("zsad")


def _odd(degree: int) -> int:
    if degree % 2 == 0:
        raise ValueError(degree)
    return degree


Degree = Annotated[int, Field(ge=1), AfterValidator(_odd)]
Bound = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(Table):
    """What mutual scoring compares, and how patch scores become image scores."""

    degrees: tuple[Degree, ...] = Field(min_length=1, description="odd numbers")
    interval: Annotated[tuple[Bound, Bound], AfterValidator(rising)] = Field(
        description="two finite bounds, 0 <= low < high"
    )
    map_network: str = Field(description="the name of one of the networks")
    image_network: str = Field(description="the name of one of the networks")
    image_rule: ScoreRule = "map_maximum"
    rscin: tuple[Count, ...] = Field((), description="neighbour counts")  # none: no rescoring
    pooling: Literal["lnamd", "snamd"] = "lnamd"  # snamd: by similarity (MuSc-V2), all degrees in one comparison
    # With fixed cameras: rows and columns of patches around a patch's own place that it is compared with; None: all.
    position_window: Annotated[int, Field(ge=0)] | None = Field(None, description="a whole number from 0")
    precision: Precision = "auto"  # of the products; auto: fp32 on a CPU, fp16 on a GPU
    # Which images patches are compared with: all others, those that look normal ("clean"), or both ("blended"). The
    # latter two have an image rule of their own and rescore by the most salient patch instead of the embedding.
    references: Literal["all", "blended", "clean"] = "all"
    # Of clean references in the image scores, where these are blended; None: by which share of defects is expected.
    image_blend: Share | None = Field(None, description="a number in [0, 1]")
    map_blend: Share = 0.5  # the same of maps
    clean_share: Share = 0.5  # of the images
    clean_rounds: Count = Field(3, description="a whole number from 1")
    salient_rscin: tuple[Count, ...] = Field((1, 7), min_length=1, description="neighbour counts, at least one")
    # The share of good images that may be rejected, where known-good images give the bounds.
    false_alarms: float = Field(FALSE_ALARMS, gt=0, lt=1, description="a number between 0 and 1")

    def clean_rule(self, expected_defects: float | None) -> Rule | None:
        """Return how clean references are chosen; None where all images are references."""
        if self.references == "all":
            return None
        image_blend = fitting_blend(expected_defects) if self.image_blend is None else self.image_blend
        blends = (1.0, 1.0) if self.references == "clean" else (image_blend, self.map_blend)
        return Rule(self.interval, self.clean_share, self.clean_rounds, *blends)


@dataclass
class _Kept:
    """What one network has given for the largest group of a category and behind it for references, wherever it lies."""

    tokens: Any  # [n + k, L, P, C]
    embeddings: Any  # [n + k, D], or None


@dataclass(frozen=True)
class _Judged:
    """What comes of a group's images."""

    maps: NDArray[np.float32]  # [n, P]
    raw_scores: NDArray[np.float64]  # [n]
    features: NDArray[np.float64] | None  # [n, D] of the most salient patches, where they are rescored by these


@dataclass(frozen=True)
class _Known:
    """What comes of known-good images that are scored beside a group's."""

    raw_scores: NDArray[np.float64]  # [m]
    vectors: NDArray[Any] | None  # [m, D] that they are rescored by


class MuSc:
    """See `Method`."""

    Settings = Settings
    takes_references = True
    compares = True

    def __init__(self, config: Config, place: Place) -> None:
        assert isinstance(config.settings, Settings)
        self._settings, self._place = config.settings, place
        self._rule = config.settings.clean_rule(config.expected_defects)
        self._minima: ReturnMinima = False if self._rule is None else "smallest degree"
        self._recipes = {
            name: recipe(network.preprocessing, network.spec.side) for name, network in place.networks.items()
        }
        self.inputs = list(dict.fromkeys(self._recipes.values()))
        self._graphs = {name: network.graphs["image"] for name, network in place.networks.items()}
        try:
            self._scorings = {name: self._scoring(graph) for name, graph in self._graphs.items()}
        except ValueError as error:  # a precision or a grid that this installation or device cannot do
            raise ConfigError(str(error)) from None
        self._category = ExitStack()
        self._kept: dict[str, _Kept] = {}
        self._group = Group(0, "")
        self._members: list[int] = []
        self._first = self._end = 0  # rows of what is kept that are the group's
        self._references = 0  # behind them
        self._measured = 0  # of these, that are scored as the group's images are
        self._scored = 0  # images of the category
        self.calibration: Calibration | None = None  # of a category of few images, once it has ended
        self._known: list[_Known] = []  # of each group, where known-good images give bounds
        self._bounds: Bounds | None = None
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
        with_embedding = settings.image_network if settings.rscin and settings.references == "all" else None
        return [
            GraphRequest(name, "image", ("tokens", "embedding") if name == with_embedding else ("tokens",))
            for name in config.networks
        ]

    def record(self) -> dict[str, Any]:
        precisions = {scoring.precision for scoring in self._scorings.values()}
        rule = self._rule
        blends = {} if rule is None else {"image_blend": rule.image_blend, "map_blend": rule.map_blend}
        return {**self._settings.model_dump(), **blends, "precision": precisions.pop()}

    def _scoring(self, graph: Graph) -> MutualScoring:
        layers, patches, channels = graph.outputs["tokens"].shape
        return MutualScoring(
            square_grid(patches),
            layers,
            channels,
            (1,) if self._settings.pooling == "snamd" else self._settings.degrees,
            self._settings.interval,
            self._settings.precision,
            self._place.arrays.devices,
            window=self._settings.position_window,
        )

    @property
    def cells(self) -> int:
        return square_grid(self._graphs[self._settings.map_network].outputs["tokens"].shape[1])[0]

    @property
    def map_range(self) -> tuple[float, float] | None:
        """See `Method`; a few images are not relative to each other where there are known-good ones."""
        return None if self.calibration is None else self.calibration.map_range

    @property
    def rescores(self) -> bool:
        return self.calibration is None

    def needed(self, images: int, references: int) -> int:
        measured = measured_count(references, self._settings.false_alarms)
        counts = [(images + measured, references - measured)]
        counts += [calibration_counts(references)] if references > 1 else []
        return max(scoring.needed(*count, self._minima) for scoring in self._scorings.values() for count in counts)

    def start(self, group: Group) -> None:
        self._members, self._group = [], group
        if group.first:
            self._category.close()
            if group.images:  # else all groups have ended in an earlier run
                self._open(group)
            self._end, self.calibration = group.images, Calibration.of(group.earlier)
            self._scored = sum(int(kept["scored"]) for kept in group.earlier)
            self._known = [_Known(k["known"], k.get("vectors")) for k in group.earlier if "known" in k]
            self._bounds = None
            self._references = 0
            for batch in group.references:
                self._keep(batch, self._end + self._references)
                self._references += len(batch.indices)
            # Of tiles no count of images follows, which is what bounds promise something of.
            judged = group.whole is None
            self._measured = measured_count(self._references, self._settings.false_alarms) if judged else 0
        self._first = self._end - group.images

    def _open(self, group: Group) -> None:
        """Make room for the groups of a category and for its references."""
        images, arrays = group.images + group.reference_count, self._place.arrays
        size = sum(_bytes(graph.outputs["tokens"], images) for graph in self._graphs.values())
        kept, self._memory_left = arrays.share(size, arrays.limit(), self.needed(group.images, group.reference_count))
        if not kept:
            log.debug("the tokens of %d images are too many to stay resident and are read in chunks", images)
        for name, graph in self._graphs.items():
            rooms = {
                output: self._category.enter_context(
                    arrays.room((images, *spec.shape), spec.dtype, kept or output == "embedding")
                )
                for output, spec in graph.outputs.items()
            }
            self._kept[name] = _Kept(rooms["tokens"], rooms.get("embedding"))

    def take(self, batch: Batch) -> Iterable[Scored]:
        self._keep(batch, self._first + len(self._members))
        self._members += batch.indices
        return ()

    def _keep(self, batch: Batch, first: int) -> None:
        """Run the networks over a batch and keep what they give, from this row on."""
        for name, graph in self._graphs.items():
            kept = self._kept[name]
            for part, outputs in run_in_parts(graph, {"images": batch.inputs[self._recipes[name]]}):
                rows = slice(first + part.start, first + part.stop)
                self._place.arrays.put(self._pooled(outputs["tokens"]), kept.tokens[rows])
                if kept.embeddings is not None:
                    self._place.arrays.put(outputs["embedding"], kept.embeddings[rows])

    def _pooled(self, tokens: Any) -> Any:
        """Return tokens [B, L, P, C] as mutual scoring takes them; `kernels/snamd.py` says what it does to SNAMD's."""
        if self._settings.pooling == "lnamd":
            return tokens
        arrays = self._place.arrays
        values = arrays.fetch(tokens)
        pooled = similarity_pooled(values, square_grid(values.shape[2]), self._settings.degrees)
        return arrays.send(pooled.astype(values.dtype, copy=False))

    def finish(self, progress: Progress) -> Iterator[Scored]:
        images, measured = len(self._members), self._measured
        self._scored += images
        try:
            embeddings = self._kept[self._settings.image_network].embeddings
            self._place.arrays.complete()
            vectors = None
            if embeddings is not None:
                rows = (self._first, images), (self._end, measured)
                parts = [self._place.arrays.fetch(embeddings[row : row + count]) for row, count in rows if count]
                vectors = np.concatenate(parts)  # [n + m, D]
            self._close_ranks()
            last, stage = self._first + images + self._references, "scoring {}".format
            judged = self._judged(self._first, last, self._references - measured, self._rule, stage, progress)
            images_of_category = self._scored if self._group.whole is None else self._group.whole
            if self._last_group and self._references and images_of_category < FEW_IMAGES:
                self.calibration = self._calibrated(progress)
        finally:
            if self._last_group:
                self._kept.clear()
                self._category.close()
        vectors = vectors if judged.features is None else judged.features
        if measured:
            self._known.append(_Known(judged.raw_scores[images:], None if vectors is None else vectors[images:]))
        grid = square_grid(judged.maps.shape[1])
        for row, index in enumerate(self._members):
            vector = None if vectors is None else vectors[row]
            yield Scored(index, float(judged.raw_scores[row]), judged.maps[row].reshape(grid), vector)

    def kept(self) -> dict[str, NDArray[Any]]:
        kept: dict[str, NDArray[Any]] = {"scored": np.array(len(self._members))}
        if self.calibration is not None:
            kept["calibration"] = self.calibration.kept()
        if self._measured and self._known:
            kept["known"] = self._known[-1].raw_scores
            if self._known[-1].vectors is not None:
                kept["vectors"] = self._known[-1].vectors
        return kept

    @property
    def _last_group(self) -> bool:
        return self._group.number == self._group.groups - 1

    def _close_ranks(self) -> None:
        """Move the tokens of the group next to the references, where images that have none left a gap."""
        first, images = self._first, len(self._members)
        gap = self._end - first - images
        if not gap or not self._references:
            return
        for kept in self._kept.values():
            for row in reversed(range(first, first + images)):
                self._place.arrays.put(kept.tokens[row], kept.tokens[row + gap])
        self._place.arrays.complete()
        self._first += gap

    def _judged(
        self,
        first: int,
        last: int,
        references: int,
        rule: Rule | None,
        stage: Callable[[str], str],
        progress: Progress,
    ) -> _Judged:
        """Score kept rows, of which the last ones are references."""
        score = {
            name: partial(
                scoring.scores,
                self._kept[name].tokens[first:last],
                self._memory_left,
                progress=partial(progress, stage(name)),
                timings=self._place.timings,
                references=references,
            )
            for name, scoring in self._scorings.items()
        }
        by_map, by_image = self._settings.map_network, self._settings.image_network
        if rule is None:
            scores = {name: call() for name, call in score.items()}  # [n, P] each
            return _Judged(scores[by_map], self._raw_scores(scores[by_image]), None)
        known = self._references if self._measured else None
        clean = {name: self._clean_scores(rule, call, known) for name, call in score.items()}
        with stopwatch(self._place.timings, "references"):
            patches = enumerate(clean[by_image].salient, first)
            tokens = [self._place.arrays.fetch(self._kept[by_image].tokens[row, :, p]) for row, p in patches]  # [L, C]
            maps = clean[by_map].patch_maps.astype(np.float32)
            return _Judged(maps, clean[by_image].image_scores, salient_features(np.stack(tokens)))

    def _clean_scores(self, rule: Rule, score: Callable[..., Any], known: int | None) -> CleanScores:
        """Score by clean references; the minima of one network go before the next one's come. known: as there."""
        _, minima = score(return_minima=self._minima)
        with stopwatch(self._place.timings, "references"):
            return clean_scores(minima, rule, self._place.arrays.devices, known)

    def _raw_scores(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the raw scores [n] of images with these patch scores [n, P]."""
        size = self._place.networks[self._settings.image_network].spec.side
        return image_scores(scores, square_grid(scores.shape[1]), self._settings.image_rule, size)

    def _calibrated(self, progress: Progress) -> Calibration:
        """Score references by each other."""
        calibration = None
        if self._references > 1:
            _, others = calibration_counts(self._references)
            stage = "scoring known-good images by {}".format
            rule = None if self._rule is None else replace(self._rule, rounds=0)  # all of them are clean
            judged = self._judged(self._end, self._end + self._references, others, rule, stage, progress)
            calibration = Calibration.measured(judged.raw_scores, judged.maps)
        if calibration is not None:
            return calibration
        patches, _ = self._graphs[self._settings.image_network].outputs["tokens"].shape[1:]
        unlike = np.full((1, patches), HALF_UNLIKE, np.float32)
        raw = self._raw_scores(unlike)[0] if self._rule is None else 2 * HALF_UNLIKE  # see CleanScores.image_scores
        return Calibration.unlike(float(raw))

    def image_scores(self, scored: Iterable[Scored]) -> NDArray[np.float64]:
        scored = list(scored)
        raw = np.array([image.raw_score for image in scored])  # [N]
        if self.calibration is not None:  # few images say as little when they are rescored by each other
            if self._known:
                beside = [self.calibration.scores(known.raw_scores) for known in self._known]
                usual = self.calibration.bounds()
                region = None if usual is None else usual.region
                self._bounds = replace(known_bounds(beside, self._settings.false_alarms), region=region)
            return self.calibration.scores(raw)
        neighbours = self._settings.rscin
        if self._rule is not None:  # the nearest seven of a few images are nearly all of them
            neighbours = self._settings.salient_rscin if len(scored) >= FEW_IMAGES else ()
        vectors = np.array([image.facts for image in scored]) if neighbours else None
        if self._known and len(scored) >= FEW_IMAGES:
            beside = [self._beside(raw, vectors, known, neighbours) for known in self._known]
            self._bounds = known_bounds(beside, self._settings.false_alarms)
        return min_max(raw) if vectors is None else rscin(raw, vectors, neighbours)

    @staticmethod
    def _beside(
        raw: NDArray[np.float64], vectors: NDArray[Any] | None, known: _Known, neighbours: Sequence[int]
    ) -> NDArray[np.float64]:
        """Return the scores [m] of known-good images on the scale of the images' own."""
        if vectors is None or known.vectors is None:
            return min_max(known.raw_scores, (float(raw.min()), float(raw.max())))
        return rscin_beside(known.raw_scores, known.vectors, raw, vectors, neighbours)

    def bounds(self) -> Bounds | None:
        if self._bounds is not None or self.calibration is None:
            return self._bounds
        return self.calibration.bounds()

    def note(self) -> str | None:
        return None if self.calibration is None else self.calibration.note()


def _bytes(spec: TensorSpec, images: int) -> int:
    return images * math.prod(spec.shape) * spec.dtype.itemsize

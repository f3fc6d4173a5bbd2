"""The data flow of `zsad-infer`, in one place.

data/<category>/… → images: scan, decode, resize, normalise [B, 3, S, S] → backbone: tokens [B, L, P, C], embedding
[B, D] → kernels: patch scores [N, P] → rescoring: image scores [N] → postprocess and results: maps [h, w], files

A placement says where this happens: in host memory, or on a device up to the patch scores.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zsad.kernels.machine import stopwatch

from .config import Config
from .images.decode import ImageError, Preprocessing
from .images.folders import Category, InputImage
from .networks.runtime import Backbone, run_in_parts
from .placement import Placement
from .scores.image_scores import image_scores, min_max, rscin

log = logging.getLogger("zsad")

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # stage, done, all


@dataclass
class Stages:
    """Wall-clock seconds per stage; stages of one run do not overlap, so they add up to the run."""

    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, stage: str) -> AbstractContextManager[None]:
        """Add what the context takes to a stage."""
        return stopwatch(self.seconds, stage)

    def table(self, total: float) -> str:
        rows = {**self.seconds, "other": max(0.0, total - sum(self.seconds.values())), "total": total}
        return "\n".join(f"  {name:<16}{value:9.2f} s {100 * value / total:6.1f} %" for name, value in rows.items())


@dataclass(frozen=True)
class Options:
    """What decides how fast a run goes, and nothing about its scores."""

    batch_size: int
    workers: int
    strict: bool


@dataclass(frozen=True)
class CategoryScores:
    """Scores of one category's readable images, in the order of `images`."""

    images: list[InputImage]
    grid: tuple[int, int]
    map_scores: NDArray[np.float64]  # [N, P] patch scores of the map backbone
    raw_scores: NDArray[np.float64]  # [N] before rescoring
    scores: NDArray[np.float64]  # [N] in [0, 1]
    groups: int
    failures: list[tuple[str, str]]  # path within the category, and why it has no score


class TooFewImagesError(ImageError):
    """A category in which no two images can be compared; `failures` are as in CategoryScores."""

    def __init__(self, message: str, failures: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.failures = failures


@dataclass
class _Group:
    """What one batch of images that are scored against each other has given."""

    indices: list[int]  # of the readable images, within the category
    patch_scores: dict[str, Array]  # backbone → [n, P]
    embeddings: dict[str, Array]  # backbone → [n, D]


@dataclass(frozen=True)
class Features:
    """What the backbones give for n images, where the placement keeps it."""

    tokens: dict[str, Any]  # backbone → [n, L, P, C]
    embeddings: dict[str, Any]  # backbone → [n, D], of those that have one


@dataclass
class _Batch:
    """Decoded images on their way to the backbones."""

    indices: list[int]
    images: list[Any]  # as the placement prepared them
    failures: list[tuple[int, ImageError]]


def score_category(
    category: Category,
    config: Config,
    backbones: Mapping[str, Backbone],
    placement: Placement,
    options: Options,
    stages: Stages,
    progress: Progress,
) -> CategoryScores:
    """Score all images of a category against each other; raises TooFewImagesError when fewer than two are readable.

    With a group size the images are dealt at random (by the seed, blind to names) into groups of about that size, and
    each is scored against its own group only. With `strict` the first unreadable image raises ImageError.
    """
    failures: dict[int, str] = {}
    dealt = deal_groups(len(category.images), config.group_size, config.seed)
    groups: list[_Group] = []
    seen = 0
    for number, members in enumerate(dealt):
        suffix = f" (group {number + 1} of {len(dealt)})" if len(dealt) > 1 else ""

        def report(stage: str, done: int, total: int, seen: int = seen, suffix: str = suffix) -> None:
            if stage == "backbone":
                progress(stage, seen + done, len(category.images))
            else:
                progress(stage + suffix, done, total)

        group = _score_group(category, members, config, backbones, placement, options, stages, report, failures)
        if group is not None:
            groups.append(group)
        seen += len(members)
    named_failures = [(str(category.images[index].relative), failures[index]) for index in sorted(failures)]
    if not groups:
        raise TooFewImagesError(
            f"{category.root}: fewer than two readable images; mutual scoring compares images with each other and "
            "needs at least two, and ten or more for useful scores",
            named_failures,
        )

    with stages.measure("rescoring"):
        indices = np.concatenate([group.indices for group in groups])
        order = np.argsort(indices)  # groups are random; results go back to the input's order

        def gathered(backbone: str) -> Array:  # [N, P]
            return np.concatenate([group.patch_scores[backbone] for group in groups])[order]

        chosen = config.image_score.backbone
        embeddings = [group.embeddings[chosen] for group in groups] if config.image_score.rscin else None
        raw, scores = rescore(
            config,
            gathered(chosen),
            backbones[chosen].grid,
            None if embeddings is None else np.concatenate(embeddings)[order],
        )
    return CategoryScores(
        images=[category.images[index] for index in indices[order]],
        grid=backbones[config.map.backbone].grid,
        map_scores=gathered(config.map.backbone).astype(np.float64),
        raw_scores=raw,
        scores=scores,
        groups=len(dealt),
        failures=named_failures,
    )


def rescore(
    config: Config,
    patch_scores: Array,  # [N, P] of the image scores' backbone
    grid: tuple[int, int],
    embeddings: Array | None,  # [N, D], for RsCIN
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the raw image scores [N] and those in [0, 1], rescored where the configuration asks for it."""
    raw = image_scores(patch_scores, grid, config.image_score.rule, config.image_size)
    return raw, min_max(raw) if embeddings is None else rscin(raw, embeddings, config.image_score.rscin)


def deal_groups(images: int, group_size: int | None, seed: int) -> list[list[int]]:
    """Deal image numbers at random into groups of nearly equal size, none above group_size (None: one group)."""
    if group_size is None or images <= group_size:
        return [list(range(images))]
    # Never a group of one: it would have nothing to be compared with.
    count = min(-(-images // group_size), images // 2)
    shuffled = np.random.default_rng(seed).permutation(images)
    return [sorted(part.tolist()) for part in np.array_split(shuffled, count)]


def check_memory(
    categories: Sequence[Category], config: Config, backbones: Mapping[str, Backbone], placement: Placement
) -> None:
    """Make sure, before any work, that every group can be scored within the limit; raises MemoryError."""
    for category in categories:
        dealt = deal_groups(len(category.images), config.group_size, config.seed)
        placement.share_memory(max(map(len, dealt)), backbones)


def _score_group(
    category: Category,
    members: Sequence[int],
    config: Config,
    backbones: Mapping[str, Backbone],
    placement: Placement,
    options: Options,
    stages: Stages,
    progress: Progress,
    failures: dict[int, str],
) -> _Group | None:
    """Run the backbones over one group and score it; None when fewer than two of its images are readable."""
    kept: list[int] = []
    done = 0
    resident, memory_left = placement.share_memory(len(members), backbones)
    if not resident:
        log.debug("the tokens of %d images are too many to stay resident and are read in blocks", len(members))
    with features_of(len(members), resident, backbones, placement) as features:
        for batch in _decoded_batches(category, members, placement, options, stages):
            failures.update((index, str(error)) for index, error in batch.failures)
            if batch.images:
                with stages.measure("backbone"), placement.network_inputs(batch.images) as inputs:
                    run_backbones(inputs, len(kept), features, config, backbones, placement)
            kept += batch.indices
            done += len(batch.indices) + len(batch.failures)
            progress("backbone", done, len(members))
        if len(kept) < 2:
            failures.update((index, "no other readable image to compare it with") for index in kept)
            return None
        with stages.measure("backbone"):
            embeddings = {name: placement.fetch(array[: len(kept)]) for name, array in features.embeddings.items()}
        patch_scores = {
            name: placement.patch_scores(
                features.tokens[name][: len(kept)],
                backbone.grid,
                memory_left,
                partial(progress, f"scoring {name}"),
                stages.seconds,
                lambda plan: log.debug("%s", plan.describe()),
            )
            for name, backbone in backbones.items()
        }
    return _Group(kept, patch_scores, embeddings)


@contextmanager
def features_of(
    images: int, resident: bool, backbones: Mapping[str, Backbone], placement: Placement
) -> Iterator[Features]:
    """Make room for what all backbones give for a number of images; leaving the context frees it."""
    with ExitStack() as stack:

        def store(shape: tuple[int, ...], dtype: DTypeLike, resident: bool) -> Any:
            return stack.enter_context(placement.store((images, *shape), dtype, resident))

        yield Features(
            {
                name: store((b.layers, math.prod(b.grid), b.channels), b.token_type, resident)
                for name, b in backbones.items()
            },
            {
                name: store((b.embedding_width,), np.float32, True)
                for name, b in backbones.items()
                if b.embedding_width is not None
            },
        )


def run_backbones(
    inputs: Mapping[Preprocessing, Any],  # [B, 3, S, S]
    row: int,
    features: Features,
    config: Config,
    backbones: Mapping[str, Backbone],
    placement: Placement,
) -> None:
    """Run all backbones over one batch and keep what they give from row `row` on."""
    for name, backbone in backbones.items():
        for part, tokens, embeddings in run_in_parts(backbone, inputs[config.backbones[name].preprocessing]):
            rows = slice(row + part.start, row + part.stop)
            placement.put(tokens, features.tokens[name][rows])
            if embeddings is not None:
                placement.put(embeddings, features.embeddings[name][rows])


def _decoded_batches(
    category: Category, members: Sequence[int], placement: Placement, options: Options, stages: Stages
) -> Iterator[_Batch]:
    """Decode images in a thread pool a little ahead of the backbone, and yield them in batches in order."""

    def load(index: int) -> Any:
        return placement.prepare(placement.decode(category.images[index].path))

    ahead = options.batch_size + options.workers
    with ThreadPoolExecutor(options.workers, "decode") as pool:
        queue = deque((index, pool.submit(load, index)) for index in members[:ahead])
        try:
            following = iter(members[ahead:])
            while queue:
                batch = _Batch([], [], [])
                with stages.measure("decode"):
                    while queue and len(batch.indices) < options.batch_size:
                        index, future = queue.popleft()
                        for upcoming in itertools.islice(following, 1):
                            queue.append((upcoming, pool.submit(load, upcoming)))
                        try:
                            batch.images.append(future.result())
                            batch.indices.append(index)
                        except ImageError as error:
                            if options.strict:
                                raise ImageError(f"{category.images[index].path}: {error}") from None
                            batch.failures.append((index, error))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

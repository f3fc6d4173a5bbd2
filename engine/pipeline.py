"""The data flow of `zsad-infer`, in one place.

data/<category>/… → images: scan, decode, resize, normalise [B, 3, S, S] → backbone: tokens [B, L, P, C], embedding
[B, D] → kernels: patch scores [N, P] → rescoring: image scores [N] → postprocess and results: maps [h, w], files
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from zsad.kernels import mutual_scores
from zsad.kernels.cpu import pair_kernel
from zsad.kernels.mutual_scoring import plan_on_cpu
from zsad.kernels.planner import default_memory_limit, scratch

from .backbone import Backbone
from .config import Config
from .images import Category, ImageError, InputImage, Preprocessing, decode, network_input
from .rescoring import image_scores, min_max, rscin

log = logging.getLogger("zsad")

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # stage, done, all


@dataclass
class Stages:
    """Wall-clock seconds per stage; stages of one run do not overlap, so they add up to the run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def table(self, total: float) -> str:
        rows = {**self.seconds, "other": max(0.0, total - sum(self.seconds.values())), "total": total}
        return "\n".join(f"  {name:<16}{value:9.2f} s {100 * value / total:6.1f} %" for name, value in rows.items())


@dataclass(frozen=True)
class Options:
    """What decides how fast a run goes, and nothing about its scores."""

    batch_size: int
    workers: int
    memory_limit: int | None
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
    embeddings: Array | None  # [n, D]


@dataclass
class _Batch:
    """Decoded images on their way to the backbones."""

    indices: list[int]
    inputs: dict[Preprocessing, Array]  # [B, 3, S, S] each
    failures: list[tuple[int, ImageError]]


def score_category(
    category: Category,
    config: Config,
    backbones: Mapping[str, Backbone],
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

        group = _score_group(category, members, config, backbones, options, stages, report, failures)
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

        rules = config.image_score
        raw = image_scores(gathered(rules.backbone), backbones[rules.backbone].grid, rules.rule, config.image_size)
        if rules.rscin:
            embeddings = np.concatenate([group.embeddings for group in groups if group.embeddings is not None])[order]
            scores = rscin(raw, embeddings, rules.rscin)
        else:
            scores = min_max(raw)
    return CategoryScores(
        images=[category.images[index] for index in indices[order]],
        grid=backbones[config.map.backbone].grid,
        map_scores=gathered(config.map.backbone).astype(np.float64),
        raw_scores=raw,
        scores=scores,
        groups=len(dealt),
        failures=named_failures,
    )


def deal_groups(images: int, group_size: int | None, seed: int) -> list[list[int]]:
    """Deal image numbers at random into groups of nearly equal size, none above group_size (None: one group)."""
    if group_size is None or images <= group_size:
        return [list(range(images))]
    # Never a group of one: it would have nothing to be compared with.
    count = min(-(-images // group_size), images // 2)
    shuffled = np.random.default_rng(seed).permutation(images)
    return [sorted(part.tolist()) for part in np.array_split(shuffled, count)]


def check_memory(
    categories: Sequence[Category], config: Config, backbones: Mapping[str, Backbone], memory_limit: int | None
) -> None:
    """Make sure, before any work, that every group can be scored within the limit; raises MemoryError."""
    for category in categories:
        dealt = deal_groups(len(category.images), config.group_size, config.seed)
        _share_memory(max(map(len, dealt)), config, backbones, memory_limit)


def _share_memory(
    images: int, config: Config, backbones: Mapping[str, Backbone], memory_limit: int | None
) -> tuple[bool, int]:
    """Decide whether the tokens of a group stay in memory, and how many bytes are left to score them with.

    They stay if they take at most half of the limit and leave enough. Raises MemoryError where nothing is enough.
    """
    limit = default_memory_limit() if memory_limit is None else memory_limit
    tokens = sum(4 * int(np.prod(_token_shape(images, backbone))) for backbone in backbones.values())

    def check(left: int) -> None:
        for backbone in backbones.values():
            _, _, patches, channels = _token_shape(images, backbone)
            kernel = pair_kernel(backbone.grid, config.degrees, config.precision)
            plan_on_cpu(kernel, images, patches, channels, config.interval, left)

    if tokens <= limit // 2:
        with suppress(MemoryError):
            check(limit - tokens)
            return True, limit - tokens
    check(limit)
    return False, limit


def _token_shape(images: int, backbone: Backbone) -> tuple[int, int, int, int]:
    return images, backbone.layers, backbone.grid[0] * backbone.grid[1], backbone.channels


def _score_group(
    category: Category,
    members: Sequence[int],
    config: Config,
    backbones: Mapping[str, Backbone],
    options: Options,
    stages: Stages,
    progress: Progress,
    failures: dict[int, str],
) -> _Group | None:
    """Run the backbones over one group and score it; None when fewer than two of its images are readable."""
    kept: list[int] = []
    embeddings: list[Array] = []
    done = 0
    in_memory, memory_left = _share_memory(len(members), config, backbones, options.memory_limit)
    if not in_memory:
        log.debug("the tokens of %d images go to a memory-mapped temporary file", len(members))
    with ExitStack() as stack:
        stores = {
            name: stack.enter_context(scratch(_token_shape(len(members), backbone), in_memory))
            for name, backbone in backbones.items()
        }
        for batch in _decoded_batches(category, members, config, options, stages):
            failures.update((index, str(error)) for index, error in batch.failures)
            rows = slice(len(kept), len(kept) + len(batch.indices))
            with stages.measure("backbone"):
                for name, backbone in backbones.items() if batch.indices else ():
                    stores[name][rows], embedding = backbone.run(batch.inputs[config.backbones[name].preprocessing])
                    if embedding is not None:
                        embeddings.append(embedding)
            kept += batch.indices
            done += len(batch.indices) + len(batch.failures)
            progress("backbone", done, len(members))
        if len(kept) < 2:
            failures.update((index, "no other readable image to compare it with") for index in kept)
            return None
        patch_scores = {}
        for name, backbone in backbones.items():
            patch_scores[name] = mutual_scores(
                stores[name][: len(kept)],
                backbone.grid,
                config.degrees,
                config.interval,
                precision=config.precision,
                memory_limit=memory_left,
                progress=partial(progress, f"scoring {name}"),
                timings=stages.seconds,
                on_plan=lambda plan: log.debug("%s", plan.describe()),
            )
    return _Group(kept, patch_scores, np.concatenate(embeddings) if embeddings else None)


def _decoded_batches(
    category: Category, members: Sequence[int], config: Config, options: Options, stages: Stages
) -> Iterator[_Batch]:
    """Decode images in a thread pool a little ahead of the backbone, and yield them in batches in order."""
    wanted = sorted({backbone.preprocessing for backbone in config.backbones.values()})

    def load(index: int) -> dict[Preprocessing, Array]:
        image = decode(category.images[index].path)
        return {kind: network_input(image, config.image_size, kind) for kind in wanted}

    ahead = options.batch_size + options.workers
    with ThreadPoolExecutor(options.workers, "decode") as pool:
        queue = deque((index, pool.submit(load, index)) for index in members[:ahead])
        try:
            following = iter(members[ahead:])
            while queue:
                batch = _Batch([], {}, [])
                loaded = []
                with stages.measure("decode"):
                    while queue and len(batch.indices) < options.batch_size:
                        index, future = queue.popleft()
                        for upcoming in itertools.islice(following, 1):
                            queue.append((upcoming, pool.submit(load, upcoming)))
                        try:
                            loaded.append(future.result())
                            batch.indices.append(index)
                        except ImageError as error:
                            if options.strict:
                                raise ImageError(f"{category.images[index].path}: {error}") from None
                            batch.failures.append((index, error))
                    batch.inputs = {kind: np.stack([item[kind] for item in loaded]) for kind in wanted if loaded}
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

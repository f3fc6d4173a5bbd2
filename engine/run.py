"""A run, in one place: set up once, then one category after another from its images to its record.

data/<category>/… → folders: which images → resume: what is finished already → loader: batches of network inputs
[B, 3, S, S] → method: a raw score and a map [h, w] for each image → scores and maps in [0, 1], verdicts → results: the
category's folder → evaluation and report of all of them
"""

import errno
import importlib.metadata
import logging
import os
import platform
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zsad.engine.config import Config, ConfigError
from zsad.engine.evaluation.evaluate import Evaluation, evaluate, labelled
from zsad.engine.images.categories import Category, counted
from zsad.engine.images.depth import batch_bit_depth
from zsad.engine.images.duplicates import Duplicates
from zsad.engine.images.folders import Dataset, scan
from zsad.engine.images.limits import Limits, limited
from zsad.engine.images.loader import Batch
from zsad.engine.images.references import NoReferencesError, References, count_references, find_references
from zsad.engine.images.stored import DAMAGE, ImageError
from zsad.engine.images.tree import RECORD, REPORT, RUN, SCORES
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Group, Scored
from zsad.engine.networks.runtime import Runtime
from zsad.engine.results.category import THUMBNAILS, Background, CategoryWriter, Result, Writing
from zsad.engine.results.output import check_there, claimed
from zsad.engine.results.records import CategoryRecord, CheckpointRecord, Failure, RunRecord
from zsad.engine.results.report import shown_categories, write_report
from zsad.engine.results.resume import fingerprint, finished_record, why_again
from zsad.engine.scores.image_scores import min_max
from zsad.engine.scores.verdicts import NORMAL_PERCENTILE, auto_threshold, region_threshold
from zsad.engine.workplace import Options, Workplace, image_memory, set_up
from zsad.export.libraries import EngineError
from zsad.export.state_dict import CheckpointError
from zsad.kernels.files import printable, written_whole
from zsad.kernels.machine import CacheError, peak_memory, stopwatch

log = logging.getLogger("zsad")

CategoryProgress = Callable[[str, str, int, int], None]  # category, stage, done, all

# After these the next category would fail like the one before.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# What libraries and kernels multiply; of methods that judge every image by itself the first is all that `take` does.
LIBRARY_STAGES = ("networks", "product")

NO_MAP = np.zeros((0, 0), np.float32)

FEW_IMAGES = 10  # below, a group says little about what is usual


@dataclass(frozen=True)
class CategoryJob:
    """One category to be scored and written; can be handed to another process."""

    category: Category
    config: Config
    options: Options
    products: frozenset[str] = frozenset()  # names of the folders of all categories


class TooFewImagesError(ImageError):
    """A category in which no two images can be compared; `failures` are its files and why they have no score."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


def run(data: Path, config: Config, runtime: Runtime, options: Options, progress: CategoryProgress) -> RunRecord:
    """Score all categories under a folder and write everything there is to write; returns the record of the run.

    What goes wrong with single images or categories is in the record. Raises ConfigError, CheckpointError, EngineError,
    OutputError and NothingToScoreError before any work, ImageError with `strict`, OSError when the disk is full.
    """
    with limited(replace(options.limits, bytes=image_memory(runtime, options))):
        return _run(data, config, runtime, options, progress)


def _run(data: Path, config: Config, runtime: Runtime, options: Options, progress: CategoryProgress) -> RunRecord:
    start, started = time.perf_counter(), datetime.now(timezone.utc)
    if config.reference is not None and not os.path.exists(config.reference):  # noqa: PTH110 - of no permission, raises
        raise ConfigError(f"--reference {config.reference}: there is no such folder or list")
    dataset = scan(data, exclude=options.output)
    with claimed(options.output, dataset.categories, options.resume):
        workplace, records = _scored(dataset, config, runtime, options, progress)
        check_there(options.output)
        records = [_if_there(record, dataset, options) for record in records]
        timings = workplace.timings
        dataset, evaluation, missing, left_out = _evaluated(dataset, options, records, timings)
        seconds = time.perf_counter() - start
        record = RunRecord(
            version=importlib.metadata.version("zsad"),
            preset=config.preset,
            method=config.method,
            device=runtime.device_name,
            runtime=runtime.describe(),
            started=started.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            images=sum(len(category.images) for category in records),
            failed=sum(len(category.failures) for category in records),
            not_compared=left_out,
            images_per_second=round(sum(len(c.images) for c in records if not c.resumed) / seconds, 3),
            peak_memory_bytes=peak_memory(),
            device_memory_bytes=runtime.device.used_bytes() if runtime.device else None,
            stages={name: round(value, 3) for name, value in timings.items()},
            library_share=round(sum(timings.get(stage, 0.0) for stage in LIBRARY_STAGES) / seconds, 4),
            config=dict(workplace.record),
            checkpoints=[CheckpointRecord(n.checkpoint, n.sha256) for n in workplace.networks.values()],
            versions={"python": platform.python_version(), "numpy": np.__version__},
            categories=records,
            metrics=evaluation,
            notes=[*dataset.notes, *_notes(records), *missing],
        )
        check_there(options.output)  # writing would make it anew
        if "zsad" in options.formats:
            shown = shown_categories(options.output, dataset.categories, records, evaluation)
            write_report(options.output / REPORT, record, shown)
        with written_whole(options.output / RUN) as temporary:
            temporary.write_text(record.to_json())
    return record


def _scored(
    dataset: Dataset, config: Config, runtime: Runtime, options: Options, progress: CategoryProgress
) -> tuple[Workplace, list[CategoryRecord]]:
    """Set up what all categories share, and score and write each."""
    categories = dataset.categories
    workplace = set_up(config, runtime, options)
    check_memory(categories, config, workplace)
    log.info(
        "%s in %d %s, preset %s, %s (%s)",
        counted(sum(len(category.images) for category in categories), "image"),
        len(categories),
        "categories" if len(categories) > 1 else "category",
        config.preset,
        runtime.describe(),
        runtime.reason,
    )
    for note in dataset.notes:
        log.info("%s", note)
    products = _products(categories)
    return workplace, [
        run_category(CategoryJob(category, config, options, products), workplace, progress) for category in categories
    ]


def _if_there(record: CategoryRecord, dataset: Dataset, options: Options) -> CategoryRecord:
    """Return a category's record, or where somebody has removed its results since, one that says so."""
    folder = options.output / record.name
    if not record.images or all((folder / file).is_file() for file in (RECORD, SCORES, THUMBNAILS)):
        return record
    log.error("%s: its results are gone from %s; --resume scores it again", printable(record.name), options.output)
    (images,) = (category.images for category in dataset.categories if category.name == record.name)
    failures = [Failure(str(image.relative), "its results are gone") for image in images]
    return CategoryRecord(record.name, failures=failures, notes=record.notes)


def check_memory(categories: Sequence[Category], config: Config, workplace: Workplace) -> None:
    """Make sure, before any work, that every group can be scored within the limit; raises ConfigError."""
    limit = workplace.arrays.limit()
    products = _products(categories)
    for category in categories:
        references = count_references(category, products, config.reference, config.shots) if config.few_shot else 0
        largest = max(map(len, deal_groups(len(category.images), config.group_size, config.seed)))
        needed = workplace.method.needed(largest, references)
        if needed > limit:
            work, option = f"scoring {largest} images together", "--group-size"
            if not workplace.method.compares:
                work, option = f"comparing with {counted(references, 'known-good image')}", "--shots"
            raise ConfigError(
                f"{printable(category.name)}: {work} needs at least {needed / 2**20:.0f} MiB and the memory limit is "
                f"{limit / 2**20:.0f} MiB; raise --memory-limit, or make the work smaller with --image-size or {option}"
            )


def _products(categories: Sequence[Category]) -> frozenset[str]:
    """Return the names of the folders of all categories."""
    return frozenset(category.product for category in categories)


def deal_groups(images: int, group_size: int | None, seed: int) -> list[Sequence[int]]:
    """Deal image numbers at random into groups of nearly equal size, none above group_size (None: one group)."""
    if group_size is None or images <= group_size:
        return [range(images)]
    # Never a group of one: it would have nothing to be compared with.
    count = min(-(-images // group_size), images // 2)
    shuffled = np.random.default_rng(seed).permutation(images)
    return [sorted(part.tolist()) for part in np.array_split(shuffled, count)]


def run_category(job: CategoryJob, workplace: Workplace, progress: CategoryProgress) -> CategoryRecord:
    """Score and write one category, or take over what an earlier run finished; a failure is recorded, not raised."""
    category, options = job.category, job.options
    name = printable(category.name)
    progress(name, "start", 0, 0)
    unreadable = [Failure(str(path), reason) for path, reason in category.unreadable]
    if unreadable and options.strict:
        raise ImageError(f"{category.root / unreadable[0].path}: {unreadable[0].reason}")
    for note in [ignored_files(category.ignored)] * bool(category.ignored) + list(category.notes):
        log.info("%s: %s", name, note)
    checkpoints = {network.checkpoint: network.sha256 for network in workplace.networks.values()}
    start = time.perf_counter()
    check_there(options.output)
    try:
        references = _references(job, workplace)
        written = [*options.written, *[str(options.limits)] * (options.limits != Limits())]  # a file may be left out
        digest = fingerprint(category, workplace.record, checkpoints, written, references.digests)
        record = finished_record(options.output, category, digest) if options.resume else None
        if record is not None:
            log.info("%s: already finished", name)
            return replace(record, resumed=True, seconds=0.0)
        if options.resume:
            reason = why_again(options.output, category.name, digest, workplace.record, checkpoints)
            if reason is not None:
                log.info("%s: scored again, since %s", name, reason)
        record = CategoryPass(job, references, workplace, progress).write(digest, unreadable)
    except (CheckpointError, EngineError, CacheError):  # of the text tower, which all categories need
        raise
    except workplace.fatal as error:
        raise OSError(f"the GPU failed ({error}); see nvidia-smi, or use --device cpu") from error
    except Exception as error:  # ONNX Runtime and OpenCV have errors of their own; the other categories go on
        if (isinstance(error, ImageError) and options.strict) or getattr(error, "errno", None) in NO_ROOM:
            raise
        check_there(options.output)
        said = str(error) or type(error).__name__
        log.error("%s", said if isinstance(error, TooFewImagesError) else f"{name}: {said}")
        log.debug("%s", name, exc_info=True)
        failures = [Failure(str(image.relative), "its category failed") for image in category.images]
        if isinstance(error, TooFewImagesError):
            failures = error.failures
        record = CategoryRecord(category.name, failures=[*failures, *unreadable], notes=list(category.notes))
    for failure in record.failures:
        log.error("%s/%s: skipped: %s", name, printable(failure.path), failure.reason)
    return replace(record, seconds=round(time.perf_counter() - start, 3))


def _references(job: CategoryJob, workplace: Workplace) -> References:
    """Find the known-good images of a category, if any are asked for; raises NoReferencesError."""
    config = job.config
    if not config.few_shot:
        return References()
    references = find_references(job.category, job.products, config.reference, config.shots, config.seed)
    name = printable(job.category.name)
    for note in references.notes:
        log.warning("%s: %s", name, note)
    log.info("%s: %s to compare with", name, counted(len(references.images), "known-good image"))
    return references


class CategoryPass:
    """One category's way from its images to its folder."""

    def __init__(
        self, job: CategoryJob, references: References, workplace: Workplace, progress: CategoryProgress
    ) -> None:
        self.job, self.references, self.workplace = job, references, workplace
        self.category, self.config, self.method = job.category, job.config, workplace.method
        self.progress = partial(progress, printable(job.category.name))
        self.groups = deal_groups(len(self.category.images), self.config.group_size, self.config.seed)
        self.done = np.zeros(len(self.category.images), np.bool_)  # which images an interrupted run has written
        self.duplicates = Duplicates()
        self.failures: dict[int, str] = {}  # why images have no score, by their number
        self.damaged: dict[int, str] = {}  # what speaks for damage of images that have one
        self.stages: dict[int, Stages] = {}  # of images whose foreground the method knows nothing of, by their number
        self.notes = [*self.category.notes, *references.notes]
        self.failed_references: list[Failure] = []

    def write(self, digest: str, unreadable: Sequence[Failure]) -> CategoryRecord:
        """Score the images and write the category's folder; images without a score join what was unreadable before."""
        bit_depth = self._bit_depth()
        scored = self._scored(bit_depth)
        results = self._compared(scored) if self.method.compares else map(self._absolute, scored)
        timings, options = self.workplace.timings, self.job.options
        writing = Writing(
            options.formats,
            _background(self.config),
            options.keep_stages,
            self.workplace.loader.workers,
            self.workplace.loader.memory_limit,
            middle_square=any(recipe.resize == "shortest_crop" for recipe in self.method.inputs),
        )
        # Results that depend on other images are written at the end: there is nothing to go on with before.
        journal = None if self.method.compares else digest
        with CategoryWriter(options.output, self.category, writing, bit_depth, journal, options.resume) as writer:
            self.done = writer.done
            if self.done.any():
                name = printable(self.category.name)
                log.info("%s: going on after %s", name, counted(int(self.done.sum()), "image"))
            for result in results:
                with stopwatch(timings, "write"):
                    writer.write(result)
            with stopwatch(timings, "write"):
                scores = writer.scores()
                if self.method.rescores and not self.method.compares and len(scores):
                    light = (Scored(w.number, w.record.raw_score, NO_MAP, w.facts) for w in writer.written())
                    scores = self.method.image_scores(light)
                    writer.rescore(scores)
                threshold, above = self._thresholds(writer, scores, results if isinstance(results, list) else None)
                self._note_duplicates()
                self._note_damaged()
                record = CategoryRecord(
                    name=self.category.name,
                    fingerprint=digest,
                    failures=[*self._failures(), *self.failed_references, *unreadable],
                    groups=len(self.groups),
                    group_size=self.config.group_size,
                    scale=writer.scale or self.method.map_range,
                    relative=self.method.map_range is None or self.method.rescores,
                    threshold=threshold,
                    region_threshold=above,
                    ignored=dict(self.category.ignored),
                    references=self.references.record(),
                    notes=self.notes,
                )
                return writer.finish(record)

    def _bit_depth(self) -> int | None:
        """Return how many bits of the 16-bit files' grey values are in use."""
        if self.config.bit_depth is not None:
            return self.config.bit_depth
        with stopwatch(self.workplace.timings, "decode"):
            depth = batch_bit_depth(image.path for image in self.category.images)
        if depth.note is not None:
            self._note(depth.note)
        return depth.bits

    def _note(self, note: str) -> None:
        log.warning("%s: %s", printable(self.category.name), note)
        self.notes.append(note)

    def _scored(self, bit_depth: int | None) -> Iterator[Scored]:
        """Yield what the method says of the readable images, group after group."""
        method, timings, done = self.method, self.workplace.timings, int(self.done.sum())
        for number, members in enumerate(self.groups):
            suffix = f" (group {number + 1} of {len(self.groups)})" if len(self.groups) > 1 else ""

            def report(stage: str, so_far: int, total: int, suffix: str = suffix) -> None:
                self.progress(stage + suffix, so_far, total)

            members = array("q", (index for index in members if not self.done[index]))
            readable: list[int] = []
            references = self._reference_batches(bit_depth)
            method.start(Group(len(members), self.category.product, references, len(self.references.images)))
            images, seen = self.category.images, self._seen
            for batch in self.workplace.loader.batches(images, members, bit_depth, seen):
                self._take_failures(batch.failures)
                if batch.indices:
                    with stopwatch(timings, "networks"):
                        answered = list(method.take(batch))
                    if (foregrounds := self.workplace.foregrounds) is not None:
                        for index, image in zip(batch.indices, batch.images, strict=True):
                            self.stages[index] = foregrounds.find(image).stages()
                    yield from answered
                if method.compares:
                    readable += batch.indices
                done += len(batch.indices) + len(batch.failures)
                self.progress("networks", done, len(images))
            if method.compares and len(readable) < 2:
                self.failures.update((index, "no other readable image to compare it with") for index in readable)
            else:
                yield from method.finish(report)

    def _reference_batches(self, bit_depth: int | None) -> Iterator[Batch]:
        """Yield the readable references; raises NoReferencesError where there are some, but none is readable."""
        images, readable = self.references.images, 0
        for batch in self.workplace.loader.batches(images, range(len(images)), bit_depth, lambda *_: None):
            self.failed_references += [Failure(str(images[index].relative), reason) for index, reason in batch.failures]
            readable += len(batch.indices)
            if batch.indices:
                yield batch
        if images and not readable:
            raise NoReferencesError(
                f"none of the {len(images)} references can be read: {self.failed_references[0].reason}"
            )

    def _seen(self, index: int, image: Image.Image | None) -> None:
        if image is not None and DAMAGE in image.info:
            self.damaged[index] = image.info[DAMAGE]
        if not self.method.compares:  # copies hide nothing
            return
        with suppress(OSError):  # a file that has just gone is no copy of anything
            self.duplicates.add(index, self.category.images[index].path, image)

    def _take_failures(self, failures: Sequence[tuple[int, str]]) -> None:
        for index, reason in failures:
            if self.job.options.strict:
                raise ImageError(f"{self.category.images[index].path}: {reason}")
            self.failures[index] = reason

    def _failures(self) -> list[Failure]:
        images = self.category.images
        return [Failure(str(images[index].relative), self.failures[index]) for index in sorted(self.failures)]

    def _compared(self, scored: Iterator[Scored]) -> list[Result]:
        """Return the results of methods whose scores and maps are relative to the category."""
        found = sorted(scored, key=lambda image: image.index)  # groups are random
        if not found:
            raise TooFewImagesError(
                f"{printable(self.category.name)}: fewer than two readable images; method {self.config.method} "
                "compares images with each other and needs at least two, and ten or more for useful scores",
                self._failures(),
            )
        sound = [place for place, image in enumerate(found) if image.index not in self.damaged]
        if len(sound) < 2:
            sound = list(range(len(found)))
        with stopwatch(self.workplace.timings, "rescoring"):
            scores = self.method.image_scores(found)  # [N]
            if len(sound) < len(found):  # one broken picture must not make all others look alike
                scores[sound] = self.method.image_scores([found[place] for place in sound])
        scale = self.method.map_range or (
            min(float(found[place].map.min()) for place in sound),
            max(float(found[place].map.max()) for place in sound),
        )
        return [
            Result(
                image.index,
                float(score),
                image.raw_score,
                image.map,
                scale,
                stages=self.stages.pop(image.index, None),
                note=self.damaged.get(image.index),
            )
            for image, score in zip(found, scores, strict=True)
        ]

    def _absolute(self, image: Scored) -> Result:
        """Return the result of a method whose maps have a fixed range."""
        assert self.method.map_range is not None
        score = min(max(image.raw_score, 0.0), 1.0)
        stages = image.stages or self.stages.pop(image.index, None)
        note = self.damaged.get(image.index)
        return Result(image.index, score, image.raw_score, image.map, self.method.map_range, image.facts, stages, note)

    def _thresholds(
        self, writer: CategoryWriter, scores: NDArray[np.float64], results: Sequence[Result] | None
    ) -> tuple[float | None, float | None]:
        """Return the score above which images are anomalous, and the map value above which their pixels are.

        results: of methods that compare, with their maps in the methods' units.
        """
        asked = self.config.threshold
        if asked is None or not scores.size:
            return None, None
        threshold = auto_threshold(scores) if isinstance(asked, str) else asked
        anomalous = scores > threshold
        if results is not None:
            maps = min_max(np.stack([result.map for result in results]), results[0].scale)  # [N, h, w]
            return threshold, region_threshold(maps, anomalous)
        normal = np.flatnonzero(~anomalous) if not anomalous.all() else np.arange(len(scores))
        return threshold, writer.map_percentile(normal, NORMAL_PERCENTILE)

    def _note_damaged(self) -> None:
        for index in sorted(self.damaged):
            self._note(f"{printable(str(self.category.images[index].relative))}: {self.damaged[index]}")

    def _note_duplicates(self) -> None:
        for copies in self.duplicates.groups():
            names = [printable(str(self.category.images[index].relative)) for index in copies.indices]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            kind = "the same picture" if copies.exact else "nearly the same picture"
            self._note(f"{', '.join(names[:3])}{more} are {kind}; copies of a defect hide it")


def _evaluated(
    dataset: Dataset, options: Options, records: Sequence[CategoryRecord], timings: MutableMapping[str, float]
) -> tuple[Dataset, Evaluation | None, list[str], int]:
    """Compare with ground truth where the data have it; scoring never sees it.

    Returns the images with their labels, the metrics, notes on metrics that there cannot be, and how many images were
    left out since their masks or maps are unreadable, each of which is said.
    """
    # A category that failed in this run may still have the results of an earlier one.
    finished = {record.name for record in records if record.images}
    comparable = {category.name for category in dataset.categories if category.has_ground_truth} & finished
    notes: list[str] = []
    left_out = 0
    if not comparable:
        return dataset, None, notes, left_out
    # Without maps every image would be named for lacking one.
    with_maps = "zsad" in options.formats

    def warn(message: str | ImageError) -> None:
        nonlocal left_out
        left_out += with_maps and isinstance(message, ImageError)
        log.log(logging.WARNING if with_maps else logging.DEBUG, "%s", message)

    def note(message: str | ImageError, level: int = logging.INFO) -> None:
        log.log(level, "%s", message)
        notes.append(f"{message}.")

    with stopwatch(timings, "evaluate"):
        try:
            dataset = replace(dataset, categories=tuple(labelled(c, warn, note) for c in dataset.categories))
            evaluation = evaluate(options.output, dataset, warn=warn, only=comparable, note=note)
            return dataset, evaluation, notes, left_out
        except Exception as error:  # whatever goes wrong here must not cost the report
            note(f"no metrics: {error}", logging.WARNING)
            return dataset, None, notes, left_out + 1


def _notes(records: Sequence[CategoryRecord]) -> list[str]:
    notes = []
    for record in records:
        if record.relative and 0 < len(record.images) < FEW_IMAGES:
            notes.append(
                f"{record.name}: only {len(record.images)} images. With so few it is hard to tell what is usual "
                "from what is not; read the ranking with care."
            )
        if record.groups > 1:
            notes.append(f"{record.name}: scored in {record.groups} random groups, each against itself only.")
        if record.ignored:
            notes.append(f"{record.name}: {ignored_files(record.ignored)}.")
        if record.images and record.threshold is not None and record.threshold >= 1:
            notes.append(
                f"{record.name}: no image is called anomalous, since the scores are spread up to 1 without a tail; "
                "give --threshold a number."
            )
        notes += [f"{record.name}: {note}" for note in record.notes]
    if any(record.relative for record in records):
        notes.append("Scores are relative to this batch: 1 is its most unusual image or patch, not proof of a defect.")
    return notes


def _background(config: Config) -> Background:
    """Return which pixels get the lowest score, whatever the method says of them."""
    if config.components or config.foreground == "none":  # the method has done it
        return "none"
    return "colour" if config.foreground == "colour" else "stages"


def ignored_files(ignored: Mapping[str, int]) -> str:
    """Say how many files were passed over because of their names, by suffix."""
    kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(ignored.items()))
    return f"{sum(ignored.values())} files are no images by their names and are ignored ({kinds})"

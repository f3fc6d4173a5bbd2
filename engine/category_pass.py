"""One category, start to finish: from its images to its folder and its record.

images → resume: what is finished already → loader: batches of network inputs [B, 3, S, S] → method: a raw score and a
map [h, w] for each image → scores and maps in [0, 1], verdicts → results: the category's folder
"""

import errno
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from zsad.engine.address_space import address_limit, is_scarcity
from zsad.engine.config import Config
from zsad.engine.images.categories import Category, counted
from zsad.engine.images.depth import Depth, batch_bit_depth
from zsad.engine.images.loader import Batch
from zsad.engine.images.noticed import Noticed
from zsad.engine.images.references import NoReferencesError, References, find_references
from zsad.engine.images.stored import ImageError
from zsad.engine.methods.foreground import Stages
from zsad.engine.methods.method import Group, Scored, method_class
from zsad.engine.methods.tile_grid import TilePlan
from zsad.engine.results.category import CategoryWriter
from zsad.engine.results.groups import EndedGroups, GroupFacts, KeptImages, Results, ends_of_maps, light
from zsad.engine.results.image_files import Background, Result, Writing
from zsad.engine.results.output import check_there, ended_folder
from zsad.engine.results.records import CategoryRecord, Failure
from zsad.engine.results.resume import fingerprint, finished_record, image_fingerprint, why_again
from zsad.engine.scores.image_scores import min_max
from zsad.engine.scores.maps import common_scale
from zsad.engine.scores.verdicts import VERDICTS, Bounds
from zsad.engine.workplace import Options, Workplace
from zsad.export.libraries import EngineError
from zsad.export.state_dict import CheckpointError
from zsad.kernels.files import printable
from zsad.kernels.machine import CacheError, stopwatch

from .category_bounds import NO_VERDICTS, Compared, image_bounds, region_bound

log = logging.getLogger("zsad")

CategoryProgress = Callable[[str, str, int, int], None]  # category, stage, done, all

# After these the next category would fail like the one before.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

CATEGORY_FAILED = "its category failed"  # of each of its images, which is said once

TOGETHER = 4000  # images that each score is averaged over the most similar of, where they were compared in groups

NO_MAP = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class CategoryJob:
    """One category to be scored and written; can be handed to another process."""

    category: Category
    config: Config
    options: Options
    products: frozenset[str] = frozenset()  # names of the folders of all categories
    sides: Mapping[str, int] = field(
        default_factory=dict
    )  # of the inputs of networks, where the images or a bank decide
    median: float | None = None  # of the shorter sides of images, where it was asked for
    deep: bool = True  # whether there may be files of 16 bits among the images
    tiles: TilePlan | None = None  # where images that are compared with each other are cut into such
    ended: bool = False  # whether its groups have ended already, scored elsewhere


class TooFewImagesError(ImageError):
    """A category in which no two images can be compared; `failures` are its files and why they have no score."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


def deal_groups(images: int, group_size: int | None, seed: int) -> list[Sequence[int]]:
    """Deal image numbers at random into groups of nearly equal size, none above group_size (None: one group)."""
    if group_size is None or images <= group_size:
        return [range(images)]
    # Never a group of one: it would have nothing to be compared with.
    count = min(-(-images // group_size), images // 2)
    shuffled = np.random.default_rng(seed).permutation(images)
    return [array("q", np.sort(part).tobytes()) for part in np.array_split(shuffled, count)]  # of a million images


def run_category(
    job: CategoryJob, workplace: Workplace, progress: CategoryProgress, kept: CategoryRecord | None = None
) -> CategoryRecord:
    """Score and write one category, or take over what an earlier run finished; a failure is recorded, not raised.

    kept: what is whole of an earlier run, in an output folder that cannot be seen from here.
    """
    category, options = job.category, job.options
    name = printable(category.name)
    progress(name, "start", 0, 0)
    unreadable = [Failure(str(path), reason) for path, reason in category.unreadable]
    if unreadable and options.strict:
        raise ImageError(f"{category.root / unreadable[0].path}: {unreadable[0].reason}")
    for note in [ignored_files(category.ignored)] * bool(category.ignored) + list(category.notes):
        log.info("%s: %s", name, note)
    start, references = time.perf_counter(), References()
    check_there(options.output)
    try:
        references = _references(job, workplace)
        unreadable += [Failure(str(path), reason) for path, reason in references.unreadable]
        checkpoints = workplace.checkpoints
        digest = fingerprint(category, workplace.record, checkpoints, options.written, references.digests)
        record = finished_record(options.output, category, digest) if options.resume else None
        if kept is not None and kept.fingerprint == digest:
            record = kept
        if record is not None:
            log.info("%s: already finished", name)
            return replace(record, resumed=True, seconds=0.0)
        again = None
        if options.resume:
            again = why_again(options.output, category.name, digest, workplace.asked(job.config), checkpoints)
        with closing(CategoryPass(job, references, workplace, progress)) as category_pass:
            record = category_pass.write(digest, unreadable, again)
    except Exception as error:  # ONNX Runtime and OpenCV have errors of their own; the other categories go on
        said = cost_of_one(error, workplace, options)
        log.debug("%s", name, exc_info=True)
        if isinstance(error, TooFewImagesError):
            log.error("%s", said)
            failures = [*error.failures, *unreadable]
            record = CategoryRecord(category.name, failures=failures, notes=list(category.notes))
        else:
            record = without_scores(category, said)
    known_good = references.record()
    for failure in (failure for failure in record.failures if failure.reason != CATEGORY_FAILED):
        place = "" if failure.path in known_good else f"{name}/"
        log.error("%s%s: skipped: %s", place, printable(failure.path), failure.reason)
    return replace(record, seconds=round(time.perf_counter() - start, 3))


def without_scores(category: Category, why: str) -> CategoryRecord:
    """Say why a category has no scores, and return its record."""
    log.error("%s: %s; %s without a score", printable(category.name), why, counted(len(category.images), "image"))
    failures = [Failure(str(image.relative), CATEGORY_FAILED) for image in category.images]
    unreadable = [Failure(str(path), reason) for path, reason in category.unreadable]
    return CategoryRecord(category.name, failures=[*failures, *unreadable], notes=list(category.notes))


def in_groups(job: CategoryJob) -> bool:
    """Tell whether a category's groups can be scored apart from each other, by `score_group`, and ended by `ended`."""
    config, options = job.config, job.options
    return (
        method_class(config.method).compares
        and len(deal_groups(len(job.category.images), config.group_size, config.seed)) > 1
        and not config.few_shot  # known-good images are looked at once, for all groups
        and not (options.strict and job.category.unreadable)
    )


def opened(job: CategoryJob, workplace: Workplace) -> tuple[str, int]:
    """Return the fingerprint of a category that is scored in groups, and the bits in use in its 16-bit files."""
    digest = fingerprint(job.category, workplace.record, workplace.checkpoints, job.options.written)
    return digest, CategoryPass(job, References(), workplace, untold).depth().bits


def score_group(
    job: CategoryJob, number: int, members: Sequence[int], bit_depth: int, workplace: Workplace
) -> tuple[list[Scored], GroupFacts]:
    """Score one group of a category, the images `members`, as if there were no others."""
    return CategoryPass(job, References(), workplace, untold).group(number, members, bit_depth)


def untold(*_: object) -> None:
    """Stand for a progress that nobody follows."""


def cost_of_one(error: Exception, workplace: Workplace, options: Options) -> str:
    """Say what went wrong with one category; raises the error where the next would fail as well, or all is to end."""
    if isinstance(error, (CheckpointError, EngineError, CacheError)):  # of the text tower, which all categories need
        raise error
    if isinstance(error, workplace.fatal):
        raise OSError(f"the GPU failed ({error}); see nvidia-smi, or use --device cpu") from error
    if (isinstance(error, ImageError) and options.strict) or getattr(error, "errno", None) in NO_ROOM:
        raise error
    if address_limit() is not None and is_scarcity(error) and not isinstance(error, ImageError):
        raise error  # what `ulimit -v` allows is used up, for the other categories too
    check_there(options.output)
    return str(error) or type(error).__name__


def _references(job: CategoryJob, workplace: Workplace) -> References:
    """Find the known-good images of a category, if any are asked for; raises NoReferencesError."""
    config = job.config
    if not config.few_shot:
        return References()
    references = find_references(job.category, job.products, config.reference, config.shots, config.seed)
    name = printable(job.category.name)
    if references.unreadable and job.options.strict:
        raise ImageError("{}: {}".format(*references.unreadable[0]))
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
        self.noticed = Noticed(self.category, references, copies=self.method.compares)  # elsewhere they hide nothing
        self.failures: dict[int, str] = {}  # why images have no score, by their number
        self.stages: dict[int, Stages] = {}  # of images whose foreground the method knows nothing of, by their number
        self.seconds: dict[int, float] = {}  # that images took which are about to be written, by their number
        self.pixels: dict[int, NDArray[np.uint8]] = {}  # of such, where the loader keeps them
        self.notes = [*self.category.notes, *references.notes]
        self.failed_references: list[Failure] = []
        self.readable_references = 0
        self.seen = 0  # images that the loader has given, readable or not
        self.ended: EndedGroups | None = None  # of several groups: those that are done, also by an earlier run

    def close(self) -> None:
        """Close the files of groups that have ended; a later run may go on from them."""
        if self.ended is not None:
            self.ended.close()

    def write(self, digest: str, unreadable: Sequence[Failure], again: str | None = None) -> CategoryRecord:
        """Score the images and write the category's folder; images without a score join what was unreadable before.

        again: why what an earlier run has finished is not kept as it is.
        """
        depth = self.depth()
        if depth.note is not None:
            self._note(depth.note)
        bit_depth = depth.bits
        if len(self.groups) > 1 and self.method.compares:
            place = ended_folder(self.job.options.output / self.category.name)
            self.ended = EndedGroups(place, digest, self.job.options.resume or self.job.ended)
        results = self.results(bit_depth)
        timings, options = self.workplace.timings, self.job.options
        writing = how_to_write(self.config, options, self.workplace)
        journal = self._journal(bit_depth)
        # Where nothing else is under way, NumPy's own threads would only be in the way of those that write.
        with (
            threadpool_limits(1 if self.method.compares else None, user_api="blas"),
            CategoryWriter(options.output, self.category, writing, bit_depth, journal, options.resume) as writer,
        ):
            self.done = writer.done
            self.noticed.damaged.update(writer.notes)
            name = printable(self.category.name)
            if self.done.any():
                log.info("%s: going on after %s", name, counted(int(self.done.sum()), "image"))
            elif again is not None:
                log.info("%s: scored again, since %s", name, again)
            for result in results:
                with stopwatch(timings, "write"):
                    writer.write(result)
            with stopwatch(timings, "write"):
                scores = writer.scores()
                if self.method.rescores and not self.method.compares and len(scores):
                    light = (Scored(w.number, w.record.raw_score, NO_MAP, w.facts) for w in writer.written())
                    scores = self.method.image_scores(light)
                    writer.rescore(scores)
                bounds = self._bounds(writer, scores, results if isinstance(results, Results) else None)
                for note in self.noticed.notes():
                    self._note(note)
                record = CategoryRecord(
                    name=self.category.name,
                    fingerprint=digest,
                    failures=[*self._failures(), *self.failed_references, *unreadable],
                    groups=len(self.groups),
                    group_size=self.config.group_size,
                    image_sizes=self.workplace.sides,
                    scale=writer.scale or self.method.map_range,
                    relative=self.method.map_range is None or self.method.rescores,
                    bounds=bounds,
                    ignored=dict(self.category.ignored),
                    references=self.references.record(),
                    notes=self.notes,
                )
                record = writer.finish(record)
        if self.ended is not None:
            self.ended.remove()
        return record

    def _journal(self, bit_depth: int | None) -> str | None:
        """Return what results of single images depend on, by which a later run goes on after them.

        None where they depend on other images and are written at the end: there is nothing to go on with before.
        """
        if self.method.compares:
            return None
        settings, checkpoints, known = self.workplace.record, self.workplace.checkpoints, self.references.digests
        written = self.job.options.written
        return image_fingerprint(self.category.product, settings, checkpoints, written, known, bit_depth)

    def results(self, bit_depth: int | None) -> Iterable[Result]:
        """Score the images; returns what there is to write of each, as it comes or as a sequence of all."""
        scored = self._scored(bit_depth)
        return self._compared(scored) if self.method.compares else map(self._absolute, scored)

    def depth(self) -> Depth:
        """Return how many bits of the 16-bit files' grey values are in use."""
        if self.config.bit_depth is not None:
            return Depth(self.config.bit_depth, None)
        if not self.job.deep:
            return Depth(16, None)
        with stopwatch(self.workplace.timings, "decode"):
            return batch_bit_depth(image.path for image in self.category.images)

    def _note(self, note: str) -> None:
        log.warning("%s: %s", printable(self.category.name), note)
        self.notes.append(note)

    def _scored(self, bit_depth: int | None) -> Iterator[Scored]:
        """Yield what the method says of the readable images, group after group."""
        earlier = self._take_up()
        ended = {group.number for group in earlier}
        self.seen = int(self.done.sum()) + sum(len(self.groups[number]) for number in ended)
        left = [number for number in range(len(self.groups)) if number not in ended]
        for place, number in enumerate(left, len(earlier)):
            start = time.perf_counter()
            members = array("q", (index for index in self.groups[number] if not self.done[index]))
            group = self._group(place, members, self._reference_batches(bit_depth), earlier)
            suffix = f" (group {number + 1} of {len(self.groups)})" if len(self.groups) > 1 else ""
            yield from self._ended(number, members, self._of_group(group, members, bit_depth, suffix), start)

    def _of_group(
        self, group: Group, members: Sequence[int], bit_depth: int | None, suffix: str = ""
    ) -> Iterator[Scored]:
        """Yield what the method says of the readable images of a group; suffix: of what is reported."""
        method, images, readable = self.method, self.category.images, list[int]()
        method.start(group)
        for batch in self.workplace.loader.batches(images, members, bit_depth, self.noticed.see):
            self._take_failures(batch.failures)
            if batch.indices:
                begun = time.perf_counter()
                with stopwatch(self.workplace.timings, "networks"):
                    answered = list(method.take(batch))
                if (foregrounds := self.workplace.foregrounds) is not None:
                    for index, image in zip(batch.indices, batch.images, strict=True):
                        self.stages[index] = foregrounds.find(image).stages()
                share = (time.perf_counter() - begun) / len(batch.indices)
                took = zip(batch.indices, batch.seconds or repeat(0.0), strict=False)
                self.seconds.update((index, read + share) for index, read in took if answered)
                if answered:
                    self.pixels.update(zip(batch.indices, batch.images, strict=False))
                yield from answered
            if method.compares:
                readable += batch.indices
            self.seen += len(batch.indices) + len(batch.failures)
            self.progress("networks", self.seen, len(images))
        if method.compares and len(readable) < (1 if self.readable_references else 2):
            self.failures.update((index, "no other readable image to compare it with") for index in readable)
        else:
            yield from method.finish(lambda stage, *counts: self.progress(stage + suffix, *counts))

    def group(self, number: int, members: Sequence[int], bit_depth: int) -> tuple[list[Scored], GroupFacts]:
        """Score the group of this number, which are the images `members`, as if there were no others."""
        start = time.perf_counter()
        group = replace(self._group(0, members, (), ()), groups=1)
        scored = list(self._of_group(group, members, bit_depth))
        facts = self._facts(number, members, start)
        return self._with_stages(scored), facts

    def _group(
        self, number: int, members: Sequence[int], references: Iterable[Batch], earlier: Sequence[GroupFacts]
    ) -> Group:
        """Return what the method is told of a group; earlier: those that ended in an earlier run."""
        first, category = number == len(earlier), self.category
        # Room is made once, for the largest group.
        images = len(self.groups[0]) if earlier and first and members else len(members)
        count = len(self.references.images)
        kept = [group.kept for group in earlier] if first else ()
        tiles = self.job.tiles
        return Group(
            images,
            category.product,
            references,
            count,
            category.name,
            number,
            len(self.groups),
            aligned=tiles is not None and tiles.aligned,
            earlier=kept,
        )

    def _take_up(self) -> Sequence[GroupFacts]:
        """Take up what is on record of groups that ended in an earlier run; returns it, in the order of the groups."""
        if self.ended is None or not self.ended.facts:
            return ()
        earlier = sorted(self.ended.facts, key=lambda group: group.number)
        for group in earlier:
            self.failures.update(group.failures)
            self.noticed.damaged.update(group.damaged)
            self.noticed.copies += group.copies
        if not self.job.ended:
            log.info(
                "%s: going on after %d of %d groups", printable(self.category.name), len(earlier), len(self.groups)
            )
        if len(earlier) == len(self.groups):  # the others will find known-good images by themselves
            self.readable_references = earlier[-1].readable_references
            self.failed_references = list(earlier[-1].failed_references)
            self.method.start(self._group(len(earlier), (), (), earlier))
        return earlier

    def _ended(self, number: int, members: Sequence[int], scored: Iterable[Scored], start: float) -> Iterable[Scored]:
        """End a group; returns what was scored, nothing where it is kept on disk."""
        if not self.method.compares:
            return scored
        scored = list(scored)
        facts = self._facts(number, members, start)
        if self.ended is None:
            return scored
        self.ended.add(self._with_stages(scored), facts)
        return ()

    def _with_stages(self, scored: Sequence[Scored]) -> list[Scored]:
        """Return images with what led to their scores, where the method knows nothing of it."""
        return [replace(image, stages=self.stages.pop(image.index, None)) for image in scored]

    def _facts(self, number: int, members: Sequence[int], start: float) -> GroupFacts:
        """End a group, which began at `start`, and return what there is to know of it."""
        copies, here = self.noticed.end_group(), set(members)
        self.noticed.copies += copies
        return GroupFacts(
            number,
            round(time.perf_counter() - start, 3),
            {index: why for index, why in self.failures.items() if index in here},
            {index: why for index, why in self.noticed.damaged.items() if index in here},
            copies,
            self.readable_references,
            self.failed_references,
            self.method.kept(),
        )

    def _reference_batches(self, bit_depth: int | None) -> Iterator[Batch]:
        """Yield the readable references; raises NoReferencesError where there are some, but none is readable."""
        images, first = self.references.images, len(self.category.images)

        def seen(index: int, image: Image.Image | None) -> None:
            self.noticed.see(first + index, image)

        for batch in self.workplace.loader.batches(images, range(len(images)), bit_depth, seen):
            if batch.failures and self.job.options.strict:
                raise ImageError(f"{images[batch.failures[0][0]].path}: {batch.failures[0][1]}")
            self.failed_references += [Failure(str(images[index].relative), reason) for index, reason in batch.failures]
            self.readable_references += len(batch.indices)
            if batch.indices:
                yield batch
        if images and not self.readable_references:
            raise NoReferencesError(
                f"of {counted(len(images), 'reference')} none can be read: {self.failed_references[0].reason}"
            )

    def _take_failures(self, failures: Sequence[tuple[int, str]]) -> None:
        for index, reason in failures:
            if self.job.options.strict:
                raise ImageError(f"{self.category.images[index].path}: {reason}")
            self.failures[index] = reason

    def _failures(self) -> list[Failure]:
        images = self.category.images
        return [Failure(str(images[index].relative), self.failures[index]) for index in sorted(self.failures)]

    def _compared(self, scored: Iterator[Scored]) -> Results:
        """Return the results of methods whose scores and maps are relative to the category."""
        found: Sequence[Scored] = sorted(scored, key=lambda image: image.index)
        if self.ended is not None:
            found = self.ended.images()  # groups are random
        if not found:
            message = "no readable image"
            if not self.readable_references:
                message = (
                    f"fewer than two readable images; method {self.config.method} compares images with each other and "
                    "needs at least two, ten or more for useful scores, or known-good ones (--reference)"
                )
            raise TooFewImagesError(f"{printable(self.category.name)}: {message}", self._failures())
        sound = self.noticed.sound([image.index for image in light(found, range(len(found)))])
        with stopwatch(self.workplace.timings, "rescoring"):
            scores = self._image_scores(found, range(len(found)))  # [N]
            if len(sound) < len(found):  # one broken picture must not make all others look alike
                scores[sound] = self._image_scores(found, sound)
        if (note := self.method.note()) is not None:
            self._note(note)
        scale = self.method.map_range or common_scale(ends_of_maps(found, sound))
        return Results(found, scores, scale, (self.stages, self.noticed.damaged), sound)

    def _image_scores(self, found: Sequence[Scored], places: Sequence[int]) -> NDArray[np.float64]:
        """Return the scores of the images at these places.

        Of very many each is rescored by those of its own group, since looking at all for each takes their square.
        """
        if not isinstance(found, KeptImages) or len(places) <= TOGETHER or self.references.images:
            return self.method.image_scores(light(found, places))
        raw, groups = found.raw_scores[places], found.groups[places]
        order, scores = np.argsort(groups, kind="stable"), np.empty(len(raw))
        for own in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            low, high = raw[own].min(), raw[own].max()
            of_group = self.method.image_scores(light(found, np.asarray(places)[own].tolist()))
            scores[own] = low + (high - low) * of_group
        self._note(f"more than {TOGETHER} images: the score of each is averaged with those of its own group only")
        return min_max(scores, (float(raw.min()), float(raw.max())))

    def _absolute(self, image: Scored) -> Result:
        """Return the result of a method whose maps have a fixed range."""
        assert self.method.map_range is not None
        score = min(max(image.raw_score if image.score is None else image.score, 0.0), 1.0)
        return Result(
            image.index,
            score,
            image.raw_score,
            image.map,
            self.method.map_range,
            image.facts,
            image.stages or self.stages.pop(image.index, None),
            self.noticed.damaged.get(image.index),
            image.p_value,
            self.seconds.pop(image.index, None),
            self.pixels.pop(image.index, None),
        )

    def _bounds(self, writer: CategoryWriter, scores: NDArray[np.float64], results: Results | None) -> Bounds | None:
        """Return which scores are accepted and rejected, and which map values are a defect; None where nothing says so.

        results: of methods that compare, with their maps in the methods' units.
        """
        if not scores.size:
            return None
        compared = None
        if results is not None:
            compared = Compared(results.raw_scores, results.sound)
        bounds = image_bounds(self.config, self.method.bounds(), scores, compared)
        if bounds is None:
            log.info("%s: %s", printable(self.category.name), NO_VERDICTS)
            self.notes.append(NO_VERDICTS)
            return None
        if bounds.region is None:
            bounds = replace(bounds, region=region_bound(bounds, scores, results, writer.map_percentile))
        verdicts = Counter(map(bounds.verdict, scores.tolist()))
        counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
        log.info("%s: %s; %s", printable(self.category.name), counts, bounds)
        for remark in () if self.method.compares else self.method.remarks(bounds, scores):
            self._note(remark)
        return bounds


def how_to_write(config: Config, options: Options, workplace: Workplace) -> Writing:
    """Return how results are written."""
    return Writing(
        options.formats,
        _background(config),
        options.keep_stages,
        workplace.loader.workers,
        workplace.loader.memory_limit,
        middle_square=any(recipe.resize == "shortest_crop" for recipe in workplace.method.inputs),
        tiling=config.tiling,
        cells=workplace.method.cells,
    )


def _background(config: Config) -> Background:
    """Return which pixels get the lowest score, whatever the method says of them."""
    if config.components or config.foreground == "none":  # the method has done it
        return "none"
    return "colour" if config.foreground == "colour" else "stages"


def ignored_files(ignored: Mapping[str, int]) -> str:
    """Say how many files were passed over because of their names, by suffix."""
    kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(ignored.items()))
    return f"no images by their names, and ignored: {counted(sum(ignored.values()), 'file')} ({kinds})"

"""A run, in one place: set up once, then one category after another from its images to its record.

data/<category>/… → folders: which images → category_pass: scores, maps, verdicts, and the folder of each category →
evaluation and report of all of them
"""

import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from zsad.engine.config import LARGEST_AUTO, Config, ConfigError
from zsad.engine.images.categories import Category, counted
from zsad.engine.images.folders import Dataset, scan
from zsad.engine.images.limits import limited
from zsad.engine.images.remote import Location
from zsad.engine.images.stored import ImageError
from zsad.engine.images.tree import RECORD, REPORT, RUN, SCORES, is_export
from zsad.engine.networks.runtime import Runtime
from zsad.engine.results.category import THUMBNAILS
from zsad.engine.results.exports import export, writer
from zsad.engine.results.formats import EXPORTS
from zsad.engine.results.output import check_there, claimed
from zsad.engine.results.records import CategoryRecord, CheckpointRecord, Failure, RunRecord
from zsad.engine.results.report import shown_categories, write_report
from zsad.engine.results.source import Finished, Source
from zsad.engine.scores.image_scores import FEW_IMAGES
from zsad.engine.workplace import Options, Setting, Workplace, Workplaces, image_memory
from zsad.kernels.files import printable, written_whole
from zsad.kernels.machine import peak_memory, stopwatch, zsad_version

from .category_pass import CategoryJob, CategoryProgress, deal_groups, ignored_files, run_category
from .plan import by_size, check_memory, check_references, plan, said_sides

if TYPE_CHECKING:
    from zsad.engine.evaluation.evaluate import Evaluation

log = logging.getLogger("zsad")

# What libraries and kernels multiply; of methods that judge every image by itself the first is all that `take` does.
LIBRARY_STAGES = ("networks", "product")


class Scorers(Protocol):
    """What scores the categories of a run: this process, or others."""

    @property
    def timings(self) -> MutableMapping[str, float]:
        """Seconds by stage, which are added to."""

    def check(self, groups: Sequence[Sequence[CategoryJob]]) -> Setting:
        """Make sure, before any work, that all can be scored; groups: categories by the size of their images.

        Raises ConfigError, CheckpointError, EngineError.
        """

    def score(self, groups: Sequence[Sequence[CategoryJob]], progress: CategoryProgress) -> Iterator[CategoryRecord]:
        """Score and write each category; yields their records in any order. Raises what `run_category` raises."""

    def setting(self) -> Setting:
        """Return with what they were scored, once all are."""


def run(
    data: Location,
    config: Config,
    runtime: Runtime,
    options: Options,
    progress: CategoryProgress,
    scorers: Scorers | None = None,
) -> RunRecord:
    """Score all categories under a folder and write everything there is to write; returns the record of the run.

    What goes wrong with single images or categories is in the record. scorers: who scores them; None: this process, by
    `runtime`. Raises ConfigError, CheckpointError, EngineError, OutputError and NothingToScoreError before any work,
    ImageError with `strict`, OSError when the disk is full.
    """
    with limited(replace(options.limits, bytes=image_memory(runtime, options))):
        return _run(data, config, scorers or Here(config, runtime, options), options, progress)


def make_bank(config: Config, runtime: Runtime, options: Options, progress: CategoryProgress) -> int:
    """Save a bank of the known-good images that a configuration names, without scoring any others.

    Returns how many of them cannot be read. Raises what `run` raises before any work, ConfigError where fewer than two
    images are left, ImageError with `strict`, OSError where the bank cannot be written.
    """
    assert options.saving is not None
    assert config.reference is not None
    from .bank_pass import Normal, check_saving, known_good, save_bank, used_bits

    with limited(replace(options.limits, bytes=image_memory(runtime, options))):
        category = known_good(config.reference, config.shots, config.seed)
        for note in category.notes:
            log.warning("%s", note)
        if category.unreadable and options.strict:
            raise ImageError("{}: {}".format(*category.unreadable[0]))
        check_saving(options.saving, config, [category])
        workplaces = Workplaces(config, runtime, options)
        (job,) = plan([category], config, options, progress, workplaces.timings)
        bits = used_bits(category.images, config)
        normal = Normal(category, category.images, bits, chosen=False, strict=options.strict)
        report = partial(progress, printable(category.name))
        failures = save_bank(options.saving, normal, config.sized(job.sides), workplaces.of(job.sides), report)
        return len(category.unreadable) + len(failures)


def _run(data: Location, config: Config, scorers: Scorers, options: Options, progress: CategoryProgress) -> RunRecord:
    started = Started()
    for name in options.exports:
        writer(name)  # raises where a library is missing
    if config.reference is not None and not os.path.exists(config.reference):  # noqa: PTH110 - of no permission, raises
        raise ConfigError(f"--reference {config.reference}: there is no such folder or list")
    dataset = scan(data, exclude=options.output)
    with claimed(options.output, dataset.categories, options.resume, options.exports):
        records = _scored(dataset, config, scorers, options, progress)
        check_there(options.output)
        records = [_if_there(record, dataset, options) for record in records]
        timings, setting = scorers.timings, scorers.setting()
        dataset, evaluation, missing, left_out = _evaluated(dataset, options, records, timings)
        record = replace(
            run_record(config, setting, started, records, [*dataset.notes, *_notes(records), *missing]),
            not_compared=left_out,
            metrics=evaluation,
        )
        not_written, lacking = _exported(dataset, records, config, options, timings, progress)
        record = replace(record, notes=[*record.notes, *(f"{line}." for line in lacking)])
        check_there(options.output)  # writing would make it anew
        if "zsad" in options.formats:
            shown = shown_categories(options.output, dataset.categories, records, evaluation)
            write_report(options.output / REPORT, record, shown)
        with written_whole(options.output / RUN) as temporary:
            temporary.write_text(record.to_json())
        if not_written is not None:
            raise not_written
    return record


@dataclass(frozen=True)
class Started:
    """When a run began."""

    at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    clock: float = field(default_factory=time.perf_counter)  # seconds


def run_record(
    config: Config, setting: Setting, started: Started, records: Sequence[CategoryRecord], notes: list[str]
) -> RunRecord:
    """Return what there is on record of a run by now, without a comparison with ground truth."""
    seconds, timings = time.perf_counter() - started.clock, setting.timings
    in_libraries = sum(timings.get(stage, 0.0) for stage in LIBRARY_STAGES)
    return RunRecord(
        version=zsad_version(),
        preset=config.preset,
        method=config.method,
        device=setting.device,
        runtime=setting.runtime,
        started=started.at.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        images=sum(len(category.images) for category in records),
        failed=sum(len(category.failures) for category in records),
        not_compared=0,
        images_per_second=round(sum(len(c.images) for c in records if not c.resumed) / seconds, 3),
        peak_memory_bytes=max(peak_memory(), setting.host_bytes),
        device_memory_bytes=setting.device_bytes,
        stages={name: round(value, 3) for name, value in timings.items()},
        library_share=round(in_libraries / seconds / setting.processes, 4),
        config=dict(setting.config),
        checkpoints=[CheckpointRecord(*checkpoint) for checkpoint in setting.checkpoints],
        versions={"python": platform.python_version(), "numpy": np.__version__},
        categories=list(records),
        metrics=None,
        notes=notes,
    )


class Here:
    """Scores in this process; see `Scorers`."""

    def __init__(self, config: Config, runtime: Runtime, options: Options) -> None:
        self._config, self._runtime, self._options = config, runtime, options
        self._workplaces = Workplaces(config, runtime, options)
        self._sides: Mapping[str, int] = {}  # of the last workplace
        self.timings = self._workplaces.timings

    def check(self, groups: Sequence[Sequence[CategoryJob]]) -> Setting:
        for group in reversed(groups):  # what was made for the first one is there when the work begins
            check_memory(group, self._of(group[0]))
            if self._options.saving is not None:
                from .bank_pass import check_rooms

                check_rooms(self._options.saving, group, self._of(group[0]))
        return self.setting()

    def score(self, groups: Sequence[Sequence[CategoryJob]], progress: CategoryProgress) -> Iterator[CategoryRecord]:
        for job in (job for group in groups for job in group):
            record = run_category(job, self._of(job), progress)
            if self._options.saving is not None:
                from .bank_pass import save_category_bank

                record = save_category_bank(self._options.saving, job, record, self._of(job), progress)
            yield record

    def setting(self) -> Setting:
        return Setting.here(self._config, self._runtime, self._workplaces.of(self._sides))

    def _of(self, job: CategoryJob) -> Workplace:
        self._sides = job.sides
        return self._workplaces.of(job.sides)


def _scored(
    dataset: Dataset, config: Config, scorers: Scorers, options: Options, progress: CategoryProgress
) -> list[CategoryRecord]:
    """Plan, check, score and write the categories; returns their records in the order of the data."""
    categories = dataset.categories
    check_references(categories, config)
    jobs = plan(categories, config, options, progress, scorers.timings)
    groups = by_size(jobs)
    if options.saving is not None:
        from .bank_pass import check_saving

        check_saving(options.saving, config, categories)
    setting = scorers.check(groups)
    log.info(
        "%s in %d %s, preset %s, %s (%s)",
        counted(sum(len(category.images) for category in categories), "image"),
        len(categories),
        "categories" if len(categories) > 1 else "category",
        config.preset,
        setting.runtime,
        setting.reason,
    )
    for note in dataset.notes:
        log.info("%s", note)
    for job in jobs:
        if job.median is not None and job.median < LARGEST_AUTO:
            name, size = printable(job.category.name), said_sides(job.sides)
            log.info(
                "%s: %s are taken at %s, since the median of their shorter sides is %g",
                name,
                "images" if job.tiles is None else "tiles",
                size,
                job.median,
            )
    records = {record.name: record for record in scorers.score(groups, progress)}
    return [records[category.name] for category in categories]


def _if_there(record: CategoryRecord, dataset: Dataset, options: Options) -> CategoryRecord:
    """Return a category's record, or where somebody has removed its results since, one that says so."""
    folder = options.output / record.name
    if not record.images or all((folder / file).is_file() for file in (RECORD, SCORES, THUMBNAILS)):
        return record
    log.error("%s: its results are gone from %s; --resume scores it again", printable(record.name), options.output)
    (images,) = (category.images for category in dataset.categories if category.name == record.name)
    failures = [Failure(str(image.relative), "its results are gone") for image in images]
    return CategoryRecord(record.name, failures=failures, notes=record.notes)


def _exported(
    dataset: Dataset,
    records: Sequence[CategoryRecord],
    config: Config,
    options: Options,
    timings: MutableMapping[str, float],
    progress: CategoryProgress,
) -> tuple[Exception | None, list[str]]:
    """Write what others read of the finished categories; returns why that ended early, and what the formats lack."""
    for name in EXPORTS:
        if name not in options.exports and is_export(options.output / name):
            log.info(
                "%s is of an earlier run; --resume --format %s makes it of these results", options.output / name, name
            )
    if not options.exports:
        return None, []
    categories = {category.name: category for category in dataset.categories}
    finished = [
        Finished(record, category.root, options.output / record.name, partial(_groups, category, record, config))
        for record in records
        if (category := categories[record.name])
    ]
    said: list[str] = []
    with stopwatch(timings, "export"):
        for name in options.exports:
            try:
                said += export(name, options.output, Source(dataset.root, finished, partial(progress, name)))
            except (OSError, ImageError) as error:  # the results themselves are there
                reason = error if isinstance(error, OSError) else OSError(f"{name} is not written: {error}")
                return reason, said
    for line in said:
        log.warning("%s", line)
    return None, said


def _groups(category: Category, record: CategoryRecord, config: Config) -> Iterator[int]:
    """Yield the number of the group that each image on record was compared in."""
    numbers = np.zeros(len(category.images), np.int64)
    for number, members in enumerate(deal_groups(len(category.images), config.group_size, config.seed)):
        numbers[members] = number
    sources = enumerate(category.images)
    for image in record.images:
        yield next(int(numbers[index]) for index, source in sources if str(source.relative) == image.path)


def _evaluated(
    dataset: Dataset, options: Options, records: Sequence[CategoryRecord], timings: MutableMapping[str, float]
) -> "tuple[Dataset, Evaluation | None, list[str], int]":
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
    from zsad.engine.evaluation.evaluate import evaluate, labelled

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
        if record.relative and 0 < len(record.images) + len(record.references) < FEW_IMAGES:
            notes.append(
                f"{record.name}: only {len(record.images)} images. With so few it is hard to tell what is usual "
                "from what is not; read the ranking with care."
            )
        if record.groups > 1:
            notes.append(f"{record.name}: scored in {record.groups} random groups, each against itself only.")
        if record.ignored:
            notes.append(f"{record.name}: {ignored_files(record.ignored)}.")
        notes += [f"{record.name}: {note}" for note in record.notes]
    if any(record.relative for record in records):
        notes.append("Scores are relative to this batch: 1 is its most unusual image or patch, not proof of a defect.")
    return notes

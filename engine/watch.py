"""A folder that images arrive in: each is scored by a bank as soon as it is written, until somebody ends it.

images/arrivals: files that are complete → category_pass: scores and maps of a few at a time → results/image_files and
results/stream: files, tables and journal → one line for each image; now and then the page of the last ones
"""

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from zsad.engine.config import Config, ConfigError
from zsad.engine.images.ahead import Ahead
from zsad.engine.images.arrivals import Arrival, Arrivals, Known
from zsad.engine.images.categories import Category, counted
from zsad.engine.images.folders import RESERVED_NAMES, NothingToScoreError
from zsad.engine.images.limits import limited
from zsad.engine.images.names import shortened
from zsad.engine.images.references import References
from zsad.engine.images.tree import REPORT, RUN
from zsad.engine.methods.bank import BankMethod, Settings, bank_settings
from zsad.engine.methods.method import Group
from zsad.engine.methods.tiled import TiledBank
from zsad.engine.networks.runtime import Runtime
from zsad.engine.results.drawing import thumbnails_of
from zsad.engine.results.image_files import ImageFiles, Pictures, Result, Written, bytes_to_write, judged, rounded
from zsad.engine.results.output import check_there, claimed
from zsad.engine.results.records import CategoryRecord, ImageRecord
from zsad.engine.results.report import write_report
from zsad.engine.results.report_images import PICTURES, ShownCategory, ShownImage
from zsad.engine.results.stream import Stream
from zsad.engine.scores.drift import Drift
from zsad.engine.scores.verdicts import Bounds
from zsad.engine.workplace import Options, Setting, Workplace, Workplaces, image_memory
from zsad.kernels.cpu.nearest import kept_threads, one_blas_thread
from zsad.kernels.files import printable, written_whole

from .category_pass import NO_ROOM, CategoryJob, CategoryPass, how_to_write
from .run import Started, run_record

log = logging.getLogger("zsad")

AT_ONCE = 64  # images that are handed to the networks one after the other before it is looked for others
TICK = 0.2  # seconds after which it is looked again whether to end
PAGE, PAGE_BUSY = 5.0, 30.0  # seconds from page to page at least, and while images are waiting
BANK = 1.0  # seconds between looks at the bank's file
ROOM = 1.0  # seconds between tries to write to a full disk

Done = TypeVar("Done")


@dataclass(frozen=True)
class Told:
    """What is said of a file that was handled."""

    path: str  # within the folder that is watched
    seconds: float  # since it was found to be complete
    record: ImageRecord | None = None  # None: it cannot be read
    error: str | None = None  # why

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        if self.record is None:
            return json.dumps({"path": self.path, "error": self.error, "seconds": round(self.seconds, 3)})
        image = self.record
        facts: dict[str, Any] = {"path": self.path, "score": image.score, "p_value": image.p_value}
        facts |= {"verdict": image.verdict, "regions": [asdict(region) for region in image.regions or []]}
        facts |= {} if image.note is None else {"note": image.note}
        return json.dumps({**facts, "seconds": round(self.seconds, 3)})

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.path}: not scored: {self.error}"
        verdict, p = f"{self.record.verdict}", self.record.p_value
        return f"{self.record.score:.3f}  {verdict:<6}  p {p if p is None else f'{p:.4f}'}  {self.path}"


@dataclass(frozen=True)
class Listener:
    """Who watches."""

    going_on: Callable[[], bool]  # says no once the end is asked for; threads may ask at once
    tell: Callable[[Told], None]  # is told of each image once its results are written


class EndedError(Exception):
    """The end was asked for while something could not be written; what was not is done by the next run."""


def watch(folder: Path, config: Config, runtime: Runtime, options: Options, listener: Listener) -> None:
    """Score the images of a folder as they arrive, until the listener has enough; the results are in the output folder.

    Raises what `run` raises before any work, OSError where the output folder is gone, the networks fail for all images,
    or the listener does.
    """
    assert isinstance(config.settings, Settings)
    if Path(config.settings.bank).is_dir():
        raise ConfigError(
            f"--watch takes one bank, and {config.settings.bank} is a folder of them; watch each product's folder by "
            f"itself: zsad-infer --watch {folder}/PART --bank {config.settings.bank}/PART.zsad"
        )
    if not folder.is_dir():
        raise NothingToScoreError(f"--watch {folder}: there is no such folder; make it, or name another one")
    if folder.resolve() == options.output.resolve():
        raise NothingToScoreError(f"{folder}: is where the results are to go; choose another --output")
    name = shortened(folder.resolve().name or "images")
    category = Category(name + "_" * (name in RESERVED_NAMES), folder, (), {}, ())
    with claimed(options.output, (), resume=True):
        workplace = Workplaces(config, runtime, options).of({})
        if workplace.loader.batch_size == 1:  # of more the images of batches would lie beside the limit
            workplace = replace(workplace, loader=replace(workplace.loader, keep_images=True))  # for overlays
        known = Known()
        with Stream(options.output / category.name, known) as stream, Arrivals(folder, options.output, known) as files:
            if stream.latest.scored or stream.latest.failed:
                log.info("going on after %s", counted(stream.latest.scored + stream.latest.failed, "image"))
            log.info("watching %s, by %s; end it with Ctrl-C", folder, config.settings.bank)
            job = CategoryJob(category, config, options)
            try:
                watching = Watching(job, runtime, workplace, stream, files, listener)
                with kept_threads(), _without_garbage():
                    watching.until_the_end()
            except workplace.fatal as error:
                raise OSError(f"the GPU failed ({error}); see nvidia-smi, or use --device cpu") from error


@contextmanager
def _without_garbage() -> Iterator[None]:
    """Take what is there by now for no garbage: to look through all of it delays a line, now and then, by 15 ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Watching:
    """All that goes on while a folder is watched."""

    def __init__(
        self,
        job: CategoryJob,
        runtime: Runtime,
        workplace: Workplace,
        stream: Stream,
        arrivals: Arrivals,
        listener: Listener,
    ) -> None:
        """job: without any images so far."""
        self._job, self._runtime, self._workplace = job, runtime, workplace
        self._stream, self._arrivals, self._listener = stream, arrivals, listener
        config = job.config
        writing = how_to_write(config, job.options, workplace)
        self._drawing = ThreadPoolExecutor(1, "draw")
        self._files = ImageFiles(stream.folder, writing, config.bit_depth, self._drawing)
        self._started, self._before = Started(), stream.latest.scored
        self._full = False  # the disk
        self._bank = _Bank(Path(config.settings.bank))  # type: ignore[attr-defined]
        self._next_page, self._page_due, self._page_lacks = 0.0, 0.0, False
        self._shown = -1  # how many images there were when the page was written
        self._open()
        for image, _ in stream.latest.images:
            self._drift.follow(image.verdict == "reject")

    def _open(self) -> None:
        """Take the bounds from the bank that is open by now."""
        method, asked = self._workplace.method, self._job.config.threshold
        assert isinstance(method, (BankMethod, TiledBank))
        method.start(Group(1, self._job.category.product, name=self._job.category.name))
        own = method.bounds()
        assert own is not None
        self._bounds = own if isinstance(asked, str) else Bounds(asked, asked, "--threshold", own.region)
        above, images = method.count_above(self._bounds.reject)
        self._drift = Drift(above, images, self._job.config.expected_defects or 0.0)
        log.info("%s", self._bounds)

    def until_the_end(self) -> None:
        """Score what arrives until the end is asked for, and write the page a last time."""
        try:
            while self._listener.going_on():
                check_there(self._job.options.output)
                self._take_changed_bank()
                files = self._arrivals.take(AT_ONCE)
                if files:
                    self._score(files)
                self._write_page(waiting=len(files) == AT_ONCE)
                if not files:
                    self._with_room(self._stream.settle)
                    self._arrivals.wait(TICK)
            self._next_page = 0.0
            self._write_page(waiting=False)
        except EndedError:
            log.error("the disk is still full; what has no score yet is scored by the next run")
        finally:
            self._drawing.shutdown()
        latest = self._stream.latest
        log.info("ended after %s, %d not scored", counted(latest.scored, "image"), latest.failed)

    def _score(self, files: Sequence[Arrival]) -> None:
        """Score files, write what there is to write of each, and tell of it; what one of them breaks costs no other."""
        start, parts = time.perf_counter(), [files]
        ending: tuple[type[Exception], ...] = (OSError, EndedError, *self._workplace.fatal)
        while parts:
            part = parts.pop()
            try:
                self._score_together(part, start)
            except ending:
                raise
            except Exception as error:  # ONNX Runtime and OpenCV have errors of their own
                log.debug("%s", error, exc_info=True)
                left = [file for file in part if not self._stream.has(file)]
                if len(left) == 1:
                    self._check_networks(error)
                    self._refuse(left[0], f"scoring it failed: {_said(error)}", start)
                elif left:
                    parts += [left[len(left) // 2 :], left[: len(left) // 2]]

    def _check_networks(self, error: Exception) -> None:
        """Raise OSError where any other image would fail as well."""
        try:
            self._workplace.try_out()
        except self._workplace.fatal:
            raise
        except Exception:
            there = " or use --device cpu" if self._runtime.devices else ""
            raise OSError(
                f"the networks fail for all images ({_said(error)}); start again{there}, and it goes on from here"
            ) from error

    def _score_together(self, files: Sequence[Arrival], start: float) -> None:
        """Score files of which none is expected to fail otherwise than by its content; raises what networks raise."""
        job = replace(self._job, category=replace(self._job.category, images=tuple(file.image for file in files)))
        scoring = CategoryPass(job, References(), self._workplace, lambda *_: None)
        loader = self._workplace.loader

        def write(result: Result, last_try: bool) -> tuple[Written, Any]:
            image = job.category.images[result.index]
            return self._with_room(lambda: self._files.write(image, result, last_try))

        limits = replace(job.options.limits, bytes=image_memory(self._runtime, job.options))
        ahead = Ahead(write, loader.workers, 2 * loader.workers, loader.memory_limit, "write")
        with limited(limits), one_blas_thread(), ahead:  # each map is drawn by one thread
            for result in scoring.results(job.config.bit_depth):
                file = files[result.index]
                if file.young and result.note is not None:  # damage may be that its end is not there yet
                    self._arrivals.put_back(file)
                    continue
                size = bytes_to_write(file.image, result)
                for done, (written, pictures) in chain(ahead.put(result, size), ahead.ready()):
                    self._keep(files[done.index], written, pictures, start)
                if not self._listener.going_on():
                    break
            for done, (written, pictures) in ahead.rest():
                self._keep(files[done.index], written, pictures, start)
        for index, reason in scoring.failures.items():
            self._refuse(files[index], reason, start)

    def _keep(self, file: Arrival, written: Written, pictures: Pictures, start: float) -> None:
        """Take an image's results into the tables and tell of them, unless the file is another one by now."""
        if self._arrivals.version(file) not in (file.version, None):
            self._arrivals.put_back(file)
            return
        record = rounded(judged(self._stream.folder, written, self._bounds))
        if written.failure is not None:
            record = replace(record, note=written.failure.reason)
        self._with_room(lambda: self._stream.add(file, record))
        self._with_room(self._stream.settle)
        self._listener.tell(Told(file.relative, time.perf_counter() - start, record))
        self._stream.show(thumbnails_of(pictures))  # on the page, which comes later
        note = self._drift.follow(record.verdict == "reject")
        if note is not None:
            log.warning("%s", note)

    def _refuse(self, file: Arrival, reason: str, start: float) -> None:
        """Say once why a file has no score; what is new, or gone, may be no image yet, or no longer one to score."""
        version = self._arrivals.version(file)
        if version is None:
            return
        if file.young or version != file.version:
            self._arrivals.put_back(file)
            return
        log.error("%s: not scored: %s", printable(file.relative), reason)
        self._with_room(lambda: self._stream.refuse(file, reason))
        self._with_room(self._stream.settle)
        self._listener.tell(Told(file.relative, time.perf_counter() - start, error=reason))

    def _with_room(self, write: Callable[[], Done]) -> Done:
        """Write, as soon as there is room on the disk; raises EndedError where there still is none at the end."""
        waited = False
        while True:
            try:
                done = write()
            except OSError as error:
                check_there(self._job.options.output)
                if error.errno not in NO_ROOM:
                    raise
                if not self._full:
                    self._full = True
                    log.error("%s: %s; waiting for room, nothing is lost", self._job.options.output, error.strerror)
                if not self._listener.going_on():
                    raise EndedError from None
                time.sleep(ROOM)
                waited = True
                continue
            if waited and self._full:
                self._full = False
                log.warning("%s: there is room again", self._job.options.output)
            return done

    def _take_changed_bank(self) -> None:
        """Go on with the bank's file as it is now, where it has changed and fits."""
        if not self._bank.has_changed():
            return
        path = self._bank.path
        try:
            if bank_settings(path) != self._bank.settings:
                raise ConfigError(f"{path} is of other settings now; end this run and start it again to use it")
            bank, before = BankMethod(self._job.config, self._workplace.place), self._workplace.method
            method = before.of(bank) if isinstance(before, TiledBank) else bank
            self._workplace = replace(self._workplace, method=method)
        except (ConfigError, MemoryError) as error:
            log.error("the bank has changed, and the one before stays in use: %s", error)
            return
        log.warning("%s has changed: what arrives from now on is scored by it as it is now", path)
        self._open()

    def _write_page(self, waiting: bool) -> None:
        """Write the page of the last images where there are others than before, and not too often."""
        latest, now = self._stream.latest, time.monotonic()
        if latest.scored + latest.failed == self._shown or now < self._next_page:
            return
        if waiting and now < self._page_due:
            return
        try:
            self._write_results()
            self._shown, self._page_lacks = latest.scored + latest.failed, False
        except OSError as error:
            check_there(self._job.options.output)
            if not self._page_lacks:
                log.warning("%s is not written: %s; it is tried again", REPORT, error.strerror or error)
            self._page_lacks = True
        # Of many pictures it takes long, which images should not have to wait for.
        pause = max(PAGE, 20 * (time.monotonic() - now))
        self._next_page, self._page_due = now + pause, now + max(pause, PAGE_BUSY)

    def _write_results(self) -> None:
        latest, options = self._stream.latest, self._job.options
        shown = [
            ShownImage(image, None, None, {name: pictures[name] for name in PICTURES if name in pictures})
            for image, pictures in latest.images
        ]
        notes = [f"The page shows the last {len(shown)} of {counted(latest.scored, 'image')}."] * bool(shown)
        notes += [f"{self._drift.note}."] * (self._drift.note is not None)
        record = CategoryRecord(
            name=self._job.category.name,
            images=[image.record for image in shown],
            failures=list(latest.failures),
            image_sizes=self._workplace.sides,
            scale=self._workplace.method.map_range,
            relative=False,
            bounds=self._bounds,
            notes=notes,
            seconds=round(time.perf_counter() - self._started.clock, 3),
        )
        setting = Setting.here(self._job.config, self._runtime, self._workplace)
        run = run_record(self._job.config, setting, self._started, [record], notes)
        rate = round((latest.scored - self._before) / run.seconds, 3)
        run = replace(run, images=latest.scored, failed=latest.failed, images_per_second=rate)
        if "zsad" in options.formats:
            write_report(options.output / REPORT, run, [ShownCategory(record, shown, None, None)], refresh=PAGE)
        with written_whole(options.output / RUN) as temporary:
            temporary.write_text(run.to_json())


def _said(error: Exception) -> str:
    """Return what an error says, as one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _Bank:
    """The bank's file, and when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path, self.settings = path, bank_settings(path)
        self._taken = self._seen = self._facts()
        self._next = time.monotonic() + BANK

    def has_changed(self) -> bool:
        """Tell once of every change, when the file has not changed since the last look."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + BANK
        before, self._seen = self._seen, self._facts()
        if self._seen is None or self._seen != before or self._seen == self._taken:
            return False
        self._taken = self._seen
        return True

    def _facts(self) -> tuple[int, int, int] | None:
        """Return what changes with the file; None while it is not there."""
        try:
            status = os.stat(self.path)  # noqa: PTH116
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

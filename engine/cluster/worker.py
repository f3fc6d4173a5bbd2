"""What runs on the machines of a cluster: a worker that Ray has placed, with one device and networks of its own.

order → set up once → calls: start, check, open, group, whole → parts of files, and what came of the call
"""

import importlib.metadata
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zsad.engine.category_pass import CategoryJob, cost_of_one, opened, run_category, score_group, untold
from zsad.engine.config import Config, ConfigError
from zsad.engine.images.limits import limited
from zsad.engine.methods.method import Scored
from zsad.engine.networks.runtime import Runtime, choose_runtime
from zsad.engine.plan import check_memory
from zsad.engine.results.groups import GroupFacts
from zsad.engine.results.received import FilePart, parts
from zsad.engine.results.records import CategoryRecord
from zsad.engine.results.resume import finished_record
from zsad.engine.workplace import Options, Setting, Workplace, Workplaces, image_memory
from zsad.export.libraries import EngineError
from zsad.export.state_dict import CheckpointError
from zsad.kernels.machine import CacheError, available_cores, default_memory_limit, peak_memory, use_cores

log = logging.getLogger("zsad")

TRIES = 4  # at what a worker was at when it died: an image may be what kills it
HANDED_ON = ("ZSAD_CACHE", "ZSAD_WEIGHTS")  # what decides where weights are looked for


@dataclass(frozen=True)
class Order:
    """What a worker is told when it is placed."""

    ledger: Any  # a handle of the `Ledger`
    config: Config
    options: Options
    device: str
    library: str
    cores: int
    level: int  # from which on log lines are wanted
    sample: Path | None  # an image, which every machine is to see
    seen: tuple[Path, str]  # a file of the output folder and what is in it
    version: str = field(default_factory=lambda: importlib.metadata.version("zsad"))
    folder: Path = field(default_factory=Path.cwd)  # that paths are relative to
    environment: Mapping[str, str] = field(
        default_factory=lambda: {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    )


@dataclass
class Outcome:
    """What comes of a call; what is None was not asked for."""

    shares: bool  # whether the worker sees the output folder
    setting: Setting | None = None
    record: CategoryRecord | None = None
    opened: tuple[str, int] | None = None
    group: tuple[list[Scored], GroupFacts] | None = None
    failed: str | None = None  # why a group or category has no scores
    said: list[tuple[int, str]] = field(default_factory=list)  # levels and lines of its log
    timings: dict[str, float] = field(default_factory=dict)
    host_bytes: int = 0
    device_bytes: int | None = None


class _Ear(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        said, self.said = self.said, []
        return said


class Worker:
    """Scores on one device, in a process that Ray has started; all it is asked for is `do`."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._place: tuple[Runtime, Workplaces] | None = None
        self._job: tuple[Any, CategoryJob | None] = (None, None)  # the last one, by its reference
        self._ear, self._held = _Ear(), ExitStack()

    def do(self, call: str, what: str, *arguments: Any) -> Iterator[FilePart | Outcome]:
        """Yield files of a category, where they are to be sent, and then what came of a call, which has a name.

        Errors that end a run are raised, and name the machine where they speak of what is installed or configured.
        """
        try:
            runtime, workplaces = self._set_up()
            outcome = Outcome(self._shares())
            if _ray().get(self._order.ledger.begin.remote(call)) > TRIES:
                outcome.failed = f"its worker died {TRIES} times"
            else:
                yield from getattr(self, f"_{what}")(outcome, *arguments)
        except (ConfigError, CheckpointError, EngineError, CacheError) as error:
            raise ConfigError(f"{error} (on {platform.node()})") from None
        outcome.said, outcome.timings = self._ear.taken(), dict(workplaces.timings)
        workplaces.timings.clear()
        outcome.host_bytes = peak_memory()
        outcome.device_bytes = runtime.device.used_bytes() if runtime.device else None
        yield outcome

    def _set_up(self) -> tuple[Runtime, Workplaces]:
        if self._place is not None:
            return self._place
        order = self._order
        if order.version != (version := importlib.metadata.version("zsad")):
            raise ConfigError(f"zsad is {version} here and {order.version} where the run was started; install that one")
        with suppress(OSError):  # all paths may be absolute, or URLs
            os.chdir(order.folder)
        if order.sample is not None and not order.sample.is_file():
            raise ConfigError(
                f"there is no {order.sample.absolute()} here; mount the images under the same path on all machines, or "
                "give a list of URLs"
            )
        os.environ.update(order.environment)
        log.setLevel(order.level)
        log.addHandler(self._ear)
        options, cores = order.options, available_cores()
        # Which library is faster is not found alike by all workers.
        runtime = replace(choose_runtime(order.device, order.library), measures=False)
        if options.memory_limit is None and not runtime.devices:  # workers on this machine share its memory
            share = min(1.0, order.cores / cores)
            options = replace(options, memory_limit=int(default_memory_limit() * share))
        use_cores(order.cores)
        self._held.enter_context(limited(replace(options.limits, bytes=image_memory(runtime, options))))
        self._place = runtime, Workplaces(order.config, runtime, options)
        return self._place

    def _shares(self) -> bool:
        path, said = self._order.seen
        with suppress(OSError):
            return path.read_text() == said and os.access(path.parent.parent, os.W_OK)
        return False

    def _known(self, reference: Sequence[Any]) -> tuple[CategoryJob, Workplace]:
        """Return a job, which is fetched once for all of its calls, and where it is done."""
        if self._job[1] is None or self._job[0] != reference[0]:
            self._job = reference[0], _ray().get(reference[0])
        job = self._job[1]
        assert job is not None
        return job, self._set_up()[1].of(job.sides)

    def _start(self, outcome: Outcome) -> Iterator[FilePart]:
        return iter(())

    def _check(self, outcome: Outcome, groups: Sequence[Sequence[CategoryJob]]) -> Iterator[FilePart]:
        runtime, workplaces = self._set_up()
        for group in reversed(groups):
            check_memory(group, workplaces.of(group[0].sides))
        outcome.setting = Setting.here(self._order.config, runtime, workplaces.of(groups[0][0].sides))
        return iter(())

    def _open(self, outcome: Outcome, reference: Sequence[Any]) -> Iterator[FilePart]:
        """Say how the groups of a category are scored, or take over what an earlier run finished."""
        job, workplace = self._known(reference)
        outcome.opened = opened(job, workplace)
        if job.options.resume and finished_record(job.options.output, job.category, outcome.opened[0]) is not None:
            outcome.record = run_category(job, workplace, untold)
        return iter(())

    def _group(
        self, outcome: Outcome, reference: Sequence[Any], number: int, members: Sequence[int], bit_depth: int
    ) -> Iterator[FilePart]:
        job, workplace = self._known(reference)
        try:
            outcome.group = score_group(job, number, members, bit_depth, workplace)
        except Exception as error:  # as in `run_category`
            outcome.failed = cost_of_one(error, workplace, job.options)
        return iter(())

    def _whole(self, outcome: Outcome, reference: Sequence[Any], kept: CategoryRecord | None) -> Iterator[FilePart]:
        """Score a category, or end one whose groups have ended; kept: see `run_category`."""
        job, workplace = self._known(reference)
        if outcome.shares:
            outcome.record = run_category(job, workplace, untold)
            return
        if job.ended:
            raise OSError(f"{platform.node()} no longer sees the output folder {job.options.output}")
        with tempfile.TemporaryDirectory(prefix="zsad-") as folder:
            options = replace(job.options, output=Path(folder), resume=False)
            outcome.record = run_category(replace(job, options=options), workplace, untold, kept)
            if outcome.record.images and not outcome.record.resumed:
                yield from parts(Path(folder) / job.category.name)
        outcome.record = replace(outcome.record, images=())  # they are sent, or there


def _ray() -> Any:
    import ray

    return ray

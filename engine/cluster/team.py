"""Several machines: Ray places workers on them, one for each GPU or for some processors of a CPU, to score for a run.

    run.py: categories → Team, in this process: calls, one at each worker → Worker: run_category, or score_group for
    each group of a category → outcomes → Team: records

What a category is and how it is scored is `category_pass.py`'s, here as there. Ray schedules the workers, starts them
anew where one dies or its machine leaves, asks them again for what they were at, and moves what is sent. A worker keeps
its networks. It writes into the output folder where it sees the same one as this process, else it sends what it has
written. Groups that have ended are kept by this process, from where a later run goes on.
"""

import logging
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from zsad.engine.category_pass import CategoryJob, CategoryProgress, deal_groups, in_groups
from zsad.engine.config import Config, ConfigError
from zsad.engine.results.output import remove_left, token
from zsad.engine.results.records import CategoryRecord
from zsad.engine.workplace import Options, Setting
from zsad.export.libraries import install_command
from zsad.kernels.machine import available_cores

from .course import Course
from .ledger import Ledger
from .worker import Order, Outcome, Worker

log = logging.getLogger("zsad")

LOCAL = "local"  # the address that stands for a Ray of this run's own, on this machine
EXTRA = "'zsad[ray]'"
STORE = 256 << 20  # bytes of a local Ray's object store, where little more than a group's maps ever is
WAITS = 0.2  # seconds after which an interruption is seen
IMPATIENT = 30.0  # seconds after which it is said that no worker was placed
AHEAD = 2  # parts of files that a worker sends before this process has taken the first


class Team:
    """Scores a run's categories by workers on the machines of a Ray cluster; see `Scorers` of run.py.

    A context: at its end no worker is left, nor a local Ray.
    """

    def __init__(self, address: str, device: str, library: str, config: Config, options: Options) -> None:
        """address: of the cluster, as Ray has it, or LOCAL. device: auto, or cpu. Raises ConfigError without Ray."""
        self._address, self._device, self._library = address, device, library
        self._config, self._options = config, options
        self.timings: dict[str, float] = {}
        self._setting: Setting | None = None
        self._ray: Any = None
        self._own = False  # whether the connection is
        self._held = ExitStack()
        self._kind: Any = None  # makes workers
        self._workers: dict[Any, bool] = {}  # those that have started, and whether they see the output folder
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Course | None]] = {}  # by what gives the outcome
        self._most = 0  # workers that there have been at once
        self._host_bytes, self._device_bytes = 0, list[int]()

    def __enter__(self) -> "Team":
        self._ray, self._own = connected(self._address)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in {*self._workers, *(worker for worker, _ in self._busy.values())}:
            self._ray.kill(worker)
        self._workers.clear()
        self._busy.clear()
        self._held.close()
        if self._own:
            self._ray.shutdown()

    def check(self, groups: Sequence[Sequence[CategoryJob]]) -> Setting:
        images = (image.path for group in groups for job in group for image in job.category.images)
        first = next(images, None)
        sample = first if isinstance(first, Path) else None
        self._place(sample)
        calls = [job for group in groups for job in group]
        wanted = sum(len(_groups(job)) if in_groups(job) else 1 for job in calls)
        for _ in range(min(self._fitting, wanted)):
            self._hire()
        impatient = time.perf_counter() + IMPATIENT
        while not self._idle:
            list(self._answers())
            if time.perf_counter() > impatient and not self._idle:
                log.warning("waiting for Ray to place a worker; `ray status` says what the cluster is at")
                impatient = float("inf")
        self._ask(self._idle.pop(), None, "check", groups)
        while self._setting is None:
            list(self._answers())
        return self._setting

    def score(self, groups: Sequence[Sequence[CategoryJob]], progress: CategoryProgress) -> Iterator[CategoryRecord]:
        waiting = deque(job for group in groups for job in group)
        courses, finished, total = list[Course](), list[str](), len(waiting)
        done = 0
        try:
            while True:
                self._deal(waiting, courses)
                if not any(course for _, course in self._busy.values()):
                    break
                for course, record in self._answers():
                    if record is not None:
                        courses.remove(course)
                        finished += [record.name] * bool(record.images)
                        done += 1
                        yield record
                progress(f"{len(self._workers)} workers", "categories", done, total)
        finally:
            for course in courses:
                course.close()
        remove_left(self._options.output, finished)

    def setting(self) -> Setting:
        assert self._setting is not None
        return replace(
            self._setting,
            timings=self.timings,
            host_bytes=self._host_bytes,
            device_bytes=max(self._device_bytes, default=None),
            processes=max(1, self._most),
        )

    def _place(self, sample: Path | None) -> None:
        """Decide which workers fit on the machines that there are."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        machines = [machine for machine in machines if machine.get("CPU", 0) >= 1]
        gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1 and self._device != "cpu"]
        asked = self._options.workers
        if gpus:
            cores = min(int(machine["CPU"] // machine["GPU"]) or 1 for machine in gpus)
            cores = min(cores, asked or cores)
            self._fitting = sum(int(machine["GPU"]) for machine in gpus)
        else:
            cores = asked or min((int(machine["CPU"]) for machine in machines), default=1)
            self._fitting = sum(int(machine["CPU"] // cores) for machine in machines)
        if not self._fitting:
            raise ConfigError(
                f"--ray: no machine of the cluster has {cores} processors for a worker; `ray status` says what there is"
            )
        seen = self._held.enter_context(token(self._options.output))
        device = "auto" if gpus else "cpu"
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self._ray.get_runtime_context().get_node_id(), soft=False
        )
        ledger = self._ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
        order = Order(
            ledger, self._config, self._options, device, self._library, cores, log.getEffectiveLevel(), sample, seen
        )
        kind = self._ray.remote(Worker).options(
            num_cpus=cores,
            num_gpus=1 if gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,  # see `Ledger`
            scheduling_strategy="SPREAD",
            name=None,
        )
        self._kind = lambda: kind.remote(order)

    def _hire(self) -> None:
        self._ask(self._kind(), None, "start")

    def _ask(self, worker: Any, course: Course | None, what: str, *arguments: Any) -> None:
        streaming = worker.do.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        self._busy[streaming.remote(secrets.token_hex(8), what, *arguments)] = worker, course

    def _deal(self, waiting: "deque[CategoryJob]", courses: list[Course]) -> None:
        """Give idle workers something to do; those for which there is nothing left are let go.

        Ray then has their place for one whose machine has left, and which is still at something.
        """
        for worker in list(self._idle):
            shares = self._workers[worker]
            course, call = next(
                ((course, call) for course in courses if (call := course.call(shares)) is not None), (None, None)
            )
            if call is None and waiting:
                job = waiting.popleft()
                course = Course(job, self._ray.put, all(self._workers.values()) and in_groups(job))
                courses.append(course)
                call = course.call(shares)
            if call is None:
                break
            self._idle.remove(worker)
            self._ask(worker, course, *call)
        if waiting or any(course.opening for course in courses):
            if self._address != LOCAL and not self._starting:  # a place more is what makes a cluster grow
                self._hire()
            return
        # What nobody refers to any more ends by itself.
        self._busy = {waits: at for waits, at in self._busy.items() if at[1] is not None}
        self._workers = {worker: shares for worker, shares in self._workers.items() if worker not in self._idle}
        self._idle.clear()

    @property
    def _starting(self) -> list[Any]:
        return [worker for worker, course in self._busy.values() if course is None]

    def _answers(self) -> Iterator[tuple[Course, CategoryRecord | None]]:
        """Wait for workers for a moment; yield the categories of what they give, with records that there are by now."""
        ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=WAITS, fetch_local=False)
        for waits in ready:
            worker, course = self._busy[waits]
            try:
                outcome = self._ray.get(next(waits))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                del self._busy[waits]
                why = str(error).strip().partition("\n")[0]
                if course is None:
                    raise ConfigError(
                        f"--ray: a worker could not be started ({error}); the same zsad, with its extra ray, is to be "
                        "installed on all machines of the cluster"
                    ) from None
                self._idle.append(worker)
                yield course, course.fail(f"its worker is lost ({why})", lost=True)
                continue
            if isinstance(outcome, Outcome):
                del self._busy[waits]
                self._idle.append(worker)
                self._note(worker, outcome)
            if course is not None:
                yield course, course.take(outcome)

    def _note(self, worker: Any, outcome: Outcome) -> None:
        self._workers[worker] = outcome.shares
        self._most = max(self._most, len(self._workers))
        self._setting = outcome.setting or self._setting
        self._host_bytes = max(self._host_bytes, outcome.host_bytes)
        if outcome.device_bytes is not None:
            self._device_bytes.append(outcome.device_bytes)
        for stage, seconds in outcome.timings.items():
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds
        for level, line in outcome.said:
            log.log(level, "%s", line)


def _groups(job: CategoryJob) -> list[Sequence[int]]:
    return deal_groups(len(job.category.images), job.config.group_size, job.config.seed)


def connected(address: str) -> tuple[Any, bool]:
    """Return Ray, connected, and whether it was not before; raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray needs Ray, which is not installed ({error}); run: {install_command(EXTRA)}") from None
    if ray.is_initialized():
        return ray, False
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        how |= {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": STORE}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**how)
    except Exception as error:  # Ray has no class of its own for what keeps it from starting
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--ray {address}: {reason}; `ray status` on a machine of the cluster says whether it runs, and --ray "
            "without an address starts a Ray on this machine"
        ) from None
    finally:
        with suppress(ValueError):  # outside of the main thread Ray sets none
            signal.signal(signal.SIGTERM, handler)
    return ray, True

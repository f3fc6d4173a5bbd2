"""One category's way over the workers of a cluster: which calls it takes, and what comes of them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zsad.engine.category_pass import CategoryJob, deal_groups, without_scores
from zsad.engine.results.groups import EndedGroups
from zsad.engine.results.output import ended_folder
from zsad.engine.results.received import FilePart, Received
from zsad.engine.results.records import CategoryRecord
from zsad.engine.results.resume import whole_record
from zsad.kernels.files import printable

from .worker import Outcome

log = logging.getLogger("zsad")


class Course:
    """One category's way over the workers: as a whole, or opened, group after group, and ended."""

    def __init__(self, job: CategoryJob, put: Any, several: bool) -> None:
        """put: makes references that workers fetch jobs by. several: whether its groups go to several workers."""
        self.job, self._put, self._several = job, put, several
        self._reference: Any = None
        self._groups: dict[int, Sequence[int]] = {}  # which are left, by their numbers
        self._bit_depth = 0
        self._next: str | None = "open" if several else "whole"
        self._ended: EndedGroups | None = None
        self._received: Received | None = None
        self._failed: str | None = None
        self._under_way = 0
        self._start = time.perf_counter()

    @property
    def opening(self) -> bool:
        """Whether there will be many calls, which nobody knows yet."""
        return self._several and self._ended is None and self._under_way > 0

    def call(self, shares: bool) -> tuple[Any, ...] | None:
        """Return what a worker may be asked next, which sees the output folder or does not; None where it can wait."""
        if self._next is None and not self._groups:
            return None
        self._under_way += 1
        if self._reference is None:
            self._reference = self._put(self.job)
        if self._next is None:
            number = next(iter(self._groups))
            return "group", [self._reference], number, self._groups.pop(number), self._bit_depth
        what, self._next = self._next, None
        if what == "open":
            return what, [self._reference]
        kept = None
        if not shares and self.job.options.resume and not self.job.ended:
            category = self.job.category
            kept = whole_record(self.job.options.output / category.name, category)
        return what, [self._reference], kept

    def take(self, outcome: FilePart | Outcome) -> CategoryRecord | None:
        """Take what a worker gives; returns the record once there is one."""
        if isinstance(outcome, FilePart):
            if self._received is None:
                self._received = Received(self.job.options.output, self.job.category)
            self._received.add(outcome)
            return None
        self._under_way -= 1
        if outcome.record is not None:
            return self._recorded(outcome)
        if outcome.opened is not None:
            self._open(*outcome.opened)
        if outcome.group is not None and self._ended is not None:
            self._ended.add(*outcome.group)
        return self.fail(outcome.failed) if outcome.failed is not None else self._end_groups()

    def fail(self, why: str, lost: bool = False) -> CategoryRecord | None:
        """Give the category up; lost: there was no outcome. Returns the record once no worker is at it."""
        self._under_way -= lost
        self._failed = self._failed or why
        self._groups.clear()
        if self._received is not None:
            self._received.drop()
        return self._end_groups()

    def close(self) -> None:
        if self._ended is not None:
            self._ended.close()

    def _open(self, digest: str, bit_depth: int) -> None:
        category, options, config = self.job.category, self.job.options, self.job.config
        self._bit_depth = bit_depth
        self._ended = EndedGroups(ended_folder(options.output / category.name), digest, options.resume)
        ended = {facts.number for facts in self._ended.facts}
        if ended:
            log.info("%s: %d groups have ended in an earlier run", printable(category.name), len(ended))
        groups = deal_groups(len(category.images), config.group_size, config.seed)
        self._groups = {number: members for number, members in enumerate(groups) if number not in ended}

    def _end_groups(self) -> CategoryRecord | None:
        """Let a worker write the category, once its groups have ended."""
        if self._groups or self._under_way:
            return None
        self.close()
        if self._failed is not None:
            return without_scores(self.job.category, self._failed)
        self.job, self._reference, self._next = replace(self.job, ended=True), None, "whole"
        return None

    def _recorded(self, outcome: Outcome) -> CategoryRecord | None:
        record = outcome.record
        assert record is not None
        folder = self.job.options.output / self.job.category.name
        if self._received is not None:
            received = self._received.finish()
            if received is None:
                return without_scores(self.job.category, "its files did not arrive whole; run it again with --resume")
            record = replace(received, seconds=record.seconds)
        elif record.resumed and not outcome.shares:
            there = whole_record(folder, self.job.category, record.fingerprint)
            record = record if there is None else replace(record, images=there.images)
        if not record.resumed:
            record = replace(record, seconds=round(time.perf_counter() - self._start, 3))
        return record

"""Streams and events of a device while its work is recorded, under CUDA's rules for that, without a GPU."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import pytest

from zsad.kernels.cuda.device import CupyDevice


class CaptureError(RuntimeError):
    """CUDA's refusal."""


class Graph:
    """What was queued in a recording."""

    def __init__(self, origin: Stream) -> None:
        self.origin, self.work, self.open = origin, [], True
        self.streams, self.joined = {origin}, defaultdict(int)  # [stream] -> of its work, how much the origin awaits

    def launch(self, stream: Stream) -> None:
        for work in self.work:
            stream.queue(work)


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None  # on which it was recorded

    def record(self, stream: Stream) -> None:
        self.stream, self.graph, self.place = stream, stream.graph, stream.queued


class Stream:
    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.done: list[str] = []
        self.waited: list[Event] = []
        self.queued = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def queue(self, work: str) -> None:
        self.queued += 1
        (self.done if self.graph is None else self.graph.work).append(work)

    def synchronize(self) -> None:
        if self.graph is not None:
            raise CaptureError("a stream that is captured cannot be waited for")

    def wait_event(self, event: Event) -> None:
        if event.stream is None:
            return
        if event.graph is not None and not event.graph.open:
            raise CaptureError("an event of a finished recording is waited for")
        if self.graph is None and event.graph is not None:
            self.graph, self.queued = event.graph, 0
            event.graph.streams.add(self)
        if event.graph is not self.graph:
            raise CaptureError("a dependency crosses the boundary of the recording")
        self.waited.append(event)
        if self.graph is not None and self is self.graph.origin:
            self.graph.joined[event.stream] = event.place

    def begin_capture(self) -> None:
        self.graph = Graph(self)

    def end_capture(self) -> Graph:
        graph = self.graph
        assert graph is not None
        graph.open = False
        for stream in graph.streams:
            stream.graph = None
        if any(graph.joined[stream] < stream.queued for stream in graph.streams - {self}):
            raise CaptureError("a stream of the recording was not joined")
        return graph


@pytest.fixture
def device() -> Any:
    """A device of which there are only streams."""
    made: Any = object.__new__(CupyDevice)
    made._cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=types.SimpleNamespace()))
    made._cupy.cuda.runtime.CUDARuntimeError = CaptureError
    made._passes, made._products, made._event = Stream(), Stream(), Event
    made._queue = made._passes
    made._produced, made._consumed, made._begun = defaultdict(Event), defaultdict(Event), Event()
    return made


def multiply(device: Any, slot: int) -> None:
    with device.producing(slot):
        device._queue.queue(f"product {slot}")


def compare(device: Any, count: int) -> None:
    """Queue products and their passes, in two workspaces by turns."""
    for number in range(count):
        multiply(device, number % 2)
        with device.consuming(number % 2):
            device._queue.queue(f"pass {number % 2}")


def test_products_and_passes_are_recorded_together_and_nothing_runs(device: Any) -> None:
    compare(device, 3)  # leaves events that a recording may not wait for
    before = [list(device._passes.done), list(device._products.done)]
    replay = device.capture(lambda: compare(device, 3))
    assert [device._passes.done, device._products.done] == before
    replay()
    recorded = device._passes.done[len(before[0]) :]
    assert recorded == ["product 0", "pass 0", "product 1", "pass 1", "product 0", "pass 0"]
    compare(device, 2)  # nor may what comes later wait for events of the recording
    replay()


def test_what_comes_after_a_replay_waits_for_it(device: Any) -> None:
    compare(device, 2)
    replay = device.capture(lambda: compare(device, 2))
    multiply(device, 0)
    early = device._products.waited[-1]
    place = early.place
    with device.consuming(0):
        pass
    replay()
    multiply(device, 0)
    assert device._products.waited[-1].place > place
    assert device._products.waited[-1].place == device._passes.queued


def test_a_recording_that_is_refused_leaves_the_streams_as_they_were(device: Any) -> None:
    compare(device, 2)
    with pytest.raises(CaptureError, match="not joined"):
        device.capture(lambda: multiply(device, 0))

    def fail() -> None:
        compare(device, 1)
        device._passes.synchronize()

    with pytest.raises(CaptureError, match="cannot be waited for"):
        device.capture(fail)
    compare(device, 3)
    device.capture(lambda: compare(device, 3))()


def test_recording_runs_the_work_first(device: Any) -> None:
    replay = device.record(lambda: compare(device, 1))
    assert device._products.done + device._passes.done == ["product 0", "pass 0"]
    replay()
    assert device._passes.done == ["pass 0", "product 0", "pass 0"]

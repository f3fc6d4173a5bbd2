"""Workers and who deals out to them, with a stand-in for Ray in this process; tests/reliability has the real one."""

import hashlib
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import draw

from zsad.engine.cluster import worker as workers
from zsad.engine.cluster.ledger import Ledger
from zsad.engine.commands.infer import main
from zsad.kernels import machine

pytestmark = pytest.mark.usefixtures("workplace")

OF_TIME = ("started", "seconds", "images_per_second", "peak_memory_bytes", "stages", "library_share")


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback")
        self.cause = cause


class Answers:
    """What a call gives, as it would come over the wire."""

    def __init__(self, given: Iterator[Any]) -> None:
        self._given = given

    def __next__(self) -> Any:
        try:
            return pickle.loads(pickle.dumps(next(self._given)))
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from error


@dataclass(frozen=True)
class Begun:
    """Stands for what the ledger will say of a call."""

    call: str


LEDGER = types.SimpleNamespace(begin=types.SimpleNamespace(remote=Begun))


class StandIn(types.ModuleType):
    """As much of Ray as is used, with calls that are done when their outcome is asked for, the last one first."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    util = types.SimpleNamespace(
        scheduling_strategies=types.SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    )

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[str] = []
        self.deadly: str | None = None  # the name of a category at which workers die

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def remote(self, kind: type) -> Any:
        def options(**_: object) -> Any:
            if kind is Ledger:
                self.ledger = Ledger()
                return types.SimpleNamespace(remote=lambda: LEDGER)
            return types.SimpleNamespace(remote=lambda order: self._placed(kind(order)))

        return types.SimpleNamespace(options=options)

    def _placed(self, worker: Any) -> Any:
        def remote(call: str, what: str, *arguments: Any) -> Answers:
            self.calls.append(what)
            jobs = [self.get(arguments[0][0])] if what in ("whole", "group") else []
            if any(job.category.name == self.deadly for job in jobs):
                for _ in range(workers.TRIES):
                    self.ledger.begin(call)  # and then it died
            return Answers(worker.do(call, what, *arguments))

        class Placed:
            do = types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=remote))

        return Placed()

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "here")

    def put(self, job: Any) -> bytes:
        return pickle.dumps(job)

    def get(self, what: Any) -> Any:
        if isinstance(what, Begun):
            return self.ledger.begin(what.call)
        return pickle.loads(what) if isinstance(what, bytes) else what

    def wait(self, waits: Sequence[Answers], **_: object) -> tuple[list[Answers], list[Answers]]:
        return [waits[-1]], list(waits[:-1])

    def kill(self, _: Any) -> None:
        pass


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(machine, "_most_cores", [])  # which workers would leave behind here
    monkeypatch.setattr(workers._Ear, "emit", lambda *_: None)  # it would hear what is said here
    return stand_in


@pytest.fixture
def infer(tiny: Path) -> Callable[..., int]:
    """Runs `zsad-infer` over `data`, a category in one group and one in three, with a file that is no image."""
    for name, count in (("bolt", 4), ("plate", 12)):
        draw(Path("data") / name, count)
    Path("data/plate/03.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    options = ["--config", str(tiny / "config.toml"), "--group-size", "4", "--device", "cpu", "--threshold", "auto"]
    return lambda *more: main(["data", *options, *more])


def results(output: str) -> dict[str, Any]:
    """Return digests of all files in an output folder, and the run's record without what time decides."""
    files = [
        path for path in Path(output).rglob("*") if path.is_file() and path.name not in ("report.html", "run.json")
    ]
    digests = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    run = json.loads((Path(output) / "run.json").read_text())
    for category in run["categories"].values():
        del category["seconds"]
    return {**digests, "run.json": {name: value for name, value in run.items() if name not in OF_TIME}}


@pytest.mark.slow
def test_results_are_those_of_one_process(ray: StandIn, infer: Callable[..., int]) -> None:
    assert infer("--output", "one") == 1
    assert infer("--output", "two", "--ray", "--workers", "1") == 1
    assert results("two") == results("one")
    assert sorted(ray.calls) == ["check", *["group"] * 3, "open", "start", "start", "whole", "whole"]


@pytest.mark.slow
def test_what_a_worker_cannot_write_is_sent(
    ray: StandIn, infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.Worker, "_shares", lambda _: False)
    assert infer("--output", "one") == 1
    assert infer("--output", "two", "--ray", "--workers", "1") == 1
    assert results("two") == results("one")
    assert set(ray.calls) == {"check", "start", "whole"}
    before = {path: path.stat().st_mtime_ns for path in Path("two").rglob("*/*")}
    assert infer("--output", "two", "--ray", "--resume") == 1
    categories = json.loads(Path("two/run.json").read_text())["categories"]
    assert all(category["resumed"] for category in categories.values())
    assert before == {path: path.stat().st_mtime_ns for path in Path("two").rglob("*/*")}


@pytest.mark.slow
@pytest.mark.parametrize("deadly", ["bolt", "plate"])
def test_what_kills_its_worker_costs_one_category(
    ray: StandIn, infer: Callable[..., int], capsys: pytest.CaptureFixture[str], deadly: str
) -> None:
    ray.deadly = deadly
    assert infer("--output", "two", "--ray", "--workers", "1") == 1
    assert f"zsad-infer: {deadly}: its worker died 4 times" in capsys.readouterr().err
    (there,) = {"bolt", "plate"} & {path.name for path in Path("two").iterdir()}
    assert there != deadly
    ray.deadly = None
    assert infer("--output", "one") == 1
    assert infer("--output", "two", "--ray", "--workers", "1", "--resume") == 1
    one, two = results("one"), results("two")
    del one["run.json"], two["run.json"]  # which says what was there before
    assert two == one


def test_wrong_use_is_a_line(
    ray: StandIn, infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer("--ray", "--workers", "3") == 2
    assert "no machine of the cluster has 3 processors" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix != ".png")
    assert infer("--ray") == 2
    assert "mount the images under the same path on all machines" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert infer("--ray") == 2
    assert "install 'zsad[ray]'" in capsys.readouterr().err

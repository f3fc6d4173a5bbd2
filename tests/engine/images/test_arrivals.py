"""Files as they arrive: each is handed out once, when it is written, whatever happens to it before and after."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zsad.engine.images import arrivals as module
from zsad.engine.images.arrivals import PATIENCE, SETTLED, Arrivals, Known, Signals, Version
from zsad.engine.images.tree import EXPORT, EXPORT_START, WATCHED, WATCHED_START


class Clock:
    """Time that passes only when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9

    def date(self, path: Path, ago: float = 0.0) -> None:
        """Set a file's time of change to a moment before now."""
        modified = int((self.time() - ago) * 1e9) + 12345
        os.utime(path, ns=(modified, modified))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Signals, "start", lambda self: None)  # whoever looks again and again needs no telling
    return clock


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def arrivals(tmp_path: Path, clock: Clock, known: Known) -> Iterator[Arrivals]:
    (tmp_path / "in").mkdir()
    with Arrivals(tmp_path / "in", tmp_path / "in" / "out", known) as arrivals:
        yield arrivals


@pytest.fixture
def taken(arrivals: Arrivals, known: Known, clock: Clock) -> Callable[[float], list[str]]:
    """Let seconds pass, and return what is complete then, which is handled."""

    def take(seconds: float) -> list[str]:
        clock.now += seconds
        found = arrivals.take(100)
        for arrival in found:
            known.add(arrival.relative, arrival.version)
        return [arrival.relative for arrival in found]

    return take


def write(clock: Clock, path: Path, content: bytes = b"x", ago: float = 0.0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)
    clock.date(path, ago)
    return path


Taken = Callable[[float], list[str]]


def test_a_file_that_grows_waits(tmp_path: Path, clock: Clock, taken: Taken) -> None:
    for length in range(1, 20):
        write(clock, tmp_path / "in" / "a.png", b"x" * length)
        assert taken(0.1) == []
    assert taken(0.1) + taken(0.1) + taken(0.1) == ["a.png"]
    assert taken(9) == []


def test_what_was_written_elsewhere_and_moved_here_is_complete_at_once(
    tmp_path: Path, clock: Clock, taken: Taken
) -> None:
    write(clock, tmp_path / "draft.png", ago=SETTLED + 0.1).rename(tmp_path / "in" / "a.png")
    assert taken(0) == ["a.png"]


def test_what_is_deleted_before_it_is_complete_is_forgotten(tmp_path: Path, clock: Clock, taken: Taken) -> None:
    path = write(clock, tmp_path / "in" / "a.png")
    assert taken(0) == []
    path.unlink()
    assert taken(5) == []


def test_a_handled_file_that_is_renamed_is_not_handed_out_again_but_a_changed_one_is(
    tmp_path: Path, clock: Clock, taken: Taken
) -> None:
    path = write(clock, tmp_path / "in" / "a.png", ago=9)
    assert taken(0) == ["a.png"]
    (tmp_path / "in" / "done").mkdir()
    moved = path.rename(tmp_path / "in" / "done" / "a.png")
    assert taken(1) == []
    write(clock, moved, b"other")
    assert taken(1) == ["done/a.png"]


def test_coarse_times_do_not_tell_a_new_file_from_a_renamed_one(known: Known) -> None:
    known.add("a.png", Version(10, 7 * 10**9, 5))
    assert not known.has("b.png", Version(10, 7 * 10**9, 5))
    known.add("a.png", Version(10, 7 * 10**9 + 123, 5))
    assert known.has("b.png", Version(10, 7 * 10**9 + 123, 5))


OLD = "old/bolt/overlays/a.jpg", "old/report_files/1/pictures/0/0-image.jpg"


@pytest.mark.parametrize("told", [False, True], ids=["found", "told"])
def test_only_images_are_handed_out_and_none_of_the_results(
    tmp_path: Path, clock: Clock, arrivals: Arrivals, taken: Taken, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    top = tmp_path / "in"
    write(clock, top / "old" / "bolt" / WATCHED, WATCHED_START)  # of another run that goes on
    write(clock, top / "old" / "report_files" / EXPORT, f'{{"{EXPORT_START}": "report"}}'.encode())
    names = [".a.png", "notes.txt", ".git/a.png", "out/incoming/overlays/a.jpg", "@eaDir/a.png", "d/" * 65 + "a.png"]
    paths = [write(clock, top / name, ago=9) for name in [*names, *OLD, "b/c/a.png"]]
    os.mkfifo(top / "pipe.png")
    (top / "b" / "round").symlink_to(top)
    if told:
        monkeypatch.setattr(arrivals, "_scan", lambda: None)
        monkeypatch.setattr(arrivals._signals, "changed", lambda: [*paths, top / "pipe.png"])
    assert taken(0) == ["b/c/a.png"]


def test_what_cannot_be_read_is_tried_once_more_after_a_while(tmp_path: Path, clock: Clock, arrivals: Arrivals) -> None:
    path = write(clock, tmp_path / "in" / "a.png", ago=9)
    (first,) = arrivals.take(9)
    assert first.young
    arrivals.put_back(first)
    clock.now += PATIENCE / 2
    assert arrivals.take(9) == []
    clock.now += PATIENCE
    (second,) = arrivals.take(9)
    assert not second.young
    arrivals.put_back(second)
    write(clock, path, b"more")  # it goes on being written after all
    clock.now += 1
    assert arrivals.take(9) == []
    clock.now += SETTLED
    (third,) = arrivals.take(9)
    assert third.young


def test_of_many_files_only_some_are_kept_in_mind_and_all_are_handed_out(
    tmp_path: Path, clock: Clock, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 7)
    for number in range(20):
        write(clock, tmp_path / "in" / f"{number:02d}.png", ago=99 - number)
    rounds = [taken(1) for _ in range(4)]
    assert max(map(len, rounds)) == 7
    assert sorted(name for names in rounds for name in names) == [f"{number:02d}.png" for number in range(20)]


def test_the_oldest_come_first(tmp_path: Path, clock: Clock, arrivals: Arrivals) -> None:
    for number in (3, 1, 2):
        write(clock, tmp_path / "in" / f"{number}.png", ago=10 + number)
    assert [file.relative for file in arrivals.take(2)] == ["3.png", "2.png"]
    assert [file.relative for file in arrivals.take(2)] == ["1.png"]


def test_a_folder_that_is_gone_is_waited_for(
    tmp_path: Path, clock: Clock, taken: Taken, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").rename(tmp_path / "away")
    assert taken(1) == taken(1) == []
    assert caplog.text.count("waiting for it to come back") == 1
    write(clock, tmp_path / "away" / "a.png", ago=9)
    (tmp_path / "away").rename(tmp_path / "in")
    assert taken(1) == ["a.png"]
    assert "is there again" in caplog.text


def test_a_folder_that_is_another_one_by_now_is_gone_on_with(
    tmp_path: Path, clock: Clock, taken: Taken, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(Signals, "start", lambda self: started.append(True))
    write(clock, tmp_path / "in" / "a.png", ago=9)
    assert taken(9) == ["a.png"]
    (tmp_path / "in").rename(tmp_path / "before")
    write(clock, tmp_path / "in" / "b.png", ago=9)
    assert taken(9) == ["b.png"]
    assert taken(9) == []
    assert caplog.text.count("is another folder by now") == 1
    assert started == [True]  # what told of the one before tells nothing of this one


def test_what_cannot_be_looked_at_for_a_while_ends_nothing(
    tmp_path: Path, clock: Clock, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(clock, tmp_path / "in" / "sub" / "a.png")
    assert taken(0) == []
    look = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if "sub" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return look(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert taken(9) == []
    assert taken(9) == ["sub/a.png"]


def test_of_a_known_file_thirty_two_bytes_are_kept() -> None:
    known = Known()
    for number in range(20_000):
        known.add(f"{number}.png", Version(1, 10**18 + 1 + number, number))
        assert known.call(f"{number}.png", f"{number}")
    assert len(known._sorted) + len(known._new) == 80_000
    assert len(known._new) < module.MERGED
    assert known._sorted.itemsize == 8
    assert (known._sorted[1:] > known._sorted[:-1]).all()
    assert all(known.has(f"{number}.png", Version(1, 10**18 + 1 + number, 0)) for number in range(0, 20_000, 97))
    assert not known.has("20000.png", Version(1, 10**18, 20_000))
    for number in range(0, 20_000, 97):  # what is known already adds nothing
        known.add(f"{number}.png", Version(1, 10**18 + 1 + number, number))
        assert not known.call(f"{number}.jpg", f"{number}")
    assert len(known._sorted) + len(set(known._new) - set(known._sorted.tolist())) == 80_000


def test_results_are_called_as_those_of_runs_and_keep_the_suffix_where_they_would_clash(
    tmp_path: Path, clock: Clock, arrivals: Arrivals, known: Known
) -> None:
    def keys(*names: str) -> list[str]:
        for number, name in enumerate(names):
            write(clock, tmp_path / "in" / "b" / name, ago=99 - number)
        clock.now += 1
        found = arrivals.take(9)
        for arrival in found:
            known.add(arrival.relative, arrival.version)
        return [str(arrival.image.key) for arrival in found]

    long = "n" * 230
    (key,) = keys(f"{long}.png")
    assert key.startswith("b/nnn")
    assert len(key) < 210
    assert keys("a.png", "a.jpg", "a.jpg.png") == ["b/a", "b/a.jpg", "b/a.jpg.png"]
    assert keys("a.png", "a.jpg") == ["b/a", "b/a.jpg"]  # other pictures of the same names
    several = keys("A.png", "A.PNG", "x.png")  # a file system may take these for one
    assert several[0] == "b/A.png"
    assert several[1].startswith("b/A.PNG~")
    assert several[2] == "b/x"


@pytest.mark.slow
def test_the_system_tells_of_new_files_also_once_the_folder_was_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("watchfiles")
    monkeypatch.setattr(module, "RESCAN_TOLD", 1000.0)
    known, root = Known(), tmp_path / "in"
    with Arrivals(root, tmp_path / "out", known) as arrivals:

        def found(name: str) -> bool:
            (root / name).parent.mkdir(exist_ok=True, parents=True)
            (root / name).write_bytes(b"x")
            for _ in range(100):
                for arrival in arrivals.take(9):
                    known.add(arrival.relative, arrival.version)
                    if arrival.relative == name:
                        return True
                arrivals.wait(0.1)
            return False

        assert found("first.png")  # the folder was not there
        for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
            assert found(name)
        shutil.rmtree(root)
        assert found("d.png")
        assert found("e.png")


def test_without_the_library_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    caplog.set_level("INFO")
    signals = Signals(tmp_path)
    signals.start()
    assert not signals.telling()
    assert "pip install 'zsad[watch]'" in caplog.text


def test_what_the_system_tells_is_taken_until_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = [set(), {(1, f"{tmp_path}/a.png"), (2, f"{tmp_path}/b.png")}, {(1, f"{tmp_path}/{n}.png") for n in range(3)}]

    def watch(*_: Any, **__: Any) -> Iterator[set[tuple[int, str]]]:
        while told:
            yield told.pop(0)
        raise RuntimeError("no space left on device about inotify watches")

    monkeypatch.setitem(sys.modules, "watchfiles", type("watchfiles", (), {"watch": staticmethod(watch)}))
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    signals = Signals(tmp_path)
    signals.start()
    assert signals.telling()
    assert signals.missed()  # what came before
    signals.wait(9)
    assert sorted(signals.changed()) == [tmp_path / "a.png", tmp_path / "b.png"]
    signals.wait(9)  # more than is kept in mind
    assert signals.missed()
    assert signals.changed() == []
    assert not signals.telling()  # asked anew it fails again, at once
    assert signals.missed()
    assert "does not tell of new files (no space left" in caplog.text
    signals.wait(0.01)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names need not be Unicode there alone")
def test_a_name_that_is_no_unicode_does_not_keep_the_system_from_telling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("watchfiles")
    signals = Signals(tmp_path)
    signals.start()
    for _ in range(2):
        signals.wait(1.2)
        signals.changed(), signals.missed()
        with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):  # noqa: PTH123 - the bytes of a name
            pass
        signals.wait(10)
        assert signals.telling()
        assert signals.missed()  # so that the folder is looked through
        (tmp_path / "a.png").write_bytes(b"x")
        signals.wait(10)
        assert tmp_path / "a.png" in signals.changed()
    assert not caplog.text

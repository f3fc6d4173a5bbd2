"""A folder that is watched: whatever happens to files, disk and bank, each image is scored once, as a run scores it."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_tensorrt import HostEngine
from PIL import Image
from runs import draw, scores_and_maps

from zsad.engine import watch as module
from zsad.engine.commands.infer import main
from zsad.engine.config import ConfigError, load_config
from zsad.engine.images import arrivals
from zsad.engine.images.folders import NothingToScoreError
from zsad.engine.methods.bank import bank_settings
from zsad.engine.methods.method import method_class
from zsad.engine.networks.onnx_runtime import OnnxRuntimeGraph
from zsad.engine.networks.runtime import choose_runtime
from zsad.engine.networks.tensorrt import TensorRTGraph
from zsad.engine.results import image_files, stream
from zsad.engine.results.image_files import ImageFiles
from zsad.engine.results.output import OutputError, claimed
from zsad.engine.watch import Listener, Told, watch
from zsad.engine.workplace import Options

ENOUGH = 120.0  # seconds that a waiting test gives up after
GOOD = 12
HUNDREDS = 210  # images at once


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with known-good images, `good`, and their bank, `part.zsad`."""
    folder = tmp_path_factory.mktemp("made")
    draw(folder / "all", GOOD + 1)
    (folder / "good").mkdir()
    for number in range(GOOD):
        shutil.copy(folder / "all" / f"{number:02d}.png", folder / "good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSAD_CACHE", str(tiny / "cache"))
        patch.delenv("ZSAD_WEIGHTS", raising=False)
        arguments = ["--reference", folder / "good", "--save-bank", folder / "part.zsad", "-q", "--device", "cpu"]
        assert main([*map(str, arguments), "--config", str(tiny / "config.toml")]) == 0
    return folder


@pytest.fixture(autouse=True)
def _quick(workplace: None, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own, in which nothing takes long."""
    monkeypatch.setattr(arrivals, "SETTLED", 0.05)
    monkeypatch.setattr(arrivals, "PATIENCE", 0.3)
    monkeypatch.setattr(arrivals, "RESCAN", 0.02)
    monkeypatch.setattr(arrivals, "RESCAN_TOLD", 0.02)
    monkeypatch.setattr(arrivals.Signals, "start", lambda self: None)
    monkeypatch.setattr(module, "BANK", 0.02)
    monkeypatch.setattr(module, "ROOM", 0.02)
    monkeypatch.setattr(stream, "PAUSE", 1000.0)
    (tmp_path / "in").mkdir()
    shutil.copy(made / "part.zsad", tmp_path)


class Line:
    """A watch that goes on until it was told of so many files, each of which may be followed by something."""

    def __init__(
        self,
        until: int,
        then: dict[int, Callable[[], Any]] | None = None,
        also: float = 0.0,
        always: Callable[[], Any] = int,
    ) -> None:
        """also: seconds to go on after the last one. always: called again and again."""
        self.told: list[Told] = []
        self._until, self._then, self._also, self._always = until, then or {}, also, always
        self._end = time.monotonic() + ENOUGH

    def going_on(self) -> bool:
        assert time.monotonic() < self._end, self.told
        self._always()
        if len(self.told) < self._until:
            return True
        self._also -= 0.02
        time.sleep(0.02 if self._also > 0 else 0)
        return self._also > 0

    def tell(self, told: Told) -> None:
        self.told.append(told)
        self._then.get(len(self.told), int)()

    def run(self, **options: Any) -> list[str]:
        overrides = {"bank": "part.zsad", **options.pop("overrides", {})}
        preset, base = bank_settings(Path("part.zsad"))
        config = load_config(preset, None, overrides, method_of=method_class, base=base)
        runtime = choose_runtime(options.pop("device", "cpu"), "auto")
        options = {"output": Path("out"), **options}
        watch(Path("in"), config, runtime, Options(**options), Listener(self.going_on, self.tell))
        return [told.path for told in self.told]


def put(made: Path, source: int, name: str) -> Path:
    target = Path("in", name)
    target.parent.mkdir(exist_ok=True, parents=True)
    shutil.copy(made / "all" / f"{source:02d}.png", target)
    return target


def table() -> list[dict[str, str]]:
    with Path("out/in/scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_what_arrives_is_scored_and_written_as_a_run_does(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, GOOD):
        put(made, number, f"{number:02d}.png")
    marked = list[bool]()

    def follow() -> None:
        marked.append(Path("out/in/watched.jsonl").read_bytes().endswith(b"[]\n"))

    line = Line(3, {1: follow, 2: lambda: (follow(), put(made, 5, "sub/05.png"))})
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", None)  # a file is decoded once
        assert sorted(line.run()) == ["00.png", "12.png", "sub/05.png"]
    assert marked == [True, False]  # all is on disk when it is said, but in bursts within a second
    assert main(["in", "--bank", "part.zsad", "--output", "run", "-q", "--device", "cpu"]) == 0
    with Path("run/in/scores.csv").open(newline="") as file:
        wanted = {row["path"]: row for row in csv.DictReader(file)}
    _, maps = scores_and_maps("run", "in")
    for row in table():
        same = {key: value for key, value in wanted[row["path"]].items() if key != "rank"}
        assert {key: value for key, value in row.items() if key != "note"} == same
        found = np.asarray(Image.open(Path("out/in", row["map"])))
        np.testing.assert_array_equal(found, maps[sorted(wanted).index(row["path"])])
        assert Path("out/in/overlays", row["path"]).with_suffix(".jpg").is_file()
    told = {told.path: json.loads(told.to_json()) for told in line.told}
    assert told["12.png"]["score"] == float(wanted["12.png"]["score"])
    assert told["12.png"]["verdict"] == wanted["12.png"]["verdict"] == "reject"
    assert len(told["12.png"]["regions"]) == int(wanted["12.png"]["regions"]) > 0
    assert set(told["00.png"]) == {"path", "score", "p_value", "verdict", "regions", "seconds"}
    page = Path("out/report.html").read_text()
    assert '"refresh":5.0' in page
    assert "The page shows the last 3 of 3 images." in page


@pytest.mark.slow
def test_what_was_scored_is_not_scored_again_and_what_came_meanwhile_is(made: Path) -> None:
    put(made, 0, "a.png")
    assert Line(1).run() == ["a.png"]
    put(made, 1, "b.png")
    Path("in/a.png").rename("in/renamed.png")
    assert Line(1, also=0.2).run() == ["b.png"]
    assert [row["path"] for row in table()] == ["a.png", "b.png"]
    time.sleep(0.01)
    put(made, 2, "b.png")  # another picture of the same name
    Image.open(put(made, 3, "c.png")).save("in/b.bmp")
    assert sorted(Line(3, also=0.2).run()) == ["b.bmp", "b.png", "c.png"]
    maps = {row["path"]: row["map"] for row in table()}
    assert maps == {f"{k}.png": f"maps/{k}.tiff" for k in "abc"} | {"b.bmp": "maps/b.bmp.tiff"}


@pytest.mark.slow
def test_half_a_file_waits_for_the_other_half(made: Path) -> None:
    content = (made / "all" / "03.png").read_bytes()
    Path("in/b.png").write_bytes(content[: len(content) // 2])
    put(made, 0, "a.png")
    begun = time.monotonic()

    def finish() -> None:
        # By then it was tried, and is not called damaged yet.
        if time.monotonic() - begun > 0.2 and Path("in/b.png").stat().st_size < len(content):
            Path("in/b.png").write_bytes(content)

    assert Line(2, always=finish).run() == ["a.png", "b.png"]
    assert [row["path"] for row in table()] == ["a.png", "b.png"]


@pytest.mark.slow
def test_what_cannot_be_read_is_named_once_and_tried_again_when_it_changes(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("in/b.png").write_bytes(b"no image")
    line = Line(1, also=0.5)
    assert line.run() == ["b.png"]
    assert json.loads(line.told[0].to_json())["error"].startswith("not a PNG")
    assert caplog.text.count("b.png: not scored") == 1
    put(made, 0, "a.png")
    assert Line(1, also=0.2).run() == ["a.png"]
    Path("in/b.png").chmod(0o600)  # as one does where it was a permission that lacked
    assert Line(1, also=0.2).run() == ["b.png"]
    put(made, 1, "b.png")
    assert Line(1).run() == ["b.png"]
    Path("in/b.png").chmod(0o640)
    put(made, 2, "c.png")
    assert Line(1, also=0.2).run() == ["c.png"]  # a score stays
    assert [row["path"] for row in table()] == ["a.png", "b.png", "c.png"]


@pytest.mark.slow
def test_a_file_that_changes_while_it_is_scored_is_scored_as_it_is_then(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(made, 0, "a.png")
    write = ImageFiles.write
    written: list[str] = []

    def slow(self: ImageFiles, image: Any, *rest: Any) -> Any:
        found = write(self, image, *rest)
        if not written:
            put(made, GOOD, "a.png")
        written.append(image.name)
        return found

    monkeypatch.setattr(ImageFiles, "write", slow)
    line = Line(1, also=0.2)
    assert line.run() == ["a.png"]
    assert len(written) == 2
    assert line.told[0].record is not None
    assert line.told[0].record.verdict == "reject"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "note"),
    [(1, None), (2, "no map, the file has changed: no longer there")],
    ids=["kept", "read again"],
)
def test_what_is_moved_away_or_deleted_stops_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, note: str | None
) -> None:
    put(made, 0, "a.png")
    write = ImageFiles.write

    def gone(self: ImageFiles, image: Any, *rest: Any) -> Any:
        if image.name == "a.png":
            Path("in/a.png").unlink(missing_ok=True)
        return write(self, image, *rest)

    monkeypatch.setattr(ImageFiles, "write", gone)
    line = Line(2, {1: lambda: put(made, 1, "b.png")})
    assert line.run(batch_size=batch_size) == ["a.png", "b.png"]
    assert line.told[0].record is not None
    assert line.told[0].record.note == note
    assert Path("out/in", line.told[0].record.map).is_file() == (note is None)


@pytest.mark.parametrize(
    ("device", "batch_size"),
    [pytest.param("cpu", 1, marks=pytest.mark.slow), ("cpu", 3), pytest.param("cuda", 3, marks=pytest.mark.slow)],
)
def test_an_image_that_makes_the_networks_fail_is_named_and_the_others_are_scored(
    made: Path,
    tensorrt: list[HostEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    batch_size: int,
) -> None:
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        put(made, GOOD if number == 2 else number, name)
    graph = OnnxRuntimeGraph if device == "cpu" else TensorRTGraph
    run = graph.run

    def fail(self: Any, inputs: Any) -> Any:
        if (inputs["images"][:, 0] - inputs["images"][:, 1]).max() > 3:  # the defect is red
            raise RuntimeError("a node of the graph\nrefuses")
        return run(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(graph, "run", fail)
        line = Line(7, also=0.2)
        assert sorted(line.run(device=device, batch_size=batch_size)) == names
    assert [told.error for told in line.told if told.error] == ["scoring it failed: a node of the graph"]
    assert caplog.text.count("not scored") == caplog.text.count("2.png: not scored") == 1
    assert sorted(row["path"] for row in table()) == names[:2] + names[3:]
    put(made, 7, "7.png")
    assert Line(1, also=0.2).run(device=device) == ["7.png"]


@pytest.mark.slow
def test_what_fails_for_all_images_ends_it_and_they_are_scored_by_the_next_run(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        put(made, number, f"{number}.png")
    run, calls = OnnxRuntimeGraph.run, 0

    def fail(self: OnnxRuntimeGraph, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise MemoryError("too little")
        return run(self, inputs)

    line = Line(3)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeGraph, "run", fail)
        with pytest.raises(OSError, match=r"fail for all images \(too little\)"):
            line.run()
    assert [told.error for told in line.told] in ([], [None])
    assert "not scored:" not in caplog.text
    assert len(Line(3 - len(line.told), also=0.2).run()) + len(line.told) == len(table()) == 3


@pytest.mark.parametrize("where", ["files", "tables"])
def test_a_full_disk_is_waited_for(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    put(made, 0, "a.png")
    put(made, 1, "b.png")
    owner, name = (ImageFiles, "write") if where == "files" else (module.Stream, "add")
    original, tries = getattr(owner, name), 0

    def full(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(owner, name, full)
    assert sorted(Line(2).run()) == ["a.png", "b.png"]
    assert caplog.text.count("waiting for room") == caplog.text.count("there is room again") == 1
    assert len(table()) == 2


def test_a_disk_that_stays_full_costs_no_image(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(made, 0, "a.png")

    def full(*_: Any) -> Any:
        line._until = 0
        raise OSError(errno.ENOSPC, "No space left on device")

    line = Line(1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "write", full)
        assert line.run() == []
    assert "scored by the next run" in caplog.text
    assert Line(1).run() == ["a.png"]


def test_a_page_that_cannot_be_written_is_said_once(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(made, 0, "a.png")
    tries = 0

    def full(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "PAGE", 0.0)
    monkeypatch.setattr(module, "write_report", full)
    Line(1).run()
    assert tries > 1
    assert caplog.text.count("report.html is not written: No space left on device") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", "out"], check=False, cwd=tmp_path)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        ballast = tmp_path / "out" / "ballast"
        ballast.write_bytes(bytes(430_000))
        for number in range(GOOD):
            put(made, number, f"{number}.png")
        begun, removed = time.monotonic(), False

        def clear() -> None:
            nonlocal removed
            if time.monotonic() - begun > 3 and not removed:
                ballast.unlink(missing_ok=True)  # threads that wait for room may ask at once
                removed = True

        line = Line(GOOD, always=clear)
        assert len(line.run()) == len(table()) == GOOD
        assert removed
        for row in table():
            assert np.asarray(Image.open(Path("out/in", row["map"]))).shape[0] == 80
    finally:
        subprocess.run(["umount", "--lazy", "out"], check=True, cwd=tmp_path)  # a test that fails may still read there


@pytest.mark.slow
def test_a_bank_that_changes_is_used_and_one_that_is_damaged_or_another_is_not(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Path("part.zsad").read_bytes()
    put(made, 0, "a.png")

    def damage() -> None:
        Path("part.zsad").write_bytes(whole[:-100])

    def mend() -> None:
        Path("new").write_bytes(whole)
        Path("new").rename("part.zsad")

    steps = [
        ("the one before stays in use", mend),
        ("is scored by it as it is now", lambda: put(made, 1, "b.png")),
    ]

    def follow() -> None:
        if steps and steps[0][0] in caplog.text:
            steps.pop(0)[1]()

    line = Line(2, {1: damage}, always=follow)
    assert line.run() == ["a.png", "b.png"]
    assert caplog.text.count("the one before stays in use") == 1
    assert caplog.text.index("stays in use") < caplog.text.index("as it is now")


@pytest.mark.slow
def test_a_drift_is_said_and_shown(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(25):
        put(made, GOOD, f"{number:02d}.png")
    Line(25).run(overrides={"expected_defects": 0.3})
    assert caplog.text.count("the images have drifted") == 1
    assert "of the last 25 images are rejected" in Path("out/report.html").read_text()


def test_the_output_is_held(made: Path) -> None:
    with claimed(Path("out"), (), resume=True), pytest.raises(OutputError, match="another run is writing there"):
        Line(0).run()


def test_what_cannot_be_watched_is_refused(made: Path) -> None:
    assert main(["in", "--bank", "part.zsad", "--output", "out", "-q"]) == 2  # no images
    Path("out/in").mkdir(parents=True)
    Path("out/in/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no results of a --watch"):
        Line(0).run()
    Path("banks").mkdir()
    shutil.copy("part.zsad", "banks")
    with pytest.raises(ConfigError, match="--watch takes one bank"):
        Line(0).run(overrides={"bank": "banks"})
    Path("in").rmdir()
    with pytest.raises(NothingToScoreError, match="there is no such folder"):
        Line(0).run()


@pytest.mark.slow
def test_output_and_banks_may_lie_in_the_folder(made: Path) -> None:
    shutil.copy("part.zsad", "in")
    for number, name in enumerate(("a.png", "b.png")):
        put(made, number, name)
        line = Line(1, also=0.2)
        assert line.run(output=Path("in/out"), overrides={"bank": "in/part.zsad"}) == [name]


@pytest.mark.long
def test_a_burst_of_hundreds(made: Path) -> None:
    """More than are handed over at once, and than the page shows."""
    assert max(module.AT_ONCE, stream.SHOWN) < HUNDREDS
    for number in range(HUNDREDS):
        Image.new("RGB", (16, 16), (number % 256, 0, number // 256)).save(f"in/{number:04d}.png")
    line = Line(HUNDREDS)
    assert sorted(line.run()) == [f"{number:04d}.png" for number in range(HUNDREDS)]
    assert len(table()) == HUNDREDS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--watch scores each image by itself, by a bank"),
        (["--bank", "part.zsad", "data"], "leave out the folder data"),
        (["--bank", "part.zsad", "--strict"], "leave out --strict"),
        (["--bank", "part.zsad", "--fail-on", "reject"], "leave out --fail-on"),
    ],
)
def test_options_that_do_not_go_with_it_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--watch", "in", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_a_line_for_each_image_and_ends_cleanly(made: Path, number: signal.Signals) -> None:
    put(made, GOOD, "a.png")
    start = "import sys; from zsad.engine.commands.start import infer; sys.exit(infer())"
    command = [sys.executable, "-c", start, "--watch", "in", "--bank", "part.zsad", "--device", "cpu"]
    command += ["--runtime", "onnxruntime"]  # else it is found out first which is faster
    for options, name, begins in ((["--json"], "a.png", '{"path": "a.png", "score": 0.'), ([], "b.png", "0.")):
        put(made, GOOD, name)
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as line:
            assert line.stdout is not None
            assert line.stdout.readline().startswith(begins)
            line.send_signal(number)
            _, said = line.communicate(timeout=ENOUGH)
        assert line.returncode == 0
        assert "zsad-infer: ended after" in said
    assert [row["path"] for row in table()] == ["a.png", "b.png"]

"""Signals as commands take them, also while they start."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import draw

from zsad.engine.commands.start import Interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)

COMMANDS = {
    "infer": ("zsad-infer", ["data"]),
    "evaluate": ("zsad-eval", ["out", "data"]),
    "export": ("zsad-export", ["--checkpoint", "model.pth", "--taps", "0"]),
}


@pytest.fixture(autouse=True)
def _workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data", 2)


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    before = [signal.signal(*unhandled) for unhandled in Interrupts.UNHANDLED]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", BOTH)
def test_either_signal_ends_a_command_and_is_remembered(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert [(number, signal.getsignal(number)) for number in BOTH] == list(Interrupts.UNHANDLED)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", BOTH)
def test_what_the_caller_ignores_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        interrupts.check()
    assert signal.getsignal(number) is signal.SIG_IGN


def test_within_another_one_it_is_that(as_in_a_terminal: None) -> None:
    with Interrupts() as outer:
        with Interrupts() as inner:
            assert inner is outer
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert outer.seen


@pytest.mark.usefixtures("as_in_a_terminal")
def test_what_is_sent_while_a_command_ends_reaches_nobody() -> None:
    sending = threading.Event()

    def send() -> None:
        sending.set()
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with Interrupts() as interrupts:
            interrupts.later = threading.Timer(0, send)
            interrupts.later.start()
            sending.wait()
        interrupts.later.join()
    except KeyboardInterrupt:
        pytest.fail("it reached the caller")


def interrupt(command: str, module: str, then: str, *options: str) -> tuple[int, str, str]:
    """Run a command with Ctrl-C at the import of a module, which then does as `then` says."""
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}:\n"
        "            try: signal.raise_signal(signal.SIGINT)\n"
        "            except KeyboardInterrupt: sys.exit('raised within an import')\n"
        f"            {then}\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.modules.pop({module!r}, None)\n"
        f"from zsad.engine.commands.start import {command}; sys.exit({command}())"
    )
    arguments = [sys.executable, "-c", code, *COMMANDS[command][1], *options]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "module"),
    [
        pytest.param(command, module, marks=() if module == represented else pytest.mark.slow)
        for command, represented in (("infer", "numpy"), ("evaluate", "argparse"), ("export", "platformdirs"))
        for module in ("argparse", "platformdirs", "numpy")
    ],
)
def test_an_interrupt_while_libraries_load_is_one_line(command: str, module: str) -> None:
    assert interrupt(command, module, "pass") == (130, "", f"{COMMANDS[command][0]}: interrupted\n")


@pytest.mark.slow
def test_an_interrupted_library_is_not_called_missing(tiny: Path) -> None:
    failure = "raise ImportError('initialization failed')"
    options = ("--config", str(tiny / "config.toml"), "--runtime", "onnxruntime")
    ended = interrupt("infer", "onnxruntime", failure, *options)
    assert ended == (130, "", "zsad-infer: interrupted\n")


@pytest.mark.usefixtures("as_in_a_terminal")
def test_an_interrupt_within_an_interrupt_does_not_reach_a_library_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thread that takes long to start may send what it is to send before the one that started it goes on."""
    (tmp_path / "interrupted.py").write_text("import signal; signal.raise_signal(signal.SIGINT); loaded = True")
    monkeypatch.syspath_prepend(tmp_path)
    sent: list[int] = []

    class Early(threading.Timer):
        def start(self) -> None:
            sent.append(len(sent))
            if len(sent) < 3:
                self.function(*self.args)
                signal.getsignal(signal.SIGINT)  # gets on, so that what was sent is noticed

    with Interrupts() as interrupts:
        monkeypatch.setattr(threading, "Timer", Early)
        assert importlib.import_module("interrupted").loaded
        assert interrupts.seen
    assert sent == [0, 1, 2]


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_command_ends_with_its_code_and_all_that_it_has_to_say(waited_for: bool) -> None:
    thread = "threading.Thread(target=lambda: (time.sleep(0.02), print('work', end=' '))).start()" if waited_for else ""
    code = (
        "import atexit, sys, threading, time; from zsad.engine.commands.start import ended\n"
        f"atexit.register(print, 'cleared'); print('said', end=' '); {thread}\n"
        "sys.exit(ended(3))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (3, "said work cleared\n" if waited_for else "said cleared\n")


def test_a_command_whose_output_is_full_does_not_end_as_if_nothing_were() -> None:
    code = "import sys; from zsad.engine.commands.start import ended; print('said'); sys.exit(ended(0))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=buffered, check=False
        )
    assert run.returncode == 120


@pytest.mark.slow
def test_what_most_runs_do_not_use_is_not_loaded() -> None:
    unused = [
        *("onnx", "polygraphy", "tifffile", "tqdm", "urllib.request", "onnxruntime", "openvino", "ray"),
        *("zsad.kernels.cuda.device", "zsad.engine.evaluation.evaluate", "zsad.engine.methods.bank"),
    ]
    code = "import sys, zsad.engine.commands.infer, zsad.engine.commands.console, zsad.engine.run; "
    code += "import zsad.engine.methods.musc; print([name for name in sys.argv[1:] if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code, *unused], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

"""Ctrl-C while a command still starts."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import draw

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


def interrupt(command: str, module: str, answer: str, *options: str) -> tuple[int, str, str]:
    """Run a command with Ctrl-C at the import of a module, which then does as `answer` says."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}:\n"
        "            try: signal.raise_signal(signal.SIGINT)\n"
        f"            except KeyboardInterrupt: {answer}\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"sys.modules.pop({module!r}, None)\n"
        f"from zsad.engine.commands.start import {command}; sys.exit({command}())"
    )
    arguments = [sys.executable, "-c", code, *COMMANDS[command][1], *options]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("module", ["argparse", "tqdm", "numpy"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_at_any_import_is_one_line(command: str, module: str) -> None:
    assert interrupt(command, module, "raise") == (130, "", f"{COMMANDS[command][0]}: interrupted\n")


def test_an_interrupted_library_is_not_called_missing(tiny: Path) -> None:
    failure = "raise ImportError('initialization failed') from None"
    ended = interrupt("infer", "onnxruntime", failure, "--config", str(tiny / "config.toml"))
    assert ended == (130, "", "zsad-infer: interrupted\n")


def test_an_interrupt_that_the_interpreter_drops_is_one_line() -> None:
    dropped = "type('Dropped', (), {'__del__': lambda _: signal.raise_signal(signal.SIGINT)})()"
    assert interrupt("infer", "cv2", dropped) == (130, "", "zsad-infer: interrupted\n")

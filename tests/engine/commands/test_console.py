"""What reaches the terminal."""

import logging
import os
import subprocess
import sys

import pytest

from zsad.engine.commands.console import logging_to_stderr


@pytest.mark.parametrize(("level", "foreign"), [(logging.ERROR, ""), (logging.INFO, "of a library\n")])
def test_quiet_commands_let_no_library_speak(level: int, foreign: str, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("zsad-x", level):
        os.write(2, b"of a library\n")
        logging.getLogger("zsad").error("ours")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == f"{foreign}zsad-x: ours\nafterwards\n"


def test_a_traceback_is_shown_all_the_same() -> None:
    code = (
        "import logging, os, sys; from zsad.engine.commands.console import logging_to_stderr\n"
        "with logging_to_stderr('zsad-x', logging.ERROR):\n"
        "    os.write(2, b'of a library')\n"
        "    print('ours', file=sys.stderr)\n"
        "    raise ValueError('a fault')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.startswith("ours\nTraceback")
    assert ended.stderr.endswith("ValueError: a fault\n")

"""What commands read, and that their help waits for nothing."""

import subprocess
import sys

import pytest

from zsad.engine.commands.arguments import Parser

HEAVY = "numpy onnx onnxruntime PIL cv2 pydantic psutil polygraphy ray safetensors tqdm"


@pytest.mark.parametrize("command", ["infer", "export"])
def test_help_imports_nothing_that_works(command: str) -> None:
    code = (
        f"import sys; from zsad.engine.commands.{command} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"heavy = set({HEAVY!r}.split()) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: ")


def test_complaints_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="zsad-x").error("\033[31m")
    assert capsys.readouterr().err.endswith("zsad-x: error: \\x1b[31m\n")

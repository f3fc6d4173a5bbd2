"""The stub by which types of calls into the native module are checked says what the module has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zsad.kernels.cpu import comparers

STUB = Path(comparers.__file__).parent / "_cpu.pyi"
COMMAND = ["-m", "nanobind.stubgen", "-q", "-m", "zsad.kernels.cpu._cpu", "-o"]


def contents(stub: Path) -> dict[str, list[str]]:
    """Names of constants and functions, with the functions' arguments, defaults and types of entries."""
    found = {}
    for node in ast.parse(stub.read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = [ast.unparse(node.annotation)]
        elif isinstance(node, ast.FunctionDef):
            arguments, defaults = node.args.args, node.args.defaults
            # Of the types only what every version of nanobind writes alike.
            types = (
                re.findall(r"float32|uint8|int32|int|float|bool|str", ast.unparse(a.annotation)) for a in arguments
            )
            found[node.name] = [f"{a.arg}: {kind}" for a, kind in zip(arguments, types, strict=True)]
            found[node.name] += [ast.unparse(default) for default in defaults]
    return found


@pytest.mark.slow
def test_the_stub_says_what_the_module_has(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="nanobind is not installed, which writes stubs")
    if comparers._cpu is None:
        pytest.skip("installed without a compiler: the native module is not there")
    subprocess.run([sys.executable, *COMMAND, str(tmp_path / "_cpu.pyi")], check=True)
    again = f"python {' '.join(COMMAND)} kernels/cpu/_cpu.pyi"
    assert contents(STUB) == contents(tmp_path / "_cpu.pyi"), f"write the stub again: {again}"

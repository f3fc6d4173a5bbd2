"""The code is formatted, lints clean and type-checks under strict settings."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["export", "engine", "kernels", "bench"]


def check(module: str, *arguments: str, cwd: Path = ROOT) -> None:
    pytest.importorskip(module)
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff() -> None:
    check("ruff", "check", ".")


def test_format() -> None:
    check("ruff", "format", "--check", ".")


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.10", "3.13"])  # the oldest and the newest supported
def test_mypy(python: str) -> None:
    # The folders are modules of `zsad` only under that name; a link gives it to them without an install. It stays where
    # it is, as does what mypy knows of modules that have not changed; git ignores both.
    folder = ROOT / "build" / f"mypy-{python}"
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / "zsad").symlink_to(ROOT, target_is_directory=True)
    packages = [argument for package in PACKAGES for argument in ("-p", f"zsad.{package}")]
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
    check("mypy", "--python-version", python, *config, *packages, cwd=folder)

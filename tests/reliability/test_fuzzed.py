"""What the fuzz targets have found so far, and what they begin with: each is read or refused in a sentence."""

import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("target", ["checkpoints", "decode"])
def test_the_corpus_is_read_or_refused(target: str) -> None:
    read = runpy.run_path(str(HERE / f"fuzz_{target}.py"))["read"]
    files = sorted((HERE / "corpus" / target).iterdir())
    assert files
    for file in files:
        read(file.read_bytes())
    read(b"")

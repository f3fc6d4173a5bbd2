"""What the tests of the runtimes need."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import ExportOptions


@pytest.fixture(autouse=True)
def _workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(random_dinov2: Callable[..., Path]) -> ExportedModel:
    """A tiny graph in half precision with an image embedding."""
    return export_onnx(str(random_dinov2()), ExportOptions((0, 1), 70, precision="fp16", attention="fused"))

"""What the tests of the runtimes need."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zsad.export.onnx_export import ExportedModel, export_onnx
from zsad.export.options import ExportOptions


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


@pytest.fixture
def model(random_dinov2: Callable[..., Path]) -> ExportedModel:
    """A tiny graph in half precision with an image embedding."""
    return export_onnx(str(random_dinov2()), ExportOptions((0, 1), 70, precision="fp16", attention="fused"))

"""What several tests of the export need."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has no weights and no graphs at all."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def torchvision() -> Iterator[None]:
    """Makes timm and open_clip importable where torchvision's extension fits another build of PyTorch."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    library = None  # the operators live as long as this
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
    yield
    del library

"""What several tests of the export need."""

import sys
from collections.abc import Iterator

import pytest


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

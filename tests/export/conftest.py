"""What several tests of the export need."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zsad.bench.random_weights import clipseg_state, write_states


@pytest.fixture(scope="session")
def published_clipseg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random CLIPSeg of the published shape, of half a gigabyte; its towers are those of ViT-B/16."""
    path = write_states(tmp_path_factory.mktemp("published") / "clipseg.safetensors", clipseg_state())
    yield path
    path.unlink()


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


@pytest.fixture
def uncompared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are not compared with what they are made of, which takes longest, and which other tests do."""
    monkeypatch.setattr("zsad.export.onnx_export._expected", lambda *_: ("nothing", {}))
    monkeypatch.setattr("zsad.export.onnx_export._run", lambda *_: {})

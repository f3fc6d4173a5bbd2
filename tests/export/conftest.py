"""What several tests of the export need."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


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


@pytest.fixture(scope="session")
def random_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random DINOv2 in its official names, stored for 70 px, and returns its file."""

    def write(width: int = 64, depth: int = 2, gated: bool = False, registers: int = 0) -> Path:
        rng = np.random.default_rng(0)
        hidden = 4 * width
        fc1, fc2 = ("w12", "w3") if gated else ("fc1", "fc2")
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 26, width),
            "patch_embed.proj.weight": (width, 3, 14, 14),
            "patch_embed.proj.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }
        if registers:
            shapes["register_tokens"] = (1, registers, width)
        for block in (f"blocks.{index}." for index in range(depth)):
            for norm in ("norm1", "norm2"):
                shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
            for name, out, into in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                (f"mlp.{fc1}", (2 if gated else 1) * hidden, width),
                (f"mlp.{fc2}", width, hidden),
            ):
                shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
            shapes |= {f"{block}ls1.gamma": (width,), f"{block}ls2.gamma": (width,)}
        state = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
        for name in state:
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                state[name] += 1
        path = tmp_path_factory.mktemp("dinov2") / f"dinov2-{width}-{depth}.safetensors"
        save_file(state, path)
        return path

    return write

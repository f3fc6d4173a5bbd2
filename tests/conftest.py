"""What several test files need."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

# Reference arrays and real images live outside the repository; tests that need them are skipped where they are absent.
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays made by the reference implementations."""
    return _shared_folder("golden")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images in MVTec layout."""
    return _shared_folder("data")


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not part of the repository")
    return folder


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


@pytest.fixture(scope="session")
def tiny(random_dinov2: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of its own and `config.toml`, which points the preset `small` at a random DINOv2.

    48 channels, 4 blocks, 70 px (25 patches): a whole run takes a fraction of a second.
    """
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = random_dinov2(width=48, depth=4)
    (folder / "config.toml").write_text(
        f'image_size = 70\n[backbones.dinov2]\ncheckpoint = "{checkpoint}"\nheads = 3\ntaps = [1, 3]\n'
    )
    (folder / "cache").mkdir()
    return folder

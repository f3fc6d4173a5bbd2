"""What several test files need."""

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
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of its own and `config.toml`, which points the preset `small` at a random DINOv2.

    48 channels, 4 blocks, 70 px (25 patches): a whole run takes a fraction of a second.
    """
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    width, hidden = 48, 96
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 26, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"blocks.{index}." for index in range(4)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
    state = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(state, folder / "tiny.safetensors")
    (folder / "config.toml").write_text(
        f'image_size = 70\n[backbones.dinov2]\ncheckpoint = "{folder / "tiny.safetensors"}"\nheads = 3\ntaps = [1, 3]\n'
    )
    (folder / "cache").mkdir()
    return folder

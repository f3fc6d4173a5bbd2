"""What the tests of several methods have in common."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_checkpoints import ARRAYS, write_clip
from numpy.typing import NDArray
from vvv_checkpoints import FEW, GOLDEN, networks, stages, write_bright_isnet

from zsad.engine.commands.infer import main

SCENES = 13


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the runs of all these tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def vvv_host(golden: Path) -> Mapping[str, NDArray[Any]]:
    """What Variance Vigilance Vanguard's steps between the networks make of given inputs."""
    path = golden / "segmentation" / "vvv_host.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not part of the repository")
    arrays = np.load(path)
    return {name: arrays[name] for name in arrays.files}


@pytest.fixture(params=range(SCENES))
def scene(request: pytest.FixtureRequest, vvv_host: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One made-up image: its arrays by name, masks unpacked."""
    prefix = f"scene{request.param:02d}_"
    arrays = {name.removeprefix(prefix): array for name, array in vvv_host.items() if name.startswith(prefix)}
    height, width = arrays["size"]
    for name in ("f_dis", "masks", "foreground"):
        bits = np.unpackbits(arrays.pop(f"{name}_packed"), axis=-1, count=height * width)
        arrays[name] = bits.reshape(*bits.shape[:-1], height, width).view(bool)
    return {**arrays, "rule": vvv_host["scene_rules"][request.param]}


@pytest.fixture(scope="session")
def bright_isnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph for 128 px that takes for the object what is brighter than half."""
    return write_bright_isnet(tmp_path_factory.mktemp("isnet") / "bright.onnx", 128)


@pytest.fixture(scope="session")
def preset_tables(
    tokenizer: object, random_dinov2: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, str]:
    """Presets → the tables of their own networks, tiny ones, and of their methods."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "few.toml").write_text(FEW)
    clip = f'checkpoint = "{write_clip(folder, "clip_tiny")}"'
    april = f'checkpoint = "{write_clip(folder, "april")}"\ntaps = [2, 5, 8, 11]'
    dinov2 = f'checkpoint = "{random_dinov2(width=48, depth=4)}"\nheads = 3\ntaps = [1, 3]'
    return {
        "small": f"image_size = 70\n[networks.dinov2]\n{dinov2}\n",
        "winclip": f"image_size = 96\n[networks.clip]\n{clip}\ntaps = [5]\n",
        "april-gan": f'image_size = 98\n[networks.clip]\n{april}\n[april_gan]\nhead = "{ARRAYS / "april_head.pth"}"\n',
        "vvv": networks(folder) + f'[vvv]\nprompts = "{folder / "few.toml"}"\ntau = 0.1\n',
    }


@pytest.fixture
def golden_pictures(golden_segmentation: Path) -> list[NDArray[np.uint8]]:
    """Pictures [H, W, 3] of shapes, of which SAM's golden masks are, and one of the golden IS-Net."""
    arrays = np.load(golden_segmentation / "sam_tiny.npz")
    return [arrays["image0_rgb"], arrays["image1_rgb"], np.load(golden_segmentation / "isnet_tiny.npz")["rgb"]]


@pytest.fixture
def infer(
    preset_tables: Mapping[str, str], bright_isnet: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs zsad-infer with tiny networks in a folder of the test's own; returns its exit code.

    isnet: bright, or the golden one. replaced: checkpoints of isnet, sam or clipseg instead. settings: lines of the
    tables in [stages].
    """
    monkeypatch.setenv("ZSAD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def run(
        preset: str,
        data: str,
        *options: str,
        isnet: str = "bright",
        isnet_size: int = 128,
        replaced: Mapping[str, Path] | None = None,
        **settings: str,
    ) -> int:
        file = bright_isnet if isnet == "bright" else GOLDEN / "isnet_tiny.safetensors"
        tables = preset_tables[preset] + stages(file, isnet_size, **settings)
        for name, other in (replaced or {}).items():
            tables = re.sub(rf'(\.{name}\]\ncheckpoint = )".*"', rf'\g<1>"{other}"', tables)
        Path("tiny.toml").write_text(tables)
        return main([data, "--preset", preset, "--config", "tiny.toml", "--device", "cpu", *options])

    return run


@pytest.fixture
def vvv(infer: Callable[..., int]) -> Callable[..., int]:
    """Runs zsad-infer --preset vvv."""
    return partial(infer, "vvv")
